"""The report on calibrators, run as a user would run it."""

import functools
import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
from PIL import Image

import calibration_demo
from calibration import calibrators_for
from comparison import calibrator_comparison, load_models, pitfalls
from report import with_interval
from settings import ROOT
from simulated_cache import simulated_cache


@functools.cache
def run(name, *arguments):
    """What the script prints of a simulated cache, without pictures."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        folder = str(simulated_cache(name))
        code = calibration_demo.main(["--cache-dir", folder, "--no-images", *arguments])
    assert (code, err.getvalue()) == (0, "")
    return out.getvalue()


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


def numbers_of(name, *arguments):
    return json.loads(run(name, "--json", *arguments), parse_constant=refuse_constant)


@pytest.mark.parametrize("name", ["two", "four", "alone"])
def test_json_holds_the_numbers_of_the_library(name):
    models = load_models(simulated_cache(name))
    numbers = numbers_of(name)
    warnings = {model: of.pop("warnings") for model, of in numbers.items()}
    expected = {model: calibrator_comparison(of) for model, of in models.items()}
    assert numbers == json.loads(json.dumps(expected))
    assert any(warnings.values()) == (name == "alone")


@pytest.mark.parametrize("arguments", [(), ("--pitfalls",)])
def test_intervals_of_few_groups_come_with_a_warning(arguments):
    (warning,) = numbers_of("alone", *arguments)["base"]["warnings"]
    assert "calibration rows (20), test rows (20). Bootstrap intervals" in warning
    assert warning in " ".join(run("alone", *arguments).split())
    assert "Fewer than" not in run("two", *arguments)


def test_json_of_the_pitfalls_holds_the_numbers_of_the_library():
    models = load_models(simulated_cache("alone"))
    expected = json.loads(json.dumps(pitfalls(models["base"])))
    numbers = numbers_of("alone", "--pitfalls")["base"]
    assert {key: value for key, value in numbers.items() if key != "warnings"} == expected


@pytest.mark.parametrize(("name", "n_labels"), [("two", 2), ("four", 4)])
def test_the_tables_show_every_calibrator(name, n_labels):
    numbers = numbers_of(name)["finetuned"]
    text = run(name, "--model", "finetuned")
    assert text.startswith("fine-tuned")
    for row in numbers["calibrators"]:
        for score in ("log_loss", "brier"):
            cells = re.escape(with_interval(row["metrics"][score]))
            if row["difference"]:
                difference = row["difference"][score]
                cells += " +" + re.escape(with_interval(difference))
                cells += f" +{difference['p_value_holm']:.2g}"
            assert re.search(rf"^{row['name']} +{cells}$", text, re.MULTILINE)
        ece = row["metrics"]["ece"]
        cells = re.escape(with_interval(ece)) + f" +{ece['null_p95']:.3f} "
        assert re.search(rf"^{row['name']} +{cells}", text, re.MULTILINE)
        cross_fitted = numbers["selection"]["calibrators"][row["name"]]["log_loss"]
        assert re.search(rf"^{row['name']} +{cross_fitted:.4f} ", text, re.MULTILINE)
    assert [row["name"] for row in numbers["calibrators"]] == list(calibrators_for(n_labels))
    chosen = numbers["selection"]["chosen"]
    assert re.search(rf"^{chosen} .* chosen$", text, re.MULTILINE)
    assert f"Chosen: {chosen}. " in text
    assert text.count("How to read it: ") == 2


def test_better_and_worse_calibrators_are_named():
    table = numbers_of("two")["base"]
    flat = " ".join(run("two", "--model", "base").split())
    assert table["better"]
    assert f"better than raw by more than chance (p < 0.05): {', '.join(table['better'])}." in flat
    assert "worse than raw by more than chance (p < 0.05): none." in flat


def test_both_models_are_shown_unless_one_is_asked_for():
    whole = run("two")
    parts = [run("two", "--model", model).rstrip("\n") for model in ("base", "finetuned")]
    assert whole.rstrip("\n") == "\n\n\n".join(parts)
    assert run("alone") == run("alone", "--model", "base")


@pytest.mark.parametrize("name", ["two", "four", "alone"])
def test_each_pitfall_has_the_wrong_and_the_right_number(name):
    numbers = numbers_of(name, "--pitfalls")
    text = "\n\n\n".join(map(calibration_demo.pitfalls_text, numbers.values()))
    parts = re.split(r"^[1-4]\. ", text, flags=re.MULTILINE)[1:]
    assert len(parts) == 4 * len(numbers)
    for part in parts:
        assert "wrong: " in part and "right: " in part
    table = numbers["base"]
    same_rows, platt, bins, cutoffs = parts[:4]
    assert f"{table['same_rows']['calibration']['ece']:.3f}" in same_rows
    assert f"{table['same_rows']['test']['ece']:.3f}" in same_rows
    assert f"{table['platt_on_probabilities']['probabilities']:.4f}" in platt
    for row in table["empty_bins"]:
        line = rf"^{row['n_bins']} +{row['mce']:.3f} +{row['count']} "
        assert re.search(line, bins, re.MULTILINE)
    for row in table["naive_cutoffs"]:
        broken = [f"{100 * row[way]['broken']:.1f} %" for way in ("naive", "certified")]
        line = rf"^{100 * row['alpha']:.1f} % +{broken[0]} +{broken[1]} "
        assert re.search(line, cutoffs, re.MULTILINE)


@pytest.mark.parametrize("arguments", [(), ("--pitfalls",)])
def test_lines_are_of_readable_width(arguments):
    assert max(map(len, run("two", *arguments).splitlines())) <= 100


@pytest.mark.parametrize("arguments", [(), ("--pitfalls",)])
def test_the_same_cache_gives_the_same_text(arguments):
    assert run.__wrapped__("alone", *arguments) == run("alone", *arguments)


def test_pictures_are_drawn_and_named_on_stderr(tmp_path, capsys):
    arguments = ["--cache-dir", str(simulated_cache("alone")), "--images-dir", str(tmp_path)]
    assert calibration_demo.main([*arguments, "--pitfalls"]) == 0
    assert capsys.readouterr().err == "" and not any(tmp_path.iterdir())
    assert calibration_demo.main([*arguments, "--json"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1
    assert sorted(shown.err.split()) == sorted(str(tmp_path / f) for f in calibration_demo.IMAGES)
    for file in calibration_demo.IMAGES:
        assert Image.open(tmp_path / file).size[0] >= 1000


def test_no_model_is_loaded():
    code = (
        "import sys, calibration_demo as c\n"
        "code = c.main(sys.argv[1:])\n"
        "unwanted = {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {unwanted}' if unwanted else code)"
    )
    command = [sys.executable, "-c", code, "--cache-dir", str(simulated_cache("alone"))]
    result = subprocess.run(
        [*command, "--no-images"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == run("alone")


def test_a_missing_cache_is_one_line_and_exit_code_1(tmp_path, capsys):
    assert calibration_demo.main(["--cache-dir", str(tmp_path / "nowhere")]) == 1
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert shown.out == ""
    assert line.startswith("error: ") and "run: python generate_evaluation_cache.py" in line


def test_a_model_that_was_not_evaluated_is_exit_code_1(capsys):
    arguments = ["--cache-dir", str(simulated_cache("alone")), "--model", "finetuned"]
    assert calibration_demo.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no fine-tuned model; run: python fine_tune_model.py" in line


def test_an_unknown_model_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        calibration_demo.main(["--model", "other"])
    assert end.value.code == 2
    assert "argument --model: invalid choice: 'other'" in capsys.readouterr().err
