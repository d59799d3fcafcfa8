"""Decisions: zones, certified automation, costs and sample sizes, against brute force."""

import json

import numpy as np
import pytest
from scipy.stats import binom

import decisions
from calibration import calibrated_probabilities, fit_calibrator
from calibration_metrics import (
    clustered_wilson_interval,
    expected_calibration_error,
    log_loss,
    null_calibration_error,
    wilson_interval,
)
from comparison import load_model
from decisions import Answers, ScoredAnswers
from records import SCHEMA_VERSION, write_json
from settings import SENTIMENT, UserError
from simulated_cache import TOPIC, simulate, simulated_cache


def rows_of(skill=0.8, n=1200, task=SENTIMENT, seed=1, sharpness=1.6):
    """Calibration and test rows of a simulated model, three rows a near-duplicate group."""
    results = simulate("base", task, n, seed, skill, sharpness)
    return results.arrays("calibration"), results.arrays("test")


def perfectly_calibrated(n, rng, group=None):
    """Answers that are right as often as their confidence says."""
    confidence = rng.beta(4, 1, n) / 2 + 0.5
    group = np.arange(n) if group is None else group
    return Answers(confidence, rng.random(n) < confidence, group.astype(str))


def scored(certifying, test):
    return ScoredAnswers("platt", {}, 100, certifying, test, fitted=None)


# Zones.


def test_a_confidence_on_an_edge_belongs_to_the_zone_above():
    confidence = np.array([1.0, 0.9, 0.8999, 0.7, 0.6999, 0.5, 0.4999, 0.0])
    assert decisions.zone_of(confidence).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_zones_are_the_rows_between_their_edges():
    rng = np.random.default_rng(0)
    confidence, correct = rng.random(500), rng.random(500) < 0.7
    group = rng.integers(100, size=500).astype(str)
    table = decisions.zone_table(confidence, correct, group)
    tops = [np.inf, 0.9, 0.7, 0.5]
    for zone, top, (low, name, action) in zip(table, tops, decisions.ZONES, strict=True):
        inside = (confidence >= low) & (confidence < top)
        assert (zone["name"], zone["action"]) == (name, action)
        assert zone["count"] == inside.sum()
        assert zone["share"] == inside.mean()
        assert zone["accuracy"] == pytest.approx(correct[inside].mean())
        assert zone["mean_confidence"] == pytest.approx(confidence[inside].mean())
        expected = clustered_wilson_interval(correct[inside], group[inside])
        assert (zone["low"], zone["high"]) == expected
    assert sum(zone["share"] for zone in table) == pytest.approx(1)


def test_copies_of_a_row_do_not_narrow_the_interval_of_a_zone():
    rng = np.random.default_rng(1)
    confidence, correct = np.full(60, 0.8), rng.random(60) < 0.75
    once = decisions.zone_table(confidence, correct, np.arange(60).astype(str))[1]
    copied = (np.repeat(column, 5) for column in (confidence, correct, np.arange(60).astype(str)))
    five_times = decisions.zone_table(*copied)[1]
    low, high = wilson_interval([correct.sum()], [60])
    assert once["high"] - once["low"] == pytest.approx(float(high[0] - low[0]), rel=0.05)
    assert five_times["high"] - five_times["low"] == pytest.approx(
        once["high"] - once["low"], rel=0.05
    )


def test_a_zone_without_rows_has_no_accuracy():
    table = decisions.zone_table(np.array([0.95]), np.array([True]), np.array(["a"]))
    assert [zone["count"] for zone in table] == [1, 0, 0, 0]
    for zone in table[1:]:
        assert zone["share"] == 0
        assert [zone[k] for k in ("accuracy", "low", "high", "mean_confidence")] == [None] * 4


# Scores.


@pytest.mark.parametrize("task", [SENTIMENT, TOPIC], ids=["two labels", "four labels"])
def test_thresholds_are_certified_on_groups_that_did_not_fit_the_calibrator(task, monkeypatch):
    seen = []
    fit = decisions.fit_calibrator
    monkeypatch.setattr(decisions, "fit_calibrator", lambda n, r: seen.append(r) or fit(n, r))
    calibration, test = rows_of(task=task)
    result = decisions.score_answers(calibration, test)
    (fitting,) = seen
    assert set(fitting["group"]) | set(result.certifying.group) == set(calibration["group"])
    assert not set(fitting["group"]) & set(result.certifying.group)
    assert result.n_fitting + len(result.certifying.correct) == len(calibration["label"])
    probabilities = calibrated_probabilities(fit(result.calibrator, fitting), test)
    np.testing.assert_array_equal(result.test.confidence, probabilities.max(axis=1))
    np.testing.assert_array_equal(
        result.test.correct, probabilities.argmax(axis=1) == test["label"]
    )


def test_test_rows_choose_nothing():
    calibration, test = rows_of(skill=1.0)
    other = dict(rows_of(skill=0.2, seed=5)[1])
    first, second = (
        decisions.automation(decisions.score_answers(calibration, rows)) for rows in (test, other)
    )
    assert first["calibrator"] == second["calibrator"]
    for a, b in zip(first["promises"], second["promises"], strict=True):
        for way in ("certified", "naive"):
            assert a[way]["threshold"] == b[way]["threshold"]
            assert a[way]["test"] != b[way]["test"] or a[way]["threshold"] is None


@pytest.mark.parametrize(
    ("calibration_split", "test_split", "message"),
    [
        ("test", "test", "calibration split, got 'test'"),
        ("calibration", "calibration", "test split, got 'calibration'"),
    ],
)
@pytest.mark.parametrize("function", [decisions.score_answers, decisions.sample_size_curves])
def test_rows_of_the_wrong_split_are_refused(function, calibration_split, test_split, message):
    calibration, test = rows_of(n=60)
    with pytest.raises(ValueError, match=message):
        function({**calibration, "split": calibration_split}, {**test, "split": test_split})


def test_too_few_groups_are_refused_and_the_fewest_accepted():
    calibration, test = rows_of(n=60)
    few = {**calibration, "group": np.array(["a", "b", "c"] * 10)}
    assert not decisions.enough_groups(few)
    for function in (decisions.score_answers, decisions.sample_size_curves):
        with pytest.raises(UserError, match="at least 4 near-duplicate groups are needed, got 3"):
            function(few, test)
    enough = {**calibration, "group": np.array(["a", "b", "c", "d", "d"] * 6)}
    assert decisions.enough_groups(enough)
    assert decisions.score_answers(enough, test).certifying.n_groups == 2


# Automation.


def test_a_perfect_model_is_automated_and_a_hopeless_one_is_not():
    n = 200
    confidence, group = np.linspace(0.5, 1, n), np.arange(n).astype(str)
    right = Answers(confidence, np.ones(n, dtype=bool), group)
    wrong = Answers(confidence, np.zeros(n, dtype=bool), group)
    (row,) = decisions.automation(scored(right, right), promises=[0.9])["promises"]
    for way in ("certified", "naive"):
        assert row[way]["threshold"] == 0.5
        assert row[way]["test"]["coverage"] == 1
        assert (row[way]["test"]["errors"], row[way]["test"]["kept"]) == (0, True)
    assert row["certified"]["abstention_bound"]["estimate"] == 0
    (row,) = decisions.automation(scored(wrong, right), promises=[0.9])["promises"]
    for way in ("certified", "naive"):
        assert row[way]["threshold"] is None
        assert row[way]["test"]["coverage"] == 0
        assert (row[way]["test"]["risk"], row[way]["test"]["kept"]) == (None, None)
    assert row["certified"]["abstention_bound"]["estimate"] == 1
    (row,) = decisions.automation(scored(right, wrong), promises=[0.9])["promises"]
    assert row["certified"]["test"]["kept"] is False
    assert row["certified"]["test"]["errors"] == n


def test_test_rows_are_counted_at_or_above_the_threshold():
    rng = np.random.default_rng(3)
    certifying, test = perfectly_calibrated(1000, rng), perfectly_calibrated(500, rng)
    table = decisions.automation(scored(certifying, test))
    assert [row["promise"] for row in table["promises"]] == [0.9, 0.95, 0.99]
    assert [row["alpha"] for row in table["promises"]] == [0.1, 0.05, 0.01]
    automated = 0
    for row in table["promises"]:
        for way in ("certified", "naive"):
            above = test.confidence >= (row[way]["threshold"] or 2)
            result = row[way]["test"]
            automated += above.sum()
            assert result["automated"] == above.sum()
            assert result["errors"] == (~test.correct[above]).sum()
            announced = (1 - test.confidence[above]).sum()
            assert result["expected_errors"] == pytest.approx(announced)
            if above.any():
                assert result["kept"] == ((~test.correct[above]).mean() <= row["alpha"])
        certified, naive = (row[way]["threshold"] for way in ("certified", "naive"))
        assert certified is None or certified >= naive
    assert automated > 0
    json.dumps(table, allow_nan=False)


def test_the_promise_is_1_minus_alpha_to_the_digit():
    """1 − 0.9 is less than 0.1 as a float: one error in ten rows keeps a promise of 90 %."""
    confidence, correct = np.full(10, 0.9), np.arange(10) > 0
    answers = Answers(confidence, correct, np.arange(10).astype(str))
    (row,) = decisions.automation(scored(answers, answers), promises=[0.9])["promises"]
    assert row["naive"]["threshold"] == 0.9
    assert row["naive"]["test"]["kept"] is True


@pytest.mark.parametrize("promise", [0, 1, 1.5, float("nan")])
def test_a_promise_is_an_accuracy_between_0_and_1(promise):
    answers = perfectly_calibrated(10, np.random.default_rng(0))
    with pytest.raises(ValueError, match="promise must lie between 0 and 1, got"):
        decisions.automation(scored(answers, answers), promises=[promise])


def test_certified_thresholds_keep_their_promise_and_naive_ones_do_not():
    """300 draws; the risk of the confidences is known exactly, so no test rows blur it."""
    rng = np.random.default_rng(0)
    population = perfectly_calibrated(20_000, rng)
    true_risk = 1 - population.confidence
    broken = {"certified": 0, "naive": 0}
    for _ in range(300):
        certifying = perfectly_calibrated(400, rng)
        table = decisions.automation(scored(certifying, certifying), promises=[0.95])
        for way in broken:
            threshold = table["promises"][0][way]["threshold"]
            if threshold is not None:
                broken[way] += true_risk[population.confidence >= threshold].mean() > 0.05
    assert broken["certified"] <= binom.ppf(0.999, 300, decisions.DELTA)
    assert broken["naive"] > 90


# Costs.


def test_costs_are_those_of_the_errors_and_the_reviews():
    rng = np.random.default_rng(5)
    certifying = perfectly_calibrated(800, rng)
    test = perfectly_calibrated(300, rng, group=np.arange(300) // 3)
    answers = scored(certifying, test)
    table = decisions.automation(answers)
    costs = decisions.cost_table(answers, table, cost_error=7.0, cost_review=2.0, n_resamples=200)
    by_policy = {(row["policy"], row["promise"]): row for row in costs}
    assert len(by_policy) == len(costs) == 2 + 2 * 3 + 1
    for row in costs:
        total = 0.0
        for confidence, correct in zip(test.confidence, test.correct, strict=True):
            if row["threshold"] is None or confidence < row["threshold"]:
                total += 2.0
            elif not correct:
                total += 7.0
        assert row["estimate"] == pytest.approx(1000 * total / 300)
        assert row["low"] <= row["estimate"] <= row["high"]
    everything = by_policy["automate everything", None]
    assert everything["automated"] == 1
    assert everything["estimate"] == pytest.approx(7000 * (~test.correct).mean())
    review = by_policy["review everything", None]
    assert (review["estimate"], review["low"], review["high"]) == (2000, 2000, 2000)
    assert by_policy["least expected cost", None]["threshold"] == pytest.approx(1 - 2 / 7)
    for row in table["promises"]:
        for way in ("naive", "certified"):
            assert by_policy[way, row["promise"]]["threshold"] == row[way]["threshold"]
    json.dumps(costs, allow_nan=False)


def test_no_threshold_is_cheaper_than_the_one_of_least_expected_cost():
    """On 50,000 answers whose confidence is right; the margin is their chance."""
    rng = np.random.default_rng(6)
    answers = perfectly_calibrated(50_000, rng)
    expected = 1 - answers.confidence
    for cost_error, cost_review in ((10, 1), (4, 1), (3, 0.2), (2, 3)):
        best = max(0.0, 1 - cost_review / cost_error)
        cost = {
            cut: np.where(answers.confidence >= cut, cost_error * expected, cost_review).mean()
            for cut in (best, *np.linspace(0, 1.01, 60))
        }
        assert min(cost.values()) == cost[best]
        table = decisions.automation(scored(answers, answers), promises=[0.9])
        row = decisions.cost_table(
            scored(answers, answers), table, cost_error, cost_review, n_resamples=20
        )[-1]
        assert row["threshold"] == best
        assert row["estimate"] == pytest.approx(1000 * cost[best], rel=0.05)


def test_a_review_dearer_than_an_error_automates_everything():
    answers = perfectly_calibrated(50, np.random.default_rng(7))
    table = decisions.automation(scored(answers, answers))
    costs = decisions.cost_table(scored(answers, answers), table, 1.0, 5.0, n_resamples=20)
    assert costs[-1]["automated"] == 1
    assert costs[-1]["estimate"] == costs[0]["estimate"]


def test_near_duplicates_widen_the_interval_of_a_cost():
    rng = np.random.default_rng(8)
    answers = perfectly_calibrated(100, rng)
    copies = Answers(*(np.repeat(c, 4) for c in (answers.confidence, answers.correct)), None)
    width = {}
    for name, group in (("alone", np.arange(400)), ("copies", np.repeat(np.arange(100), 4))):
        data = scored(answers, Answers(copies.confidence, copies.correct, group.astype(str)))
        row = decisions.cost_table(data, decisions.automation(data))[0]
        width[name] = row["high"] - row["low"]
    assert width["copies"] == pytest.approx(2 * width["alone"], rel=0.2)


@pytest.mark.parametrize(
    ("cost_error", "cost_review", "message"),
    [
        (0, 1, "cost_error must be finite and above 0, got 0"),
        (-1, 1, "cost_error must be finite and above 0, got -1"),
        (float("nan"), 1, "cost_error must be finite and above 0, got nan"),
        (1, -0.5, "cost_review must be finite and at least 0, got -0.5"),
        (1, float("inf"), "cost_review must be finite and at least 0, got inf"),
    ],
)
def test_costs_out_of_range_are_refused(cost_error, cost_review, message):
    answers = perfectly_calibrated(10, np.random.default_rng(0))
    table = decisions.automation(scored(answers, answers))
    with pytest.raises(ValueError, match=message):
        decisions.cost_table(scored(answers, answers), table, cost_error, cost_review)


# Sample size.


@pytest.fixture(scope="module")
def good_rows():
    return rows_of(skill=1.0, n=2400)


@pytest.fixture(scope="module")
def curves(good_rows):
    return decisions.sample_size_curves(*good_rows, promise=0.85, n_draws=12)


def test_sizes_run_up_to_all_calibration_rows(curves):
    assert [size["n"] for size in curves["sizes"]] == [50, 100, 200, 500, 1000, 1200]
    assert (curves["n_calibration"], curves["n_test"]) == (1200, 1200)
    for size in curves["sizes"]:
        assert size["n"] <= size["rows"] < size["n"] + 3  # whole groups of three
    json.dumps(curves, allow_nan=False)


def test_the_last_size_is_the_calibrator_of_all_rows(curves, good_rows):
    calibration, test = good_rows
    for method in ("platt", "isotonic"):
        probabilities = calibrated_probabilities(fit_calibrator(method, calibration), test)
        confidence = probabilities.max(axis=1)
        correct = probabilities.argmax(axis=1) == test["label"]
        expected = {
            "log_loss": log_loss(probabilities, test["label"]),
            "ece": expected_calibration_error(confidence, correct),
        }
        for key, value in expected.items():
            band = curves["sizes"][-1][method][key]
            assert (band["mean"], band["low"], band["high"]) == pytest.approx((value,) * 3)
    raw = calibrated_probabilities(fit_calibrator("raw", calibration), test)
    assert curves["raw"]["log_loss"] == log_loss(raw, test["label"])


def test_more_rows_make_better_calibrators_with_less_luck(curves):
    first, last = curves["sizes"][0], curves["sizes"][-2]
    for method in ("platt", "isotonic"):
        for key in ("log_loss", "ece"):
            few, many = first[method][key], last[method][key]
            assert many["mean"] < few["mean"]
            assert many["high"] - many["low"] < few["high"] - few["low"]
    assert first["isotonic"]["log_loss"]["mean"] > first["platt"]["log_loss"]["mean"]


def test_certified_coverage_grows_with_the_rows(curves):
    share = [size["certified"]["share"] for size in curves["sizes"]]
    coverage = [size["certified"]["coverage"]["mean"] for size in curves["sizes"]]
    assert share[0] == coverage[0] == 0  # 50 rows are 17 groups: too few for any certificate
    assert share[-1] > 0.3
    assert coverage[-1] > coverage[2] + 0.2
    for size in curves["sizes"]:
        assert size["certified"]["coverage"]["mean"] <= size["certified"]["share"]
        assert size["certified"]["broken"] <= size["certified"]["share"]


def test_chance_is_that_of_a_perfectly_calibrated_model(curves):
    rng = np.random.default_rng(0)
    for size in curves["sizes"]:
        assert size["null_ece"]["mean"] < size["null_ece"]["p95"]
    means = [size["null_ece"]["mean"] for size in curves["sizes"]]
    assert means == sorted(means, reverse=True)
    assert curves["sizes"][-1]["null_ece"]["mean"] == pytest.approx(
        curves["test_null"]["mean"], rel=0.05
    )
    calibration, test = rows_of(skill=1.0, n=2400)
    probabilities = calibrated_probabilities(fit_calibrator("platt", calibration), test)
    drawn = [rng.choice(probabilities.max(axis=1), 200) for _ in range(20)]
    expected = np.mean([null_calibration_error(c, n_draws=200)[0] for c in drawn])
    assert curves["sizes"][2]["null_ece"]["mean"] == pytest.approx(expected, rel=0.05)


def test_the_same_seed_draws_the_same_rows(good_rows):
    calibration, test = good_rows
    few = {k: v[:150] if isinstance(v, np.ndarray) else v for k, v in calibration.items()}
    first, again, other = (
        decisions.sample_size_curves(few, test, n_draws=3, seed=seed) for seed in (4, 4, 5)
    )
    assert first == again
    assert first["sizes"][0]["platt"] != other["sizes"][0]["platt"]


@pytest.mark.parametrize("task", [SENTIMENT, TOPIC], ids=["two labels", "four labels"])
def test_sixty_rows_are_enough(task):
    calibration, test = rows_of(n=60, task=task)
    curves = decisions.sample_size_curves(calibration, test, n_draws=3)
    assert [size["n"] for size in curves["sizes"]] == [30]
    assert curves["sizes"][0]["certified"]["share"] == 0
    needed = decisions.labels_needed(calibration)
    table = decisions.automation(decisions.score_answers(calibration, test))
    json.dumps([curves, needed, table], allow_nan=False)


def test_rows_of_one_label_or_one_answer_are_no_obstacle():
    calibration, test = rows_of(n=120)
    one_label = {**calibration, "label": np.zeros_like(calibration["label"])}
    same = {**calibration, "label_logprobs": np.tile(calibration["label_logprobs"][:1], (60, 1))}
    for rows in (one_label, same):
        table = decisions.automation(decisions.score_answers(rows, test))
        curves = decisions.sample_size_curves(rows, test, n_draws=2)
        json.dumps([table, curves, decisions.labels_needed(rows)], allow_nan=False)


# Labels needed.


def test_without_an_error_the_least_number_of_units_is_enough():
    assert decisions.units_to_certify(0.0, 0.1) == 45  # 2 ⌈ln 0.1 / ln 0.9⌉ + 1
    assert decisions.units_to_certify(0.0, 0.05) == 91
    assert decisions.units_to_certify(0.0, 0.01) == 461


@pytest.mark.parametrize("error", [0.02, 0.04, 0.06])
def test_units_to_certify_is_the_first_number_with_the_power_asked_for(error):
    def power(m):
        passing = [c for c in range(m + 1) if binom.cdf(c, m, 0.1) <= 0.1]
        return binom.cdf(max(passing), m, error) if passing else 0.0

    found = decisions.units_to_certify(error, 0.1)
    assert power(found) >= 0.8
    assert all(power(m) < 0.8 for m in range(45, min(found, round(found / 1.02))))


def test_an_error_no_better_than_promised_needs_no_number_of_labels():
    assert decisions.units_to_certify(0.1, 0.1) is None
    assert decisions.units_to_certify(0.3, 0.1) is None
    assert decisions.units_to_certify(1.0, 0.1) is None
    numbers = [decisions.units_to_certify(error, 0.1) for error in (0, 0.03, 0.06, 0.09, 0.095)]
    assert numbers == sorted(set(numbers))


def test_labels_needed_projects_the_most_confident_rows():
    calibration, _ = rows_of(skill=1.0, n=2400)
    needed = decisions.labels_needed(calibration, promises=(0.9, 0.99))
    assert needed["rows_per_group"] == 3
    # 45 units of a half of the groups, with three rows each; 461 for 99 %.
    assert [entry["rows"] for entry in needed["minimum"]] == [270, 2766]
    assert [entry["share"] for entry in needed["shares"]] == [0.1, 0.25, 0.5, 1.0]
    assert [entry["n"] for entry in needed["shares"]] == [120, 300, 600, 1200]
    accuracy = [entry["accuracy"] for entry in needed["shares"]]
    assert accuracy == sorted(accuracy, reverse=True)
    for entry in needed["shares"]:
        assert entry["low"] <= entry["accuracy"] <= entry["high"]
        for promise in entry["needed"]:
            assert (promise["units"] is None) == (entry["accuracy"] <= promise["promise"])
            if promise["units"] is not None:
                least = promise["units"] / entry["share"] * 3 * 2
                assert least <= promise["rows"] < least + 1
    surest = needed["shares"][0]["needed"][0]
    assert surest["units"] == decisions.units_to_certify(1 - accuracy[0], 0.1)
    json.dumps(needed, allow_nan=False)


# The cache.


def test_the_model_asked_for_is_the_one_that_is_read(tmp_path):
    assert load_model(simulated_cache("two")).name == "finetuned"
    assert load_model(simulated_cache("two"), "base").name == "base"
    folder = simulated_cache("alone")
    assert load_model(folder).name == "base"
    with pytest.raises(UserError, match="has no fine-tuned model; run: python fine_tune"):
        load_model(folder, "finetuned")
    empty = {"schema_version": SCHEMA_VERSION, "models": {}}
    write_json(tmp_path / "calibrated_results.json", empty)
    with pytest.raises(UserError, match="is damaged"):
        load_model(tmp_path)
