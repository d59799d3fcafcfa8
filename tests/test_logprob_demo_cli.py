"""The demonstration: its numbers against the classifier, its words, its mistakes and exit codes."""

import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import logprob_demo_cli
from calibration import CALIBRATORS
from comparison import judge_calibrators
from dataset_loader import load_examples
from logprob_demo_cli import (
    WIDTH,
    calibration_sentence,
    column_width,
    cut,
    decimals,
    load_classifier,
    main,
    percent,
    raw_report,
    report,
    table,
)
from logprobs_confidence import TokenProbability, TransformerLogprobsClassifier
from records import LOW_LABEL_MASS, SCHEMA_VERSION, ModelResults, read_json, write_json
from settings import (
    EMBEDDED_MODEL_DIR,
    ROOT,
    SENTIMENT,
    DataSettings,
    Label,
    ModelSettings,
    Task,
    UserError,
    case_variants,
)

TEXT = "Best worst thing ever"
ROW = re.compile(r" *(\d+)  (.+?)  +(-?\d+\.\d{4})  +(\S+)  +(< 0\.01|\d+\.\d\d) %(?:  (.+))?")


def own_task(*pairs):
    labels = tuple(Label(name, case_variants(word)) for name, word in pairs)
    return Task("own", "What do you think? Answer with one word.", labels)


def table_rows(lines):
    """[(rank, token, log-prob, probability, percentage, label)] of the printed table."""
    start = next(i for i, line in enumerate(lines) if line.startswith("rank  token"))
    end = lines.index("", start)
    return [ROW.fullmatch(line).groups() for line in lines[start + 1 : end]]


@pytest.fixture(scope="module")
def lines(classifier, tmp_path_factory):
    return report(classifier, TEXT, 8, tmp_path_factory.mktemp("no_cache"))


@pytest.fixture(scope="module")
def three():
    """The embedded model with three labels; one answer word has no token of its own."""
    task = own_task(("agree", "yes"), ("disagree", "no"), ("torn", "ambivalently"))
    return TransformerLogprobsClassifier(task=task)


# What is shown


def test_the_prompt_is_shown_whole_with_its_control_tokens(classifier, lines):
    shown = [line[4:] for line in lines if line.startswith("  |")]
    assert "\n".join(shown) == classifier.encoder.prompt(TEXT)
    assert "<|eot_id|>" in "\n".join(shown)


def test_the_table_shows_the_model_s_most_probable_tokens(classifier, lines):
    top = classifier.explain(TEXT, 8).top
    rows = table_rows(lines)
    assert len(rows) == len(top) == 8
    for (rank, token, logprob, probability, share, _), expected in zip(rows, top, strict=True):
        assert (int(rank), token) == (expected.rank, expected.token)
        assert float(logprob) == pytest.approx(expected.logprob, abs=1e-3)
        assert float(probability) == pytest.approx(expected.probability, abs=1e-5)
        if share != "< 0.01":
            assert float(share) == pytest.approx(100 * expected.probability, abs=0.01)
        assert math.exp(float(logprob)) == pytest.approx(float(probability), rel=2e-2, abs=1e-6)


def test_the_table_says_which_tokens_belong_to_which_label(lines):
    label_of = {repr(word): label.name for label in SENTIMENT.labels for word in label.words}
    labels = [(token, label) for _, token, _, _, _, label in table_rows(lines)]
    assert any(label for _, label in labels)
    assert all(label == label_of.get(token) for token, label in labels)


def numbers(text):
    return [float(v) for v in re.findall(r"\d+\.\d+(?:e-\d+)?", text)]


def test_the_sums_are_written_out_and_add_up(classifier, lines):
    prediction = classifier.classify(TEXT)
    text = "\n".join(lines)
    totals = np.exp(prediction.label_logprobs)
    for label, total in zip(SENTIMENT.labels, totals, strict=True):
        sum_of_tokens = re.search(rf"  p\({label.name}\) = (.+)\n +(= .+)", text)
        assert set(re.findall(r"p\('(\w+)'\)", sum_of_tokens[1])) == set(label.words)
        *parts, added = numbers(sum_of_tokens[2])
        assert len(parts) == 3 and sum(parts) == pytest.approx(added, abs=3e-6)
        assert added == pytest.approx(total, abs=1e-5)
    mass_line = numbers(re.search("label mass = (.+)", text)[1])
    assert mass_line == pytest.approx([*totals, prediction.label_mass], abs=1e-5)
    first = numbers(re.search(r"  P\(positive\) = (.+)", text)[1])
    assert first == pytest.approx(
        [totals[0], prediction.label_mass, prediction.probability], abs=1e-5
    )
    assert first[0] / first[1] == pytest.approx(first[2], abs=1e-5)
    found = re.search(r"Prediction: (\w+), confidence p\((\w+)\) = (\S+)", text)
    assert found[1] == found[2] == prediction.predicted
    assert float(found[3]) == pytest.approx(prediction.confidence, abs=1e-5)


def test_the_explanation_warns_that_raw_confidence_is_not_calibrated(lines):
    text = " ".join(lines)
    assert "not yet a calibrated probability" in text
    assert "No calibrator in" in text
    assert "warning" not in text


def test_lines_fit_the_terminal(lines):
    assert max(map(column_width, lines[lines.index("") :])) <= WIDTH


@pytest.mark.parametrize("k", [1, 3, 10**6])
def test_any_number_of_tokens_can_be_shown(classifier, tmp_path, k):
    shown = table_rows(report(classifier, TEXT, k, tmp_path))
    assert len(shown) == min(k, len(classifier.tokenizer))
    assert [int(row[0]) for row in shown] == list(range(1, len(shown) + 1))


def test_three_labels_are_summed_and_shared_alike(three, tmp_path):
    task = three.task
    prediction = three.classify(TEXT)
    text = "\n".join(report(three, TEXT, 8, tmp_path))
    shares = [numbers(re.search(rf"  P\({n}\) = (.+)", text)[1])[-1] for n in task.label_names]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert task.label_names[int(np.argmax(shares))] == prediction.predicted
    assert f"Prediction: {prediction.predicted}," in text


def test_a_token_that_only_begins_an_answer_word_is_said_to_do_so(three, lines, tmp_path):
    begins = {t.token for t in three.explain(TEXT, 1).words["torn"]}
    assert "'ambivalently'" not in begins
    text = " ".join(" ".join(report(three, TEXT, 1, tmp_path)).split())
    (note,) = re.findall(r"\(([^()]+): only the beginning of an answer word", text)
    assert set(note.split(", ")) == begins
    assert "only the beginning" not in " ".join(lines)


def test_words_that_share_their_first_token_are_said_to_be_scored_whole(tmp_path):
    classifier = TransformerLogprobsClassifier(task=own_task(("a", "zqxcalm"), ("b", "zqxwild")))
    assert classifier.encoder.label_ids is None
    text = "\n".join(report(classifier, TEXT, 8, tmp_path))
    assert "every word is scored whole" in " ".join(text.split())
    sums = " ".join(re.search(r"  p\(a\) = (.+?)\n  p\(", text, re.DOTALL)[1].split())
    assert "p('Zqxcalm') + p('zqxcalm') + p('ZQXCALM') = " in sums
    total = math.exp(classifier.classify(TEXT).label_logprobs[0])
    assert float(sums.rpartition("= ")[2]) == pytest.approx(total, rel=0.06)


def test_a_low_label_mass_is_a_warning(tmp_path):
    classifier = TransformerLogprobsClassifier(task=own_task(("z", "zebra"), ("q", "quartz")))
    assert classifier.classify(TEXT).label_mass < LOW_LABEL_MASS
    text = " ".join(" ".join(report(classifier, TEXT, 3, tmp_path)).split())
    assert "warning: the label mass is below 0.5" in text
    assert "It hardly answers the question" in text


def test_control_characters_are_written_out_and_long_texts_say_so(classifier, tmp_path):
    shown = report(classifier, "red \x1b[31m and \ttab", 1, tmp_path)
    assert r"  | Text: red \x1b[31m and \ttab<|eot_id|>" in "\n".join(shown)
    note = "it saw this without the text's middle"
    assert note not in " ".join(shown)
    assert note in " ".join(report(classifier, "word " * 3000, 1, tmp_path))


def test_a_raw_prompt_is_continued_as_it_stands(classifier):
    shown = raw_report(classifier, "The film was", 5)
    expected = classifier.next_token_distribution("The film was", 5)
    assert [row[1] for row in table_rows(shown)] == [t.token for t in expected]
    assert "label" not in shown[1]
    words = " ".join(" ".join(shown).split())
    assert percent(sum(t.probability for t in expected)) in words
    assert "not the confidence in a label" in words
    trailing = classifier.next_token_distribution("The film was ", 1)[0]
    assert table_rows(raw_report(classifier, "The film was ", 1))[0][1] == trailing.token


def test_columns_stay_aligned_for_wide_long_and_odd_tokens():
    names = ["' Yes'", "'电影'", "'e\u0301'", "'" + "=" * 60 + "'", r"'\n\n'", "<E2 80>", "'…'"]
    tokens = [
        TokenProbability(i + 1, i, n, -1.5 * i, math.exp(-1.5 * i)) for i, n in enumerate(names)
    ]
    header, *rows = table(tokens, {0: ["positive"], 1: ["positive", "negative"]})
    end_of_logprob = column_width(header.partition("nats")[0]) + 4
    for row, token in zip(rows, tokens, strict=True):
        before = row.partition(f"{token.logprob:.4f}")[0]
        assert column_width(before) + len(f"{token.logprob:.4f}") == end_of_logprob
    assert rows[0].endswith("100.00 %  positive")
    assert rows[1].endswith("22.31 %  positive,…")
    assert "…  " in rows[3] and max(map(column_width, [header, *rows])) <= WIDTH


def test_text_is_cut_to_columns_only_where_it_is_too_wide():
    assert cut("abc", 3) == "abc"
    assert cut("abcd", 3) == "ab…"
    assert cut("电影好", 5) == "电影…" and cut("电影好", 4) == "电…"


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "1.000000"), (0.8146746, "0.814675"), (1e-6, "0.000001"), (4.2e-9, "4.2e-09")],
)
def test_small_probabilities_never_look_like_zero(value, text):
    assert decimals(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "100.0 %"),
        (0.99999, "more than 99.9 %"),
        (0.815, "81.5 %"),
        (0.0004, "less than 0.1 %"),
        (0.0, "0.0 %"),
    ],
)
def test_percentages_claim_no_certainty_that_is_not_there(value, text):
    assert percent(value) == text


# The calibrator


def write_calibrators(folder, classifier):
    """calibrated_results.json with the real calibrators of this model, fitted and judged on some of
    the shipped texts; where the task has labels of its own they are dealt out in turn."""
    names = classifier.task.label_names
    examples = []
    for i, e in enumerate(load_examples(DataSettings(), SENTIMENT)[::50]):
        label = e.label if e.label in names else names[i % len(names)]
        split = ("calibration", "test")[i // len(names) % 2]
        examples.append(replace(e, label=label, split=split))
    rows = classifier.classify_batch([e.text for e in examples], [e.id for e in examples])
    results = ModelResults(
        "base", classifier.task, classifier.identity, tuple(examples), tuple(rows), {}
    )
    cache = {
        "schema_version": SCHEMA_VERSION,
        "task": classifier.task.to_json(),
        "models": {
            "base": {"identity": results.identity} | judge_calibrators(results, n_resamples=20)
        },
    }
    write_json(folder / "calibrated_results.json", cache)
    return results


@pytest.fixture(scope="module")
def calibrated(classifier, tmp_path_factory):
    """(folder with calibrated_results.json of the embedded model, its `ModelResults`)."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, write_calibrators(folder, classifier)


def sentence(classifier, text, folder):
    return calibration_sentence(classifier, classifier.classify(text), folder)


@pytest.mark.parametrize("i", [0, 40, -1])
def test_the_calibrator_of_this_model_says_how_often_such_answers_are_right(
    classifier, calibrated, i
):
    folder, results = calibrated
    cache = read_json(folder / "calibrated_results.json", "")
    platt = CALIBRATORS["platt"].from_json(cache["models"]["base"]["calibrators"]["platt"])
    text = [e.text for e in results.examples if e.split == "test"][i]
    prediction = classifier.classify(text)

    def chance(logprobs):
        first = platt.predict_proba([logprobs[0] - logprobs[1]])[0]
        return first if logprobs[0] >= logprobs[1] else 1 - first

    mine = chance(prediction.label_logprobs)
    test = results.arrays("test")
    such = np.array([abs(chance(row) - mine) <= 0.05 for row in test["label_logprobs"]])
    shown = calibration_sentence(classifier, prediction, folder)
    assert f"fitted on {platt.n_rows} held-out texts" in shown
    assert f"a chance of {percent(mine)} to be right" in shown
    assert f"{test['correct'][such].sum()} of {such.sum()} were" in shown
    assert ("is the better answer" in shown) == (mine < 0.5)


def test_a_calibrator_that_disagrees_names_the_better_answer(classifier, calibrated, tmp_path):
    cache = read_json(calibrated[0] / "calibrated_results.json", "")
    (one,) = cache["models"]["base"]["calibrators"]["platt"]["parameters"]["maps"]
    one.update(slope=-1.0, intercept=0.0)
    write_json(tmp_path / "calibrated_results.json", cache)
    other = {"positive": "negative", "negative": "positive"}
    predicted = classifier.classify(TEXT).predicted
    shown = sentence(classifier, TEXT, tmp_path)
    assert shown.endswith(f"Calibrated, {other[predicted]!r} is the better answer.")


def test_a_calibrator_of_three_labels_is_read_too(classifier, three, tmp_path):
    write_calibrators(tmp_path, three)
    assert "gives this answer a chance of" in sentence(three, TEXT, tmp_path)
    assert sentence(classifier, TEXT, tmp_path).startswith("No calibrator in")


def test_a_calibrator_of_another_model_is_not_used(calibrated):
    half = TransformerLogprobsClassifier(ModelSettings(dtype="bfloat16"))
    assert sentence(half, TEXT, calibrated[0]).startswith("No calibrator in")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema_version=99), "has schema 99, not "),
        (lambda c: c.pop("models"), "is damaged"),
        (lambda c: c.update(models=[1]), "is damaged"),
        (lambda c: c["models"]["base"]["identity"].pop("fingerprint"), "is damaged"),
        (lambda c: c["models"]["base"]["calibrators"].pop("platt"), "is damaged"),
        (lambda c: c["models"]["base"]["test"]["label"].pop(), "is damaged"),
        (lambda c: c["models"]["base"]["test"]["methods"].pop("raw"), "is damaged"),
    ],
)
def test_a_damaged_cache_is_an_error_with_the_next_step(
    classifier, calibrated, tmp_path, change, message
):
    cache = read_json(calibrated[0] / "calibrated_results.json", "")
    change(cache)
    write_json(tmp_path / "calibrated_results.json", cache)
    with pytest.raises(UserError) as caught:
        sentence(classifier, TEXT, tmp_path)
    assert message in str(caught.value)
    assert str(caught.value).endswith("run: python generate_evaluation_cache.py --force")


# Models


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """A folder as fine_tune_model.py writes it, with an adapter that changes the answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("fine_tuned")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL_DIR, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    task = own_task(("good", "yes"), ("bad", "no"))
    write_json(folder / "task.json", task.to_json())
    write_json(folder / "manifest.json", {"base_model": "embedded"})
    return folder


def test_finetuned_is_the_adapter_with_its_base_model_and_task(classifier, fine_tuned):
    tuned = load_classifier("finetuned", fine_tuned)
    assert tuned.task.label_names == ("good", "bad")
    assert tuned.settings.model == "embedded" and tuned.adapter_active
    prediction = tuned.classify(TEXT)
    with tuned.without_adapter():
        assert tuned.classify(TEXT).probability != pytest.approx(prediction.probability, abs=1e-4)


@pytest.mark.parametrize("missing", ["manifest.json", "task.json", "adapter_config.json"])
def test_a_missing_fine_tuned_model_names_the_command(fine_tuned, tmp_path, missing):
    folder = shutil.copytree(fine_tuned, tmp_path / "copy")
    (folder / missing).unlink()
    with pytest.raises(UserError, match=r"run: python fine_tune_model\.py$"):
        load_classifier("finetuned", folder)


@pytest.mark.parametrize(
    ("file", "content"), [("manifest.json", {}), ("task.json", {}), ("task.json", {"labels": [1]})]
)
def test_a_damaged_fine_tuned_model_names_the_command(fine_tuned, tmp_path, file, content):
    folder = shutil.copytree(fine_tuned, tmp_path / "copy")
    write_json(folder / file, content)
    with pytest.raises(UserError, match=r"is damaged .*; run: python fine_tune_model\.py$"):
        load_classifier("finetuned", folder)


def test_base_is_the_embedded_model_and_other_names_are_models(
    classifier, tmp_path, tiny_model_folder
):
    base = load_classifier("base", tmp_path)
    assert base.identity == classifier.identity and base.adapter is None
    folder = str(tiny_model_folder("qwen2"))
    assert load_classifier(folder, tmp_path).settings.model == folder
    without_template = load_classifier(str(tiny_model_folder("gpt2")), tmp_path)
    rows = table_rows(report(without_template, TEXT, 5, tmp_path))
    assert len(rows) == 5


# The command


@pytest.fixture
def loaded(classifier, monkeypatch, tmp_path):
    """main() with the session's classifier, which is the one `base` stands for, and no cache."""
    monkeypatch.setattr(logprob_demo_cli, "load_classifier", lambda name, folder: classifier)
    monkeypatch.setattr(logprob_demo_cli, "CACHE_DIR", tmp_path)


def test_quiet_is_one_line(loaded, classifier, capsys):
    prediction = classifier.classify(TEXT)
    assert main([TEXT, "--quiet"]) == 0
    assert capsys.readouterr().out == f"{prediction.predicted} {prediction.confidence:.4f}\n"
    first = classifier.next_token_distribution("The film was", 1)[0]
    assert main(["The film was", "--quiet", "--raw-prompt"]) == 0
    assert capsys.readouterr().out == f"{first.token} {first.probability:.4f}\n"


def test_command_prints_the_report(loaded, classifier, tmp_path, capsys):
    assert main([TEXT, "--top-k", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == report(classifier, TEXT, 3, tmp_path)
    assert main([TEXT, "--raw-prompt", "--top-k", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == raw_report(classifier, TEXT, 3)


@pytest.mark.parametrize("flags", [[], ["--raw-prompt"], ["--quiet"], ["--quiet", "--raw-prompt"]])
@pytest.mark.parametrize(
    ("text", "message"), [("", "empty"), (" \n", "empty"), ("a\udcff", "UTF-8")]
)
def test_a_text_that_is_none_is_one_line_and_exit_code_1(capsys, text, message, flags):
    assert main([text, *flags]) == 1
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith("error: ") and message in line and shown.out == ""


def test_a_model_that_is_not_there_is_one_line_and_exit_code_1(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(logprob_demo_cli, "FINE_TUNED_DIR", tmp_path / "nowhere")
    for name, message in (("finetuned", "run: python fine_tune_model.py"), ("no-such", "no-such")):
        assert main([TEXT, "--model", name]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    "arguments", [[], ["a", "b"], ["a", "--top-k", "0"], ["a", "--top-k", "-3"], ["a", "--top-k=x"]]
)
def test_bad_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: " in capsys.readouterr().err


def test_the_script_runs_as_a_user_would_run_it():
    result = subprocess.run(
        [sys.executable, "logprob_demo_cli.py", "naïve 电影", "--raw-prompt", "--top-k", "400"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},  # a terminal that cannot show every token
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("The 400 most probable next tokens:\nrank  token")
