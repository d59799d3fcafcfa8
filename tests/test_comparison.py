"""Comparisons of calibrators and models against brute force, scipy and scikit-learn."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import ttest_1samp
from sklearn.calibration import _sigmoid_calibration

import comparison
from calibration import calibrated_probabilities, calibrators_for, fit_calibrator, select_calibrator
from comparison import (
    SCORES,
    calibrator_comparison,
    load_models,
    mcnemar_test,
    model_comparison,
    pitfalls,
)
from records import label_probabilities
from settings import UserError
from simulated_cache import simulated_cache


@pytest.fixture(scope="module")
def models():
    """{cache: {model: ModelEvaluation}}: two labels, four labels, a base model alone."""
    return {name: load_models(simulated_cache(name)) for name in ("two", "four", "alone")}


@pytest.fixture(scope="module")
def both(models):
    """The comparison of the two models of two labels."""
    return model_comparison(*models["two"].values())


@pytest.fixture(scope="module")
def lessons(models):
    """{cache: {model: pitfalls}}"""
    return {
        name: {model.name: pitfalls(model) for model in of.values()} for name, of in models.items()
    }


def rows_of(model, keep):
    """The model with the (n,) bool `keep` of its test rows."""
    kept = {key: getattr(model, key)[keep] for key in ("label", "category", "domain", "group")}
    ids = np.array(model.entry["test"]["ids"])[keep].tolist()
    return replace(
        model,
        **kept,
        probabilities={name: p[keep] for name, p in model.probabilities.items()},
        entry=model.entry | {"test": model.entry["test"] | {"ids": ids}},
    )


def bare(model, **changes):
    """The model without categories and domains, whose breakdown takes most of the time."""
    nothing = np.full(len(model.label), "")
    return replace(model, category=nothing, domain=nothing, **changes)


def row_scores(probabilities, label):
    """{score: (n,)} row by row, from the definitions."""
    chosen = probabilities[np.arange(len(label)), label]
    truth = np.arange(probabilities.shape[1]) == label[:, None]
    return {
        "accuracy": (probabilities.argmax(axis=1) == label).astype(float),
        "log_loss": -np.log(chosen),
        "brier": ((probabilities - truth) ** 2).sum(axis=1) / 2,
    }


def differences(first, second, method="raw"):
    """{score: (n,) second − first}; method "selected" is the calibrator each model has chosen."""
    of = [
        row_scores(m.probabilities[m.selected if method == "selected" else "raw"], m.label)
        for m in (first, second)
    ]
    return {score: of[1][score] - of[0][score] for score in of[0]}


def holm_by_hand(p_values):
    """Holm's correction as its textbook states it, one p-value after the other."""
    corrected, highest = [None] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


# The cache.


def test_rows_of_a_model_are_the_test_rows_of_its_results(models):
    for model in (*models["two"].values(), *models["four"].values()):
        rows = model.results.arrays("test")
        assert model.entry["test"]["ids"] == rows["id"].tolist()
        for key in ("label", "category", "domain", "group"):
            np.testing.assert_array_equal(getattr(model, key), rows[key])
        expected = label_probabilities(rows["label_logprobs"])
        np.testing.assert_allclose(model.probabilities["raw"], expected, atol=1e-9)
    assert [model.bins for model in models["four"].values()] == [12, 12]


def test_every_calibrator_that_applies_is_fitted_on_calibration_rows_alone(models):
    for name, n_labels in (("two", 2), ("four", 4)):
        model = models[name]["finetuned"]
        fitting, test = (model.results.arrays(split) for split in ("calibration", "test"))
        assert tuple(model.probabilities) == calibrators_for(n_labels)
        for method in model.probabilities:
            expected = calibrated_probabilities(fit_calibrator(method, fitting), test)
            np.testing.assert_allclose(model.probabilities[method], expected, atol=1e-9)


@pytest.mark.parametrize("split", ["calibration", "test"])
def test_rows_of_a_single_group_are_refused_with_what_to_do(models, split):
    results = models["alone"]["base"].results
    examples = tuple(replace(e, group="one") if e.split == split else e for e in results.examples)
    with pytest.raises(UserError, match=rf"the scored {split} rows are of 1 near-.*label more"):
        comparison.judge_calibrators(replace(results, examples=examples))


def test_the_choice_of_a_calibrator_uses_calibration_rows_alone(models):
    model = models["two"]["base"]
    chosen, table = select_calibrator(
        model.results.arrays("calibration"), seed=42
    )  # the evaluation seed of the cache
    assert model.entry["selection"] == {"chosen": chosen, "calibrators": table}
    assert model.selected == chosen != "raw"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("calibrated_results", lambda d: d["models"]["base"].pop("selection"), "no 'selection'"),
        (
            "calibrated_results",
            lambda d: d["models"]["base"]["test"]["ids"].reverse(),
            "its ids are not the test rows in their order",
        ),
        ("base_model_results", lambda d: d["run"].pop("evaluation"), "no 'evaluation'"),
        (
            "base_model_results",
            lambda d: d["run"]["evaluation"].update(bins=0),
            "bins must be an integer of at least 1, got 0",
        ),
    ],
)
def test_a_damaged_cache_is_refused(tmp_path, file, change, message):
    folder = shutil.copytree(simulated_cache("alone"), tmp_path / "damaged")
    data = json.loads((folder / f"{file}.json").read_text())
    change(data)
    (folder / f"{file}.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=message) as caught:
        load_models(folder)
    assert "run: python generate_evaluation_cache.py --force" in str(caught.value)


# Calibrators.


def test_differences_to_raw_are_those_of_the_rows(models):
    for model in (models["two"]["base"], models["four"]["finetuned"]):
        table = calibrator_comparison(model)
        raw, *others = table["calibrators"]
        assert raw["name"] == "raw" and raw["difference"] is None
        before = row_scores(model.probabilities["raw"], model.label)
        for row in others:
            after = row_scores(model.probabilities[row["name"]], model.label)
            for score in ("log_loss", "brier"):
                expected = (after[score] - before[score]).mean()
                assert row["difference"][score]["estimate"] == pytest.approx(expected, abs=1e-8)


def test_better_and_worse_are_decided_by_the_corrected_p_value(models):
    table = calibrator_comparison(models["two"]["base"])
    assert {"platt", "temperature"} <= set(table["better"])  # twice too sure by construction
    assert table["worse"] == []
    entry = models["two"]["base"].entry
    turned = {
        name: {
            score: {**d, "estimate": -d["estimate"], "p_value_holm": 0.06 if i else 0.04}
            for score, d in scores.items()
        }
        for i, (name, scores) in enumerate(entry["comparison"].items())
    }
    model = replace(models["two"]["base"], entry=entry | {"comparison": turned})
    table = calibrator_comparison(model)
    assert (table["better"], table["worse"]) == ([], [next(iter(turned))])


def test_width_and_clipping_are_those_of_calibrators_fitted_again(models):
    model = models["two"]["base"]
    fitting, test = (model.results.arrays(split) for split in ("calibration", "test"))
    margin = test["label_logprobs"] @ [1.0, -1.0]
    p0, p1 = fit_calibrator("venn_abers", fitting).predict_interval(margin)
    table = calibrator_comparison(model)
    assert table["venn_abers_width"] == {
        "mean": pytest.approx((p1 - p0).mean()),
        "median": pytest.approx(np.median(p1 - p0)),
        "largest": pytest.approx((p1 - p0).max()),
    }
    isotonic = fit_calibrator("isotonic", fitting)
    for rows in (fitting, test):
        value = calibrated_probabilities(isotonic, rows)
        clipped = np.isclose(value, 1 / 1002, atol=1e-12).any(axis=1)
        assert table["isotonic_clipped"][rows["split"]] == clipped.mean()


def test_results_are_json(models, both, lessons):
    for of in models.values():
        for model in of.values():
            json.dumps(calibrator_comparison(model), allow_nan=False)
    json.dumps([both, lessons], allow_nan=False)


# McNemar.


def test_mcnemar_known_answer():
    first = [True] * 1 + [False] * 8 + [True] * 20 + [False] * 5
    second = [False] * 1 + [True] * 8 + [True] * 20 + [False] * 5
    result = mcnemar_test(first, second)
    assert result == {"only_first": 1, "only_second": 8, "p_value": pytest.approx(20 / 512)}
    assert mcnemar_test(second, first)["p_value"] == result["p_value"]


def test_mcnemar_without_a_discordant_row_says_nothing():
    assert mcnemar_test([True, False], [True, False])["p_value"] == 1.0


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([], [], "correct_first must have at least 1 row"),
        ([1, 0], [1], "correct_second must have as many rows as correct_first"),
        ([1, 2], [1, 0], "correct_first must be 0 or 1"),
        ([1.0, np.nan], [1, 0], "correct_first must be finite"),
    ],
)
def test_mcnemar_refuses_bad_input(first, second, message):
    with pytest.raises(ValueError, match=message):
        mcnemar_test(first, second)


# Models.


@pytest.mark.parametrize("method", ["raw", "selected"])
def test_differences_of_models_are_those_of_the_rows(models, both, method):
    first, second = models["two"].values()
    table = both["methods"][method]
    for score, difference in differences(first, second, method).items():
        assert table[score]["estimate"] == pytest.approx(difference.mean(), abs=1e-9)
        assert table[score]["low"] < table[score]["estimate"] < table[score]["high"]
        gap = table[score]["finetuned"] - table[score]["base"]
        assert table[score]["estimate"] == pytest.approx(gap)


def test_copies_of_rows_change_the_p_value_of_mcnemar_and_no_other(models):
    first, second = (rows_of(bare(m), np.arange(300)) for m in models["two"].values())
    twice = []
    for model in (first, second):
        copied = rows_of(model, np.repeat(np.arange(300), 2))
        ids = [f"{name} {i % 2}" for i, name in enumerate(copied.entry["test"]["ids"])]
        entry = copied.entry | {"test": copied.entry["test"] | {"ids": ids}}
        twice.append(replace(copied, entry=entry, group=np.repeat(np.arange(300), 2).astype(str)))
    table = model_comparison(*twice)["methods"]["selected"]
    for score, difference in differences(first, second, "selected").items():
        assert table[score]["p_value"] == pytest.approx(ttest_1samp(difference, 0).pvalue)
    right = [m.confidence(m.selected)[1] for m in (first, second)]
    assert table["mcnemar"]["p_value"] < mcnemar_test(*right)["p_value"]


def test_holm_is_over_both_methods_and_all_scores(both):
    tables = [both["methods"][m][score] for m in ("raw", "selected") for score in SCORES]
    expected = holm_by_hand([table["p_value"] for table in tables])
    assert [table["p_value_holm"] for table in tables] == pytest.approx(expected)
    assert "p_value" not in both["methods"]["raw"]["ece"]


def test_curve_differences_have_an_interval_that_knows_the_better_model(models, both):
    first, second = models["two"].values()
    for name, model in (("base", first), ("finetuned", second)):
        metrics = model.metrics["raw"]
        for measure in ("ece", "aurc"):
            value = both["methods"]["raw"][measure][name]
            assert value == pytest.approx(metrics[measure]["estimate"], abs=1e-6)
    aurc = both["methods"]["raw"]["aurc"]
    assert aurc["low"] < aurc["estimate"] < aurc["high"] < 0  # more skill by construction


def test_high_confidence_counts_rows_and_right_answers(models, both):
    model = models["two"]["finetuned"]
    confidence, correct = model.confidence("raw")
    high = both["methods"]["raw"]["high_confidence"]["finetuned"]
    assert high["count"] == (confidence >= 0.9).sum() > 0
    assert high["accuracy"]["estimate"] == correct[confidence >= 0.9].mean()
    assert high["accuracy"]["low"] < high["accuracy"]["estimate"] < high["accuracy"]["high"]


def test_a_model_does_not_differ_from_itself(models):
    model = models["four"]["base"]
    table = model_comparison(bare(model), replace(model, name="finetuned"))
    for method in table["methods"].values():
        for score in SCORES:
            assert (method[score]["estimate"], method[score]["p_value"]) == (0.0, 1.0)
            assert str(method[score]["estimate"]) == "0.0"  # not −0.0
        assert method["mcnemar"]["p_value"] == 1.0
        assert (method["ece"]["low"], method["ece"]["high"]) == (0.0, 0.0)
    beaten = [[b["calibrator"] for b in place["better_than"]] for place in table["ranking"]]
    assert beaten == [["raw", "raw"], ["raw", "raw"], [], []]


def test_rows_are_paired_by_id_and_rows_without_a_partner_left_out(models):
    first, second = models["two"].values()
    unsure = first.confidence("raw")[0] < 0.9
    turned = rows_of(second, np.random.default_rng(0).permutation(1000))
    table = model_comparison(rows_of(bare(first), unsure), turned)
    assert (table["n"], table["left_out"]) == (unsure.sum(), (~unsure).sum())
    raw = table["methods"]["raw"]
    for score, difference in differences(first, second).items():
        assert raw[score]["estimate"] == pytest.approx(difference[unsure].mean())
    nothing = {"threshold": 0.9, "count": 0, "accuracy": None}
    assert raw["high_confidence"]["base"] == nothing != raw["high_confidence"]["finetuned"]


@pytest.mark.parametrize("keep", [[0, 1], [999]])
def test_models_without_two_groups_in_common_are_refused(models, keep):
    first, second = models["two"].values()
    with pytest.raises(UserError, match="groups in common; at least 2 are needed"):
        model_comparison(rows_of(first, np.array(keep)), second)


def test_a_breakdown_is_the_difference_within_each_category(models, both):
    first, second = models["two"].values()
    gain = differences(first, second, "selected")
    for key, name in (("label_name", "labels"), ("category", "categories"), ("domain", "domains")):
        values, parts = getattr(first, key), both[name]
        assert sorted(part["name"] for part in parts) == sorted(set(values))
        assert sum(part["n"] for part in parts) == 1000
        for part in parts:
            inside = values == part["name"]
            assert part["n_groups"] == len(set(first.group[inside]))
            for score in SCORES:
                expected = gain[score][inside].mean()
                assert part[score]["estimate"] == pytest.approx(expected, abs=1e-9)
        gains = [part["accuracy"]["estimate"] for part in parts]
        assert gains == sorted(gains, reverse=True)
        for score in SCORES:
            expected = holm_by_hand([part[score]["p_value"] for part in parts])
            assert [part[score]["p_value_holm"] for part in parts] == pytest.approx(expected)


def test_a_category_of_one_group_has_a_difference_and_no_p_value(models):
    first, second = models["two"].values()
    alone = np.where(first.group == first.group[0], "alone", "")
    table = model_comparison(replace(bare(first), category=alone), second)
    assert table["domains"] == []
    (part,) = table["categories"]
    assert (part["name"], part["n_groups"]) == ("alone", 1)
    for score in SCORES:
        keys = ("low", "high", "p_value", "p_value_holm")
        assert [part[score][key] for key in keys] == [None] * 4
        assert np.isfinite(part[score]["estimate"])
        assert not comparison.is_significant(part[score])


def test_the_ranking_is_by_log_loss_and_corrected_over_all_pairs(models, both):
    ranking = both["ranking"]
    assert len(ranking) == 4
    assert ranking[0]["model"] == "finetuned"  # more skill by construction
    losses = {}
    for place in ranking:
        model = models["two"][place["model"]]
        losses[place["model"], place["calibrator"]] = row_scores(
            model.probabilities[place["calibrator"]], model.label
        )["log_loss"]
        mean = losses[place["model"], place["calibrator"]].mean()
        assert place["log_loss"] == pytest.approx(mean, abs=1e-9)
    means = [place["log_loss"] for place in ranking]
    assert means == sorted(means)
    tested = [beaten for place in ranking for beaten in place["better_than"]]
    assert tested
    for test in tested:
        assert test["p_value"] <= test["p_value_holm"] <= 6 * test["p_value"]
        assert test["p_value_holm"] < 0.05


# Pitfalls.


def test_isotonic_looks_perfect_on_its_own_rows_only(lessons):
    for name in ("two", "four"):
        for of in lessons[name].values():
            own, test = of["same_rows"]["calibration"], of["same_rows"]["test"]
            assert own["log_loss"] < test["log_loss"]
            if name == "two":  # with more labels the maps are fitted one by one
                assert own["ece"] < 0.0005 < 0.01 < test["ece"]


def test_platt_on_probabilities_is_what_scikit_learn_fits(models, lessons):
    model = models["two"]["base"]
    rows = model.results.arrays("calibration")
    given = label_probabilities(rows["label_logprobs"])[:, 0]
    slope, intercept = _sigmoid_calibration(given, np.where(rows["label"] == 0, 1, -1))
    first = expit(-(slope * model.probabilities["raw"][:, 0] + intercept))
    wrong = np.where(model.label == 0, first, 1 - first)
    table = lessons["two"]["base"]["platt_on_probabilities"]
    assert table["probabilities"] == pytest.approx(-np.log(wrong).mean(), abs=1e-5)
    assert table["margin"] == pytest.approx(
        model.metrics["platt"]["log_loss"]["estimate"], abs=1e-8
    )
    gap = table["probabilities"] - table["margin"]
    assert table["difference"]["estimate"] == pytest.approx(gap)


def test_the_maximum_error_comes_with_the_rows_that_decided_it(models, lessons):
    model = models["two"]["base"]
    confidence, correct = model.confidence("platt")
    table = lessons["two"]["base"]["empty_bins"]
    assert [row["n_bins"] for row in table] == [5, 10, 15, 20, 50]
    for row in table:
        bins = np.minimum((confidence * row["n_bins"]).astype(int), row["n_bins"] - 1)
        gaps = {b: abs(correct[bins == b].mean() - confidence[bins == b].mean()) for b in set(bins)}
        worst = max(gaps, key=gaps.__getitem__)
        assert row["mce"] == pytest.approx(gaps[worst])
        assert row["count"] == (bins == worst).sum()
        assert row["ece"] < row["mce"] and row["ece_null_mean"] < row["null_mean"]


def test_naive_cutoffs_break_their_promise_and_certified_ones_keep_it(lessons):
    margin = 2 * np.sqrt(0.1 * 0.9 / comparison.CUTOFF_DRAWS)
    tables = {name: of["naive_cutoffs"] for name, of in lessons["two"].items()}
    for table in tables.values():
        for row in table:
            assert row["certified"]["broken"] <= 0.1 + margin
            assert row["certified"]["automated"] <= row["naive"]["automated"]
    broken = [row["naive"]["broken"] for table in tables.values() for row in table]
    assert max(broken) > 0.3
    assert tables["finetuned"][0]["certified"]["automated"] > 0  # not by automating nothing


def test_the_same_seed_gives_the_same_numbers(models, lessons):
    model, expected = models["alone"]["base"], lessons["alone"]["base"]
    assert pitfalls(model) == expected
    assert pitfalls(model, seed=1)["naive_cutoffs"] != expected["naive_cutoffs"]
