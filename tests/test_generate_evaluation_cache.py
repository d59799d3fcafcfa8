"""The held-out evaluation: what is written, what it equals, and what an interruption leaves."""

import functools
import json
import re
from dataclasses import replace

import numpy as np
import pytest

import generate_evaluation_cache
import logprobs_confidence
from blend import SignalBlend, signal_rows
from calibration import (
    CALIBRATORS,
    calibrated_probabilities,
    calibrators_for,
    fit_calibrator,
)
from consistency_confidence import (
    consistency_predictions,
    dropout_predictions,
    other_wordings,
    paraphrase_predictions,
)
from generate_evaluation_cache import PartialResults, generate
from logprobs_confidence import TransformerLogprobsClassifier
from prompted_confidence import p_true_predictions, p_true_siblings
from records import (
    CONSISTENCY,
    MC_DROPOUT,
    MODEL_FILES,
    P_TRUE,
    PARAPHRASE,
    SCHEMA_VERSION,
    TOKEN_PROBABILITY,
    VERBALISED,
    load_held_out,
    load_results,
    prediction_from_logprobs,
)
from settings import (
    SENTIMENT,
    DataSettings,
    EvaluationSettings,
    ModelSettings,
    OutputSettings,
    UserError,
)
from test_fine_tune_model import (
    LABELS,
    MODEL,
    QUESTION,
    TASK,
    all_files,
    command_line,
    small_rows,
    train,
    write_csv,
)

ROWS, CHUNK = 120, 8
EVALUATION = EvaluationSettings(resamples=20, signals="none")
WITH_SIGNALS = EvaluationSettings(resamples=20, dropout_passes=3)
CACHE_FILES = {*MODEL_FILES.values(), "calibrated_results.json", "evaluation_metadata.json"}


class Run:
    """A folder with a fine-tuned model, the data it was made from, and its evaluation."""

    def __init__(self, folder, data):
        self.folder, self.data, self.cache = folder, data, folder / "evaluation_cache"

    def generate(self, model=MODEL, evaluation=EVALUATION, base_only=False, **data):
        return generate(
            TASK,
            model,
            DataSettings(data=str(self.data), **data),
            evaluation,
            OutputSettings(output_dir=str(self.folder)),
            base_only,
        )

    def flags(self, **settings):
        values = {"data": self.data, "question": QUESTION, "labels": LABELS, "device": "cpu"}
        values |= {"output_dir": self.folder, "resamples": EVALUATION.resamples}
        values |= {"signals": EVALUATION.signals}
        return command_line(values | settings)

    def main(self, *extra, **settings):
        return generate_evaluation_cache.main([*self.flags(**settings), *extra])

    def results(self, name):
        return load_results(self.cache / MODEL_FILES[name])

    def json(self, file):
        return json.loads((self.cache / file).read_text(encoding="utf-8"))


def probabilities(results, method=TOKEN_PROBABILITY):
    return np.array([p.probability for p in results.predictions if p.method == method])


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    run = Run(folder, write_csv(tmp_path_factory.mktemp("data") / "rows.csv", small_rows(ROWS)))
    train(folder, run.data)
    assert run.generate(evaluation=WITH_SIGNALS) == "evaluated"
    return run


@pytest.fixture(scope="module")
def opened():
    """`open_classifier` that loads each model once; an adapter is known by the folder it is in."""
    once = functools.cache(logprobs_confidence.open_classifier)
    return lambda model, adapter=None, task=SENTIMENT: once(
        model, None if adapter is None else adapter.resolve(), task
    )


@pytest.fixture
def run(evaluated, opened, tmp_path, monkeypatch):
    """A copy of the fine-tuned model alone, to be evaluated by the test."""
    monkeypatch.setattr(logprobs_confidence, "open_classifier", opened)
    (tmp_path / "fine_tuned_sentiment_model").symlink_to(
        evaluated.folder / "fine_tuned_sentiment_model"
    )
    return Run(tmp_path, evaluated.data)


@pytest.fixture
def scored(monkeypatch):
    """The ids of every held-out text that goes through a model, in order."""
    ids = []
    classify = TransformerLogprobsClassifier.classify_batch

    def record(self, texts, ids_of_texts=None, *arguments, **options):
        ids.extend(ids_of_texts or ())  # content-free texts have none
        return classify(self, texts, ids_of_texts, *arguments, **options)

    monkeypatch.setattr(TransformerLogprobsClassifier, "classify_batch", record)
    return ids


# What is written.


def test_cache_has_its_files_and_no_others(evaluated):
    assert {p.name for p in evaluated.cache.iterdir()} == CACHE_FILES


def test_results_come_back_as_they_were_written(run, monkeypatch):
    written = []
    model_results = generate_evaluation_cache.model_results

    def record(*arguments):
        written.append(model_results(*arguments))
        return written[-1]

    monkeypatch.setattr(generate_evaluation_cache, "model_results", record)
    run.generate()
    assert [results.name for results in written] == list(MODEL_FILES)
    for results in written:
        without_texts = tuple(replace(e, text="") for e in results.examples)
        assert run.results(results.name) == replace(results, examples=without_texts)
        on_disk = run.json(MODEL_FILES[results.name])
        assert on_disk == json.loads(json.dumps(results.to_json()))


def test_every_held_out_row_has_one_prediction_of_each_method(evaluated):
    held_out = load_held_out(evaluated.folder / "fine_tuned_sentiment_model")
    metadata = evaluated.json("evaluation_metadata.json")
    splits = [e.split for e in held_out]
    assert metadata["rows"] == {s: splits.count(s) for s in ("calibration", "test")}
    for name in MODEL_FILES:
        results = evaluated.results(name)
        assert [e.id for e in results.examples] == [e.id for e in held_out]
        methods = (TOKEN_PROBABILITY, CONSISTENCY, PARAPHRASE, P_TRUE)
        methods += (MC_DROPOUT,) * (name == "finetuned")
        assert set(results.to_json()["counts"]) == set(methods)
        for method in methods:
            rows = [p for p in results.predictions if p.method == method]
            assert [p.example_id for p in rows] == [e.id for e in held_out]
            assert all(p.latency_sec > 0 for p in rows)
        counts = results.counts()
        assert counts == metadata["models"][name]["counts"]
        assert counts["requested"] == counts["scored"] == len(held_out)
        assert counts["failed"] == counts["truncated"] == 0
    assert metadata["training"]["rows"]["held_out"] == len(held_out)


def test_predictions_equal_a_direct_classification_and_the_base_knows_no_adapter(evaluated):
    held_out = load_held_out(evaluated.folder / "fine_tuned_sentiment_model")
    texts, ids = [e.text for e in held_out], [e.id for e in held_out]
    base = TransformerLogprobsClassifier(MODEL, task=TASK)
    tuned = TransformerLogprobsClassifier(
        MODEL, evaluated.folder / "fine_tuned_sentiment_model", TASK
    )
    for name, classifier in (("base", base), ("finetuned", tuned)):
        direct = [p.probability for p in classifier.classify_batch(texts, ids)]
        cached = evaluated.results(name)
        assert np.abs(probabilities(cached) - direct).max() < classifier.tolerance
        assert cached.identity == classifier.identity
    assert evaluated.results("base").identity["adapter_fingerprint"] is None
    change = probabilities(evaluated.results("base")) - probabilities(
        evaluated.results("finetuned")
    )
    assert np.abs(change).max() > 0.1


def test_calibrators_are_fitted_on_calibration_rows_and_judged_on_test_rows(evaluated):
    calibrated = evaluated.json("calibrated_results.json")
    assert set(calibrated["models"]) == set(MODEL_FILES)
    for name, model in calibrated["models"].items():
        results = evaluated.results(name)
        fitting, test = results.arrays("calibration"), results.arrays("test")
        assert model["identity"] == results.identity
        assert model["test"]["ids"] == list(test["id"])
        assert model["test"]["label"] == list(test["label"])
        assert not set(fitting["id"]) & set(test["id"])
        assert list(model["test"]["methods"]) == list(model["calibrators"])
        assert set(model["calibrators"]) == set(calibrators_for(2)) < set(CALIBRATORS)
        assert model["selection"]["chosen"] in model["calibrators"]
        assert set(model["comparison"]) == set(model["calibrators"]) - {"raw"}
        for method, values in model["test"]["methods"].items():
            expected = calibrated_probabilities(fit_calibrator(method, fitting), test)
            assert np.abs(np.array(values["probabilities"]) - expected).max() < 1e-8
            assert values["metrics"]["n"] == len(test["id"])


def test_failed_and_truncated_rows_are_counted_and_are_no_predictions(tmp_path, tiny_model_folder):
    """A SentencePiece-like model refuses a text that holds one of its control tokens."""
    rows = []
    for i in range(40):
        text = f"a good text {i}" + " good" * (300 if i in (4, 5) else 0) + "[INST]" * (i in (6, 7))
        split = ("train", "validation", "calibration", "test")[i // 2 % 4]
        rows.append((text, SENTIMENT.label_names[i % 2], split))
    data = write_csv(tmp_path / "rows.csv", rows, ("text", "label", "split"))
    output = OutputSettings(output_dir=str(tmp_path))
    model = ModelSettings(str(tiny_model_folder("mistral")), device="cpu", max_tokens=150)
    generate(SENTIMENT, model, DataSettings(data=str(data)), EVALUATION, output, base_only=True)
    results = load_results(output.cache / MODEL_FILES["base"])
    counts = results.counts()
    assert (counts["requested"], counts["scored"]) == (20, 18)
    assert (counts["failed"], counts["truncated"]) == (2, 2)
    rows = [p for p in results.predictions if p.method == TOKEN_PROBABILITY]
    failed = [p for p in rows if p.error is not None]
    assert len(failed) == 2
    # Samples of a random model are hardly ever an answer; nothing else fails that did not before.
    failures = {m: counts["failed"] for m, counts in results.to_json()["counts"].items()}
    assert failures.pop(CONSISTENCY) >= 2 and set(failures.values()) == {2}
    assert all("'[INST]'" in p.error and p.predicted is p.probability is None for p in failed)
    assert not {p.example_id for p in failed} & set(results.arrays("test")["id"])


def test_consistency_is_sampled_at_its_temperature_and_probability_is_not(run, evaluated):
    evaluation = replace(EVALUATION, temperature=4.0)
    run.generate(evaluation=evaluation, base_only=True)
    hot, cold = run.results("base"), evaluated.results("base")
    assert np.abs(probabilities(hot) - probabilities(cold)).max() < 1e-4
    held_out = load_held_out(run.folder / "fine_tuned_sentiment_model")
    classifier = TransformerLogprobsClassifier(MODEL, task=TASK)
    distributions = classifier.classify_batch(
        [e.text for e in held_out], [e.id for e in held_out], temperature=4.0
    )
    expected = consistency_predictions(TASK, distributions, evaluation)
    got = [p for p in hot.predictions if p.method == CONSISTENCY]
    assert [replace(p, passes=None, latency_sec=None) for p in got] == expected
    assert all(p.passes == 1 for p in got)  # at another temperature the samples cost a pass
    assert [p.label_counts for p in got] != [
        p.label_counts for p in cold.predictions if p.method == CONSISTENCY
    ]


# The signals.


def rows_of(results, method):
    return [p for p in results.predictions if p.method == method]


def test_signals_equal_a_direct_question(evaluated):
    held_out = load_held_out(evaluated.folder / "fine_tuned_sentiment_model")
    texts = [e.text for e in held_out]
    classifier = TransformerLogprobsClassifier(
        MODEL, evaluated.folder / "fine_tuned_sentiment_model", TASK
    )
    results = evaluated.results("finetuned")
    own = rows_of(results, TOKEN_PROBABILITY)
    siblings = [classifier.for_task(task) for task in other_wordings(TASK)]
    direct = {
        PARAPHRASE: paraphrase_predictions(siblings, texts, own),
        P_TRUE: p_true_predictions(p_true_siblings(classifier), texts, own),
    }
    for method, rows in direct.items():
        cached = rows_of(results, method)
        assert [p.predicted for p in cached] == [p.predicted for p in rows]
        difference = [a.confidence - b.confidence for a, b in zip(cached, rows, strict=True)]
        assert np.abs(difference).max() < classifier.tolerance
    rows = dropout_predictions(classifier, texts, own, 3, seed=42)
    for cached, row in zip(rows_of(results, MC_DROPOUT), rows, strict=True):
        np.testing.assert_allclose(cached.pass_logprobs, row.pass_logprobs, atol=1e-3)


def test_the_cost_of_a_signal_is_counted_in_passes(evaluated):
    results = evaluated.results("finetuned")
    expected = {
        TOKEN_PROBABILITY: 1,
        CONSISTENCY: 0,
        PARAPHRASE: len(other_wordings(TASK)),
        P_TRUE: 1,
        MC_DROPOUT: 3,
    }
    for method, passes in expected.items():
        # A prefix that several texts share may go through the model once more a batch.
        assert {round(p.passes) for p in rows_of(results, method)} == {passes}


def test_the_run_says_what_was_asked_and_what_was_left_out(evaluated):
    base, tuned = (evaluated.results(name).run["signals"] for name in MODEL_FILES)
    for signals in (base, tuned):  # the embedded model answers yes or no, whatever it is asked
        reason = signals["left_out"].pop(VERBALISED)
        assert re.fullmatch(
            r"scored 0 of the first \d+ texts; an error: the reply '.*' is no whole number.*",
            reason,
        )
    assert base["left_out"] == {MC_DROPOUT: "the base model has no LoRA layers to drop out"}
    assert tuned["left_out"] == {}
    for signals in (base, tuned):
        asked = [{"question": t.question, "negated": False} for t in other_wordings(TASK)]
        assert signals["wordings"] == asked
        assert [row["text"] for row in signals["content_free"]] == ["N/A", "[MASK]", "..."]


def test_the_signals_are_judged_and_their_blend_is_kept(evaluated):
    for name, model in evaluated.json("calibrated_results.json")["models"].items():
        signals, results = model["signals"], evaluated.results(name)
        blend = SignalBlend.from_json(signals["combined"]["blend"])
        fitting = results.arrays("calibration")
        assert set(blend.fitted_ids) <= set(fitting["id"].tolist())
        rows = signal_rows(results, "test", blend.parts)
        predicted = blend.predict_proba(rows).argmax(axis=1)
        accuracy = signals["methods"]["combined"]["metrics"]["accuracy"]["estimate"]
        assert accuracy == pytest.approx((predicted == rows["label"]).mean())


def test_no_signals_cost_nothing_but_the_content_free_texts(run, scored):
    run.generate(base_only=True)
    results = run.results("base")
    assert set(results.to_json()["counts"]) == {TOKEN_PROBABILITY, CONSISTENCY}
    assert len(scored) == len(results.examples)
    methods = run.json("calibrated_results.json")["models"]["base"]["signals"]["methods"]
    assert {"margin", "batch_calibration", "contextual_calibration"} < set(methods)


def test_some_signals_are_asked_in_their_own_order(run):
    evaluation = replace(WITH_SIGNALS, signals=" p_true , paraphrase,p_true")
    run.generate(evaluation=evaluation, base_only=True)
    counts = list(run.results("base").to_json()["counts"])
    assert counts == [TOKEN_PROBABILITY, CONSISTENCY, PARAPHRASE, P_TRUE]


def test_an_adapter_trained_without_dropout_says_so(run, tmp_path):
    folder = tmp_path / "dry"
    dry = Run(folder, write_csv(tmp_path / "dry.csv", small_rows(72)))
    train(folder, dry.data, dropout=0.0, batch_size=32)
    dry.generate(evaluation=replace(WITH_SIGNALS, signals="mc_dropout"))
    assert "--dropout above 0" in dry.results("finetuned").run["signals"]["left_out"][MC_DROPOUT]


# Again, in part, or not at all.


def test_second_run_is_up_to_date_until_something_changes(run, scored):
    assert run.generate() == "evaluated"
    held_out = [e.id for e in load_held_out(run.folder / "fine_tuned_sentiment_model")]
    assert sorted(scored) == sorted(held_out * 2)
    before = all_files(run.cache)
    assert run.generate() == "up to date"
    assert all_files(run.cache) == before
    assert len(scored) == 2 * len(held_out)
    (run.cache / MODEL_FILES["finetuned"]).unlink()
    assert run.generate() == "evaluated"
    assert run.generate(evaluation=replace(EVALUATION, samples=5)) == "evaluated"
    assert run.main("--force", samples=5) == 0
    assert len(scored) == 8 * len(held_out)


def test_base_only_needs_no_adapter_and_removes_what_is_not_of_this_evaluation(run, tmp_path):
    run.generate()
    assert run.generate(base_only=True) == "evaluated"
    assert {p.name for p in run.cache.iterdir()} == CACHE_FILES - {MODEL_FILES["finetuned"]}
    assert set(run.json("calibrated_results.json")["models"]) == {"base"}
    assert run.json("evaluation_metadata.json")["training"] is None
    assert run.generate(base_only=True) == "up to date"
    alone = Run(tmp_path / "alone", run.data)
    assert alone.main("--base-only") == 0
    assert (probabilities(alone.results("base")) == probabilities(run.results("base"))).all()


def test_missing_adapter_names_the_two_ways_on(tmp_path, evaluated, capsys):
    assert Run(tmp_path, evaluated.data).main() == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: no fine-tuned model in {tmp_path}")
    assert "fine_tune_model.py" in error and "--base-only" in error
    assert not list(tmp_path.iterdir())


def test_rows_the_adapter_may_have_been_trained_on_are_refused(run, tmp_path, capsys):
    assert run.main(split_seed=7) == 1
    error = capsys.readouterr().err
    assert "the adapter may have been trained on test rows" in error
    assert "--split-seed" in error and "fine_tune_model.py" in error
    test_row = load_held_out(run.folder / "fine_tuned_sentiment_model")[0]
    other = {"animal": "plant", "plant": "animal"}[test_row.label]
    rows = [(text, other if text == test_row.text else label) for text, label in small_rows(ROWS)]
    relabelled = write_csv(tmp_path / "relabelled.csv", rows)
    assert Run(run.folder, relabelled).main() == 1
    assert "other rows than this data" in capsys.readouterr().err
    assert not run.cache.exists()


def test_adapter_of_another_base_model_is_refused(run, tiny_model_folder, capsys):
    assert run.main(model=tiny_model_folder("llama")) == 1
    assert "was trained on other weights" in capsys.readouterr().err
    assert not run.cache.exists()


def test_adapter_of_another_question_is_refused(run, capsys):
    assert run.main(question="Is there a plant in this text? Answer yes or no.") == 1
    error = capsys.readouterr().err
    assert f"was trained for the question {QUESTION!r}" in error
    assert "fine_tune_model.py with the same --question and --labels" in error
    assert not run.cache.exists()


def test_metadata_is_written_last_and_the_next_run_recovers_without_scoring_again(
    run, scored, capsys
):
    (run.cache / "calibrated_results.json").mkdir(parents=True)  # cannot be replaced by a file
    assert run.main() == 1
    assert f"error: cannot write {run.cache / 'calibrated_results.json'}" in capsys.readouterr().err
    assert not (run.cache / "evaluation_metadata.json").exists()
    n_scored = len(scored)
    (run.cache / "calibrated_results.json").rmdir()
    assert run.main() == 0
    assert len(scored) == n_scored
    assert {p.name for p in run.cache.iterdir()} == CACHE_FILES


def test_cache_folder_that_cannot_be_written_is_a_clear_error(run, capsys):
    run.cache.write_text("a file where the folder should be")
    assert run.main() == 1
    assert f"error: cannot write {run.cache}" in capsys.readouterr().err


def interrupt_after(monkeypatch, chunks):
    """Ctrl-C once so many chunks of texts have been scored."""
    classify, calls = TransformerLogprobsClassifier.classify_batch, []

    def interrupted(self, texts, *arguments, **options):
        if len(calls) == chunks:
            raise KeyboardInterrupt
        calls.append(len(texts))
        return classify(self, texts, *arguments, **options)

    monkeypatch.setattr(generate_evaluation_cache, "CHUNK", CHUNK)
    monkeypatch.setattr(TransformerLogprobsClassifier, "classify_batch", interrupted)


def test_interrupted_run_continues_with_the_missing_rows(
    run, evaluated, scored, monkeypatch, capsys
):
    monkeypatch.setattr(generate_evaluation_cache, "CHUNK", CHUNK)
    with monkeypatch.context() as patch:
        interrupt_after(patch, chunks=2)
        assert run.main() == 1
    assert "interrupted; the same command continues" in capsys.readouterr().err
    assert len(scored) == 2 * CHUNK
    assert not any((run.cache / file).exists() for file in CACHE_FILES)
    assert run.main() == 0
    n = len(load_held_out(run.folder / "fine_tuned_sentiment_model"))
    assert len(scored) == 2 * n
    assert len(set(scored[:n])) == n  # no base row twice
    for name in MODEL_FILES:
        difference = probabilities(run.results(name)) - probabilities(evaluated.results(name))
        assert np.abs(difference).max() < 1e-4
    assert {p.name for p in run.cache.iterdir()} == CACHE_FILES


def test_signals_of_an_interrupted_run_end_with_the_numbers_of_any_other(run, scored, monkeypatch):
    """Wherever it stops, no chunk is asked twice, and dropout masks are those of a whole run."""
    evaluation = replace(WITH_SIGNALS, signals="paraphrase,mc_dropout,p_true", dropout_passes=2)
    monkeypatch.setattr(generate_evaluation_cache, "CHUNK", CHUNK)
    run.generate(evaluation=evaluation)
    whole = {name: run.results(name).predictions for name in MODEL_FILES}
    n_scored = len(scored)
    for file in CACHE_FILES:
        (run.cache / file).unlink()
    scored.clear()
    chunks = (5, 9, 4, 8, 20)
    for n in chunks:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_after(patch, chunks=n)
            run.generate(evaluation=evaluation)
    run.generate(evaluation=evaluation)
    # A chunk of several passes that was interrupted in the middle is asked again from its first.
    assert n_scored <= len(scored) <= n_scored + len(chunks) * CHUNK * 5
    for name, rows in whole.items():
        again = run.results(name).predictions
        timeless = [replace(p, latency_sec=None, passes=None) for p in rows]
        assert [replace(p, latency_sec=None, passes=None) for p in again] == timeless


def test_interrupted_run_leaves_the_earlier_evaluation_whole(run, monkeypatch):
    run.generate(base_only=True)
    before = all_files(run.cache)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, chunks=1)
        run.generate()
    left = all_files(run.cache)
    assert {name: left[name] for name in before} == before
    assert run.generate(base_only=True) == "up to date"


def test_partial_rows_of_another_evaluation_are_not_taken_over(run, scored, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, chunks=2)
        run.generate(base_only=True)
    done = len(scored)
    assert run.generate(base_only=True, evaluation=replace(EVALUATION, samples=5)) == "evaluated"
    assert len(scored) - done == len(load_held_out(run.folder / "fine_tuned_sentiment_model"))


def test_partial_file_cut_off_anywhere_gives_back_its_whole_rows(tmp_path):
    partial = PartialResults(tmp_path / "partial", "print")
    assert partial.read() == {}
    rows = [prediction_from_logprobs(f"é{i}", SENTIMENT, [-0.1, -3.0 - i]) for i in range(3)]
    partial.write(rows[:1])
    partial.append(rows[1:])
    assert partial.read() == {(row.method, row.example_id): row for row in rows}
    assert PartialResults(partial.path, "other").read() == {}
    whole = partial.path.read_bytes()
    for length in range(len(whole)):
        partial.path.write_bytes(whole[:length])
        complete = max(0, whole[:length].count(b"\n") - 1)
        assert list(partial.read().values()) == rows[:complete]


@pytest.mark.parametrize("damage", [b"\x00\x00\x00", b"[1, 2]", b'{"what": 1}', b"null", b"\xff"])
def test_partial_file_damaged_in_the_middle_gives_back_the_rows_before(tmp_path, damage):
    partial = PartialResults(tmp_path / "partial", "print")
    rows = [prediction_from_logprobs(str(i), SENTIMENT, [-0.1, -3.0]) for i in range(3)]
    partial.write(rows)
    lines = partial.path.read_bytes().split(b"\n")
    lines[2] = damage
    partial.path.write_bytes(b"\n".join(lines))
    assert list(partial.read().values()) == rows[:1]


# Mistakes.


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"label_mass"', '"label_maß"'),
        lambda text: text.replace('"identity"', '"identiti"'),
        lambda text: text.replace('"split": "test"', '"split": "exam"'),
        lambda text: "[]",
        lambda text: "",
        lambda text: text.replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 99'),
    ],
)
def test_damaged_cache_file_is_a_clear_error(tmp_path, evaluated, damage):
    text = (evaluated.cache / MODEL_FILES["base"]).read_text(encoding="utf-8")
    assert damage(text) != text
    path = tmp_path / "results.json"
    path.write_text(damage(text), encoding="utf-8")
    with pytest.raises(UserError, match=r"results\.json (is damaged|has schema 99)") as caught:
        load_results(path)
    assert str(caught.value).endswith("run: python generate_evaluation_cache.py --force")


def test_missing_cache_file_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"does not exist; run: python generate_evaluation_cache"):
        load_results(tmp_path / "results.json")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": 0}, "--temperature must be above 0 and finite, got 0.0"),
        ({"temperature": "nan"}, "--temperature must be above 0 and finite, got nan"),
        ({"temperature": "inf"}, "--temperature must be above 0 and finite, got inf"),
        ({"samples": 0}, "--samples must be above 0 and finite, got 0"),
        ({"dropout_passes": 0}, "--dropout-passes must be above 0 and finite, got 0"),
        (
            {"signals": "p_true,vibes"},
            "--signals has 'vibes'; give none, or some of paraphrase, mc",
        ),
        ({"signals": ""}, "--signals has ''; give none"),
        ({"signals": "none,p_true"}, "--signals has 'none'; give none"),
        ({"bins": -1}, "--bins must be above 0 and finite, got -1"),
        ({"resamples": 0}, "--resamples must be above 0 and finite, got 0"),
        ({"evaluation_seed": -1}, "--evaluation-seed must be at least 0, got -1"),
        ({"data": "/no/such.csv"}, "/no/such.csv does not exist"),
    ],
    ids=str,
)
def test_bad_setting_is_one_clear_error(run, capsys, setting, message):
    assert run.main("--base-only", **setting) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not run.cache.exists()
