"""Texts and files: every format, every kind of bad input, and no row lost or doubled by a kill."""

import csv
import datetime
import gzip
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from itertools import count

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import classify_cli
import ray_engine
from calibration import PlattScalingCalibrator
from classify_cli import CHUNK_ROWS, COLUMNS, Unfinished, main, open_table, rounded
from decisions import ZONES, zone_of
from forked_scripts import start_script
from records import SCHEMA_VERSION, write_json
from settings import ROOT

TEXTS = [
    "An absolutely wonderful film, I loved every minute of it.",
    'Terrible service, "cold" food\nand a rude waiter. Never again.',
    "It was fine, I suppose.",
    "电影很好看 – naïve 😀",
    "Best worst thing ever",
    "The second half starts at four o'clock.",
    "<|eot_id|> is not the end",
]
NAMES = list(COLUMNS)


@pytest.fixture(scope="module")
def calibrator():
    margin = np.linspace(-5, 5, 200)
    label = np.random.default_rng(0).random(200) < 1 / (1 + np.exp(-(0.6 * margin + 0.3)))
    return PlattScalingCalibrator().fit(margin, label)


@pytest.fixture(scope="module")
def cache_dir(classifier, calibrator, tmp_path_factory):
    """An evaluation that has a calibrator of the session's classifier."""
    folder = tmp_path_factory.mktemp("cache")
    entry = {
        "identity": classifier.identity,
        "selection": {"chosen": "platt"},
        "calibrators": {"platt": calibrator.to_json()},
    }
    cache = {"schema_version": SCHEMA_VERSION, "models": {"base": entry}}
    write_json(folder / "calibrated_results.json", cache)
    return folder


@pytest.fixture
def command(classifier, cache_dir, monkeypatch):
    """main() with the session's classifier, which is the one `base` stands for."""
    monkeypatch.setattr(classify_cli, "load_classifier", lambda *arguments: classifier)
    return lambda *arguments: main([*map(str, arguments), f"--cache-dir={cache_dir}"])


def expected_answers(classifier, calibrator, texts):
    """The answers by the public parts, one text at a time."""
    answers = []
    for text in texts:
        p = classifier.classify(text)
        first = float(calibrator.predict_proba([p.label_logprobs[0] - p.label_logprobs[1]])[0])
        chance = first if p.predicted == "positive" else 1 - first
        _, zone, action = ZONES[int(zone_of(np.array([chance]))[0])]
        values = (p.predicted, p.confidence, chance, p.label_mass, zone, action, False, None)
        answers.append(dict(zip(NAMES, values, strict=True)))
    return answers


def assert_same_answers(found, expected):
    for mine, wanted in zip(found, expected, strict=True):
        assert {k: v for k, v in mine.items() if not isinstance(v, float)} == {
            k: v for k, v in wanted.items() if not isinstance(v, float)
        }
        numbers = [(mine[k], v) for k, v in wanted.items() if isinstance(v, float)]
        for one, other in numbers:
            assert one == pytest.approx(other, abs=1e-4)


def write_csv(path, rows, delimiter=","):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def read_csv(path, delimiter=","):
    """[dict] of a CSV file, read by Python alone; empty cells of an answer become None."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=delimiter, strict=True))
    kinds = {"string": str, "float64": float, "bool": "true".__eq__}
    return [
        row | {n: kinds[COLUMNS[n]](row[n]) if row[n] else None for n in NAMES if n in row}
        for row in rows
    ]


def read_jsonl(path):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def answers_in(rows):
    return [{name: row[name] for name in NAMES} for row in rows]


def left_behind(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# One text


def test_one_text_is_answered_as_the_classifier_and_its_calibrator_answer(
    command, classifier, calibrator, capsys
):
    assert command(TEXTS[4], "--json") == 0
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    assert answer.pop("no_calibrator_because") is None and shown.err == ""
    assert_same_answers([answer], expected_answers(classifier, calibrator, [TEXTS[4]]))
    assert command(TEXTS[4]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == answer["predicted"]
    assert f"{answer['confidence']:.4f}" in lines[1]
    assert f"{answer['calibrated_confidence']:.4f}" in lines[2] and "platt" in lines[2]
    assert lines[3].endswith(f"{answer['zone']}: {answer['action']}")
    assert max(map(len, lines)) <= 80


def test_without_its_own_calibrator_an_answer_says_so_and_has_no_zone(
    classifier, cache_dir, tmp_path, monkeypatch, capsys
):
    spam = classifier.for_task(classify_cli.read_task("spam"))
    monkeypatch.setattr(classify_cli, "load_classifier", lambda *arguments: spam)
    for folder, reason in ((cache_dir, "from base in there it differs in"), (tmp_path, "no ")):
        assert main([TEXTS[0], "--json", f"--cache-dir={folder}"]) == 0
        shown = capsys.readouterr()
        (line,) = shown.err.splitlines()
        assert line.startswith("no calibrated confidence: ") and reason in line
        answer = json.loads(shown.out)
        assert answer["predicted"] in ("spam", "ham") and answer["confidence"] > 0
        assert answer["calibrated_confidence"] is answer["zone"] is answer["action"] is None
        assert reason in answer["no_calibrator_because"]
    assert main([TEXTS[0], f"--cache-dir={tmp_path}"]) == 0
    assert "zone" not in capsys.readouterr().out


def test_a_damaged_cache_is_an_error_not_a_missing_calibrator(command, cache_dir, tmp_path, capsys):
    (tmp_path / "calibrated_results.json").write_text(
        json.dumps({"schema_version": SCHEMA_VERSION, "models": 3})
    )
    assert main([TEXTS[0], f"--cache-dir={tmp_path}"]) == 1
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", " \n", "half \ud83d"])
def test_a_text_that_is_none_is_exit_code_1(command, text, capsys):
    assert command(text) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: the text ")


# Files


@pytest.mark.parametrize(
    ("name", "output", "delimiter"),
    [
        ("a.csv", "b.csv", ","),
        ("a.tsv", "b.tsv", "\t"),
        ("a.CSV", "b.csv.gz", ","),
        ("a.csv.gz", "b.csv", ","),
    ],
)
def test_a_csv_file_keeps_its_columns(
    command, classifier, calibrator, tmp_path, name, output, delimiter
):
    rows = [[str(i), text, ' "x", ', "007"] for i, text in enumerate(TEXTS)]
    path = write_csv(tmp_path / name, [["id", "review", "odd, name", "n"], *rows], delimiter)
    made = tmp_path / "new" / "folder" / output
    flags = ("--text-column", "review", "--chunk-rows", 3)
    assert command("--file", path, "--output", made, *flags) == 0
    found = read_csv(made, delimiter)
    assert list(found[0]) == ["id", "review", "odd, name", "n", *NAMES]
    assert [list(row.values())[:4] for row in found] == rows
    assert_same_answers(answers_in(found), expected_answers(classifier, calibrator, TEXTS))
    assert left_behind(made.parent) == []


@pytest.mark.parametrize(("name", "output"), [("a.jsonl", "b.jsonl"), ("a.json.gz", "b.jsonl.gz")])
def test_a_jsonl_file_keeps_what_was_written(
    command, classifier, calibrator, tmp_path, name, output
):
    odd = '"n": 1.0, "big": 123456789012345678901234567890, "e": 1e400, "a": [1, {"b": null}]'
    lines = [f'{{"text": {json.dumps(text)}, {odd}, "i": {i}}}  ' for i, text in enumerate(TEXTS)]
    raw = ("\ufeff" + "\r\n\n".join(lines)).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)
    made = tmp_path / output
    assert command("--file", path, "--output", made, "--chunk-rows", 3) == 0
    opener = gzip.open if made.suffix == ".gz" else open
    with opener(made, "rt", encoding="utf-8", newline="") as file:
        written = file.read().split("\n")
    assert written.pop() == ""
    for before, after in zip(lines, written, strict=True):
        assert after.startswith(before.rstrip()[:-1] + ", ")
    found = read_jsonl(made)
    assert_same_answers(answers_in(found), expected_answers(classifier, calibrator, TEXTS))


def test_a_text_file_becomes_a_csv_file(command, classifier, calibrator, tmp_path):
    path, made = tmp_path / "a.txt", tmp_path / "b.csv"
    lines = [text.replace("\n", " ") for text in TEXTS]
    path.write_bytes(("\r\n".join([lines[0], "", *lines[1:]]) + "\r\n").encode())
    assert command("--file", path, "--output", made) == 0
    found = read_csv(made)
    assert [row["text"] for row in found] == [lines[0], "", *lines[1:]]
    assert found[1]["error"].startswith("the text is empty")
    scored = [row for row in answers_in(found) if row["error"] is None]
    assert_same_answers(scored, expected_answers(classifier, calibrator, lines))


def odd_table():
    n = len(TEXTS)
    times = [datetime.datetime(2024, 1, 1 + i, tzinfo=datetime.UTC) for i in range(n)]
    return pyarrow.table(
        {
            "when": pyarrow.array(times, pyarrow.timestamp("us", "UTC")),
            "body": pyarrow.array([TEXTS[i % len(TEXTS)] for i in range(n)], "large_string"),
            "kind": pyarrow.array([f"k{i % 3}" for i in range(n)]).dictionary_encode(),
            "tags": pyarrow.array([[{"a": i}] * (i % 3) for i in range(n)]),
            "small": pyarrow.array([None, *range(1, n)], "int8"),
        }
    ).replace_schema_metadata({"made by": "a test"})


def test_a_parquet_file_keeps_its_types(command, classifier, calibrator, tmp_path):
    table = odd_table()
    path, made = tmp_path / "a.parquet", tmp_path / "b.parquet"
    parquet.write_table(table, path, row_group_size=4)
    flags = ("--text-column", "body", "--chunk-rows", 3)
    assert command("--file", path, "--output", made, *flags) == 0
    found = parquet.read_table(made)
    before = parquet.read_table(path)
    assert found.select(before.column_names).equals(before)
    assert found.schema.metadata[b"made by"] == b"a test"
    types = {name: str(found.schema.field(name).type) for name in NAMES}
    assert types == {n: {"float64": "double"}.get(kind, kind) for n, kind in COLUMNS.items()}
    answers = found.select(NAMES).to_pylist()
    assert_same_answers(answers, expected_answers(classifier, calibrator, TEXTS))
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("kind", ["string", "string_view", "dictionary"])
def test_a_parquet_text_may_be_any_kind_of_string(command, tmp_path, kind):
    texts = pyarrow.array(["fine film", None, "dull film"])
    texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(kind)
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    made = tmp_path / "b.parquet"
    assert command("--file", tmp_path / "a.parquet", "--output", made) == 0
    assert [bool(row["error"]) for row in parquet.read_table(made).to_pylist()] == [0, 1, 0]


def test_two_models_can_fill_one_file_with_a_prefix(command, tmp_path, capsys):
    write_csv(tmp_path / "a.csv", [["text"], [TEXTS[0]]])
    assert command("--file", tmp_path / "a.csv", "--output", tmp_path / "b.csv") == 0
    again = ("--file", tmp_path / "b.csv", "--output", tmp_path / "c.csv")
    assert command(*again) == 1
    message = capsys.readouterr().err
    assert "has a column 'predicted' already; rename it, or" in message and "--prefix" in message
    assert command(*again, "--prefix", "second_") == 0
    (row,) = read_csv(tmp_path / "c.csv")
    assert row["second_predicted"] == row["predicted"]
    assert list(row) == ["text", *NAMES, *(f"second_{name}" for name in NAMES)]


def test_the_labels_of_a_labelled_file_are_no_collision(command, tmp_path):
    write_csv(tmp_path / "a.csv", [["text", "label"], [TEXTS[0], "positive"]])
    assert command("--file", tmp_path / "a.csv", "--output", tmp_path / "b.csv") == 0
    assert read_csv(tmp_path / "b.csv")[0]["label"] == "positive"


CELL = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(CELL, min_size=2, max_size=2), min_size=1, max_size=4))
def test_any_cell_survives(tmp_path_factory, cells):
    folder = tmp_path_factory.mktemp("cells")
    path = write_csv(folder / "a.csv", [["text", "other"], *cells])
    table = open_table(path, folder / "b.csv", "text", NAMES, 2)
    answer = dict.fromkeys(COLUMNS) | {"error": "x"}
    raw = b""
    for rows, texts in table.chunks(0):
        raw += table.encode(rows, [answer] * len(texts), first=not raw)
    written = list(csv.reader(io.StringIO(raw.decode(), newline=""), strict=True))
    assert [row[:2] for row in written[1:]] == cells
    assert all(len(row) == 2 + len(NAMES) for row in written)


def test_chunks_are_bounded_by_rows_and_by_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(classify_cli, "CHUNK_CHARACTERS", 100)
    lengths = [30, 30, 30, 30, 500, 10, 10, 10, 10, 10]
    texts = [letter * n for letter, n in zip("abcdefghij", lengths, strict=True)]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=7)
    for name, made in (("a.txt", "b.csv"), ("a.parquet", "b.parquet")):
        table = open_table(tmp_path / name, tmp_path / made, "text", NAMES, 5)
        chunks = [part for _, part in table.chunks(0)]
        assert [text for part in chunks for text in part] == texts
        assert len(chunks[0]) == 4 and max(map(len, chunks)) <= 5
        for i in range(1, len(chunks)):
            done = sum(map(len, chunks[:i]))
            assert [part for _, part in table.chunks(done)] == chunks[i:]


# Rows that cannot be scored


BAD_ROWS = [
    ("", "the text is empty"),
    (" \t ", "the text is empty"),
    (None, "there is no text"),
    (7, "a text must be a string, got int"),
    (["a"], "a text must be a string, got list"),
    ("half \ud83d", "half a character"),
]


def test_bad_rows_become_error_rows_and_the_run_goes_on(command, tmp_path, capsys):
    rows = [{"text": TEXTS[0], "i": 0}, *({"text": text} for text, _ in BAD_ROWS), {"i": 9}]
    path, made = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command("--file", path, "--output", made, "--chunk-rows", 3) == 0
    shown = capsys.readouterr().out
    found = read_jsonl(made)
    assert [row.get("text") for row in found] == [row.get("text") for row in rows]
    assert found[0]["error"] is None and found[0]["predicted"] == "positive"
    for row, (_, message) in zip(found[1:], [*BAD_ROWS, (None, "there is no text")], strict=True):
        assert message in row["error"]
        assert all(row[name] is None for name in NAMES if name != "error")
    assert "8 rows, 1 scored" in shown
    assert "not scored, see their error: 7; first row 2: the text is empty" in shown


def test_a_file_without_a_single_good_row_is_exit_code_1_and_says_why(command, tmp_path, capsys):
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    made = tmp_path / "b.parquet"
    assert command("--file", tmp_path / "a.parquet", "--output", made) == 1
    assert "row 1: a text must be a string, got int" in capsys.readouterr().err
    assert [row["error"] is not None for row in parquet.read_table(made).to_pylist()] == [True] * 2


def test_the_summary_counts_what_became_of_the_rows(command, tmp_path, capsys):
    texts = [*TEXTS, "word " * 2000, ""]
    path, made = (
        write_csv(tmp_path / "a.csv", [["text"], *([t] for t in texts)]),
        tmp_path / "b.csv",
    )
    assert command("--file", path, "--output", made, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    found = answers_in(read_csv(made))
    assert (data["rows"], data["scored"], data["failed"]) == (len(texts), len(texts) - 1, 1)
    assert data["truncated"] == 1 == sum(row["truncated"] is True for row in found)
    for key, name in (("predicted", "predicted"), ("actions", "action")):
        assert data[key] == {v: n for v in data[key] if (n := sum(r[name] == v for r in found))}
        assert sum(data[key].values()) == data["scored"]
    assert data["calibrator"] == "platt" and data["output"] == str(made)


# Files that cannot be read, outputs that cannot be written


def a_parquet_of(columns):
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


BAD_FILES = [
    ("a.csv", None, "a.csv does not exist; give the path of an existing file with --file"),
    ("a.parquet", None, "a.parquet does not exist"),
    ("a.xlsx", b"x", "a.xlsx has no extension that is read here; use .csv, .tsv, .jsonl"),
    ("a.csv", b"", "a.csv has no rows; it needs one for every text"),
    ("a.csv", b"text\n", "a.csv has no rows"),
    ("a.jsonl", b"\n\n", "a.jsonl has no rows"),
    ("a.txt", b"", "a.txt has no rows"),
    ("a.parquet", a_parquet_of({"text": []}), "a.parquet has no rows"),
    ("a.csv", b"id;text\n1;a\n", "a.csv has no column 'text' but 'id;text'; name yours"),
    ("a.jsonl", b'{"body": "a"}\n', "a.jsonl has no column 'text' but 'body'; name yours with"),
    ("a.parquet", a_parquet_of({"body": ["a"]}), "no column 'text' but 'body'"),
    ("a.csv", b"text,text\na,b\n", "has the column 'text' twice"),
    ("a.csv", b"text,error\na,b\n", "has a column 'error' already"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b", "zone": 1}\n', "has a column 'zone' already"),
    ("a.csv", b"text,n\na,1\nb\n", "a.csv line 3 has 1 fields, the header 2"),
    ("a.csv", b'text,n\na,1\n"b,2\nc,3\n', "a.csv line 3 is malformed"),
    ("a.csv", b"text,n\na,1\ncaf\xe9,2\n", "a.csv line 3 is not UTF-8 (byte 0xe9)"),
    ("a.txt", b"fine\ncaf\xe9\n", "a.txt line 2 is not UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl line 2 is not a JSON object"),
    ("a.jsonl", b'[{"text": "a"}]\n', "a.jsonl line 1 is not a JSON object (a list)"),
    ("a.csv.gz", b"text\na\n", "a.csv.gz is not a whole gzip file"),
    ("a.csv.gz", gzip.compress(b"text\na\n", mtime=0)[:-4], "a.csv.gz is not a whole gzip file"),
    ("a.parquet", b"PAR1 no", "a.parquet is not a sound Parquet file"),
]


@pytest.mark.parametrize(("name", "raw", "message"), BAD_FILES)
def test_a_bad_file_is_one_clear_line_before_anything_is_scored(
    command, tmp_path, capsys, monkeypatch, name, raw, message
):
    monkeypatch.setattr(classify_cli, "load_classifier", None)  # it is not even loaded
    path, made = tmp_path / name, tmp_path / name.replace("a.", "b.").replace("txt", "csv")
    if raw is not None:
        path.write_bytes(raw)
    assert command("--file", path, "--output", made) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert [p.name for p in tmp_path.iterdir()] == ([name] if raw is not None else [])


def test_a_parquet_page_that_is_damaged_ends_the_run_there_and_keeps_what_is_done(
    command, tmp_path, capsys
):
    path, made = tmp_path / "a.parquet", tmp_path / "b.parquet"
    texts = [f"{text} {i}" for i in range(10) for text in TEXTS]
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=10, **plain)
    sound = path.read_bytes()
    place = sound.index(texts[45].encode())
    path.write_bytes(sound[:place] + b"\xff\xfe" + sound[place + 2 :])
    flags = ("--file", path, "--output", made, "--chunk-rows", 10)
    assert command(*flags) == 1
    assert "a.parquet is not a sound Parquet file" in capsys.readouterr().err
    unfinished = Unfinished(made)
    assert not made.exists() and len(unfinished.journal.read_text().splitlines()) == 1 + 4


def test_an_existing_output_is_never_replaced(command, tmp_path, capsys):
    path, made = write_csv(tmp_path / "a.csv", [["text"], ["a"]]), tmp_path / "b.csv"
    made.write_text("precious")
    assert command("--file", path, "--output", made) == 1
    assert "b.csv exists; remove it or choose another --output" in capsys.readouterr().err
    assert made.read_text() == "precious" and left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "made", "wanted"),
    [
        ("a.csv", "b.jsonl", ".csv"),
        ("a.csv", "b.tsv", ".csv"),
        ("a.jsonl", "b.csv", ".jsonl"),
        ("a.parquet", "b.csv", ".parquet"),
        ("a.txt", "b.txt", ".csv"),
        ("a.txt", "b.parquet", ".csv"),
    ],
)
def test_the_output_has_the_format_of_the_input(command, tmp_path, capsys, name, made, wanted):
    (tmp_path / name).write_bytes(b"text\na\n")
    assert command("--file", tmp_path / name, "--output", tmp_path / made) == 1
    assert f"is a {wanted} file, not " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a TEXT, or --file and --output"),
        (["a", "--file", "b.csv"], "give a TEXT, or --file"),
        (["--file", "b.csv"], "--file needs --output"),
        (["a", "--output", "b.csv"], "--output is for a --file"),
        (["a", "--text-column", "b"], "--text-column is for a --file"),
        (["a", "--prefix", "b"], "--prefix is for a --file"),
        (["a", "--chunk-rows", "3"], "--chunk-rows is for a --file"),
        (["--file", "b.csv", "--output", "./b.csv"], "must be another file"),
        (["--file", "b.csv", "--output", "c.csv", "--chunk-rows", "0"], "must be at least 1"),
        (["a", "--engine", "ray"], "--engine ray is for a --file"),
        (["a", "--workers", "2"], "--workers is for --engine ray"),
        (["a", "--ray-address", "auto"], "--ray-address is for --engine ray"),
        (
            ["--file=b.csv", "--output=c.csv", "--engine=ray", "--workers=0"],
            "--workers must be at least 1, got 0",
        ),
        (
            ["--file=b.csv", "--output=c.csv", "--engine=ray", "--server=http://a"],
            "--engine is for a model here",
        ),
    ],
)
def test_bad_usage_is_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_ray_one_line_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    requirement = ray_engine.REQUIREMENT
    assert requirement in (ROOT / "requirements-ray.txt").read_text().splitlines()
    for name in ("ray", "ray.data"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in (ray_engine.STATISTICS, ray_engine.LOOPBACK_ONLY):
        monkeypatch.setenv(name, "0")
    path, made = write_csv(tmp_path / "a.csv", [["text"], ["a"]]), tmp_path / "b.csv"
    assert main([f"--file={path}", f"--output={made}", "--engine=ray"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith(f'; run: pip install "{requirement}"')
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


# Interruptions


def numbered_rows(n):
    """Texts of their own, so that a row that is lost or doubled shows."""
    return [[str(i), f"{TEXTS[i % len(TEXTS)]} {i}"] for i in range(n)]


class Stopped(Exception):
    pass


def stop_after(classifier, chunks):
    """A classifier that raises Stopped when it is asked for one more chunk."""
    asked = count()

    class Stopping:
        def __getattr__(self, name):
            return getattr(classifier, name)

        def classify_batch(self, texts):
            if next(asked) == chunks:
                raise Stopped
            return classifier.classify_batch(texts)

    return Stopping()


@pytest.fixture
def interrupted(command, classifier, tmp_path, monkeypatch, capsys):
    """(flags, bytes of the whole output, output): a run that was stopped after 3 of 7 chunks."""
    path = write_csv(tmp_path / "a.csv", [["id", "text"], *numbered_rows(33)])
    whole, made = tmp_path / "whole.csv", tmp_path / "b.csv"
    rest = ("--chunk-rows", 5)
    assert command("--file", path, "--output", whole, *rest) == 0
    flags = ("--file", path, "--output", made, *rest)
    with monkeypatch.context() as patch:
        stopping = stop_after(classifier, 3)
        patch.setattr(classify_cli, "load_classifier", lambda *arguments: stopping)
        with pytest.raises(Stopped):
            command(*flags)
    assert not made.exists()
    assert left_behind(tmp_path) == [".b.csv.journal", ".b.csv.lock", ".b.csv.partial"]
    capsys.readouterr()
    return flags, whole.read_bytes(), made


def test_a_run_continues_after_its_last_chunk(interrupted, command, capsys):
    flags, whole, made = interrupted
    assert command(*flags) == 0
    shown = capsys.readouterr()
    assert "continuing after row 15 of 33" in shown.err and "33 rows, 33 scored" in shown.out
    assert made.read_bytes() == whole and left_behind(made.parent) == []


def cut_off_journal(unfinished):
    with unfinished.journal.open("ab") as file:
        file.write(b'{"rows": 20, "bytes": 99')
    with unfinished.partial.open("ab") as file:
        file.write(b"15,half a row of a chunk that was nev")


def lose_partial(unfinished):
    with unfinished.partial.open("r+b") as file:
        file.truncate(unfinished.partial.stat().st_size - 1)


def lose_journal(unfinished):
    unfinished.journal.unlink()


@pytest.mark.parametrize(
    ("damage", "goes_on"),
    [(cut_off_journal, "row 15"), (lose_partial, "row 10"), (lose_journal, None)],
)
def test_what_a_crash_leaves_half_written_is_done_again(
    interrupted, command, capsys, damage, goes_on
):
    flags, whole, made = interrupted
    damage(Unfinished(made))
    assert command(*flags) == 0
    shown = capsys.readouterr().err
    assert (f"continuing after {goes_on} of 33" in shown) == (goes_on is not None)
    assert made.read_bytes() == whole


def test_a_run_killed_between_its_last_two_steps_is_seen_to_be_done(
    interrupted, command, capsys, monkeypatch
):
    flags, whole, made = interrupted

    def stop(path, missing_ok):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(type(made), "unlink", stop)
        with pytest.raises(Stopped):
            command(*flags)
    assert made.read_bytes() == whole and Unfinished(made).journal.exists()
    assert command(*flags, "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["scored"] == 33
    assert made.read_bytes() == whole and left_behind(made.parent) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda path: (["--prefix", "x_"], None), "prefix"),
        (lambda path: (["--chunk-rows", "4"], None), "rows of a chunk"),
        (lambda path: ([], path.write_bytes(path.read_bytes() + b"33,one more\n")), "input file"),
    ],
)
def test_another_input_or_setting_starts_again_and_says_so(
    interrupted, command, capsys, tmp_path, change, named
):
    flags, _, made = interrupted
    more, _ = change(tmp_path / "a.csv")
    assert command(*flags, *more) == 0
    shown = capsys.readouterr()
    assert f"changed since the interrupted run: {named}; starting again" in shown.err
    assert "continuing" not in shown.err
    ids = [row["id"] for row in read_csv(made)]
    assert ids == [str(i) for i in range(len(ids))] and len(ids) in (33, 34)


def test_another_model_starts_again(interrupted, command, classifier, monkeypatch, capsys):
    flags, _, _ = interrupted
    spam = classifier.for_task(classify_cli.read_task("spam"))
    monkeypatch.setattr(classify_cli, "load_classifier", lambda *arguments: spam)
    assert command(*flags) == 0
    changed = "changed since the interrupted run: model, adapter or question, calibrator; starting"
    assert changed in capsys.readouterr().err


def test_a_second_run_beside_a_living_one_is_refused(interrupted, command, capsys):
    from filelock import FileLock

    flags, whole, made = interrupted
    with FileLock(Unfinished(made).lock):
        assert command(*flags) == 1
    assert "another run is making" in capsys.readouterr().err
    assert command(*flags) == 0 and made.read_bytes() == whole


def test_a_full_disk_is_one_line_and_the_run_continues_when_there_is_room(
    interrupted, command, capsys
):
    flags, whole, made = interrupted
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (Unfinished(made).partial.stat().st_size + 9, most))
    try:
        assert command(*flags) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: cannot write ") and "again, it continues" in line
    assert command(*flags) == 0 and made.read_bytes() == whole


def test_a_file_that_grows_while_it_is_read_is_not_passed_off_as_done(
    command, classifier, tmp_path, monkeypatch, capsys
):
    path, made = write_csv(tmp_path / "a.csv", [["text"], ["a film"]]), tmp_path / "b.csv"

    class Slow:
        def __getattr__(self, name):
            return getattr(classifier, name)

        def classify_batch(self, texts):
            with path.open("a") as file:
                file.write("one more\n")
            return classifier.classify_batch(texts)

    monkeypatch.setattr(classify_cli, "load_classifier", lambda *arguments: Slow())
    assert command("--file", path, "--output", made) == 1
    assert "a.csv changed while it was read; run the same command" in capsys.readouterr().err
    assert not made.exists()


KILLED_ROWS = 90


def test_killed_at_a_random_moment_no_row_is_lost_or_doubled(command, cache_dir, tmp_path, capsys):
    """test_classify_server.py kills the continued run as well, and runs over Parquet files."""
    rows = numbered_rows(KILLED_ROWS)
    rows[17][1] = " "
    path = write_csv(tmp_path / "a.csv.gz", [["id", "text"], *rows])
    whole, made = tmp_path / "whole.csv.gz", tmp_path / "b.csv.gz"
    assert command(f"--file={path}", f"--output={whole}", "--chunk-rows=3") == 0
    flags = f"--file={path}", f"--output={made}", "--chunk-rows=3"
    process = start_script("classify_cli.py", *flags, f"--cache-dir={cache_dir}")
    rng, journal = random.Random(0), Unfinished(made).journal
    wanted = rng.randint(2, 16)
    while process.is_alive() and lines_of(journal) < wanted:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.03))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not made.exists() and wanted <= lines_of(journal) < KILLED_ROWS / 3
    assert command(*flags) == 0
    assert "continuing after row " in capsys.readouterr().err
    assert made.read_bytes() == whole.read_bytes()
    assert left_behind(tmp_path) == []


def lines_of(journal):
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


# Size


def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(n):
        path = tmp_path / f"{n}.csv"
        write_csv(
            path, [["id", "text"], *([str(i), "a text of some words " * 5] for i in range(n))]
        )
        tracemalloc.start()
        table = open_table(path, tmp_path / "b.csv", "text", NAMES, CHUNK_ROWS)
        answer = dict.fromkeys(COLUMNS) | {"error": "x"}
        size = 0
        for rows, texts in table.chunks(0):
            size += len(table.encode(rows, [answer] * len(texts), first=size == 0))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert size > path.stat().st_size
        return most

    assert peak(20_000) < 1.2 * peak(4_000) + 100_000


def test_numbers_keep_nine_digits():
    assert rounded(0.123456789012) == 0.123456789 and rounded(1.23456789e-12) == 1.23456789e-12


def test_the_script_runs_as_a_user_would_run_it(tmp_path):
    write_csv(tmp_path / "a.csv", [["text"], ["A wonderful film."], ["A terrible film."], [" "]])
    command = [sys.executable, "classify_cli.py", "--file", tmp_path / "a.csv"]
    result = subprocess.run(
        [*command, "--output", tmp_path / "b.csv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert result.returncode == 0 and "3 rows, 2 scored" in result.stdout
    assert "3/3" in result.stderr and "row/s" in result.stderr
    found = read_csv(tmp_path / "b.csv")
    assert [row["predicted"] for row in found] == ["positive", "negative", None]
    calibrated = [row["calibrated_confidence"] is not None for row in found]
    missing = "no calibrated confidence: " in result.stderr  # what the committed evaluation has
    assert calibrated == [not missing, not missing, False]
