"""The comparison of objectives: its runs, its numbers against the caches, its document."""

import json
import subprocess
import sys

import numpy as np
import pytest

import compare_objectives
from calibration_metrics import expected_calibration_error, log_loss, paired_difference
from compare_objectives import (
    METHODS,
    REFERENCE,
    comparison_numbers,
    run_settings,
    tables,
    update_document,
)
from comparison import against_reference, load_model
from records import P_TRUE
from settings import (
    OBJECTIVES,
    ROOT,
    EvaluationSettings,
    TrainingSettings,
    UserError,
    changed_flags,
)
from test_fine_tune_model import LABELS, QUESTION, small_rows, write_csv
from test_run_complete_pipeline import environment

SEEDS = ("42", "7")


def run(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "compare_objectives.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(),
    )


# The runs


def test_a_run_has_its_objective_its_seed_and_no_parameter_of_another():
    training = TrainingSettings(epochs=3, focal_gamma=3.0, label_smoothing=0.2)
    flags = {}
    for name in OBJECTIVES:
        own, evaluation = run_settings(training, EvaluationSettings(bins=9), name, 7)
        flags[name] = changed_flags(own)
        asked = P_TRUE if name in ("cross-entropy", "multi-task") else "none"
        assert evaluation == EvaluationSettings(bins=9, signals=asked)
    common = ["--epochs=3", "--train-seed=7"]
    assert flags == {
        "cross-entropy": common,
        "label-smoothing": [*common, "--objective=label-smoothing", "--label-smoothing=0.2"],
        "focal": [*common, "--objective=focal", "--focal-gamma=3.0"],
        "brier": [*common, "--objective=brier"],
        "multi-task": [*common, "--objective=multi-task"],
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(output folder, flags, first run) of a comparison on a small file with two seeds."""
    folder = tmp_path_factory.mktemp("objectives")
    data = write_csv(folder / "rows.csv", small_rows(120))
    output = folder / "runs"
    flags = ["--data", data, f"--question={QUESTION}", f"--labels={LABELS}", "--device=cpu"]
    flags += [
        "--batch-size=16",
        "--rank=4",
        "--soup=1",
        "--evaluations-per-epoch=1",
        "--resamples=30",
    ]
    flags += ["--output-dir", output, "--seeds", *SEEDS, "--objectives", "multi-task"]
    return output, flags, run(*flags)


def numbers_of(output):
    return json.loads((output / "objectives.json").read_text(encoding="utf-8"))


def models_of(output, name):
    return [load_model(output / f"{name}-{seed}" / "evaluation_cache") for seed in SEEDS]


@pytest.mark.slow
def test_every_run_has_a_folder_and_the_table_shows_the_numbers(finished):
    output, _, first = finished
    assert first.returncode == 0, first.stderr
    runs = {f"{name}-{seed}" for name in (REFERENCE, "multi-task") for seed in SEEDS}
    assert {path.name for path in output.iterdir()} == runs | {"objectives.json"}
    assert tables(numbers_of(output)) in first.stdout
    numbers = numbers_of(output)
    assert "--seeds 42 7" in numbers["command"] and "--objectives multi-task" in numbers["command"]
    assert str(output) not in json.dumps(numbers)
    settings = [of["settings"] for by_seed in numbers["runs"].values() for of in by_seed.values()]
    assert [(s["objective"], s["train_seed"]) for s in settings] == [
        (name, int(seed)) for name in (REFERENCE, "multi-task") for seed in SEEDS
    ]


@pytest.mark.slow
def test_the_numbers_are_those_of_the_caches_paired_by_seed(finished):
    output = finished[0]
    numbers = numbers_of(output)
    plain, taught = (models_of(output, name) for name in (REFERENCE, "multi-task"))
    group = np.concatenate([model.group for model in plain])
    for method in METHODS:
        found = numbers["comparison"][method]["multi-task"]
        label = np.concatenate([model.label for model in plain])
        pair = [
            np.concatenate([model.probabilities[method] for model in of]) for of in (plain, taught)
        ]
        losses = [-np.log(p[np.arange(len(label)), label]) for p in pair]
        for name, p in zip((REFERENCE, "multi-task"), pair, strict=True):
            assert found["log_loss"][name] == pytest.approx(log_loss(p, label))
            correct = p.argmax(1) == label
            assert found["accuracy"][name] == pytest.approx(correct.mean())
            assert found["ece"][name] == pytest.approx(
                expected_calibration_error(p.max(1), correct)
            )
        assert found["log_loss"]["estimate"] == pytest.approx((losses[1] - losses[0]).mean())
        # Whole groups are drawn with all their seeds: twice the rows, but no more groups.
        seed = EvaluationSettings().evaluation_seed
        expected = paired_difference(losses[1], losses[0], group, seed=seed)
        assert found["log_loss"]["low"] == pytest.approx(expected["low"])
        assert found["log_loss"]["high"] == pytest.approx(expected["high"])
    assert numbers["n"] * len(SEEDS) == len(group)
    assert numbers["n_groups"] == len(np.unique(group))


@pytest.mark.slow
def test_p_true_is_read_from_the_caches_of_both_models(finished):
    output = finished[0]
    numbers = numbers_of(output)
    assert set(numbers["p_true"]) == {REFERENCE, "multi-task"}
    for name, table in numbers["p_true"].items():
        rows = [model.results.arrays("test", P_TRUE) for model in models_of(output, name)]
        own = [model.results.arrays("test") for model in models_of(output, name)]
        confidence = np.concatenate([of["confidence"] for of in rows])
        correct = np.concatenate([of["correct"] for of in own])
        assert table[P_TRUE]["raw_ece"]["estimate"] == pytest.approx(
            expected_calibration_error(confidence, correct)
        )
        right = np.where(correct, confidence, 1 - confidence)
        assert table[P_TRUE]["raw_log_loss"]["estimate"] == pytest.approx(-np.log(right).mean())
        for method in ("token_probability", P_TRUE):
            judged = [m.entry["signals"]["methods"][method] for m in models_of(output, name)]
            after = np.mean([one["metrics"]["log_loss"]["estimate"] for one in judged])
            assert table[method]["log_loss"]["estimate"] == pytest.approx(after)


@pytest.mark.slow
def test_what_is_finished_is_not_done_twice(finished):
    output, flags, _ = finished
    before = (output / "objectives.json").read_bytes()
    second = run(*flags)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("up to date") == 8  # training and evaluation of four runs
    assert (output / "objectives.json").read_bytes() == before


@pytest.mark.slow
def test_a_model_that_cannot_be_asked_for_p_true_is_a_sentence(finished):
    output = finished[0]
    folders = {
        name: {s: output / f"{name}-{s}" for s in SEEDS} for name in (REFERENCE, "multi-task")
    }
    numbers = comparison_numbers(folders, "command", EvaluationSettings())
    numbers["p_true"]["multi-task"] = {"left_out": "the question takes 9 of 8 tokens"}
    text = " ".join(tables(numbers).split())
    assert "After multi-task P(True) cannot be judged: the question takes 9 of 8 tokens." in text
    assert "multi-task, P(True)" not in text
    assert "cross-entropy, P(True)" in text


# The arithmetic


def test_a_real_difference_is_found_and_holm_counts_every_test():
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.05, 0.95, 600)
    label = (rng.uniform(size=600) > truth).astype(int)
    group = (np.arange(600) // 2).astype(str)
    good = np.column_stack([truth, 1 - truth])
    sharp = good**4 / (good**4).sum(1, keepdims=True)
    answers = {"good": {"raw": good}, "sharp": {"raw": sharp}, "same": {"raw": good.copy()}}
    table = against_reference(answers, label, group)["raw"]
    assert table["sharp"]["log_loss"]["p_value_holm"] < 0.01
    assert table["sharp"]["log_loss"]["estimate"] > 0
    assert table["sharp"]["ece"]["estimate"] > 0.05
    assert table["sharp"]["aurc"]["estimate"] == pytest.approx(0, abs=1e-9)  # order is the same
    assert (table["same"]["brier"]["estimate"], table["same"]["brier"]["p_value_holm"]) == (0, 1)
    both = against_reference(
        {name: {"raw": of["raw"], "platt": of["raw"]} for name, of in answers.items()}, label, group
    )["raw"]["sharp"]
    least = min((both[score] for score in ("log_loss", "brier")), key=lambda d: d["p_value"])
    assert least["p_value_holm"] == pytest.approx(12 * least["p_value"])  # 2 methods · 2 · 3 scores


# The document


@pytest.mark.slow
def test_the_document_gets_the_tables_between_its_markers(finished, tmp_path, monkeypatch):
    numbers = numbers_of(finished[0])
    document = tmp_path / "OBJECTIVES.md"
    monkeypatch.setattr(compare_objectives, "DOCUMENT", document)
    monkeypatch.setattr(compare_objectives, "DOCUMENT_NUMBERS", tmp_path / "objectives.json")
    document.write_text("A\n<!-- measured: objectives -->\nold\n<!-- /measured -->\nB\n")
    update_document(numbers)
    expected = f"A\n<!-- measured: objectives -->\n{tables(numbers)}\n<!-- /measured -->\nB\n"
    assert document.read_text(encoding="utf-8") == expected
    assert json.loads((tmp_path / "objectives.json").read_text(encoding="utf-8")) == numbers
    (tmp_path / "objectives.json").unlink()
    document.write_text("no block")
    with pytest.raises(UserError, match=r"OBJECTIVES\.md has 0 marker pairs named 'objectives'"):
        update_document(numbers)
    assert not (tmp_path / "objectives.json").exists()


def test_the_shipped_document_names_every_objective_and_shows_the_shipped_numbers():
    text = compare_objectives.DOCUMENT.read_text(encoding="utf-8")
    for name, parameters in OBJECTIVES.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        for parameter in parameters:
            default = getattr(TrainingSettings, parameter)
            assert row.endswith(f"{default:g} |")
            assert f"--{parameter.replace('_', '-')}" in row
    block = text.partition("<!-- measured: objectives -->\n")[2].partition("\n<!-- /measured")[0]
    if compare_objectives.DOCUMENT_NUMBERS.exists():
        numbers = json.loads(compare_objectives.DOCUMENT_NUMBERS.read_text(encoding="utf-8"))
        assert set(numbers["runs"]) == set(OBJECTIVES)
        assert block == tables(numbers)
    else:
        assert block.startswith("Not measured yet")


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objectives", "mse"], "invalid choice: 'mse'"),
        (["--objectives", REFERENCE], "invalid choice: 'cross-entropy'"),
        (["--seeds", "1", "2", "1"], "--seeds has 1 twice"),
        (["--objective", "focal"], "unrecognized arguments: --objective focal"),
        (["--objectives", "focal", "--update-docs"], "--update-docs needs all objectives"),
        (["--data", "x.csv", "--update-docs"], "--update-docs is for the texts of dataset/"),
    ],
)
def test_bad_usage_exits_with_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        compare_objectives.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_that_fails_is_named_and_leaves_no_numbers(tmp_path):
    data = write_csv(tmp_path / "rows.csv", small_rows(60))
    flags = ["--data", data, f"--question={QUESTION}", f"--labels={LABELS}", "--device=cpu"]
    done = run(*flags, "--rank=0", "--output-dir", tmp_path / "runs")
    assert done.returncode == 1
    assert "error: --rank must be above 0, got 0" in done.stderr
    assert "error: the run 'cross-entropy, seed 42' failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "objectives.json").exists()
