"""The demonstration: its numbers against the classifier, its words, its mistakes and exit codes."""

import contextlib
import fcntl
import io
import json
import math
import os
import pty
import re
import shutil
import struct
import sys
import termios
from dataclasses import replace

import numpy as np
import pytest

import logprob_demo_cli
from calibration import CALIBRATORS
from comparison import judge_calibrators
from dataset_loader import load_examples
from forked_scripts import start_script
from logprob_demo_cli import (
    WIDTH,
    DemoSettings,
    calibration_sentence,
    column_width,
    comparison_report,
    cut,
    decimals,
    evaluated_model,
    look,
    look_json,
    main,
    percent,
    pieces,
    raw_report,
    report,
    table,
    tokens_holding,
    unstyled,
    written_steps,
)
from logprobs_confidence import (
    TokenProbability,
    TransformerLogprobsClassifier,
    load_classifier,
    weights_fingerprint,
)
from openai_server import MODEL_NAME, CompletionServer
from records import LOW_LABEL_MASS, SCHEMA_VERSION, ModelResults, read_json, write_json
from settings import (
    EMBEDDED_MODEL_DIR,
    SENTIMENT,
    DataSettings,
    Label,
    ModelSettings,
    Task,
    UserError,
    case_variants,
    read_task,
)

TEXT = "Best worst thing ever"
ROW = re.compile(
    r" *(\d+)  (.+?)  +(-?\d+\.\d{4})  +(\S+)  +(?:(< 0\.01|\d+\.\d\d) %|(\S+))(?:  (.+))?"
)


def own_task(*pairs):
    labels = tuple(Label(name, case_variants(word)) for name, word in pairs)
    return Task("own", "What do you think? Answer with one word.", labels)


def table_rows(lines, start=0):
    """[(rank, token, log-prob, probability, percentage, label)] of the first table printed."""
    start = next(i for i, line in enumerate(lines) if i >= start and line.startswith("rank  token"))
    end = lines.index("", start)
    rows = [ROW.fullmatch(line).groups() for line in lines[start + 1 : end]]
    return [(*row[:4], row[4] or row[5], row[6]) for row in rows]


def seen_by(classifier, text, folder, **settings):
    """The `Look` at a text, with the calibrators in a folder."""
    demo = DemoSettings(**settings)
    return look(classifier, text, demo, evaluated_model(classifier, folder))


def shown(classifier, text, folder, **settings):
    """The lines that are shown of a text, without colours."""
    seen = seen_by(classifier, text, folder, **settings)
    lines = raw_report(seen) if seen.demo.raw_prompt else report(seen)
    return [unstyled(line) for line in lines]


@pytest.fixture(scope="module")
def lines(classifier, tmp_path_factory):
    return shown(classifier, TEXT, tmp_path_factory.mktemp("no_cache"))


@pytest.fixture(scope="module")
def three():
    """The embedded model with three labels; one answer word has no token of its own."""
    task = own_task(("agree", "yes"), ("disagree", "no"), ("torn", "ambivalently"))
    return TransformerLogprobsClassifier(task=task)


# What is shown


def test_the_prompt_is_shown_whole_with_its_control_tokens(classifier, lines):
    prompt = "".join(
        ("\n" if line.startswith("  |") else "") + line[4:]
        for line in lines[1 : lines.index("")]  # a colon continues the line above
    )
    assert prompt[1:] == classifier.encoder.prompt(TEXT)
    assert "<|eot_id|>" in prompt


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
    assert "is not known: there is no" in text
    assert "warning" not in text


def test_lines_fit_the_terminal(classifier, calibrated):
    assert max(map(column_width, shown(classifier, TEXT, calibrated[0]))) <= WIDTH


def test_a_long_line_is_divided_before_a_space_or_a_control_token():
    assert list(pieces("", 9)) == [""] and list(pieces("123456789", 9)) == ["123456789"]
    assert list(pieces("one two three", 9)) == ["one two", " three"]
    assert list(pieces("abcdefghijkl", 5)) == ["abcde", "fghij", "kl"]
    assert list(pieces("word<|eot_id|><|x|>", 12)) == ["word", "<|eot_id|>", "<|x|>"]
    assert list(pieces("电影好看", 5)) == ["电影", "好看"]


@pytest.mark.parametrize("k", [1, 3, 10**6])
def test_any_number_of_tokens_can_be_shown(classifier, tmp_path, k):
    rows = table_rows(shown(classifier, TEXT, tmp_path, top_k=k))
    assert len(rows) == min(k, len(classifier.tokenizer))
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))


def test_three_labels_are_summed_and_shared_alike(three, tmp_path):
    task = three.task
    prediction = three.classify(TEXT)
    text = "\n".join(shown(three, TEXT, tmp_path))
    shares = [numbers(re.search(rf"  P\({n}\) = (.+)", text)[1])[-1] for n in task.label_names]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert task.label_names[int(np.argmax(shares))] == prediction.predicted
    assert f"Prediction: {prediction.predicted}," in text


def test_a_token_that_only_begins_an_answer_word_is_said_to_do_so(three, lines, tmp_path):
    begins = {t.token for t in three.explain(TEXT, 1).words["torn"]}
    assert "'ambivalently'" not in begins
    text = " ".join(" ".join(shown(three, TEXT, tmp_path, top_k=1)).split())
    (note,) = re.findall(r"\(([^()]+): only the beginning of an answer word", text)
    assert set(note.split(", ")) == begins
    assert "only the beginning" not in " ".join(lines)


def test_words_that_share_their_first_token_are_said_to_be_scored_whole(tmp_path):
    classifier = TransformerLogprobsClassifier(task=own_task(("a", "zqxcalm"), ("b", "zqxwild")))
    assert classifier.encoder.label_ids is None
    text = "\n".join(shown(classifier, TEXT, tmp_path))
    assert "every word is scored whole" in " ".join(text.split())
    sums = " ".join(re.search(r"  p\(a\) = (.+?)\n  p\(", text, re.DOTALL)[1].split())
    assert "p('Zqxcalm') + p('zqxcalm') + p('ZQXCALM') = " in sums
    total = math.exp(classifier.classify(TEXT).label_logprobs[0])
    assert float(sums.rpartition("= ")[2]) == pytest.approx(total, rel=0.06)


def test_lettered_options_show_one_order_in_full_and_the_mean_of_all(classifier, tmp_path):
    labels = tuple(Label(name, (f"It is {name}.",)) for name in ("good", "bad", "neither"))
    lettered = classifier.for_task(Task("own", "What do you think?", labels, lettered=True))
    lines = shown(lettered, TEXT, tmp_path)
    text = "\n".join(lines)
    assert "  | C. It is neither.\n" in text and "only the beginning" not in text
    assert "p(good) = p('A')" in text and "p(neither) = p('C')" in text
    answer = lettered.classify(TEXT)
    assert f"Prediction: {answer.predicted}, confidence" in text
    assert "The options were shown in 3 orders" in text
    flat = " ".join(text.split())
    for k, label in enumerate(labels):
        *at, mean = numbers(re.search(rf"p\({label.name}\): (.+?; mean \S+)", flat)[1])
        assert len(at) == 3 and sum(at) / 3 == pytest.approx(mean, abs=2e-6)
        assert mean == pytest.approx(math.exp(answer.label_logprobs[k]), abs=1e-5)
    below = [line for line in lines[lines.index("") :] if str(tmp_path) not in line]
    assert max(map(column_width, below)) <= WIDTH


def test_a_low_label_mass_is_a_warning(tmp_path):
    classifier = TransformerLogprobsClassifier(task=own_task(("z", "zebra"), ("q", "quartz")))
    assert classifier.classify(TEXT).label_mass < LOW_LABEL_MASS
    text = " ".join(" ".join(shown(classifier, TEXT, tmp_path)).split())
    assert "warning: the label mass is below 0.5" in text
    assert "It hardly answers the question" in text


def test_control_characters_are_written_out_and_long_texts_say_so(classifier, tmp_path):
    lines = shown(classifier, "red \x1b[31m and \ttab", tmp_path)
    assert r"  | Text: red \x1b[31m and \ttab<|eot_id|>" in "\n".join(lines)
    note = "it saw this without the text's middle"
    assert note not in " ".join(lines)
    assert note in " ".join(shown(classifier, "word " * 3000, tmp_path))


def test_a_raw_prompt_is_continued_as_it_stands(classifier, tmp_path):
    lines = shown(classifier, "The film was", tmp_path, raw_prompt=True, top_k=5)
    expected = classifier.next_token_distribution("The film was", 5)
    assert [row[1] for row in table_rows(lines)] == [t.token for t in expected]
    assert "label" not in lines[1]
    words = " ".join(" ".join(lines).split())
    assert percent(sum(t.probability for t in expected)) in words
    assert "not the confidence in a label" in words
    trailing = classifier.next_token_distribution("The film was ", 1)[0]
    lines = shown(classifier, "The film was ", tmp_path, raw_prompt=True)
    assert table_rows(lines)[0][1] == trailing.token


def test_columns_stay_aligned_for_wide_long_and_odd_tokens():
    names = ["' Yes'", "'电影'", "'e\u0301'", "'" + "=" * 60 + "'", r"'\n\n'", "<E2 80>", "'…'"]
    tokens = [
        TokenProbability(i + 1, i, n, -1.5 * i, math.exp(-1.5 * i)) for i, n in enumerate(names)
    ]
    notes = {0: ("positive", "36"), 1: ("positive, negative", "36")}
    header, *rows = map(unstyled, table(tokens, notes))
    end_of_logprob = column_width(header.partition("nats")[0]) + 4
    for row, token in zip(rows, tokens, strict=True):
        before = row.partition(f"{token.logprob:.4f}")[0]
        assert column_width(before) + len(f"{token.logprob:.4f}") == end_of_logprob
    assert rows[0].endswith("100.00 %  positive")
    assert rows[1].endswith("22.31 %  positive,…") or rows[1].endswith("positive, n…")
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
    cache["models"]["base"]["selection"]["chosen"] = "platt"
    write_json(folder / "calibrated_results.json", cache)
    return results


@pytest.fixture(scope="module")
def calibrated(classifier, tmp_path_factory):
    """(folder with calibrated_results.json of the embedded model, its `ModelResults`)."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, write_calibrators(folder, classifier)


def sentence(classifier, text, folder):
    seen = seen_by(classifier, text, folder)
    return calibration_sentence(seen.explanation.prediction, seen.calibration)


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
    shown = sentence(classifier, text, folder)
    assert f"The calibrator 'platt', fitted on {platt.n_rows} held-out texts" in shown
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
    missing = sentence(classifier, TEXT, tmp_path)
    assert "is not known" in missing and "differs in label_words" in missing


def test_a_calibrator_of_another_model_is_not_used(calibrated):
    half = TransformerLogprobsClassifier(ModelSettings(dtype="bfloat16"))
    missing = sentence(half, TEXT, calibrated[0])
    assert "from base in there it differs in dtype ('float32', now 'bfloat16')" in missing


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
    assert str(caught.value).endswith("python generate_evaluation_cache.py --force")


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
    base = {"base_model": "embedded", "base_fingerprint": weights_fingerprint(EMBEDDED_MODEL_DIR)}
    write_json(folder / "manifest.json", base)
    return folder


FINE_TUNED = ModelSettings(model="finetuned")


@pytest.fixture(scope="module")
def tuned(fine_tuned):
    return load_classifier(FINE_TUNED, fine_tuned)


def test_finetuned_is_the_adapter_with_its_base_model_and_task(tuned):
    assert tuned.task.label_names == ("good", "bad")
    assert tuned.settings.model == "embedded" and tuned.adapter_active
    prediction = tuned.classify(TEXT)
    with tuned.without_adapter():
        assert tuned.classify(TEXT).probability != pytest.approx(prediction.probability, abs=1e-4)


def test_an_adapter_can_be_asked_another_question_and_put_on_a_named_model(fine_tuned, tuned):
    asked = load_classifier(FINE_TUNED, fine_tuned, SENTIMENT)
    assert asked.task == SENTIMENT and asked.adapter_active
    named = load_classifier(ModelSettings(model="base"), fine_tuned)
    assert named.identity == tuned.identity


@pytest.mark.parametrize("missing", ["manifest.json", "task.json", "adapter_config.json"])
def test_a_missing_fine_tuned_model_names_the_command(fine_tuned, tmp_path, missing):
    folder = shutil.copytree(fine_tuned, tmp_path / "copy")
    (folder / missing).unlink()
    with pytest.raises(UserError, match=r"run: python fine_tune_model\.py$"):
        load_classifier(FINE_TUNED, folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("manifest.json", {}, "is damaged"),
        ("manifest.json", {"base_model": "embedded"}, "trained on other weights than embedded"),
        ("task.json", {}, "is damaged"),
        ("task.json", {"labels": [1]}, "is damaged"),
    ],
)
def test_a_damaged_fine_tuned_model_names_the_command(fine_tuned, tmp_path, file, content, message):
    folder = shutil.copytree(fine_tuned, tmp_path / "copy")
    write_json(folder / file, content)
    with pytest.raises(UserError, match=rf"{message} .*; run: python fine_tune_model\.py$"):
        load_classifier(FINE_TUNED, folder)


def test_base_is_the_embedded_model_and_other_names_are_models(
    classifier, tmp_path, tiny_model_folder
):
    base = load_classifier(ModelSettings(model="base"))
    assert base.identity == classifier.identity and base.adapter is None
    folder = str(tiny_model_folder("qwen2"))
    assert load_classifier(ModelSettings(model=folder)).settings.model == folder
    without_template = load_classifier(ModelSettings(model=str(tiny_model_folder("gpt2"))))
    assert len(table_rows(shown(without_template, TEXT, tmp_path, top_k=5))) == 5


# Temperature, and what the model writes


def one_step(classifier, ids, **settings):
    return written_steps(classifier, ids, DemoSettings(**settings))[0].distribution


@pytest.mark.parametrize("temperature", [0.5, 1, 3])
def test_probabilities_at_a_temperature_stand_beside_those_at_1(
    classifier, calibrated, temperature
):
    lines = shown(classifier, TEXT, calibrated[0], temperature=temperature, top_k=6)
    cooled = classifier.classify(TEXT, temperature=temperature)
    labels = np.exp(cooled.label_logprobs)
    words = classifier.explain(TEXT).words
    at = {row[1]: float(row[4]) for row in table_rows(lines)}
    for name, total in zip(SENTIMENT.label_names, labels, strict=True):
        assert sum(at[t.token] for t in words[name]) == pytest.approx(total, abs=2e-5)
    text = "\n".join(lines)
    for name, total in zip(("p(positive)", "p(negative)"), labels, strict=True):
        (line,) = re.findall(rf"^  {re.escape(name)} +\S+ +(\S+)$", text, re.MULTILINE)
        assert float(line) == pytest.approx(total, abs=2e-6)
    effect = {0.5: "sharpens", 1: "stays as it is", 3: "flattens"}[temperature]
    assert f"Temperature {temperature:g}: the distribution {effect}." in text
    assert max(map(column_width, lines)) <= WIDTH


def test_a_temperature_divides_the_logits(classifier):
    ids = classifier.raw_prompt_ids("The film was")
    distribution = one_step(classifier, ids)
    expected = np.exp(distribution.logprobs) ** (1 / 2)
    assert distribution.at(2) == pytest.approx(expected / expected.sum())
    assert distribution.at(0.01).max() > 0.999 and distribution.at(0.01).sum() == pytest.approx(1)
    assert tokens_holding(distribution.at(1), 0.9) < tokens_holding(distribution.at(2), 0.9)
    assert tokens_holding(np.array([0.1, 0.6, 0.3]), 0.5) == 1
    assert tokens_holding(np.array([0.1, 0.6, 0.3]), 0.7) == 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2", "glm4"])
def test_the_steps_are_those_of_generate_on_every_architecture(tiny_model_folder, name):
    import torch

    classifier = TransformerLogprobsClassifier(str(tiny_model_folder(name)))
    ((ids, _),) = classifier.encoder.encode([TEXT])
    steps = written_steps(classifier, ids, DemoSettings(max_new_tokens=12))
    generated = classifier.model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=12,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    assert generated.sequences[0, len(ids) :].tolist() == [step.token_id for step in steps]
    for step, logits in zip(steps, generated.logits, strict=True):
        expected = logits[0].float().log_softmax(-1).numpy()
        assert step.distribution.logprobs == pytest.approx(expected, abs=1e-3)


def test_writing_stops_at_the_end_of_the_turn(classifier, tmp_path):
    lines = shown(classifier, TEXT, tmp_path, max_new_tokens=10, top_k=3)
    text = "\n".join(lines)
    answer = classifier.explain(TEXT, 1).top[0].token.strip("'")
    assert text.endswith(f"Written: '{answer}<|eot_id|>'. '<|eot_id|>' ends its turn.")
    assert re.findall(r"^Step (\d+)", text, re.MULTILINE) == ["1", "2"]
    assert f"Step 2, after '{answer}':" in text
    written = [line for line in lines if line.endswith("← written")]
    assert [line.split()[1] for line in written] == [repr(answer), "'<|eot_id|>'"]


def test_drawing_follows_the_seed_and_shows_what_was_drawn(classifier, tmp_path):
    def drawn(seed):
        settings = {"raw_prompt": True, "temperature": 2.0, "max_new_tokens": 6, "top_k": 2}
        return shown(classifier, "The film was", tmp_path, seed=seed, **settings)

    lines = drawn(1)
    assert lines == drawn(1) != drawn(2)
    assert "drawn at temperature 2 with seed 1" in "\n".join(lines)
    ranks = [int(line.split()[0]) for line in lines if line.endswith("← written")]
    assert len(ranks) == 6 and max(ranks) > 2  # what is not among the first K stands below them
    assert max(map(column_width, lines)) <= WIDTH


def test_tokens_are_drawn_from_the_distribution_at_the_temperature(classifier):
    ids = classifier.raw_prompt_ids("The film was")
    expected = one_step(classifier, ids).at(0.5)
    draws = [
        written_steps(classifier, ids, DemoSettings(temperature=0.5, seed=seed))[0].token_id
        for seed in range(300)
    ]
    for token in np.argsort(-expected)[:3]:
        n = draws.count(token)
        assert abs(n - 300 * expected[token]) < 4 * math.sqrt(300 * expected[token])


def test_more_tokens_than_the_context_holds_are_refused(classifier, tmp_path):
    with pytest.raises(UserError, match=r"and 600 more do not fit into the model's 512; lower"):
        seen_by(classifier, TEXT, tmp_path, max_new_tokens=600)


# Two models


@pytest.fixture(scope="module")
def looks(tuned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("no_cache")
    with tuned.without_adapter():
        base = seen_by(tuned, TEXT, folder, top_k=5)
    return {"base": base, "finetuned": seen_by(tuned, TEXT, folder, top_k=5)}


def test_two_models_stand_side_by_side(looks):
    lines = [unstyled(line) for line in comparison_report(looks)]
    assert max(map(column_width, lines[:-6])) <= WIDTH  # the paths at the end may be longer
    text = "\n".join(lines)
    for i, name in enumerate(("p(good)", "p(bad)")):
        (row,) = re.findall(rf"^{re.escape(name)} +(\S+) +(\S+)$", text, re.MULTILINE)
        for value, seen in zip(row, looks.values(), strict=True):
            logprob = seen.explanation.prediction.label_logprobs[i]
            assert float(value) == pytest.approx(math.exp(logprob), abs=1e-6)
    (predicted,) = re.findall(r"^prediction +(\S+) +(\S+)$", text, re.MULTILINE)
    assert list(predicted) == [seen.explanation.prediction.predicted for seen in looks.values()]
    start = lines.index("The 5 most probable next tokens:")
    for rank, line in enumerate(lines[start + 2 : start + 7]):
        for seen in looks.values():
            assert f"{seen.top[rank].token} " in line
    assert text.count("there is no") == 2


def test_two_models_continue_a_raw_prompt_side_by_side(tuned, tmp_path):
    seen = seen_by(tuned, "The film was", tmp_path, raw_prompt=True)
    lines = comparison_report({"base": seen, "finetuned": seen})
    assert len(lines) == 10
    assert all(line.count(f"{t.token} ") == 2 for line, t in zip(lines[2:], seen.top, strict=True))


# JSON


def test_json_holds_what_is_shown(classifier, calibrated):
    settings = {"temperature": 2.0, "max_new_tokens": 3, "top_k": 4}
    seen = seen_by(classifier, TEXT, calibrated[0], **settings)
    data = json.loads(json.dumps(look_json(seen), allow_nan=False))
    prediction = classifier.classify(TEXT)
    assert data["predicted"] == prediction.predicted and not data["truncated"]
    assert data["confidence"] == pytest.approx(prediction.confidence, abs=1e-5)
    assert data["labels"]["positive"]["share"] == pytest.approx(prediction.probability, abs=1e-5)
    assert [t["token"] for t in data["tokens"]] == [
        t.token for t in classifier.explain(TEXT, 4).top
    ]
    assert data["calibration"]["calibrator"] == "platt"
    cooled = classifier.classify(TEXT, temperature=2.0)
    assert data["labels_at_temperature"]["negative"]["p"] == pytest.approx(
        math.exp(cooled.label_logprobs[1]), abs=1e-5
    )
    assert len(data["steps"]) <= 3 and len(data["steps"][0]["tokens"]) == 4


# The command


@pytest.fixture
def loaded(classifier, monkeypatch):
    """main() with the session's classifier, which is the one `base` stands for."""
    monkeypatch.setattr(logprob_demo_cli, "load_classifier", lambda *arguments: classifier)


def test_quiet_is_one_line(loaded, classifier, capsys):
    prediction = classifier.classify(TEXT)
    assert main([TEXT, "--quiet"]) == 0
    assert capsys.readouterr().out == f"{prediction.predicted} {prediction.confidence:.4f}\n"
    first = classifier.next_token_distribution("The film was", 1)[0]
    assert main(["The film was", "--quiet", "--raw-prompt"]) == 0
    assert capsys.readouterr().out == f"{first.token} {first.probability:.4f}\n"


def test_command_prints_the_report(loaded, classifier, tmp_path, capsys):
    no_cache = ["--cache-dir", str(tmp_path)]
    assert main([TEXT, "--top-k", "3", *no_cache]) == 0
    assert capsys.readouterr().out.splitlines() == shown(classifier, TEXT, tmp_path, top_k=3)
    flags = ["--raw-prompt", "--top-k", "3", "--temperature", "2", "--max-new-tokens", "2"]
    assert main([TEXT, *flags, "--seed", "0", *no_cache]) == 0
    settings = {"raw_prompt": True, "top_k": 3, "temperature": 2, "max_new_tokens": 2, "seed": 0}
    assert capsys.readouterr().out.splitlines() == shown(classifier, TEXT, tmp_path, **settings)


def test_compare_prints_both_models(tuned, looks, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(logprob_demo_cli, "load_classifier", lambda *arguments: tuned)
    flags = ["--compare", "--top-k", "5", "--cache-dir", str(tmp_path)]
    assert main([TEXT, *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = [unstyled(line) for line in comparison_report(looks)]
    assert lines[:25] == expected[:25]
    assert main([TEXT, *flags, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert set(data) == {"base", "finetuned"}
    assert data["base"]["confidence"] != data["finetuned"]["confidence"]


def test_several_texts_each_have_a_heading_a_line_or_an_object(loaded, tmp_path, capsys):
    path = tmp_path / "texts.txt"
    path.write_bytes(b"\xef\xbb\xbfA fine film.\r\n\n  \nA dull film.")
    assert main(["--file", str(path), "--top-k", "1"]) == 0
    shown = capsys.readouterr().out
    assert re.findall("^=== (.+) ===$", shown, re.MULTILINE) == ["line 1", "line 4"]
    assert main(["--file", str(path), "--json"]) == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [o["text"] for o in objects] == ["A fine film.", "A dull film."]
    assert main(["A fine film.", "A dull film.", "--quiet"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_bad_text_among_others_is_named_and_the_rest_is_shown(loaded, capsys):
    assert main(["A fine film.", " ", "A dull film.", "--quiet"]) == 1
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2
    assert shown.err.startswith("error: text 2: the text is empty")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "texts.txt does not exist; give an existing file with --file"),
        (b"\n \n", "there is no text"),
        (b"fine\ncaf\xe9\n", "texts.txt line 2 is not UTF-8 (byte 0xe9)"),
    ],
)
def test_a_file_without_texts_is_one_line_and_exit_code_1(
    loaded, tmp_path, capsys, content, message
):
    path = tmp_path / "texts.txt"
    if content is not None:
        path.write_bytes(content)
    assert main(["--file", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize("flags", [[], ["--raw-prompt"], ["--quiet"], ["--quiet", "--raw-prompt"]])
@pytest.mark.parametrize(
    ("text", "message"), [("", "empty"), (" \n", "empty"), ("a\udcff", "UTF-8")]
)
def test_a_text_that_is_none_is_one_line_and_exit_code_1(loaded, capsys, text, message, flags):
    assert main([text, *flags]) == 1
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith("error: ") and message in line and shown.out == ""


def test_a_model_or_task_that_is_not_there_is_one_line_and_exit_code_1(capsys, tmp_path):
    for flags, message in (
        (["--adapter", str(tmp_path)], "run: python fine_tune_model.py"),
        (["--model", "no-such"], "no-such"),
        (["--task", "no-such"], "the shipped tasks are: "),
    ):
        assert main([TEXT, *flags]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--top-k", "0"], "--top-k must be at least 1, got 0"),
        (["a", "--top-k=x"], "invalid int value"),
        (["a", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["a", "--temperature", "0"], "--temperature must lie between 0.01 and 100"),
        (["a", "--temperature", "nan"], "--temperature must lie between"),
        (["a", "--seed", "-1", "--temperature", "2", "--max-new-tokens", "2"], "--seed must be"),
        (["a", "--seed", "0"], "--seed is for drawing"),
        (["a", "--quiet", "--json"], "--quiet and --json exclude each other"),
        (["a", "--quiet", "--compare"], "--quiet and --compare exclude"),
        (["a", "--quiet", "--top-k", "3"], "--quiet and --top-k exclude"),
        (["a", "--quiet", "--temperature", "3"], "--quiet and --temperature exclude"),
        (["a", "--quiet", "--max-new-tokens", "3"], "--quiet and --max-new-tokens exclude"),
        (["a", "--compare", "--temperature", "3"], "--compare and --temperature exclude"),
        (["a", "--compare", "--max-new-tokens", "3"], "--compare and --max-new-tokens exclude"),
        (["a", "--compare", "--model", "embedded"], "--compare needs an adapter"),
        (["a", "--raw-prompt", "--task", "spam"], "--raw-prompt and --task exclude"),
        (["a", "--file", "b"], "--file and TEXT exclude"),
        (["-", "-"], "give - once"),
    ],
)
def test_bad_usage_is_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert "usage: " in shown and message in shown


def open_terminal():
    """(master, slave) of a real terminal of 80 columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
    return master, slave


def in_a_terminal(*arguments):
    """(exit code, output) of the script on a real terminal, as a user would run it."""
    master, slave = open_terminal()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), os.ttyname(slave))
    process = start_script("logprob_demo_cli.py", *arguments, TERM="xterm", NO_COLOR="", **streams)
    process.join(120)
    os.close(slave)
    output = b""
    while chunk := read_terminal(master):
        output += chunk
    os.close(master)
    return process.exitcode, output.decode()


def read_terminal(master):
    try:
        return os.read(master, 1 << 16)
    except OSError:  # what Linux says when the other side is closed
        return b""


def test_colour_is_for_a_terminal_that_wants_it(loaded, monkeypatch):
    flags = [TEXT, "--top-k", "2"]
    code, coloured = in_a_terminal(*flags)
    assert code == 0 and "\x1b[1mThe 2 most probable next tokens:\x1b[0m" in coloured
    master, slave = open_terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    with open(slave, "w") as terminal, contextlib.redirect_stdout(terminal):
        assert terminal.isatty() and main(flags) == 0
    plain = b""
    while chunk := read_terminal(master):
        plain += chunk
    os.close(master)
    assert plain.decode() == unstyled(coloured) != coloured


def test_a_terminal_without_a_text_is_bad_usage():
    code, output = in_a_terminal()
    assert code == 2 and "give a TEXT, --file, or texts on the standard input" in output


def test_texts_come_through_a_pipe(loaded, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.write(writer, b"A wonderful film.\n\nA terrible film.\n")
    os.close(writer)
    with open(reader) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        assert main(["--quiet"]) == 0
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["positive", "negative"]
    assert shown.err == ""


def test_an_output_that_cannot_show_every_token_gets_escapes(loaded, monkeypatch, capsys):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("naïve 电影\n".encode())))
    monkeypatch.setattr(sys, "stdout", output)
    assert main(["-", "--raw-prompt", "--top-k", "10000"]) == 0  # all that there are
    output.flush()
    shown = output.buffer.getvalue().decode("ascii")
    assert re.match(r"The \d+ most probable next tokens:\nrank  token", shown)
    assert "'é'" not in shown and "'\\xe9'" in shown
    assert capsys.readouterr().err == ""


# A model on a server


def asked_of(server, *arguments):
    flags = ["--backend=openai", f"--base-url={server.url}", f"--model={MODEL_NAME}"]
    return main([*flags, "--tokenizer=embedded", TEXT, *arguments])


@pytest.mark.parametrize(
    ("form", "task"),
    [
        ({}, "sentiment"),
        ({}, "news_topic"),  # lettered options
        ({"logprob_token_ids": False}, "sentiment"),
        ({"logprob_token_ids": False, "by_id": True}, "sentiment"),
    ],
    ids=["vLLM", "vLLM, letters", "older vLLM", "llama.cpp"],
)
def test_a_server_is_looked_at_like_a_model_that_is_loaded_here(classifier, capsys, form, task):
    with CompletionServer(classifier, **form) as server:
        assert asked_of(server, "--json", f"--task={task}", "--top-k=10") == 0
        found = json.loads(capsys.readouterr().out)
        assert asked_of(server, "--quiet", f"--task={task}") == 0
        assert capsys.readouterr().out == f"{found['predicted']} {found['confidence']:.4f}\n"
    local = classifier.for_task(read_task(task)).explain(TEXT, 10)
    assert found["prompt"] == local.prompt
    assert [t["token"] for t in found["tokens"]] == [t.token for t in local.top]
    for rows, expected in [
        (found["tokens"], local.top),
        *((found["words"][name], tokens) for name, tokens in local.words.items()),
    ]:
        for row, token in zip(rows, expected, strict=True):
            assert (row["token_id"], row["token"]) == (token.token_id, token.token)
            assert row["rank"] in (token.rank, None) and not row["bound"]
            assert row["probability"] == pytest.approx(token.probability, abs=1e-4)
    assert found["predicted"] == local.answer.predicted
    assert found["label_mass"] == pytest.approx(local.answer.label_mass, abs=1e-4)
    assert "label_slack" not in found
    assert "'of the server'" in found["calibration"]["reason"]  # nothing was calibrated for it


def test_what_a_server_does_not_say_is_shown_as_a_bound(classifier, capsys):
    with CompletionServer(classifier, logprob_token_ids=False, most_logprobs=5) as server:
        assert asked_of(server) == 0
        out, err = capsys.readouterr()
        assert asked_of(server, "--json") == 0
        found = json.loads(capsys.readouterr().out)
    lines = out.splitlines()
    assert "The 5 most probable next tokens:" in lines
    assert "only the 5 most probable tokens are known" in err
    ((name, row),) = [(n, t) for n, words in found["words"].items() for t in words if t["bound"]]
    true = {t.token: t.probability for t in classifier.explain(TEXT, 8).words[name]}
    assert (name, row["token"], row["rank"]) == ("positive", "'YES'", None)
    assert true["'YES'"] <= row["probability"] < 2 * true["'YES'"]
    assert any(f"+ ≤ {decimals(row['probability'])} = " in line for line in lines)
    said = re.search(r"p\(positive\) lies between (\S+)\s+and\s+(\S+)\.\s", "\n".join(lines))
    lower, upper = map(float, said.groups())
    assert lower <= sum(true.values()) <= upper
    assert found["label_slack"]["positive"] == pytest.approx(upper - lower, abs=2e-6)
    assert "p(negative) lies between" not in " ".join(lines)  # every word of it was named
    assert any(line.startswith("  label mass ≤ ") for line in lines)


@pytest.mark.parametrize(
    "flags",
    [("--temperature=2",), ("--max-new-tokens=3",), ("--raw-prompt",), ("--compare",)],
    ids=lambda flags: flags[0],
)
def test_what_needs_the_whole_model_is_refused_for_a_server(capsys, flags):
    with pytest.raises(SystemExit) as ended:
        main(["--backend=openai", "--base-url=http://127.0.0.1:9/v1", "--model=m", TEXT, *flags])
    assert ended.value.code == 2
    name = flags[0].partition("=")[0]
    assert f"{name} needs a model that is loaded here" in capsys.readouterr().err


def test_server_flags_without_a_server_are_one_clear_error(capsys):
    assert main(["--base-url=http://127.0.0.1:9/v1", TEXT]) == 1
    assert "--base-url is not for --backend local" in capsys.readouterr().err
    assert main(["--backend=openai", TEXT]) == 1
    assert "--backend openai needs --base-url" in capsys.readouterr().err


def test_a_text_that_a_server_refuses_is_one_clear_error(classifier, capsys):
    with CompletionServer(classifier) as server:
        server.fails = lambda number: 400 if server.bodies[-1].get("logprobs") == 8 else None
        assert asked_of(server) == 0  # fewer tokens are asked for then
        assert "The 5 most probable next tokens:" in capsys.readouterr().out
        server.fails = lambda number: 400 if "logprob_token_ids" not in server.bodies[-1] else None
        assert asked_of(server) == 1
        error = capsys.readouterr().err
    assert "error: the server refuses this text: status 400, not now" in error
