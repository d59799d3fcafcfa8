"""The run over all tasks: its rows, its numbers, what a second run does, and its document."""

import contextlib
import gzip
import io
import json
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest

import charts
import run_all_tasks
from comparison import load_models
from report import with_interval
from run_all_tasks import SOURCES, Source, prepare_rows, tables, update_document
from settings import ROOT, TASKS_DIR, UserError, read_task
from test_fine_tune_model import small_rows
from test_run_complete_pipeline import environment, run_here

FINANCIAL = read_task("financial_sentiment")


def write_rows(path, rows):
    """A data set as the script reads it, packed if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(
        json.dumps({"id": f"row-{i}", "text": text, "label": label}) + "\n"
        for i, (text, label) in enumerate(rows)
    )
    data = lines.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def labelled(n):
    """n made-up rows of three labels."""
    names = FINANCIAL.label_names
    return [
        (text, names[("animal", "plant", "metal").index(kind)])
        for text, kind in small_rows(n, ("animal", "plant", "metal"))
    ]


def run(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "run_all_tasks.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(),
    )


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# Rows


def test_every_shipped_task_has_a_source():
    assert set(SOURCES) == {path.stem for path in TASKS_DIR.glob("*.json")}


def test_rows_are_drawn_divided_by_group_and_the_same_each_time(tmp_path):
    write_rows(tmp_path / "set.jsonl.gz", labelled(300))
    source = Source("set.jsonl.gz")
    for name in ("a", "b"):
        prepare_rows(FINANCIAL, source, tmp_path, tmp_path / f"{name}.jsonl", 200)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    rows = read_rows(tmp_path / "a.jsonl")
    shares = Counter(row["split"] for row in rows)
    assert len(rows) == 200
    for split, expected in (("train", 80), ("validation", 20), ("calibration", 50), ("test", 50)):
        assert abs(shares[split] - expected) <= 4
    splits = defaultdict(set)  # small_rows makes near-duplicates by adding a word
    for row in rows:
        splits[row["text"].removesuffix(" Really")].add(row["split"])
    assert all(len(of) == 1 for of in splits.values())
    assert len(splits) < len(rows)


def test_rows_at_the_beginning_and_labels_not_asked_for_are_left_out(tmp_path):
    rows = labelled(200)
    write_rows(tmp_path / "set.jsonl", rows)
    sentiment = read_task("sentiment")
    source = Source("set.jsonl", skip=60, left_out=("neutral",))
    prepare_rows(sentiment, source, tmp_path, tmp_path / "rows.jsonl", 1000)
    drawn = read_rows(tmp_path / "rows.jsonl")
    expected = {f"row-{i}" for i, (_, label) in enumerate(rows) if i >= 60 and label != "neutral"}
    assert {row["id"] for row in drawn} == expected
    assert {row["label"] for row in drawn} == {"positive", "negative"}


def test_a_label_that_is_not_in_the_task_is_still_an_error(tmp_path):
    write_rows(tmp_path / "set.jsonl", labelled(60))
    with pytest.raises(
        UserError, match=r"line 2 has the label 'neutral'.*not one of positive, neg"
    ):
        prepare_rows(read_task("sentiment"), Source("set.jsonl"), tmp_path, tmp_path / "x", 50)
    assert not (tmp_path / "x").exists()


# The run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(data root, output folder, flags, what it printed) of a run of one task on made-up rows."""
    folder = tmp_path_factory.mktemp("all tasks")
    root, output = folder / "sets", folder / "runs"
    write_rows(root / SOURCES["financial_sentiment"].file, labelled(120))
    flags = ["--data-root", root, "--output-dir", output, "--rows=80", "--resamples=20"]
    flags += ["--device=cpu", "--signals=p_true", "--tasks", "financial_sentiment"]
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setattr(run_all_tasks.subprocess, "run", run_here)
        patch.setattr(charts, "CHARTS", charts.named(["calibration/confusion_matrix.png"]))
        assert run_all_tasks.main([str(flag) for flag in flags]) == 0
    return root, output, flags, shown.getvalue()


def test_a_task_runs_through_the_pipeline_and_leaves_numbers_without_texts(finished):
    root, output, _, shown = finished
    assert {path.name for path in output.iterdir()} == {"financial_sentiment", "tasks.json"}
    numbers = json.loads((output / "tasks.json").read_text(encoding="utf-8"))
    (task,) = numbers["tasks"].values()
    assert sum(task["rows"].values()) == 80
    assert list(task["labels"]) == list(FINANCIAL.label_names)
    assert sum(task["labels"].values()) == pytest.approx(1, abs=1e-5)
    models = load_models(output / "financial_sentiment" / "evaluation_cache")
    for name, model in models.items():
        of = task["models"][name]
        assert of["calibrator"] == model.selected
        accuracy = model.confidence("raw")[1].mean()
        assert of["accuracy"]["estimate"] == pytest.approx(accuracy, abs=1e-6)
        for method, key in (("raw", "raw"), (model.selected, "calibrated")):
            assert of["ece"][key]["null_mean"] == pytest.approx(
                model.metrics[method]["ece"]["null_mean"], abs=1e-6
            )
            cell = with_interval(model.metrics[method]["log_loss"])
            assert cell in shown
        combined = model.entry["signals"]["combined"]
        assert of["combined"]["best_part"] == combined["best_part"]
        assert of["combined"]["worse_than"] == combined["worse_than"]
        assert with_interval(combined["difference"][combined["best_part"]]) in shown
        mass = np.exp(model.results.arrays("test")["label_logprobs"]).sum(axis=1)
        assert of["label_mass"]["mean"] == pytest.approx(mass.mean(), abs=1e-4)
    assert tables(numbers) in shown
    text = (output / "tasks.json").read_text(encoding="utf-8")
    assert not any(
        row["text"] in text for row in read_rows(output / "financial_sentiment/rows.jsonl")
    )
    assert str(root) not in text


def test_what_is_finished_is_not_done_twice(finished):
    _, output, flags, shown = finished
    numbers = (output / "tasks.json").read_bytes()
    second = run(*flags)  # with its processes
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("up to date") == 3  # training, evaluation and charts
    assert (output / "tasks.json").read_bytes() == numbers
    begin = "| task | source |"
    assert second.stdout[second.stdout.index(begin) :] == shown[shown.index(begin) :]


def test_the_document_gets_the_tables_between_its_markers(finished, tmp_path, monkeypatch):
    numbers = json.loads((finished[1] / "tasks.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(run_all_tasks, "DOCUMENT", tmp_path / "TASKS.md")
    monkeypatch.setattr(run_all_tasks, "DOCUMENT_NUMBERS", tmp_path / "tasks.json")
    (tmp_path / "TASKS.md").write_text(
        "# A\n<!-- measured: tasks -->\nold\n<!-- /measured -->\nB\n"
    )
    update_document(numbers)
    expected = f"# A\n<!-- measured: tasks -->\n{tables(numbers)}\n<!-- /measured -->\nB\n"
    assert (tmp_path / "TASKS.md").read_text(encoding="utf-8") == expected
    assert json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8")) == numbers
    (tmp_path / "TASKS.md").write_text("no block")
    with pytest.raises(UserError, match=r"TASKS\.md has 0 marker pairs named 'tasks'"):
        update_document(numbers)


def test_the_shipped_document_shows_the_shipped_numbers_and_no_others():
    text = run_all_tasks.DOCUMENT.read_text(encoding="utf-8")
    block = text.partition("<!-- measured: tasks -->")[2].partition("<!-- /measured -->")[0]
    expected = ""
    if run_all_tasks.DOCUMENT_NUMBERS.exists():
        numbers = json.loads(run_all_tasks.DOCUMENT_NUMBERS.read_text(encoding="utf-8"))
        assert set(numbers["tasks"]) == set(SOURCES)
        expected = tables(numbers)
    assert block.strip("\n") == expected


# Mistakes


def test_a_missing_data_set_is_one_clear_line(tmp_path):
    done = run("--data-root", tmp_path, "--output-dir", tmp_path / "out", "--tasks", "spam")
    assert (done.returncode, done.stdout) == (1, "")
    assert "sms_spam/part_a.jsonl does not exist" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data-root"),
        (["--data-root", ".", "--tasks", "spamm"], "invalid choice: 'spamm'"),
        (["--data-root", ".", "--rows", "0"], "--rows must be at least 1, got 0"),
        (["--data-root", ".", "--tasks", "spam", "--update-docs"], "--update-docs needs all tasks"),
    ],
)
def test_bad_usage_exits_with_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run_all_tasks.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
