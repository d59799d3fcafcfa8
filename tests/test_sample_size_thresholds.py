"""The report on how many labelled rows are needed, run as a user would run it."""

import functools
import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
from PIL import Image

import sample_size_thresholds
from decisions import labels_needed, sample_size_curves
from records import load_results
from settings import ROOT
from simulated_cache import simulated_cache


@pytest.fixture(scope="module")
def cache():
    """Two labels, base and fine-tuned model."""
    return simulated_cache("two")


@pytest.fixture(scope="module")
def small_cache():
    """A base model alone, 60 calibration and 60 test rows."""
    return simulated_cache("alone")


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


@functools.cache
def run(cache, *arguments):
    """What the script prints without pictures."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = sample_size_thresholds.main(["--cache-dir", str(cache), "--no-images", *arguments])
    assert (code, err.getvalue()) == (0, "")
    return out.getvalue()


def numbers_of(cache, *arguments):
    return json.loads(run(cache, "--json", *arguments), parse_constant=refuse_constant)


def test_json_holds_the_numbers_of_the_library(small_cache, tmp_path):
    folder = shutil.copytree(small_cache, tmp_path / "seven bins")
    path = folder / "base_model_results.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["run"]["evaluation"]["bins"] = 7
    path.write_text(json.dumps(data), encoding="utf-8")
    numbers = numbers_of(folder, "--model", "base", "--promise", "0.8")
    calibration, test = (load_results(path).arrays(split) for split in ("calibration", "test"))
    curves = sample_size_curves(calibration, test, 0.8, n_bins=7)
    needed = labels_needed(calibration, (0.8, 0.9, 0.95, 0.99))
    (warning,) = numbers.pop("warnings")
    assert "near-duplicate groups: calibration rows (20). Bootstrap intervals" in warning
    assert warning in " ".join(run(small_cache).split())
    assert numbers == json.loads(
        json.dumps({"model": "base", "curves": curves, "labels_needed": needed})
    )


def test_the_tables_show_every_size(cache):
    numbers, text = numbers_of(cache), run(cache)
    assert "fine-tuned" in text.splitlines()[0]
    assert [size["n"] for size in numbers["curves"]["sizes"]] == [50, 100, 200, 500, 1000]
    for size in numbers["curves"]["sizes"]:
        assert len(re.findall(rf"^{size['n']:,} +", text, re.MULTILINE)) == 4
        for method in ("platt", "isotonic"):
            for score in ("log_loss", "ece"):
                band = size[method][score]
                assert f"{band['mean']:.3f} [{band['low']:.3f}, {band['high']:.3f}]" in text
        assert f"{size['null_ece']['p95']:.3f}" in text
    for entry in numbers["labels_needed"]["minimum"]:
        assert f"{entry['rows']:,}" in text
    assert text.count("How to read it: ") == 5
    assert numbers["warnings"] == [] and "Fewer than" not in text
    assert all(len(line) <= 100 for line in text.splitlines()[1:])


def test_the_promise_is_an_option(small_cache):
    numbers, text = (
        numbers_of(small_cache, "--promise", "0.75"),
        run(small_cache, "--promise", "0.75"),
    )
    assert numbers["curves"]["promise"] == 0.75
    assert [e["promise"] for e in numbers["labels_needed"]["minimum"]] == [0.75, 0.9, 0.95, 0.99]
    assert "promise: 75 % of the automated answers are right" in text
    assert "75 % right" in text


def test_the_same_cache_gives_the_same_text(small_cache):
    text = run(small_cache)
    assert text == run.__wrapped__(small_cache)
    assert "base model" in text.splitlines()[0]


def test_the_picture_shows_what_was_asked_for(small_cache, tmp_path, capsys):
    drawn, folders = [], ["--cache-dir", str(small_cache)]
    for promise in ("0.9", "0.6"):
        images = tmp_path / promise
        arguments = [*folders, "--images-dir", str(images), "--promise", promise]
        assert sample_size_thresholds.main(arguments) == 0
        path = images / "calibration" / "sample_size.png"
        assert capsys.readouterr().err == f"{path}\n"
        assert [p for p in images.rglob("*") if p.is_file()] == [path]
        assert Image.open(path).size[0] >= 1000
        drawn.append(path.read_bytes())
    assert drawn[0] != drawn[1]


def test_neither_torch_nor_a_plot_is_needed_for_the_numbers(small_cache):
    code = (
        "import sys, sample_size_thresholds as s\n"
        "code = s.main(sys.argv[1:])\n"
        "unwanted = {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {unwanted}' if unwanted else code)"
    )
    command = [sys.executable, "-c", code, "--cache-dir", str(small_cache), "--no-images", "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--promise", "0"], "argument --promise: must lie between 0 and 1, got 0"),
        (["--promise", "90"], "argument --promise: must lie between 0 and 1, got 90"),
        (["--promise", "nan"], "argument --promise: must lie between 0 and 1, got nan"),
        (["--promise", "high"], "argument --promise: must be a number, got 'high'"),
        (["--model", "other"], "argument --model: invalid choice: 'other'"),
    ],
)
def test_bad_values_are_exit_code_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        sample_size_thresholds.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_cache_is_one_line_and_exit_code_1(tmp_path, capsys):
    assert sample_size_thresholds.main(["--cache-dir", str(tmp_path / "nowhere")]) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith("error: ")
    assert "run: python generate_evaluation_cache.py" in line


def test_a_model_that_was_not_evaluated_is_exit_code_1(small_cache, capsys):
    arguments = ["--cache-dir", str(small_cache), "--model", "finetuned"]
    assert sample_size_thresholds.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no fine-tuned model; run: python fine_tune_model.py" in line
