"""The benchmark: its contestants answer alike, its ratios are right, its document is up to date."""

import functools
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import accelerator, arms, speed
from benchmarks.workers import Tally, Turn, Worker, ratios, take_turns
from settings import EMBEDDED_MODEL_DIR, ROOT, UserError


def run(*arguments, timeout=60):
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "speed.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def data():
    """(texts, token ids, what they begin with, label ids) of a few held-out rows."""
    texts, sequences, prefix, label_ids = arms.prompts()()
    return texts[:5], sequences[:5], prefix, label_ids


# Turns


def test_a_worker_computes_in_a_process_of_its_own():
    with Worker(functools.partial, os.getpid) as worker:
        turn = worker.run()
    assert turn.result != os.getpid()
    assert turn.wall_sec > 0 and turn.cpu_sec >= 0 and turn.peak_mib > 1 and worker.load_sec >= 0


def test_what_fails_in_a_worker_is_raised_here_with_its_reason():
    with (
        Worker(functools.partial, math.sqrt) as worker,
        pytest.raises(RuntimeError, match="ValueError"),
    ):
        worker.run(-1.0)
    with pytest.raises(RuntimeError, match="ModuleNotFoundError"):
        Worker(__import__, "no_such_module")
    with Worker(functools.partial, os._exit) as worker, pytest.raises(RuntimeError, match="with 3"):
        worker.run(3)


def test_contestants_take_turns_and_every_other_round_backwards():
    order = []

    class Recorder:
        load_sec = 0.0

        def run(self, name):
            order.append(name)
            return Turn(1.0, 1.0, 1.0, name)

    take_turns({name: (Recorder(), 1, (name,)) for name in "ab"}, rounds=3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"


def test_a_ratio_is_the_median_over_rounds_and_for_each_item():
    def tally(items, walls):
        return Tally(items, 0.0, None, [Turn(w, 2 * w, 1.0, None) for w in walls])

    fast, slow = tally(10, [1.0, 2.0, 10.0]), tally(5, [2.0, 4.0, 100.0])
    assert ratios(fast, slow) == {"wall": 4.0, "cpu": 4.0}  # rounds: 2, 2, 10, twice the items
    assert slow.per_sec() == 1.25


# Contestants


def test_all_contestants_give_a_text_the_same_probabilities(data):
    texts, sequences, prefix, label_ids = data
    asked = EMBEDDED_MODEL_DIR, sequences, prefix, label_ids
    expected = arms.generate(*asked)()
    assert expected.shape == (5, 2)
    for answers in (
        arms.batched(*asked)(),
        arms.engine(*asked)(),
        arms.whole(EMBEDDED_MODEL_DIR, texts)(),
    ):
        assert np.abs(answers - expected).max() < speed.TOLERANCES["float32"]
    half = arms.engine(*asked, dtype="bfloat16")()
    assert 0 < np.abs(half - expected).max() < speed.TOLERANCES["bfloat16"]


def test_lm_evaluation_harness_gives_the_same_probabilities(data):
    pytest.importorskip("lm_eval")
    asked = EMBEDDED_MODEL_DIR, *data[1:]
    difference = arms.lm_eval(*asked)() - arms.engine(*asked)()
    assert np.abs(difference).max() < speed.TOLERANCES["float32"]


@pytest.mark.parametrize("every_position", [True, False])
def test_onnxruntime_gives_the_same_probabilities(data, tmp_path, every_position):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "model.onnx"
    arms.export(EMBEDDED_MODEL_DIR, str(path), every_position)()
    difference = (
        arms.onnxruntime(str(path), *data[1:])() - arms.engine(EMBEDDED_MODEL_DIR, *data[1:])()
    )
    assert np.abs(difference).max() < speed.TOLERANCES["float32"]


def test_a_contestant_without_its_package_is_left_out_and_named(data, monkeypatch):
    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    found, left_out = speed.contestants(EMBEDDED_MODEL_DIR, data[1:], {})
    assert speed.ENGINE in found and "generate, one by one" in found
    assert left_out["lm-evaluation-harness"] == f"needs lm_eval: {speed.INSTALL}"
    assert set(found) | set(left_out) == set(speed.CLASSIFIERS)


def test_shared_tokens_are_as_many_as_asked_for(data):
    _, sequences, prefix, _ = data
    for length in (0, 7, 48, 200):
        rows, shared = speed.with_prefix(sequences, prefix, length)
        assert len(shared) == length
        assert [row[:length] for row in rows] == [list(shared)] * len(rows)
        assert [row[length:] for row in rows] == [ids[len(prefix) :] for ids in sequences]


def test_gradients_are_those_of_rows_one_by_one():
    assert 0 < arms.gradient_difference(EMBEDDED_MODEL_DIR, 8)() < 1e-5


# The document


def test_the_document_shows_the_shipped_results_and_no_others():
    text = speed.DOCUMENT.read_text(encoding="utf-8")
    block = text.partition("<!-- measured: speed -->\n")[2].partition("<!-- /measured -->")[0]
    if speed.RESULTS.exists():
        results = json.loads(speed.RESULTS.read_text(encoding="utf-8"))
        assert not results["quick"]
        assert block.strip() == speed.tables(results)
    else:
        assert block.startswith("Not measured yet")


def test_without_results_the_document_stays_and_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "RESULTS", tmp_path / "results.json")
    before = speed.DOCUMENT.read_bytes()
    with pytest.raises(UserError, match="does not exist; run: python"):
        speed.update_document()
    assert speed.DOCUMENT.read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [("--update-docs", "--quick"), ("--quick", "--output", speed.RESULTS), ("--rounds", "5")],
)
def test_bad_usage_is_exit_code_2(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ") and "Traceback" not in done.stderr


def test_the_document_shows_every_accelerator_that_was_measured():
    text = accelerator.DOCUMENT.read_text(encoding="utf-8")
    block = text.partition("<!-- measured: accelerator -->\n")[2].partition("<!-- /measured -->")[0]
    results = json.loads(accelerator.RESULTS.read_text(encoding="utf-8"))
    assert block.strip() == accelerator.tables(results)


def test_the_operations_of_a_text_are_those_of_its_tokens_and_one_answer():
    model = arms.classifier_of(EMBEDDED_MODEL_DIR).model
    config, hidden = model.config, model.config.hidden_size
    attention, mlp = 4 * hidden**2, 3 * hidden * config.intermediate_size
    last = 2 * hidden**2 + mlp  # queries, output, feed-forward: not its keys and values
    every = config.num_hidden_layers * (attention + mlp) - last
    once = config.vocab_size * hidden + last
    assert arms.operations(model, 0, 1) == 2 * once
    assert arms.operations(model, 31, 1) == 2 * (31 * every + once)


def test_a_quick_run_on_any_device_adds_its_results(tmp_path, capsys):
    path = tmp_path / "accelerator.json"
    path.write_text('{"accelerators": [{"accelerator": "another"}]}', encoding="utf-8")
    assert accelerator.main(["--quick", "--output", str(path)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = json.loads(path.read_text(encoding="utf-8"))["accelerators"]
    assert rows == [{"accelerator": "another"}, found]
    for row in (*found["classification"], *found["training"]):
        assert row["per_sec"] > 0 and 0 < row["share_of_limit"] < 1
    assert "this engine" in found["classification"][0]["arm"]
    assert "not shared" not in found["classification"][0]["arm"]


def test_without_an_accelerator_one_line_says_what_to_do(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert accelerator.main([]) == 1
    assert "--quick" in capsys.readouterr().err


@pytest.mark.slow
def test_a_quick_run_measures_everything(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    done = run("--quick", "--output", path, timeout=1500)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results == json.loads(path.read_text(encoding="utf-8"))
    parts = results["parts"]
    for dtype in speed.TOLERANCES:
        assert parts["parity"][dtype]["largest_difference"] < parts["parity"][dtype]["tolerance"]
    assert parts["fine_tuning"]["gradient_relative_difference"] < 1e-5
    assert all(0 < row["reached_fraction"] < 1 for row in parts["matrix_rates"])
    document = tmp_path / "PERFORMANCE.md"
    document.write_text("a\n<!-- measured: speed -->\nold\n<!-- /measured -->\nb\n")
    monkeypatch.setattr(speed, "RESULTS", path)
    monkeypatch.setattr(speed, "DOCUMENT", document)
    speed.update_document()
    text = document.read_text(encoding="utf-8")
    assert text == f"a\n<!-- measured: speed -->\n{speed.tables(results)}\n<!-- /measured -->\nb\n"
    assert f"| {speed.ENGINE} |" in text
