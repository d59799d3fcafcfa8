"""The whole pipeline as a user runs it: its configuration, its stages and what they leave."""

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

import charts
import run_complete_pipeline
from records import load_results
from run_complete_pipeline import SETTINGS, flags, parse, stages
from settings import (
    ROOT,
    EvaluationSettings,
    ModelSettings,
    OutputSettings,
    TaskSettings,
    TrainingSettings,
    from_arguments,
)
from test_fine_tune_model import LABELS, QUESTION, command_line, small_rows, write_csv

CONFIG = """
[task]
question = "Is this spam? Answer yes or no."
labels = "spam=yes,ham=no"

[training]
epochs = 7
learning_rate = 1e-3
dropout = 0

[evaluation]
samples = 9
"""
SCRIPT = str(ROOT / "run_complete_pipeline.py")


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::RuntimeWarning"}


def run_pipeline(*arguments, **variables):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment() | variables,
    )


def run_here(command):
    """`subprocess.run` of a script of the repository, without a new process that would import
    torch again. One run of each test module starts the processes."""
    _, script, *arguments = command
    code = importlib.import_module(Path(script).stem).main(arguments)
    return subprocess.CompletedProcess(command, code)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


# The configuration.


def test_values_of_the_file_are_applied_and_flags_win(tmp_path):
    config = write(tmp_path / "run.toml", CONFIG)
    arguments = parse(["--config", str(config), "--samples", "11", "--epochs=3"])
    training = from_arguments(TrainingSettings, arguments)
    assert (training.epochs, training.learning_rate, training.dropout) == (3, 1e-3, 0)
    assert training.rank == TrainingSettings().rank
    assert from_arguments(EvaluationSettings, arguments).samples == 11
    assert from_arguments(TaskSettings, arguments).build().label_names == ("spam", "ham")


def test_no_two_tables_share_the_name_of_a_setting():
    names = [f.name for cls in SETTINGS for f in fields(cls)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[trainig]\nepochs = 3", "[trainig] is no table of settings; known: task, model, data"),
        ("epochs = 3", "[epochs] is no table of settings"),
        ("[training]\nepoch = 3", "[training] has no setting 'epoch'; known: rank, alpha"),
        ("[training]\nsamples = 3", "[training] has no setting 'samples'"),
        ("[training\nepochs = 3", "is not valid TOML: "),
        ("[task]\nquestion = 'a", "is not valid TOML: "),
        ("[training]\nepochs = 3.0", "[training] epochs must be a whole number, got 3.0"),
        ("[training]\nepochs = '3'", "[training] epochs must be a whole number, got '3'"),
        ("[training]\nepochs = true", "[training] epochs must be a whole number, got True"),
        ("[training]\ndropout = 'some'", "[training] dropout must be a number, got 'some'"),
        ("[training.rank]\nvalue = 3", "[training] rank must be a whole number, got {'value': 3}"),
        ("[task]\nlabels = ['a', 'b']", "[task] labels must be text, got ['a', 'b']"),
        ("[output]\noutput_dir = 3", "[output] output_dir must be text, got 3"),
    ],
)
def test_what_does_not_belong_into_the_file_is_one_clear_error(tmp_path, capsys, text, message):
    config = write(tmp_path / "run.toml", text)
    assert run_complete_pipeline.main(["--config", str(config)]) == 1
    out, error = capsys.readouterr()
    assert error.startswith(f"error: {config}")
    assert message in error
    assert out == ""  # no stage was started


def test_missing_or_binary_configuration_is_one_clear_error(tmp_path, capsys):
    assert run_complete_pipeline.main(["--config", str(tmp_path / "no.toml")]) == 1
    assert capsys.readouterr().err.startswith(f"error: cannot read {tmp_path / 'no.toml'}")
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe\x00")
    assert run_complete_pipeline.main(["--config", str(tmp_path / "run.toml")]) == 1
    assert "is not valid TOML" in capsys.readouterr().err


def test_stages_get_only_what_differs_from_the_defaults(tmp_path):
    assert flags(parse([]), *SETTINGS) == []
    arguments = parse(["--model=qwen2.5-0.5b", "--epochs=1", "--question=Good?", "--samples=9"])
    assert flags(arguments, TaskSettings, ModelSettings) == [
        "--question=Good?",
        "--model=qwen2.5-0.5b",
    ]
    assert flags(arguments, TrainingSettings) == ["--epochs=1"]
    assert flags(arguments, EvaluationSettings) == ["--samples=9"]


def test_plan_has_the_stages_asked_for(tmp_path):
    output = OutputSettings(output_dir=str(tmp_path))

    def plan(*arguments):
        return {title: flags for title, _, flags in stages(parse(list(arguments)), output)}

    assert list(plan()) == ["fine-tuning", "evaluation", "charts"]
    assert list(plan("--skip-images")) == ["fine-tuning", "evaluation"]
    assert plan("--force-retrain")["fine-tuning"] == ["--force-retrain"]
    alone = plan("--skip-finetuning", "--samples=9")
    assert list(alone) == ["evaluation", "charts"]
    assert alone["evaluation"] == ["--samples=9", "--base-only"]
    (tmp_path / "fine_tuned_sentiment_model").mkdir()
    write(tmp_path / "fine_tuned_sentiment_model/manifest.json", "{}")
    assert plan("--skip-finetuning")["evaluation"] == []


# The run.


def test_failing_stage_is_named_with_the_next_step_and_ends_the_run(tmp_path):
    done = run_pipeline(f"--data={tmp_path / 'no.csv'}", f"--output-dir={tmp_path / 'out'}")
    assert done.returncode == 1
    assert f"{tmp_path / 'no.csv'} does not exist" in done.stderr
    assert "error: the stage 'fine-tuning' ended with exit code 1" in done.stderr
    assert "run the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert "[2/3]" not in done.stdout
    assert not (tmp_path / "out").exists()


def test_bad_usage_exits_with_2():
    done = run_pipeline("--epochs=many")
    assert done.returncode == 2
    assert "--epochs: invalid int value: 'many'" in done.stderr


def test_whole_pipeline_runs_on_a_question_of_ones_own_and_then_has_nothing_to_do(tmp_path):
    data = write_csv(tmp_path / "animals and plants.csv", small_rows(120))
    output = tmp_path / "my run"
    config = write(
        tmp_path / "run.toml",
        f"""
[task]
question = "{QUESTION}"
labels = "{LABELS}"
[model]
device = "cpu"
[data]
data = '{data}'
[training]
epochs = 3
soup = 1
rank = 8
[evaluation]
resamples = 20
dropout_passes = 2
[output]
output_dir = '{output}'
""",
    )
    command = ["--config", config, "--epochs=1", "--batch-size=16", "--evaluations-per-epoch=1"]
    started = time.perf_counter()
    first = run_pipeline(*command)
    first_sec = time.perf_counter() - started
    assert first.returncode == 0, first.stderr
    metrics = json.loads((output / "fine_tuned_sentiment_model/training_metrics.json").read_text())
    assert (metrics["settings"]["epochs"], metrics["settings"]["rank"]) == (1, 8)
    n = len(load_results(output / "evaluation_cache/base_model_results.json").arrays("test")["id"])
    assert f"test rows: {n}" in first.stdout
    for line in ("base model", "fine-tuned", "accuracy", "ECE, platt", "log-loss, isotonic"):
        assert line in first.stdout
    charts = json.loads((output / "images/manifest.json").read_text())["files"]
    assert {"calibration", "fine_tuning"} == {file.partition("/")[0] for file in charts}
    assert all((output / "images" / file).stat().st_size > 1000 for file in charts)
    assert f"'--question={QUESTION}'" in first.stdout  # a command that can be pasted
    assert {p.name for p in output.iterdir()} == {
        "fine_tuned_sentiment_model",
        "evaluation_cache",
        "images",
    }

    started = time.perf_counter()
    second = run_pipeline(*command, PYTHONPROFILEIMPORTTIME="1")  # of every stage, on stderr
    assert second.returncode == 0
    assert second.stdout.count("up to date") == 3
    assert time.perf_counter() - started < first_sec / 2
    imported = {line.rpartition("|")[2].strip() for line in second.stderr.splitlines()}
    assert {"fine_tune_model", "generate_evaluation_cache", "dataset_loader"} & imported
    heavy = {"torch", "transformers", "peft", "accelerate", "sklearn", "matplotlib"}
    assert heavy & imported == set()
    closing = first.stdout.index("test rows:"), second.stdout.index("test rows:")
    tables = [
        run.stdout[start : run.stdout.index("seconds:")]
        for run, start in zip((first, second), closing, strict=True)
    ]
    assert tables[0] == tables[1]
    assert "Traceback" not in first.stderr + second.stderr


def test_whole_pipeline_runs_with_lettered_options_from_a_task_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_complete_pipeline.subprocess, "run", run_here)
    monkeypatch.setattr(charts, "CHARTS", charts.named(["calibration/confusion_matrix.png"]))
    labels = ("animal", "plant", "metal")
    task = {
        "name": "kind",
        "question": "What does this text name?",
        "labels": [{"name": label, "words": [f"some {label}"]} for label in labels],
        "lettered": True,
        "wordings": ["Which of these is in the text?"],
    }
    settings = {
        "data": write_csv(tmp_path / "three.csv", small_rows(120, labels)),
        "task": write(tmp_path / "kind.json", json.dumps(task)),
        "device": "cpu",
        "epochs": 1,
        "soup": 1,
        "batch_size": 16,
        "evaluations_per_epoch": 1,
        "resamples": 20,
        "signals": "paraphrase",
        "output_dir": tmp_path,
    }
    assert run_complete_pipeline.main(command_line(settings)) == 0
    shown = capsys.readouterr().out
    calibrated = json.loads((tmp_path / "evaluation_cache/calibrated_results.json").read_text())
    for name in ("base", "finetuned"):
        results = load_results(tmp_path / f"evaluation_cache/{name}_model_results.json")
        assert results.task.label_names == labels and results.identity["orders"] == 3
        test = results.arrays("test")
        assert test["label_logprobs"].shape == (len(test["id"]), 3)
        for method in calibrated["models"][name]["test"]["methods"].values():
            rows = method["probabilities"]
            assert all(len(row) == 3 and abs(sum(row) - 1) < 1e-6 for row in rows)
    assert "accuracy" in shown
    (file,) = json.loads((tmp_path / "images/manifest.json").read_text())["files"]
    assert (tmp_path / "images" / file).stat().st_size > 1000
