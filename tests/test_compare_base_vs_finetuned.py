"""The comparison of the two models, run as a user would run it."""

import functools
import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
from PIL import Image

import compare_base_vs_finetuned
from comparison import load_models, model_comparison
from report import with_interval
from settings import ROOT, SENTIMENT
from simulated_cache import simulated_cache, write_cache


@functools.cache
def run(folder, *arguments):
    """What the script prints, without pictures."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        arguments = ["--cache-dir", str(folder), "--no-images", *arguments]
        code = compare_base_vs_finetuned.main(arguments)
    assert (code, err.getvalue()) == (0, "")
    return out.getvalue()


@functools.cache
def numbers_of(folder):
    def refuse_constant(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(run(folder, "--json"), parse_constant=refuse_constant)


def text_of(folder):
    """What the script prints of the numbers that --json gave."""
    return compare_base_vs_finetuned.comparison_text(numbers_of(folder))


@pytest.fixture(scope="module")
def sixty(tmp_path_factory):
    """60 calibration and 60 test rows: a category is of few groups, or of one."""
    return write_cache(tmp_path_factory.mktemp("sixty"), SENTIMENT, n=120)


@pytest.fixture(params=["two", "four", "sixty"])
def cache(request, sixty):
    return sixty if request.param == "sixty" else simulated_cache(request.param)


def test_json_and_text_hold_the_numbers_of_the_library(sixty):
    expected = model_comparison(*load_models(sixty).values())
    numbers = {key: value for key, value in numbers_of(sixty).items() if key != "warnings"}
    assert numbers == json.loads(json.dumps(expected))
    assert run(sixty) == text_of(sixty) + "\n"


def test_the_tables_show_every_measure_and_category(cache):
    numbers, text = numbers_of(cache), text_of(cache)
    assert f"the same {numbers['n']:,} test rows" in text
    for method in numbers["methods"].values():
        for measure, title, factor, digits in (
            ("accuracy", "accuracy, %", 100, 1),
            ("log_loss", "log-loss, nats", 1, 3),
            ("brier", "Brier score", 1, 3),
            ("ece", "ECE", 1, 3),
            ("aurc", "AURC", 1, 3),
        ):
            of = method[measure]
            values = [f"{factor * of[name]:.{digits}f}" for name in ("base", "finetuned")]
            cells = " +".join(map(re.escape, [*values, with_interval(of, factor, digits)]))
            assert re.search(rf"^{title} +{cells} ", text, re.MULTILINE)
        for title, key in (("ECE if perfect", "null_mean"), ("95 % stay below", "null_p95")):
            null = [f"{method['ece'][key][name]:.3f}" for name in ("base", "finetuned")]
            assert re.search(rf"^{title} +{' +'.join(null)}$", text, re.MULTILINE)
        mcnemar = method["mcnemar"]
        flat = " ".join(text.split())
        assert (
            f"base {mcnemar['only_first']:,} rows, fine-tuned {mcnemar['only_second']:,}." in flat
        )
    for part in (*numbers["labels"], *numbers["categories"], *numbers["domains"]):
        line = rf"^{part['name']} +{part['n']:,} +{part['n_groups']:,} .*"
        assert re.search(line, text, re.MULTILINE)
    for place in numbers["ranking"]:
        title = {"base": "base", "finetuned": "fine-tuned"}[place["model"]]
        line = rf"^{title}, {place['calibrator']} +{place['log_loss']:.3f} "
        assert re.search(line, text, re.MULTILINE)
    assert text.count("How to read it: ") == 5


def test_winners_are_named_only_where_the_corrected_p_value_decides():
    folder = simulated_cache("two")
    numbers, text = numbers_of(folder), text_of(folder)
    shown = set()
    for part in numbers["categories"]:
        (line,) = re.findall(rf"^{part['name']} .*$", text, re.MULTILINE)
        (winner,) = re.findall(r" (fine-tuned|base|undecided) ", line)
        of = part["accuracy"]
        better = "fine-tuned" if of["estimate"] > 0 else "base"
        assert winner == (better if of["p_value_holm"] < 0.05 else "undecided")
        shown.add(winner)
    assert len(shown) > 1
    raw = numbers["methods"]["raw"]["log_loss"]
    assert raw["estimate"] < 0 and raw["p_value_holm"] < 0.05
    assert re.search(r"^log-loss, nats .* fine-tuned$", text, re.MULTILINE)
    assert re.search(r"^ECE .* –$", text, re.MULTILINE)


def test_a_category_of_one_group_shows_dashes():
    unknown = {"low": None, "high": None, "p_value": None, "p_value_holm": None}
    part = {
        "name": "alone",
        "n": 5,
        "n_groups": 1,
        "accuracy": {"base": 0.4, "finetuned": 0.6, "estimate": 0.2, **unknown},
        "log_loss": {"base": 0.7, "finetuned": 0.5, "estimate": -0.2, **unknown},
    }
    text = compare_base_vs_finetuned.breakdown_text([part], "categories")
    (line,) = re.findall("^alone.*$", text, re.MULTILINE)
    assert line.split() == [
        "alone",
        "5",
        "1",
        "40.0",
        "60.0",
        "20.0",
        "–",
        "undecided",
        "-0.200",
        "–",
    ]


def test_intervals_of_few_groups_come_with_a_warning(sixty):
    overall, categories, domains = numbers_of(sixty)["warnings"]
    assert "near-duplicate groups: test rows (20). Bootstrap intervals" in overall
    few = [f"{part['name']} ({part['n_groups']})" for part in numbers_of(sixty)["categories"]]
    assert [part in categories for part in few] == [not part.endswith("(1)") for part in few]
    flat = " ".join(run(sixty).split())
    assert all(warning in flat for warning in (overall, categories, domains))
    assert numbers_of(simulated_cache("two"))["warnings"] == []


def test_rows_without_categories_say_so():
    text = compare_base_vs_finetuned.breakdown_text([], "categories")
    assert text == "The rows of this cache have no categories."


def test_confident_rows_are_counted():
    folder = simulated_cache("two")
    flat = " ".join(text_of(folder).split())
    for name, title in (("base", "base"), ("finetuned", "fine-tuned")):
        high = numbers_of(folder)["methods"]["raw"]["high_confidence"][name]
        interval = with_interval(high["accuracy"], 100, 1)
        expected = f"Confidence of 90.0 % or more, {title}: {high['count']:,} rows, {interval} %"
        assert expected in flat


def test_pictures_are_drawn_and_named_on_stderr(sixty, tmp_path, capsys):
    arguments = ["--cache-dir", str(sixty), "--images-dir", str(tmp_path), "--json"]
    assert compare_base_vs_finetuned.main(arguments) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1
    images = compare_base_vs_finetuned.IMAGES
    assert sorted(shown.err.split()) == sorted(str(tmp_path / file) for file in images)
    for file in images:
        assert Image.open(tmp_path / file).size[0] >= 1000


def test_no_model_is_loaded(sixty):
    code = (
        "import sys, compare_base_vs_finetuned as c\n"
        "code = c.main(sys.argv[1:])\n"
        "unwanted = {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {unwanted}' if unwanted else code)"
    )
    command = [sys.executable, "-c", code, "--cache-dir", str(sixty), "--no-images"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == run(sixty)


def test_a_base_model_alone_is_exit_code_1(capsys):
    folder = simulated_cache("alone")
    assert compare_base_vs_finetuned.main(["--cache-dir", str(folder)]) == 1
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert shown.out == ""
    assert "has no fine-tuned model; run: python fine_tune_model.py" in line


def test_a_missing_cache_is_one_line_and_exit_code_1(tmp_path, capsys):
    assert compare_base_vs_finetuned.main(["--cache-dir", str(tmp_path / "nowhere")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "run: python generate_evaluation_cache.py" in line
