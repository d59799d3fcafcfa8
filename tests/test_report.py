"""The tables say what the committed cache holds, and the committed results belong together."""

import json

import pytest

import charts
from records import load_results
from report import (
    category_accuracy,
    few_groups_warnings,
    metrics_by_model,
    percent,
    rewritten,
    summary_rows,
    with_interval,
)
from settings import CACHE_DIR, IMAGES_DIR, UserError


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_summary_states_the_accuracy_counted_from_the_rows():
    (title, models), *rows = summary_rows(CACHE_DIR)
    table = dict(rows)
    assert title == "test rows: 1,000" and models == ["base model", "fine-tuned"]
    for column, name in enumerate(("base_model_results.json", "finetuned_model_results.json")):
        test = load_results(CACHE_DIR / name).arrays("test")
        counted = 100 * test["correct"].mean()
        assert table["accuracy, raw, %"][column].startswith(f"{counted:.1f} [")
        for category, value in category_accuracy(CACHE_DIR, ["base", "finetuned"])[
            ("base", "finetuned")[column]
        ].items():
            rows_of = test["category"] == category
            assert rows_of.sum() == 125
            assert value == test["correct"][rows_of].mean()
        for k, label in enumerate(("positive", "negative")):
            of_label = 100 * test["correct"][test["label"] == k].mean()
            assert table[f"accuracy, true label {label}, %"][column] == f"{of_label:.1f}"


def test_every_calibration_error_stands_beside_its_null_value():
    titles = [title for title, _ in summary_rows(CACHE_DIR)]
    errors = [t for t in titles if t.startswith("ECE") and not t.endswith("calibrated")]
    assert len(errors) == 3
    for title in errors:
        assert titles[titles.index(title) + 1] == f"{title}, if perfectly calibrated"


def test_base_model_is_better_calibrated_after_platt_scaling():
    base = metrics_by_model(CACHE_DIR)["base"]
    assert base["platt"]["log_loss"]["estimate"] < base["raw"]["log_loss"]["estimate"]


def test_committed_charts_and_cache_are_of_one_run():
    metadata = read(CACHE_DIR / "evaluation_metadata.json")
    manifest = read(IMAGES_DIR / "manifest.json")
    assert manifest["cache_fingerprint"] == metadata["fingerprint"]
    assert all((IMAGES_DIR / file).stat().st_size < 200_000 for file in manifest["files"])
    assert len(manifest["files"]) == len(charts.CHARTS)


def test_calibration_and_test_rows_share_no_group():
    results = load_results(CACHE_DIR / "base_model_results.json")
    groups = {s: set(results.arrays(s)["group"]) for s in ("calibration", "test")}
    assert not groups["calibration"] & groups["test"]


def test_numbers_in_words():
    assert percent(0.8125) == "81.2 %"
    assert (
        with_interval({"estimate": 0.5, "low": 0.25, "high": 1.0}, 100, 1) == "50.0 [25.0, 100.0]"
    )


def test_few_groups_are_named_with_their_number():
    assert few_groups_warnings({"test rows": 30, "alone": 1, "nothing": 0}) == []
    (warning,) = few_groups_warnings({"test rows": 29, "alone": 1, "books": 2, "films": 31})
    assert warning.startswith("Fewer than 30 near-duplicate groups: test rows (29), books (2). ")
    assert "too narrow" in warning


def test_markers_are_filled_and_a_missing_one_is_an_error():
    text = "a\n<!-- measured: x -->\nold\n<!-- /measured -->\nb"
    new = rewritten(text, {"x": "1\\2"}, "f")
    assert new == "a\n<!-- measured: x -->\n1\\2\n<!-- /measured -->\nb"
    assert rewritten(new, {"x": "1\\2"}, "f") == new
    with pytest.raises(UserError, match="f has 0 marker pairs named 'y'"):
        rewritten(text, {"y": ""}, "f")
