"""The report on what may be automated, run as a user would run it."""

import functools
import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
from PIL import Image

import business_reliability
from charts import load_evaluation, prepare_zones
from decisions import ZONES, automation, score_answers
from records import load_results
from settings import ROOT
from simulated_cache import simulated_cache

IMAGES = [
    f"calibration/{name}.png"
    for name in (
        "business_reliability",
        "business_reliability_progression",
        "certified_thresholds",
    )
]


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
        code = business_reliability.main(["--cache-dir", str(cache), "--no-images", *arguments])
    assert (code, err.getvalue()) == (0, "")
    return out.getvalue()


def numbers_of(cache, *arguments):
    return json.loads(run(cache, "--json", *arguments), parse_constant=refuse_constant)


@pytest.mark.parametrize("model", ["base", "finetuned"])
def test_json_holds_the_numbers_of_the_library(cache, model):
    numbers = numbers_of(cache, "--model", model)
    results = load_results(cache / f"{model}_model_results.json")
    scored = score_answers(results.arrays("calibration"), results.arrays("test"))
    expected = json.loads(json.dumps(automation(scored)))
    assert numbers["model"] == model
    assert numbers["automation"] == expected
    assert len(numbers["costs"]["table"]) == 9


def test_the_zones_are_those_of_the_picture(cache):
    table = numbers_of(cache)["zones"]["table"]
    drawn = prepare_zones(load_evaluation(cache).finetuned)
    assert [zone["count"] for zone in table] == drawn["count"].tolist()
    for i, zone in enumerate(table):
        if zone["count"]:
            assert zone["accuracy"] == drawn["accuracy"][i]
            assert (zone["low"], zone["high"]) == (drawn["wilson_low"][i], drawn["wilson_high"][i])


def test_the_tables_show_every_zone_promise_and_policy(cache):
    numbers, text = numbers_of(cache), run(cache)
    assert "fine-tuned" in text.splitlines()[0]
    for zone, (_, name, action) in zip(numbers["zones"]["table"], ZONES, strict=True):
        assert re.search(rf"^{name} +{zone['count']:,} .*{action}$", text, re.MULTILINE)
    for row in numbers["automation"]["promises"]:
        for way in ("certified", "naive"):
            threshold, test = row[way]["threshold"], row[way]["test"]
            shown = "none" if threshold is None else f"{threshold:.4f}"
            outcome = {None: "nothing automated", True: "kept", False: "broken"}[test["kept"]]
            line = rf"^{100 * row['promise']:g} % right, {way} +{shown} .*{outcome}$"
            assert re.search(line, text, re.MULTILINE)
            if test["automated"]:
                line = rf"^.* {test['expected_errors']:,.0f} +{test['errors']:,} +"
                assert re.search(line, text, re.MULTILINE)
    for row in numbers["costs"]["table"]:
        assert f"{row['estimate']:,.0f} [{row['low']:,.0f}, {row['high']:,.0f}]" in text
    assert text.count("How to read it: ") == 3
    assert all(len(line) <= 100 for line in text.splitlines()[1:])


def test_no_threshold_is_said_in_words(small_cache):
    numbers, text = numbers_of(small_cache), run(small_cache)
    for row in numbers["automation"]["promises"]:
        assert row["certified"]["threshold"] is None
        assert row["certified"]["reason"]
    flat = " ".join(text.split())
    assert flat.count("no threshold can be certified, send everything to a person") == 3
    assert "nothing automated" in text


def test_intervals_of_few_groups_come_with_a_warning(cache, small_cache):
    (warning,) = numbers_of(small_cache)["warnings"]
    assert "near-duplicate groups: test rows (20). Bootstrap intervals" in warning
    assert warning in " ".join(run(small_cache).split())
    assert numbers_of(cache)["warnings"] == [] and "Fewer than" not in run(cache)


def test_costs_are_options(cache):
    cheap = numbers_of(cache, "--cost-error", "4", "--cost-review", "0")["costs"]
    assert (cheap["cost_error"], cheap["cost_review"]) == (4, 0)
    by_policy = {row["policy"]: row for row in cheap["table"]}
    assert by_policy["review everything"]["estimate"] == 0
    assert by_policy["least expected cost"]["threshold"] == 1
    default = {row["policy"]: row for row in numbers_of(cache)["costs"]["table"]}
    assert default["review everything"]["estimate"] == 1000
    assert default["least expected cost"]["threshold"] == pytest.approx(0.9)


def test_the_same_cache_gives_the_same_text(cache):
    assert run.__wrapped__(cache) == run(cache)


def test_pictures_are_drawn_of_the_model_asked_for(cache, tmp_path, capsys):
    drawn = {}
    for model in ("base", "finetuned"):
        images = tmp_path / model
        arguments = ["--cache-dir", str(cache), "--images-dir", str(images), "--model", model]
        assert business_reliability.main(arguments) == 0
        assert capsys.readouterr().err.split() == [str(images / file) for file in IMAGES]
        assert sorted(p.name for p in images.rglob("*.*")) == sorted(
            f.split("/")[1] for f in IMAGES
        )
        for file in IMAGES:
            assert Image.open(images / file).size[0] >= 1000
        drawn[model] = [(images / file).read_bytes() for file in IMAGES]
    assert all(a != b for a, b in zip(drawn["base"], drawn["finetuned"], strict=True))


def shell(*arguments):
    command = [sys.executable, "business_reliability.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_neither_torch_nor_a_plot_is_needed_for_the_numbers(cache):
    code = (
        "import sys, business_reliability as b\n"
        "code = b.main(sys.argv[1:])\n"
        "unwanted = {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {unwanted}' if unwanted else code)"
    )
    command = [sys.executable, "-c", code, "--cache-dir", str(cache), "--no-images", "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cost-error", "0"], "--cost-error: must be above 0 and at most 1e+12, got 0"),
        (["--cost-error", "inf"], "--cost-error: must be above 0 and at most 1e+12, got inf"),
        (["--cost-error", "nan"], "--cost-error: must be above 0 and at most 1e+12, got nan"),
        (["--cost-review", "-1"], "--cost-review: must be at least 0 and at most 1e+12, got -1"),
        (["--cost-review", "dear"], "argument --cost-review: must be a number, got 'dear'"),
        (["--model", "other"], "argument --model: invalid choice: 'other'"),
    ],
)
def test_bad_values_are_exit_code_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        business_reliability.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_cache_is_one_line_and_exit_code_1(tmp_path):
    result = shell("--cache-dir", tmp_path / "nowhere")
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "run: python generate_evaluation_cache.py" in line


def test_a_model_that_was_not_evaluated_is_exit_code_1(small_cache, capsys):
    arguments = ["--cache-dir", str(small_cache), "--model", "finetuned"]
    assert business_reliability.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no fine-tuned model; run: python fine_tune_model.py" in line
