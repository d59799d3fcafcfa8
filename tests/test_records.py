"""Rows, their JSON, files written whole or not at all, and the cache they make up."""

import csv
import json
import math
import re
import subprocess
import sys
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from dataset_loader import load_examples
from generate_evaluation_cache import generate
from records import (
    CONSISTENCY,
    LOW_LABEL_MASS,
    MODEL_FILES,
    SCHEMA_VERSION,
    TOKEN_PROBABILITY,
    Example,
    ModelResults,
    Prediction,
    atomic_path,
    changed_packages,
    label_probabilities,
    load_held_out,
    load_results,
    prediction_from_json,
    prediction_from_logprobs,
    prediction_to_json,
    read_json,
    versions,
    write_json,
)
from settings import (
    ROOT,
    SENTIMENT,
    DataSettings,
    EvaluationSettings,
    Label,
    ModelSettings,
    OutputSettings,
    Task,
    UserError,
)

TOPIC = Task("topic", "Which topic?", tuple(Label(name, (name,)) for name in ("a", "b", "c")))
NEXT_STEP = "run: python do_it_again.py"


# Predictions


def test_a_prediction_follows_from_its_log_probabilities():
    p = prediction_from_logprobs("e1", TOPIC, np.log([0.2, 0.5, 0.1]), latency_sec=0.5)
    assert (p.example_id, p.method, p.predicted) == ("e1", TOKEN_PROBABILITY, "b")
    assert p.label_logprobs == pytest.approx([math.log(0.2), math.log(0.5), math.log(0.1)])
    assert p.label_mass == pytest.approx(0.8)
    assert p.probability == pytest.approx(0.2 / 0.8)
    assert p.confidence == pytest.approx(0.5)
    assert p.margin == pytest.approx(math.log(0.5 / 0.2))
    assert (p.truncated, p.latency_sec, p.label_counts, p.error) == (False, 0.5, None, None)


def test_probabilities_never_exceed_one_and_the_first_of_equals_is_predicted():
    p = prediction_from_logprobs("e1", SENTIMENT, [1e-7, -40.0])
    assert p.label_mass == p.confidence == 1.0
    tie = prediction_from_logprobs("e1", SENTIMENT, [-1.0, -1.0])
    assert (tie.predicted, tie.probability, tie.margin) == ("positive", 0.5, 0.0)


@pytest.mark.parametrize(
    "logprobs", [[-1.0], [-1.0, -2.0, -3.0], [[-1.0, -2.0]], [-1.0, math.nan], [-1.0, -math.inf]]
)
def test_log_probabilities_of_another_shape_or_not_finite_are_refused(logprobs):
    with pytest.raises(ValueError, match="expected 2 finite log-probabilities"):
        prediction_from_logprobs("e1", SENTIMENT, logprobs)


def test_label_probabilities_keep_ratios_however_small_the_numbers():
    logprobs = np.array([[[-1000.0, -1000.0 - math.log(3)], [-1.0, -800.0]]])  # (1, 2, 2)
    assert label_probabilities(logprobs) == pytest.approx(np.array([[[0.75, 0.25], [1.0, 0.0]]]))
    assert label_probabilities([700.0, 700.0, 700.0]) == pytest.approx([1 / 3] * 3)


finite = st.floats(-1e6, 0)
share = st.floats(0, 1)
PREDICTIONS = st.builds(
    Prediction,
    example_id=st.text(min_size=1),
    method=st.sampled_from([TOKEN_PROBABILITY, CONSISTENCY]),
    label_logprobs=st.none() | st.tuples(finite, finite),
    label_mass=st.none() | share,
    predicted=st.none() | st.sampled_from(SENTIMENT.label_names),
    probability=st.none() | share,
    confidence=st.none() | share,
    label_counts=st.none() | st.tuples(st.integers(0, 20), st.integers(0, 20)),
    pass_logprobs=st.none() | st.lists(st.tuples(finite, finite), min_size=1).map(tuple),
    passes=st.none() | st.floats(0, 100),
    truncated=st.booleans(),
    latency_sec=st.none() | st.floats(0, 1e3),
    error=st.none() | st.text(min_size=1),
)


@hypothesis_settings(deadline=None)
@given(PREDICTIONS)
def test_a_prediction_survives_json(prediction):
    assert (
        prediction_from_json(json.loads(json.dumps(prediction_to_json(prediction)))) == prediction
    )


def test_json_leaves_out_what_is_not_set_and_keeps_zero():
    row = Prediction("e1", CONSISTENCY, (-1.0, -2.0), 0.0, "positive", 0.0, 0.0, (0, 0))
    assert prediction_to_json(row) == {
        "example_id": "e1",
        "method": CONSISTENCY,
        "label_logprobs": (-1.0, -2.0),
        "label_mass": 0.0,
        "predicted": "positive",
        "probability": 0.0,
        "confidence": 0.0,
        "label_counts": (0, 0),
    }
    failed = Prediction("e2", TOKEN_PROBABILITY, error="empty")
    assert set(prediction_to_json(failed)) == {"example_id", "method", "error"}
    assert prediction_to_json(replace(row, truncated=True))["truncated"] is True


def test_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="unknown prediction field 'confidenze'"):
        prediction_from_json({"example_id": "e1", "method": CONSISTENCY, "confidenze": 0.5})


def test_an_example_knows_the_splits():
    assert Example("e1", "text", "positive", split="test").split == "test"
    with pytest.raises(ValueError, match=r"split must be one of train, .* got 'dev'"):
        Example("e1", "text", "positive", split="dev")


# Model results


def model_results():
    """Six examples: one failed, one without any prediction, one truncated, one off the subject."""
    examples = (
        Example("e1", "one", "positive", "strong", "sport", "g1", "test"),
        Example("e2", "two", "negative", "weak", None, "g1", "calibration"),
        Example("e3", "three", "negative", None, None, None, "test"),
        Example("e4", "four", "positive", None, None, None, "test"),
        Example("e5", "five", "positive", None, None, None, "test"),
        Example("e6", "six", "positive", None, None, None, "calibration"),
    )
    predictions = (
        prediction_from_logprobs("e3", SENTIMENT, np.log([0.6, 0.3]), truncated=True),
        prediction_from_logprobs("e1", SENTIMENT, np.log([0.9, 0.1])),
        prediction_from_logprobs("e2", SENTIMENT, np.log([0.01, 0.02])),
        Prediction("e4", TOKEN_PROBABILITY, error="the text is empty"),
        prediction_from_logprobs("e6", SENTIMENT, np.log([0.8, 0.1])),
        Prediction("e1", CONSISTENCY, (-0.1, -3.0), 1.0, "positive", 0.95, 0.95, (19, 1)),
        Prediction("e3", CONSISTENCY, (-0.7, -0.7), 0.0, "positive", 0.5, 0.0, (0, 0)),
    )
    identity = {"model": "none", "fingerprint": "0" * 16}
    return ModelResults("base", SENTIMENT, identity, examples, predictions, {"seconds": 1.0})


def test_counts_say_what_became_of_every_row():
    assert model_results().counts() == {
        "requested": 6,
        "scored": 4,
        "failed": 2,
        "truncated": 1,
        "low_label_mass": 1,
    }


def test_a_label_mass_of_zero_counts_as_low():
    assert model_results().counts(CONSISTENCY)["low_label_mass"] == 1


def test_arrays_hold_the_scored_rows_of_a_split_in_the_order_of_the_examples():
    test = model_results().arrays("test")
    assert test.pop("split") == "test"
    lists = {name: values.tolist() for name, values in test.items()}
    assert np.exp(lists.pop("label_logprobs")) == pytest.approx(np.array([[0.9, 0.1], [0.6, 0.3]]))
    assert lists.pop("label_mass") == pytest.approx([1.0, 0.9])
    assert lists.pop("probability") == pytest.approx([0.9, 2 / 3])
    assert lists.pop("confidence") == pytest.approx([0.9, 0.6])
    assert lists == {
        "id": ["e1", "e3"],
        "category": ["strong", ""],
        "domain": ["sport", ""],
        "group": ["g1", "e3"],
        "label": [0, 1],
        "predicted": [0, 0],
        "correct": [True, False],
    }
    assert model_results().arrays("calibration")["id"].tolist() == ["e2", "e6"]


def test_arrays_of_k_labels_have_k_columns():
    examples = tuple(Example(f"e{i}", "", "c", split="test") for i in range(4))
    rows = tuple(prediction_from_logprobs(e.id, TOPIC, [-3.0, -2.0, -1.0]) for e in examples)
    test = ModelResults("base", TOPIC, {}, examples, rows, {}).arrays("test")
    assert test["label_logprobs"].shape == (4, 3)
    assert test["label"].tolist() == test["predicted"].tolist() == [2] * 4
    assert all(test[name].shape == (4,) for name in test if name not in ("split", "label_logprobs"))


@pytest.mark.parametrize(
    ("split", "method"),
    [("train", TOKEN_PROBABILITY), ("no-split", TOKEN_PROBABILITY), ("calibration", CONSISTENCY)],
)
def test_rows_that_are_not_there_are_an_error(split, method):
    with pytest.raises(UserError, match=f"base: no scored {split} rows of {method}"):
        model_results().arrays(split, method)


# Files


def test_results_survive_their_file_without_the_texts(tmp_path):
    results = model_results()
    write_json(tmp_path / "base.json", results.to_json())
    loaded = load_results(tmp_path / "base.json")
    assert loaded == replace(results, examples=tuple(replace(e, text="") for e in results.examples))
    assert '"one"' not in (tmp_path / "base.json").read_text()
    data = json.loads((tmp_path / "base.json").read_text())
    assert data["schema_version"] == SCHEMA_VERSION
    assert data["counts"] == {m: results.counts(m) for m in (TOKEN_PROBABILITY, CONSISTENCY)}
    assert data["examples"][2] == {"id": "e3", "label": "negative", "split": "test"}


def test_rows_take_one_line_each(tmp_path):
    data = {
        "name": "é\n",
        "rows": [{"a": 1, "b": [1, 2]}, {"a": 2}],
        "none": [],
        "deep": {"x": [1]},
    }
    write_json(tmp_path / "f.json", data)
    text = (tmp_path / "f.json").read_text(encoding="utf-8")
    assert json.loads(text) == data
    assert '\n  {"a": 1, "b": [1, 2]},\n  {"a": 2}\n' in text and "é" in text
    write_json(tmp_path / "f.json", {})
    assert read_json(tmp_path / "f.json", NEXT_STEP) == {}


@pytest.mark.parametrize(
    "value", [math.nan, [math.inf], [{"a": math.nan}], {"deep": {"a": [math.nan]}}]
)
def test_not_a_number_is_never_written(tmp_path, value):
    write_json(tmp_path / "f.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "f.json", {"a": value})
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]
    assert read_json(tmp_path / "f.json", NEXT_STEP) == {"a": 1}


def test_a_file_takes_its_place_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "f.txt"
    with atomic_path(path) as partial:
        assert partial.parent == path.parent
        partial.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["f.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, OSError])
def test_an_error_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, error):
    path = tmp_path / "f.txt"
    path.write_text("old")
    with pytest.raises(UserError if error is OSError else error), atomic_path(path) as partial:
        partial.write_text("half of the n")
        raise error(28, "No space left on device")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f.txt"]


def test_a_path_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "f.json", tmp_path / "folder"):
        with pytest.raises(UserError, match=f"cannot write {re.escape(str(path))}: "):
            write_json(path, {"a": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is damaged"),
        (b'{"a": 1', "is damaged"),
        (b"\xff\xfe{}", "is damaged"),
        (b"[1]", "is damaged (not a JSON object)"),
        (b"null", "is damaged (not a JSON object)"),
    ],
)
def test_a_file_that_cannot_be_read_names_the_next_step(tmp_path, content, message):
    path = tmp_path / "f.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path, NEXT_STEP)
    text = str(caught.value)
    assert text.startswith(f"{path} {message}") and text.endswith(f"; {NEXT_STEP}")
    assert "\n" not in text


def test_a_folder_in_place_of_a_file_names_the_next_step(tmp_path):
    with pytest.raises(UserError, match=f"cannot be read .*; {NEXT_STEP}"):
        read_json(tmp_path, NEXT_STEP)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("schema_version"), f"has schema None, not {SCHEMA_VERSION}"),
        (
            lambda d: d.update(schema_version=SCHEMA_VERSION + 1),
            f"has schema {SCHEMA_VERSION + 1}, not {SCHEMA_VERSION}",
        ),
        (lambda d: d.pop("task"), "is damaged (KeyError: 'task')"),
        (lambda d: d.update(predictions=None), "is damaged (TypeError"),
        (lambda d: d["predictions"][0].update(colour="red"), "unknown prediction field 'colour'"),
        (lambda d: d["predictions"][0].pop("method"), "is damaged (TypeError"),
        (lambda d: d["examples"][0].update(split="dev"), "split must be one of"),
        (lambda d: d["examples"][0].update(colour="red"), "is damaged (TypeError"),
    ],
)
def test_a_damaged_cache_file_is_one_line_with_the_next_step(tmp_path, change, message):
    data = json.loads(json.dumps(model_results().to_json()))
    change(data)
    write_json(tmp_path / "base.json", data)
    with pytest.raises(UserError) as caught:
        load_results(tmp_path / "base.json")
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "base.json")) and message in text
    assert text.endswith("; run: python generate_evaluation_cache.py --force") and "\n" not in text


def test_held_out_rows_survive_their_file(tmp_path):
    examples = list(model_results().examples)
    write_json(tmp_path / "test_set.json", {"examples": [asdict(e) for e in examples]})
    assert load_held_out(tmp_path) == examples
    for broken in ({}, {"examples": [{"id": "e1"}]}, {"examples": 5}):
        write_json(tmp_path / "test_set.json", broken)
        with pytest.raises(UserError, match=r"test_set.json is damaged .*fine_tune_model.py"):
            load_held_out(tmp_path)


def test_versions_are_those_of_this_interpreter():
    assert versions()["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions()["numpy"] == np.__version__


def test_changed_packages_are_named_with_both_versions():
    assert changed_packages(versions()) == ""
    assert changed_packages({}) == ""  # of a result that kept none
    older = versions() | {"python": "3.9.1", "numpy": "1.0", "peft": "0.1"}
    now = versions()
    assert changed_packages(older) == f"peft 0.1 → {now['peft']}, numpy 1.0 → {now['numpy']}"


# A real cache and the document that describes it


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The results folder of the base model evaluated on a few hundred of the shipped texts."""
    folder = tmp_path_factory.mktemp("run")
    rows = load_examples(DataSettings(), SENTIMENT)[::25]
    with (folder / "small.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "category"])
        writer.writerows((e.text, e.label, e.category) for e in rows)
    data = DataSettings(data=str(folder / "small.csv"), category_column="category")
    output = OutputSettings(str(folder))
    evaluation = EvaluationSettings(resamples=50)
    assert generate(SENTIMENT, ModelSettings(), data, evaluation, output, True) == "evaluated"
    return output


def test_a_real_cache_has_a_prediction_a_row_and_method(output):
    results = load_results(output.cache / MODEL_FILES["base"])
    for method in (TOKEN_PROBABILITY, CONSISTENCY):
        ids = [p.example_id for p in results.predictions if p.method == method]
        assert ids == [e.id for e in results.examples]
        assert results.counts(method)["scored"] == len(ids)
    metadata = read_json(output.cache / "evaluation_metadata.json", NEXT_STEP)
    for split, n in metadata["rows"].items():
        assert n == len(results.arrays(split)["id"]) > 10
    mass = results.arrays("test")["label_mass"]
    assert ((mass > 0) & (mass <= 1)).all()
    assert metadata["models"]["base"]["counts"]["low_label_mass"] == sum(
        p.label_mass < LOW_LABEL_MASS for p in results.predictions if p.method == TOKEN_PROBABILITY
    )


def keys(value, own=("label_words",)):
    """All keys of a JSON value; `own` ones hold names of the user's task below them."""
    if isinstance(value, list):
        return {k for item in value for k in keys(item)}
    if not isinstance(value, dict):
        return set()
    below = {k for name, item in value.items() if name not in own for k in keys(item)}
    return set(value) | below


def test_the_schema_document_names_every_field(output):
    document = (ROOT / "docs" / "CACHE_SCHEMA.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w.-]+)`", document))
    named |= {part for name in named for part in name.split(".")}
    found = {f.name for cls in (Prediction, Example) for f in fields(cls)}
    for path in output.cache.iterdir():
        assert path.name in document
        found |= keys(json.loads(path.read_text(encoding="utf-8")))
    assert found - named == set()


def test_the_python_of_the_schema_document_runs(output):
    document = (ROOT / "docs" / "CACHE_SCHEMA.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    assert blocks
    test = load_results(output.cache / MODEL_FILES["base"]).arrays("test")
    for code in blocks:
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=output.folder,
            env={"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (result.returncode, result.stderr) == (0, "")
        assert f"{test['correct'].mean():.3f}" in result.stdout
