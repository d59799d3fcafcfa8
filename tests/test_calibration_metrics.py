"""Calibration metrics against published values, scikit-learn, brute force and simulation."""

import json
import os
import subprocess
import sys
import time
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from scipy.stats import binom, binomtest, norm, ttest_1samp, ttest_rel
from scipy.stats import t as student_t
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.metrics import log_loss as sklearn_log_loss

from calibration_metrics import (
    CALIBRATION_ERRORS,
    FEW_GROUPS,
    METRICS,
    RANKINGS,
    accuracy_at_coverage,
    augrc,
    aurc,
    auroc,
    bootstrap_interval,
    brier_score,
    calibration_metrics,
    clustered_wilson_interval,
    compare,
    corp_decomposition,
    coverage_at_risk,
    debiased_squared_calibration_error,
    excess_aurc,
    expected_calibration_error,
    holm,
    kuiper_test,
    log_loss,
    maximum_calibration_error,
    measure,
    null_calibration_error,
    paired_difference,
    reliability_diagram,
    risk_coverage_band,
    risk_coverage_curve,
    smooth_calibration_error,
    spiegelhalter_test,
    wilson_interval,
)

# The value of every measure of confidence against correct.
MEASURES = {
    "ece": expected_calibration_error,
    "ece_equal_mass": lambda c, k: expected_calibration_error(c, k, binning="mass"),
    "mce": lambda c, k: maximum_calibration_error(c, k)[0],
    "squared_calibration_error": debiased_squared_calibration_error,
    "smooth_ece": smooth_calibration_error,
    "miscalibration": lambda c, k: corp_decomposition(c, k)["miscalibration"],
    "discrimination": lambda c, k: corp_decomposition(c, k)["discrimination"],
    "uncertainty": lambda c, k: corp_decomposition(c, k)["uncertainty"],
    "auroc": auroc,
    "aurc": aurc,
    "excess_aurc": excess_aurc,
    "augrc": augrc,
    "accuracy_at_coverage": lambda c, k: accuracy_at_coverage(c, k, 0.7),
    "coverage_at_risk": lambda c, k: coverage_at_risk(c, k, 0.1),
    "kuiper": lambda c, k: kuiper_test(c, k)["statistic"],
    "spiegelhalter": lambda c, k: spiegelhalter_test(c, k)["statistic"],
}

steady = settings(derandomize=True, deadline=None, max_examples=60)


def calibrated_rows(n, seed, scale=3.0):
    """Probabilities (n, 2) and labels of a perfectly calibrated model, logit ~ N(0, scale²)."""
    rng = np.random.default_rng(seed)
    first = expit(scale * rng.standard_normal(n))
    label = (rng.random(n) >= first).astype(int)
    return np.column_stack([first, 1 - first]), label


def brute_force_bins(confidence, correct, n_bins):
    """(count, mean confidence, accuracy) of each occupied equal-width bin, one row at a time."""
    bins = {}
    for c, k in zip(confidence, correct, strict=True):
        b = max(j for j in range(n_bins) if c >= j / n_bins)
        bins.setdefault(b, []).append((c, k))
    return {
        b: (len(rows), sum(c for c, _ in rows) / len(rows), sum(k for _, k in rows) / len(rows))
        for b, rows in sorted(bins.items())
    }


confidence_and_correct = st.lists(
    st.tuples(st.floats(0, 1) | st.sampled_from([0.0, 0.3, 0.5, 0.95, 1.0]), st.booleans()),
    min_size=1,
    max_size=40,
).map(lambda rows: (np.array([c for c, _ in rows]), np.array([k for _, k in rows])))


# Known answers.


def test_confidence_of_exactly_one_falls_in_the_last_bin():
    assert expected_calibration_error([0.95, 1.0], [1, 0], n_bins=10) == pytest.approx(0.475)


def test_equal_mass_and_equal_width_known_answers():
    confidence, correct = [0.6, 0.7, 0.8, 0.9], [0, 0, 1, 1]
    assert expected_calibration_error(confidence, correct, 2, "mass") == pytest.approx(0.4)
    assert expected_calibration_error(confidence, correct, 2, "width") == pytest.approx(0.25)


def test_a_decimal_on_an_edge_starts_the_bin_above():
    confidence = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    diagram = reliability_diagram(confidence, [1] * 10, n_bins=10, n_null=10)
    assert diagram["count"].tolist() == [1] * 10


def test_equal_confidences_share_one_equal_mass_bin():
    confidence, correct = [0.7] * 6, [1, 1, 1, 0, 0, 0]
    assert expected_calibration_error(confidence, correct, 3, "mass") == pytest.approx(0.2)
    count = reliability_diagram(confidence, correct, 3, "mass", n_null=10)["count"]
    assert sorted(count) == [0, 0, 6]


def test_equal_mass_bins_hold_equal_counts():
    confidence = np.random.default_rng(0).permutation(np.linspace(0.01, 0.99, 50))
    diagram = reliability_diagram(confidence, confidence > 0.5, 7, "mass", n_null=10)
    assert diagram["count"].sum() == 50
    assert set(diagram["count"]) == {7, 8}
    assert (diagram["mean_confidence"] >= diagram["edges"][:-1]).all()
    assert (diagram["mean_confidence"] <= diagram["edges"][1:]).all()


def test_maximum_calibration_error_names_the_count_of_its_bin():
    confidence = [0.55, 0.55, 0.55, 0.55, 0.91]
    correct = [1, 1, 0, 0, 0]
    assert maximum_calibration_error(confidence, correct, 10) == (pytest.approx(0.91), 1)


def test_maximum_calibration_error_of_perfect_rows_counts_real_rows():
    assert maximum_calibration_error([1.0, 1.0], [1, 1]) == (0.0, 2)


@pytest.mark.parametrize(
    ("n", "mean", "p95"), [(200, 0.043, 0.072), (1000, 0.019, 0.031), (5000, 0.008, 0.012)]
)
def test_null_calibration_error_has_the_published_size(n, mean, p95):
    draws = [
        null_calibration_error(calibrated_rows(n, seed)[0].max(axis=1), 10, 100, seed)
        for seed in range(12)
    ]
    assert np.mean([m for m, _ in draws]) == pytest.approx(mean, rel=0.12)
    assert np.mean([p for _, p in draws]) == pytest.approx(p95, rel=0.2)


def test_wilson_interval_known_answer_and_oracle():
    low, high = wilson_interval([8], [10])
    assert (low[0], high[0]) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    successes, count = np.array([0, 1, 30, 30]), np.array([30, 30, 30, 77])
    low, high = wilson_interval(successes, count, level=0.9)
    for i in range(4):
        oracle = binomtest(int(successes[i]), int(count[i])).proportion_ci(0.9, method="wilson")
        assert (low[i], high[i]) == pytest.approx((oracle.low, oracle.high))
    assert np.isnan(wilson_interval([0], [0])).all()


# Oracles.


@steady
@given(confidence_and_correct, st.integers(1, 25))
def test_errors_agree_with_brute_force(rows, n_bins):
    confidence, correct = rows
    bins = brute_force_bins(confidence, correct, n_bins)
    gaps = [(abs(mean - accuracy), count) for count, mean, accuracy in bins.values()]
    ece = sum(gap * count for gap, count in gaps) / len(confidence)
    assert expected_calibration_error(confidence, correct, n_bins) == pytest.approx(ece, abs=1e-12)
    value, count = maximum_calibration_error(confidence, correct, n_bins)
    assert value == pytest.approx(max(gaps)[0], abs=1e-12)
    assert any(g == pytest.approx(value, abs=1e-12) and c == count for g, c in gaps)
    diagram = reliability_diagram(confidence, correct, n_bins, n_null=5)
    for b in range(n_bins):
        row = tuple(diagram[key][b] for key in ("count", "mean_confidence", "accuracy"))
        if b in bins:
            assert row == pytest.approx(bins[b])
        else:
            assert row[0] == 0
            binned = ("mean_confidence", "accuracy", "wilson_low", "null_low", "null_high")
            assert all(np.isnan(diagram[key][b]) for key in binned)


@pytest.mark.parametrize("n_labels", [2, 3, 5])
def test_proper_scores_agree_with_scikit_learn(n_labels):
    rng = np.random.default_rng(n_labels)
    probabilities = softmax(2 * rng.standard_normal((300, n_labels)), axis=1)
    label = rng.integers(n_labels, size=300)
    expected = sklearn_log_loss(label, probabilities)
    assert log_loss(probabilities, label) == pytest.approx(expected, rel=1e-12)
    expected = brier_score_loss(label, probabilities, scale_by_half=True)
    assert brier_score(probabilities, label) == pytest.approx(expected, rel=1e-12)


def test_binary_brier_is_the_usual_one():
    probabilities, label = calibrated_rows(200, 3)
    expected = brier_score_loss(label, probabilities[:, 1])
    assert brier_score(probabilities, label) == pytest.approx(expected)


def test_probabilities_of_zero_and_one_give_finite_scores():
    probabilities = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    assert log_loss(probabilities, [0, 1, 0]) == 0.0
    assert log_loss(probabilities, [1, 1, 0]) == pytest.approx(36.0437 / 3, abs=1e-4)
    assert log_loss(probabilities, [1, 1, 0]) == pytest.approx(
        sklearn_log_loss([1, 1, 0], np.array(probabilities))
    )
    assert brier_score(probabilities, [1, 1, 0]) == pytest.approx(1 / 3)


def test_debiased_error_agrees_with_uncertainty_calibration(tmp_path):
    rng = np.random.default_rng(0)
    confidence = rng.random((4, 400))
    correct = rng.random((4, 400)) < confidence ** np.array([[1.0], [1.5], [2.0], [4.0]])
    (tmp_path / "rows.json").write_text(json.dumps([confidence.tolist(), correct.tolist()]))
    script = """
import json
try:
    from calibration import utils  # not ours: -P keeps the current folder off the path
except ModuleNotFoundError:
    print("null")
else:
    error = [
        float(utils.unbiased_square_ce(utils.equal_bin(list(zip(*rows)), bins)))
        for rows in zip(*json.load(open("rows.json")))
        for bins in (5, 10, 20)
    ]
    print(json.dumps(error))
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    answer = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=True,
    ).stdout
    if (expected := json.loads(answer)) is None:
        pytest.skip("uncertainty-calibration is not installed")
    ours = [
        debiased_squared_calibration_error(c, k, bins)
        for c, k in zip(confidence, correct, strict=True)
        for bins in (5, 10, 20)
    ]
    assert ours == pytest.approx(expected, abs=1e-12)


def test_debiased_error_of_a_known_gap():
    # One bin: (0.8 − 0.6)² less 0.6 · 0.4 / 9.
    value = debiased_squared_calibration_error([0.8] * 10, [1] * 6 + [0] * 4)
    assert value == pytest.approx(0.04 - 0.24 / 9)


def test_debiased_error_is_zero_on_average_when_calibrated_and_plain_errors_are_not():
    confidence = calibrated_rows(300, 0)[0].max(axis=1)
    mean, p95 = null_calibration_error(confidence, metric="squared_calibration_error")
    assert abs(mean) < 0.1 * p95
    assert null_calibration_error(confidence, metric="ece")[0] > 0.03


def test_debiased_error_of_few_rows_uses_bins_of_two():
    confidence, correct = [0.1, 0.2, 0.8, 0.9], [1, 0, 1, 1]
    few = debiased_squared_calibration_error(confidence, correct, n_bins=20)
    assert few == debiased_squared_calibration_error(confidence, correct, n_bins=2)
    assert few == pytest.approx(((0.15 - 0.5) ** 2 - 0.25 + 0.15**2) / 2)


def smooth_error_by_quadrature(confidence, correct):
    """The definition: images of every row mirrored at 0 and 1, a fixed point by bisection."""
    t = (np.arange(3000) + 0.5) / 3000
    low, high = 0.0, 1.0
    for _ in range(14):
        sigma = (low + high) / 2
        kernel = sum(
            norm.pdf(t[:, None], sign * confidence + 2 * j, sigma)
            for j in range(-4, 5)
            for sign in (1, -1)
        )
        error = np.abs(kernel @ (correct - confidence) / len(confidence)).mean()
        low, high = (sigma, high) if error > sigma else (low, sigma)
    return high


@pytest.mark.parametrize(
    ("confidence", "correct"),
    [
        ([0.0, 1.0], [1, 0]),
        ([1.0] * 6 + [0.9] * 2, [1] * 5 + [0] * 3),
        ([0.02, 0.3, 0.3, 0.55, 0.97, 1.0], [1, 0, 1, 1, 0, 1]),
        (np.linspace(0.5, 1, 25), [1, 0, 1, 1, 0] * 5),
    ],
)
def test_smooth_error_agrees_with_its_definition(confidence, correct):
    confidence, correct = np.array(confidence), np.array(correct)
    expected = smooth_error_by_quadrature(confidence, correct)
    assert smooth_calibration_error(confidence, correct) == pytest.approx(expected, abs=5e-4)


def test_smooth_error_of_one_sided_gaps_is_their_mean():
    assert smooth_calibration_error([0.7] * 10, [1] * 10) == pytest.approx(0.3)
    assert smooth_calibration_error([0.9, 0.8], [0, 0]) == pytest.approx(0.85)


def test_smooth_error_agrees_with_relplot():
    # relplot cuts the kernel at distance 1/2 and counts rows within 1/2000 of 0 or 1 by half, so
    # the two agree where σ is below about 0.15 and few rows lie there.
    relplot = pytest.importorskip("relplot")
    rng = np.random.default_rng(0)
    for n in (100, 1000, 10_000):
        for scale in (0.5, 0.8, 1.2):
            confidence = expit(1.2 * rng.standard_normal(n))
            truth = expit(scale * np.log(confidence / (1 - confidence)))
            event = rng.random(n) < truth
            top = np.maximum(confidence, 1 - confidence)
            for c, k in ((confidence, event), (top, event == (confidence >= 0.5))):
                expected = relplot.smECE(c, k.astype(float))
                assert expected < 0.15
                assert smooth_calibration_error(c, k) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("decimals", [1, 2, 16])
def test_auroc_agrees_with_scikit_learn(decimals):
    rng = np.random.default_rng(decimals)
    score = np.round(rng.standard_normal(300), decimals)
    event = rng.random(300) < expit(score)
    assert auroc(score, event) == pytest.approx(roc_auc_score(event, score), abs=1e-12)


@pytest.mark.parametrize("decimals", [1, 2, 16])
def test_corp_decomposition_agrees_with_model_diagnostics(decimals):
    scoring = pytest.importorskip("model_diagnostics.scoring")
    rng = np.random.default_rng(decimals)
    probability = np.round(rng.random(200), decimals)
    event = rng.random(200) < probability**2
    oracle = scoring.decompose(
        event.astype(float), probability, scoring_function=scoring.SquaredError()
    )
    ours = corp_decomposition(probability, event)
    assert ours == pytest.approx({name: oracle[name][0] for name in ours}, abs=1e-12)


@steady
@given(confidence_and_correct)
def test_corp_terms_add_up_to_the_brier_score(rows):
    probability, event = rows
    terms = corp_decomposition(probability, event)
    assert min(terms.values()) >= 0
    assert terms["score"] == pytest.approx(np.mean((probability - event) ** 2), abs=1e-12)
    total = terms["miscalibration"] - terms["discrimination"] + terms["uncertainty"]
    assert terms["score"] == pytest.approx(total, abs=1e-12)


# Risk and coverage.


def orders(confidence, correct):
    """(orders, n) errors from the surest row down, in every order that the confidences allow."""
    rows = list(zip(-np.asarray(confidence), np.asarray(correct), strict=True))
    found = [p for p in permutations(rows) if [c for c, _ in p] == sorted(c for c, _ in rows)]
    return np.array([[not k for _, k in p] for p in found])


tied_rows = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 0.8, 1.0]), st.booleans()), min_size=1, max_size=6
).map(lambda rows: (np.array([c for c, _ in rows]), np.array([k for _, k in rows])))


def test_area_under_the_risk_coverage_curve_known_answer():
    assert aurc([0.6, 0.0, 0.8], [1, 1, 0]) == pytest.approx(11 / 18)
    # The perfect order has its error last: 0, 0, 1/3.
    assert excess_aurc([0.6, 0.0, 0.8], [1, 1, 0]) == pytest.approx(11 / 18 - 1 / 9)
    assert excess_aurc([0.6, 0.9, 0.8], [0, 1, 1]) == 0


@settings(steady, max_examples=40)
@given(tied_rows, st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]))
def test_ties_count_as_the_mean_over_all_their_orders(rows, coverage):
    confidence, correct = rows
    n = len(confidence)
    caught = np.cumsum(orders(confidence, correct), axis=1)  # errors among the first i rows
    count = np.arange(1, n + 1)
    assert aurc(confidence, correct) == pytest.approx((caught / count).mean(), abs=1e-12)
    best = np.cumsum(np.sort(~correct)) / count
    assert excess_aurc(confidence, correct) == pytest.approx(
        (caught / count).mean() - best.mean(), abs=1e-12
    )
    generalized = np.pad(caught, ((0, 0), (1, 0))) / n
    area = np.trapezoid(generalized.mean(axis=0), dx=1 / n)
    assert augrc(confidence, correct) == pytest.approx(area, abs=1e-12)
    first = max(1, int(np.ceil(round(coverage * n, 9))))
    expected = 1 - caught[:, first - 1].mean() / first
    assert accuracy_at_coverage(confidence, correct, coverage) == pytest.approx(expected)


@steady
@given(confidence_and_correct)
def test_augrc_is_the_published_function_of_auroc_and_accuracy(rows):
    confidence, correct = rows
    accuracy = correct.mean()
    assume(0 < accuracy < 1)
    expected = (1 - auroc(confidence, correct)) * accuracy * (1 - accuracy)
    expected += (1 - accuracy) ** 2 / 2
    assert augrc(confidence, correct) == pytest.approx(expected, abs=1e-12)


@steady
@given(confidence_and_correct, st.sampled_from([0.0, 0.05, 0.1, 0.5, 1.0]))
def test_curve_and_coverage_at_risk_agree_with_every_threshold_tried(rows, risk):
    confidence, correct = rows
    curve = risk_coverage_curve(confidence, correct)
    assert curve["threshold"].tolist() == sorted(set(confidence.tolist()), reverse=True)
    best = 0.0
    for threshold, coverage, found in zip(*curve.values(), strict=True):
        above = confidence >= threshold
        assert coverage == above.mean()
        assert found == 1 - correct[above].sum() / above.sum() or found == pytest.approx(
            (~correct[above]).mean()
        )
        if (~correct[above]).sum() / above.sum() <= risk:
            best = max(best, above.mean())
    assert coverage_at_risk(confidence, correct, risk) == best


def test_the_band_of_the_curve_is_one_of_measured_accuracies():
    rng = np.random.default_rng(7)
    confidence = rng.uniform(0.5, 1, 300).round(2)
    correct, group = rng.random(300) < confidence, np.arange(300) // 3
    shares = [0.0, 0.1, 0.5, 1.0]
    band = risk_coverage_band(confidence, correct, shares, group, n_resamples=200, seed=3)
    for i, share in enumerate(shares):
        one = measure(
            "accuracy_at_coverage",
            confidence,
            correct,
            group=group,
            coverage=share,
            n_resamples=200,
            seed=3,
        )
        assert band["risk"][i] == 1 - accuracy_at_coverage(confidence, correct, share)
        assert (band["low"][i], band["high"][i]) == (1 - one["high"], 1 - one["low"])
    assert (band["low"] <= band["risk"]).all() and (band["risk"] <= band["high"]).all()
    curve = risk_coverage_curve(confidence, correct)
    whole = risk_coverage_band(confidence, correct, curve["coverage"], n_resamples=5)
    np.testing.assert_allclose(whole["risk"], curve["risk"], atol=1e-12)
    for wrong in ([1.1], [np.nan], [], 0.5):
        with pytest.raises(ValueError, match="coverage"):
            risk_coverage_band(confidence, correct, wrong)


@pytest.mark.slow
def test_the_band_of_the_curve_covers():
    """At each coverage the interval holds the risk of the whole population, in 500 draws."""
    shares = np.array([0.2, 0.5, 1.0])

    def drawn(n, seed):
        rng = np.random.default_rng(seed)
        confidence = rng.beta(4, 1.5, n)
        return confidence, rng.random(n) < confidence

    confidence, correct = drawn(2_000_000, 10_000)
    truth = [1 - accuracy_at_coverage(confidence, correct, share) for share in shares]
    bands = [risk_coverage_band(*drawn(500, seed), shares, n_resamples=300) for seed in range(500)]
    covered = [(b["low"] <= truth) & (truth <= b["high"]) for b in bands]
    assert (np.abs(np.mean(covered, axis=0) - 0.95) < 0.035).all()


def test_a_risk_met_exactly_is_met():
    correct = [1] * 71 + [0] * 29
    assert coverage_at_risk([0.9] * 100, correct, 0.29) == 1.0
    assert coverage_at_risk([0.9] * 100, correct, 0.28) == 0.0


def test_seven_tenths_of_ten_rows_are_seven():
    confidence = np.linspace(0.99, 0.9, 10)
    assert accuracy_at_coverage(confidence, [1] * 7 + [0] * 3, 0.7) == 1.0
    assert accuracy_at_coverage(confidence, [1] * 7 + [0] * 3, 0.71) == 7 / 8


# Tests of calibration.


def test_kuiper_test_agrees_with_mapie():
    mapie = pytest.importorskip("mapie.metrics.calibration")
    for seed in range(5):
        rng = np.random.default_rng(seed)
        confidence = rng.random(300)
        correct = rng.random(300) < confidence**1.2
        walk = mapie.cumulative_differences(correct.astype(float), confidence)
        # MAPIE's statistic leaves out the walk's start at 0, which belongs to its range.
        walk = np.append(walk, 0.0)
        expected = np.ptp(walk) / mapie.length_scale(confidence)
        ours = kuiper_test(confidence, correct)
        assert ours["statistic"] == pytest.approx(expected, abs=1e-6)
        assert ours["p_value"] == pytest.approx(1 - mapie.kuiper_cdf(expected), abs=1e-6)


def test_spiegelhalter_test_agrees_with_mapie_and_is_two_sided():
    mapie = pytest.importorskip("mapie.metrics.calibration")
    for seed in range(5):
        rng = np.random.default_rng(seed)
        confidence = np.round(rng.random(200), 2)
        correct = (rng.random(200) < confidence**1.2).astype(float)
        ours = spiegelhalter_test(confidence, correct)
        z = mapie.spiegelhalter_statistic(correct, confidence)
        assert ours["statistic"] == pytest.approx(z)
        assert ours["p_value"] == pytest.approx(2 * norm.sf(abs(z)))


def test_spiegelhalter_test_compares_the_brier_score_with_its_expectation():
    confidence, correct = np.array([0.9, 0.6, 0.7, 0.2]), np.array([1, 0, 1, 1])
    expected = confidence * (1 - confidence)
    variance = (expected * (1 - 2 * confidence) ** 2).sum()
    z = (((confidence - correct) ** 2).sum() - expected.sum()) / np.sqrt(variance)
    assert spiegelhalter_test(confidence, correct)["statistic"] == pytest.approx(z)


@pytest.mark.parametrize("test", [kuiper_test, spiegelhalter_test])
def test_tests_of_calibration_reject_five_in_a_hundred_calibrated_models(test):
    rng = np.random.default_rng(0)
    confidence = calibrated_rows(1500, 1)[0].max(axis=1)
    p_values = np.array(
        [test(confidence, rng.random(1500) < confidence)["p_value"] for _ in range(1000)]
    )
    # Walks in steps have a smaller range than Brownian motion, so Kuiper's test is conservative.
    assert 0.025 <= (p_values < 0.05).mean() <= 0.07
    assert test(confidence, rng.random(1500) < confidence - 0.06)["p_value"] < 0.01


# Properties of all measures.


@steady
@given(confidence_and_correct, st.randoms(use_true_random=False))
def test_row_order_does_not_matter(rows, random):
    confidence, correct = rows
    order = list(range(len(confidence)))
    random.shuffle(order)
    for name, plain in MEASURES.items():
        try:
            expected = plain(confidence, correct)
        except ValueError as error:
            with pytest.raises(ValueError, match=str(error)):
                plain(confidence[order], correct[order])
        else:
            assert plain(confidence[order], correct[order]) == expected, name


@steady
@given(confidence_and_correct)
def test_monotone_maps_leave_ranking_measures_alone(rows):
    confidence, correct = rows
    mapped = np.sqrt(confidence) / 3 + 0.5
    assume(len(set(mapped.tolist())) == len(set(confidence.tolist())))
    for name in ("aurc", "excess_aurc", "augrc", "accuracy_at_coverage", "coverage_at_risk"):
        assert MEASURES[name](mapped, correct) == MEASURES[name](confidence, correct)
    discrimination = MEASURES["discrimination"]
    assert discrimination(mapped, correct) == pytest.approx(discrimination(confidence, correct))
    if 0 < correct.mean() < 1:
        assert auroc(np.log(mapped), correct) == auroc(confidence, correct)


@steady
@given(confidence_and_correct)
def test_every_measure_has_an_answer_or_a_reason(rows):
    for plain in MEASURES.values():
        try:
            assert np.isfinite(plain(*rows))
        except ValueError as error:
            assert "undefined" in str(error)


def test_every_measure_of_a_million_rows_takes_under_two_seconds():
    rng = np.random.default_rng(0)
    confidence = rng.random(1_000_000)
    correct = rng.random(1_000_000) < confidence
    for name in set(MEASURES) - {"discrimination", "uncertainty"}:  # as miscalibration
        start = time.process_time()
        MEASURES[name](confidence, correct)
        assert time.process_time() - start < 2, name


# The consistency band and the bootstrap, checked by simulation.


def test_null_band_is_the_binomial_band_where_confidences_are_equal():
    diagram = reliability_diagram([0.8] * 40, [1] * 40, n_bins=10, n_null=4000)
    expected = binom.ppf([0.025, 0.975], 40, 0.8) / 40
    band = diagram["null_low"][8], diagram["null_high"][8]
    assert band == pytest.approx(tuple(expected), abs=1 / 40 + 1e-9)


def test_a_calibrated_model_stays_inside_the_null_band_and_an_overconfident_one_does_not():
    inside, outside, occupied = 0, 0, 0
    for seed in range(30):
        probabilities, label = calibrated_rows(400, seed)
        confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == label
        for shown, is_calibrated in ((confidence, True), (0.5 + confidence / 2, False)):
            diagram = reliability_diagram(shown, correct, 5, n_null=200, seed=seed)
            full = diagram["count"] > 0
            hit = (diagram["accuracy"] >= diagram["null_low"] - 1e-12) & (
                diagram["accuracy"] <= diagram["null_high"] + 1e-12
            )
            if is_calibrated:
                inside += hit[full].sum()
                occupied += full.sum()
            else:
                outside += not hit[full].all()
    assert 0.9 < inside / occupied <= 1
    assert outside == 30


def test_simulation_in_blocks_gives_the_same_numbers(monkeypatch):
    confidence = calibrated_rows(50, 0)[0].max(axis=1)
    whole = null_calibration_error(confidence, n_draws=101)
    monkeypatch.setattr("calibration_metrics.SIMULATION_BLOCK", 120)
    assert null_calibration_error(confidence, n_draws=101) == whole


def test_bootstrap_interval_covers_the_mean_at_its_level():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        low, high = bootstrap_interval(
            np.mean, rng.random(150) < 0.7, n_resamples=200, seed=seed, level=0.9
        )
        covered += low <= 0.7 <= high
    assert 0.85 <= covered / 300 <= 0.95


def test_only_whole_groups_cover_the_mean_of_near_duplicates():
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(80), 4)
    covered = {"groups": 0, "rows": 0}
    for seed in range(150):
        correct = np.repeat(rng.random(80) < 0.7, 4)
        for kind, given_group in (("groups", group), ("rows", None)):
            low, high = bootstrap_interval(
                np.mean, correct, group=given_group, n_resamples=150, seed=seed
            )
            covered[kind] += low <= 0.7 <= high
    assert covered["groups"] >= 0.9 * 150
    assert covered["rows"] <= 0.8 * 150


def test_groups_are_drawn_whole():
    group = np.array(["a", "b", "a", "c", "c", "c"])
    value = np.array([1, 10, 1, 100, 100, 100])
    seen = []

    def record(values):
        seen.append(values)
        return values.mean()

    bootstrap_interval(record, value, group=group, n_resamples=50)
    for values in seen:
        counts = [np.sum(values == v) for v in (1, 10, 100)]
        assert counts[0] % 2 == 0 and counts[2] % 3 == 0
        assert counts[0] / 2 + counts[1] + counts[2] / 3 == 3


def test_groups_of_one_row_are_rows():
    value = np.random.default_rng(0).random(40)
    alone = bootstrap_interval(np.mean, value, n_resamples=100)
    grouped = bootstrap_interval(np.mean, value, group=np.arange(100, 140), n_resamples=100)
    assert grouped == pytest.approx(alone)


def test_a_vector_of_statistics_shares_its_resamples():
    value = np.random.default_rng(0).random(30)
    low, high = bootstrap_interval(lambda v: [v.mean(), 2 * v.mean()], value, n_resamples=100)
    assert (low[1], high[1]) == pytest.approx((2 * low[0], 2 * high[0]))
    assert (low[0], high[0]) == bootstrap_interval(np.mean, value, n_resamples=100)


def test_an_undefined_statistic_is_refused():
    with pytest.raises(ValueError, match="statistic must be finite on every resample"):
        bootstrap_interval(lambda v: np.nan if v.all() else 1.0, np.array([True, False, True]))


def test_paired_difference_sees_what_separate_intervals_hide():
    rng = np.random.default_rng(0)
    hard = rng.exponential(2.0, 300)
    a, b = hard + 0.1 + 0.1 * rng.standard_normal(300), hard
    difference = paired_difference(a, b)
    assert difference["estimate"] == pytest.approx(np.mean(a - b))
    assert 0 < difference["low"] < 0.1 < difference["high"]
    assert bootstrap_interval(np.mean, a)[0] < bootstrap_interval(np.mean, b)[1]


def true_scores(scale):
    """Expected (log-loss, Brier score) of a calibrated model with logit ~ N(0, scale²)."""
    z = np.linspace(-8, 8, 20_001)
    weight = norm.pdf(z) / norm.pdf(z).sum()
    p = expit(scale * z)
    entropy = -(p * np.log(p) + (1 - p) * np.log1p(-p))
    return np.array([(weight * entropy).sum(), (weight * p * (1 - p)).sum()])


@pytest.mark.parametrize("rows_a_group", [1, 3])
def test_bootstrap_intervals_of_proper_scores_cover_at_their_level(rows_a_group):
    truth, n_groups = true_scores(1.5), 250
    group = np.repeat(np.arange(n_groups), rows_a_group) if rows_a_group > 1 else None
    covered = np.zeros(2)
    for seed in range(500):
        probabilities, label = calibrated_rows(n_groups, seed, scale=1.5)
        probabilities, label = (np.repeat(x, rows_a_group, axis=0) for x in (probabilities, label))
        p = probabilities[np.arange(len(label)), label]
        scores = (-np.log(p), (1 - p) ** 2)
        for i, score in enumerate(scores):
            found = paired_difference(
                score, np.zeros(len(p)), group=group, n_resamples=400, seed=seed
            )
            covered[i] += found["low"] <= truth[i] <= found["high"]
    assert (covered / 500 >= 0.92).all() and (covered / 500 <= 0.97).all()


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_null_percentiles_cover_every_calibration_error(scale):
    confidence = calibrated_rows(200, 5, scale)[0].max(axis=1)
    limit = {
        name: null_calibration_error(confidence, n_draws=4000, metric=name)[1]
        for name in CALIBRATION_ERRORS
    }
    rng = np.random.default_rng(1)
    inside = dict.fromkeys(limit, 0)
    for _ in range(500):
        correct = rng.random(200) < confidence
        for name, p95 in limit.items():
            inside[name] += MEASURES[name](confidence, correct) <= p95
    # The error of a nearly empty bin takes few values, so that of the MCE may cover more.
    for name, count in inside.items():
        assert 0.92 <= count / 500 <= (1 if name == "mce" else 0.975), name


def test_miscalibration_lies_above_every_null_percentile():
    confidence = np.random.default_rng(0).uniform(0.5, 1, 1000)
    correct = np.random.default_rng(1).random(1000) < confidence - 0.1
    for name in CALIBRATION_ERRORS:
        if name != "mce":
            assert (
                MEASURES[name](confidence, correct)
                > null_calibration_error(confidence, n_draws=200, metric=name)[1]
            )


def test_corp_curve_is_isotonic_regression_at_its_knots():
    probabilities, label = calibrated_rows(300, 2)
    confidence = np.round(probabilities[:, 0], 2)
    diagram = reliability_diagram(confidence, label == 0, n_null=5)
    oracle = IsotonicRegression().fit(confidence, label == 0)
    x, y = diagram["corp_confidence"], diagram["corp_accuracy"]
    assert (np.diff(x) > 0).all() and (np.diff(y) >= 0).all()
    assert (x[0], x[-1]) == (confidence.min(), confidence.max())
    every = np.unique(confidence)
    assert np.interp(every, x, y) == pytest.approx(oracle.predict(every), abs=1e-12)
    assert len(x) < len(every)


def test_corp_band_covers_a_calibrated_curve_and_not_an_overconfident_one():
    confidence = calibrated_rows(300, 3, 1.5)[0].max(axis=1)
    rng = np.random.default_rng(0)
    inside, knots, caught = 0, 0, 0
    for seed in range(60):
        calibrated, other, overconfident = (
            reliability_diagram(confidence, rng.random(300) < truth, n_null=200, seed=seed)
            for truth in (confidence, confidence, confidence - 0.15)
        )
        # The band is pointwise: it holds where the data did not choose the place.
        x = calibrated["corp_confidence"]
        curve = np.interp(x, other["corp_confidence"], other["corp_accuracy"])
        inside += (
            (calibrated["corp_null_low"] <= curve) & (curve <= calibrated["corp_null_high"])
        ).sum()
        knots += len(x)
        caught += (overconfident["corp_accuracy"] < overconfident["corp_null_low"]).any()
    assert 0.92 <= inside / knots <= 0.975
    assert caught >= 57


def alike_rows(n_groups, alike, rng):
    """A calibrated model on groups of three rows whose luck is correlated, by a Gaussian copula.

    alike: correlation of the luck in [0, 1]. Returns confidence, correct and group, (n,) each.
    """
    group = np.repeat(np.arange(n_groups), 3)
    logit = rng.normal(1, 1.2, n_groups)[group] + 0.3 * rng.standard_normal(len(group))
    luck = np.sqrt(alike) * rng.standard_normal(n_groups)[group]
    luck = luck + np.sqrt(1 - alike) * rng.standard_normal(len(group))
    confidence = expit(np.abs(logit))
    return confidence, luck < norm.ppf(confidence), group


def shares_kept(alike, names, n_models):
    """{kind: {name: share of calibrated models that stay inside}} for bands of groups and of rows.

    A test keeps a model whose p-value is above 0.05, an error one that is at most its null_p95.
    """
    rng = np.random.default_rng(2)
    tests = {"kuiper": kuiper_test, "spiegelhalter": spiegelhalter_test}
    kept = {kind: dict.fromkeys(names, 0) for kind in ("groups", "rows")}
    for seed in range(n_models):
        confidence, correct, group = alike_rows(60, alike, rng)
        for kind, of in (("groups", {"group": group}), ("rows", {})):
            for name in names:
                if name in tests:
                    found = tests[name](confidence, correct, **of, n_draws=100, seed=seed)
                    kept[kind][name] += found["p_value"] > 0.05
                else:
                    limit = null_calibration_error(
                        confidence, n_draws=100, seed=seed, metric=name, correct=correct, **of
                    )[1]
                    kept[kind][name] += MEASURES[name](confidence, correct) <= limit
    return {kind: {n: count / n_models for n, count in of.items()} for kind, of in kept.items()}


def test_null_bands_of_groups_cover_where_those_of_rows_do_not():
    kept = shares_kept(0.7, ("ece", "kuiper"), 120)
    for name in ("ece", "kuiper"):
        assert kept["groups"][name] >= 0.9 > kept["rows"][name]


@pytest.mark.slow
@pytest.mark.parametrize("alike", [0.0, 0.7])
def test_every_null_band_of_groups_covers_in_five_hundred_draws(alike):
    kept = shares_kept(alike, (*CALIBRATION_ERRORS, "kuiper", "spiegelhalter"), 500)
    for name, share in kept["groups"].items():
        # The error of a nearly empty bin takes few values, so that of the MCE may cover more.
        assert 0.92 <= share <= (1 if name == "mce" else 0.985), name
        if alike and name != "mce":
            assert kept["rows"][name] < 0.92, name


def test_copies_of_rows_have_the_null_band_of_one_copy():
    confidence, correct, _ = alike_rows(70, 0.0, np.random.default_rng(0))
    copies = [np.repeat(x, 3) for x in (confidence, correct, np.arange(len(correct)))]
    for metric in ("ece", "mce", "smooth_ece", "miscalibration"):
        once = null_calibration_error(confidence, n_draws=2000, metric=metric)
        thrice = null_calibration_error(
            copies[0], n_draws=2000, metric=metric, correct=copies[1], group=copies[2]
        )
        assert thrice == pytest.approx(once, rel=0.06)
        assert null_calibration_error(copies[0], n_draws=200, metric=metric)[0] < 0.75 * once[0]


def test_groups_of_one_row_have_the_null_band_of_rows():
    confidence, correct, _ = alike_rows(60, 0.0, np.random.default_rng(0))
    alone = null_calibration_error(
        confidence, n_draws=2000, correct=correct, group=np.arange(len(correct))
    )
    assert alone == pytest.approx(null_calibration_error(confidence, n_draws=2000), rel=0.05)


def test_miscalibration_is_not_taken_for_luck_that_groups_have_in_common():
    """An overconfident model errs in the same direction in every row of a group."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 900)
    correct, group = rng.random(900) < confidence - 0.2, np.arange(900) // 3
    with_groups = null_calibration_error(confidence, correct=correct, group=group)
    assert with_groups == pytest.approx(null_calibration_error(confidence), rel=0.1)
    for test in (kuiper_test, spiegelhalter_test):
        assert test(confidence, correct, group)["p_value"] == 1 / 1001


def test_bands_of_a_reliability_diagram_widen_with_groups():
    confidence, correct, group = alike_rows(150, 1.0, np.random.default_rng(1))
    plain = reliability_diagram(confidence, correct, 5, n_null=300)
    grouped = reliability_diagram(confidence, correct, 5, group=group, n_null=300)
    for low, high in (("null_low", "null_high"), ("corp_null_low", "corp_null_high")):
        width = [np.nanmean(d[high] - d[low]) for d in (plain, grouped)]
        assert width[1] > 1.1 * width[0]
    for key in ("count", "accuracy", "corp_accuracy", "edges"):
        assert np.array_equal(plain[key], grouped[key], equal_nan=True)


def test_clustered_wilson_interval_of_single_rows_is_at_least_the_plain_one():
    correct = np.array([1, 0, 1, 1, 1, 0, 1, 1])
    low, high = wilson_interval([6], [8])
    clustered = clustered_wilson_interval(correct, np.arange(8))
    assert clustered == pytest.approx((low[0], high[0]))


def test_clustered_wilson_interval_of_copies_is_that_of_their_groups():
    correct = np.random.default_rng(0).random(200) < 0.8
    group = np.repeat([f"g{i}" for i in range(200)], 3)
    low, high = wilson_interval([correct.sum()], [200])
    clustered = clustered_wilson_interval(np.repeat(correct, 3), group)
    assert clustered == pytest.approx((low[0], high[0]), abs=1e-3)


@pytest.mark.parametrize("value", [0, 1])
def test_clustered_wilson_interval_of_rows_all_alike_counts_groups(value):
    low, high = wilson_interval([10 * value], [10])
    clustered = clustered_wilson_interval([value] * 30, np.arange(30) // 3)
    assert clustered == pytest.approx((low[0], high[0]))
    low, high = wilson_interval([value], [1])
    assert clustered_wilson_interval([value] * 7, ["one"] * 7) == pytest.approx((low[0], high[0]))


def test_clustered_wilson_interval_covers_where_the_plain_one_does_not():
    rng = np.random.default_rng(0)
    group = np.arange(180) // 3
    covered = {"groups": 0, "rows": 0}
    for _ in range(500):
        # A shared draw makes two of three rows of a group agree more often than chance.
        shared = np.repeat(rng.random(60), 3)
        draw = np.where(rng.random(180) < 0.8, shared, rng.random(180))
        correct = draw < 0.8
        low, high = clustered_wilson_interval(correct, group)
        covered["groups"] += low <= 0.8 <= high
        low, high = wilson_interval([correct.sum()], [180])
        covered["rows"] += low[0] <= 0.8 <= high[0]
    assert 0.92 <= covered["groups"] / 500 <= 0.98
    assert covered["rows"] / 500 < 0.9


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_reliability_bars_widen_with_groups(binning):
    probabilities, label = calibrated_rows(150, 4)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == label
    confidence, correct = np.repeat(confidence, 3), np.repeat(correct, 3)
    group = np.repeat(np.arange(150), 3)
    plain = reliability_diagram(confidence, correct, 8, binning, n_null=5)
    grouped = reliability_diagram(confidence, correct, 8, binning, group=group, n_null=5)
    part = np.searchsorted(plain["edges"][1:-1], confidence, side="right")
    for b in np.flatnonzero(plain["count"]):
        expected = clustered_wilson_interval(correct[part == b], group[part == b])
        bar = (grouped["wilson_low"][b], grouped["wilson_high"][b])
        assert bar == pytest.approx(expected)
        assert bar[1] - bar[0] > plain["wilson_high"][b] - plain["wilson_low"][b]
    assert np.array_equal(plain["count"], grouped["count"])


def test_strata_keep_their_size_in_every_resample():
    strata = np.array(["a"] * 5 + ["b"] * 3)
    seen = []

    def record(strata, group):
        seen.append((strata == "a").sum())
        return np.mean(group)

    bootstrap_interval(record, strata, np.arange(8), strata=strata, n_resamples=40)
    assert set(seen) == {5}
    group = np.array([0, 0, 1, 1, 2, 3, 3, 4])
    seen.clear()
    bootstrap_interval(record, strata, group, group=group, strata=strata, n_resamples=40)
    assert set(seen) <= {3, 4, 5, 6}  # three of the groups of 2, 2 and 1 rows


def test_strata_take_the_difference_between_them_out_of_the_interval():
    rng = np.random.default_rng(0)
    strata = np.arange(200) % 2
    value = 10 * strata + rng.standard_normal(200)
    plain = bootstrap_interval(np.mean, value, n_resamples=200)
    stratified = bootstrap_interval(np.mean, value, strata=strata, n_resamples=200)
    assert stratified[1] - stratified[0] < 0.3 * (plain[1] - plain[0])


@pytest.mark.parametrize("group", [None, np.arange(60) // 4])
def test_interval_of_a_paired_difference_is_that_of_the_mean(group):
    a, b = np.random.default_rng(0).random((2, 60))
    found = paired_difference(a, b, group=group, n_resamples=300, seed=2, level=0.8)
    expected = bootstrap_interval(np.mean, a - b, group=group, n_resamples=300, seed=2, level=0.8)
    assert (found["low"], found["high"]) == pytest.approx(expected)


def test_one_stratum_is_none():
    value = np.random.default_rng(0).random(40)
    plain = bootstrap_interval(np.mean, value, n_resamples=50)
    assert bootstrap_interval(np.mean, value, strata=["all"] * 40, n_resamples=50) == plain


# The table.


def test_table_agrees_with_the_single_functions_and_is_json():
    probabilities, label = calibrated_rows(500, 0)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == label
    table = calibration_metrics(probabilities, label, n_resamples=200)
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    expected = {
        "accuracy": correct.mean(),
        "mean_confidence": confidence.mean(),
        "log_loss": log_loss(probabilities, label),
        "brier": brier_score(probabilities, label),
        "auroc": auroc(confidence, correct),
        "ece": expected_calibration_error(confidence, correct),
        "ece_equal_mass": expected_calibration_error(confidence, correct, binning="mass"),
        "squared_calibration_error": debiased_squared_calibration_error(confidence, correct),
        "smooth_ece": smooth_calibration_error(confidence, correct),
        **corp_decomposition(confidence, correct),
        "aurc": aurc(confidence, correct),
        "excess_aurc": excess_aurc(confidence, correct),
        "augrc": augrc(confidence, correct),
    }
    # For two labels the Brier score of the top label is that of the first.
    assert expected.pop("score") == pytest.approx(expected["brier"])
    assert set(table) == {
        "n",
        "n_groups",
        *expected,
        "mce",
        "accuracy_at_coverage",
        "coverage_at_risk",
        "kuiper",
        "spiegelhalter",
        "high_confidence",
    }
    assert (table["n"], table["n_groups"]) == (500, None)
    for name, value in expected.items():
        assert table[name]["estimate"] == pytest.approx(value, abs=1e-12)
        assert table[name]["low"] < value < table[name]["high"]
    for name in CALIBRATION_ERRORS:
        null = (table[name]["null_mean"], table[name]["null_p95"])
        assert null == null_calibration_error(confidence, n_draws=200, metric=name)
    mce = maximum_calibration_error(confidence, correct)
    assert (table["mce"]["estimate"], table["mce"]["count"]) == mce
    assert table["mce"]["low"] < mce[0] < table["mce"]["high"]
    assert [row.pop("coverage") for row in table["accuracy_at_coverage"]] == [0.5, 0.7, 0.9]
    for row, coverage in zip(table["accuracy_at_coverage"], (0.5, 0.7, 0.9), strict=True):
        assert row["estimate"] == accuracy_at_coverage(confidence, correct, coverage)
        assert row["low"] < row["estimate"] < row["high"]
    assert [row.pop("risk") for row in table["coverage_at_risk"]] == [0.01, 0.05, 0.1]
    for row, risk in zip(table["coverage_at_risk"], (0.01, 0.05, 0.1), strict=True):
        assert row["estimate"] == coverage_at_risk(confidence, correct, risk)
        assert row["low"] <= row["estimate"] <= row["high"]
    assert table["kuiper"] == kuiper_test(confidence, correct)
    assert table["spiegelhalter"] == spiegelhalter_test(confidence, correct)
    high = confidence >= 0.9
    assert table["high_confidence"] == {
        "threshold": 0.9,
        "count": high.sum(),
        "share": pytest.approx(high.mean()),
        "accuracy": pytest.approx(correct[high].mean()),
    }


@pytest.mark.parametrize("kind", ["rows", "groups", "strata"])
def test_table_intervals_are_those_of_bootstrap_interval(kind):
    probabilities, label = calibrated_rows(90, 1)
    probabilities[::4] = probabilities[1]  # ties
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == label
    group = None if kind == "rows" else np.arange(90) // 3
    strata = np.arange(90) // 45 if kind == "strata" else None
    table = calibration_metrics(probabilities, label, group, strata, n_resamples=60)
    names = [name for name in MEASURES if "low" in table.get(name, {})]
    assert len(names) == 12
    resampled = []

    def values(confidence, correct):
        resampled.append([MEASURES[name](confidence, correct) for name in names])
        return resampled[-1]

    low, high = bootstrap_interval(
        values, confidence, correct, group=group, strata=strata, n_resamples=60
    )
    bias = np.mean(resampled, axis=0) - values(confidence, correct)
    for i, name in enumerate(names):
        expected = np.array([low[i], high[i]])
        if name in (*CALIBRATION_ERRORS, "discrimination"):
            expected = expected - bias[i]
        if name != "squared_calibration_error":
            expected = np.maximum(expected, 0)
        assert [table[name]["low"], table[name]["high"]] == pytest.approx(expected, abs=1e-12), name
    low, high = bootstrap_interval(
        lambda p, y: [log_loss(p, y), brier_score(p, y)],
        probabilities,
        label,
        group=group,
        strata=strata,
        n_resamples=60,
    )
    for i, name in enumerate(("log_loss", "brier")):
        assert (table[name]["low"], table[name]["high"]) == pytest.approx((low[i], high[i]))


def test_what_is_undefined_has_a_reason_and_no_number():
    table = calibration_metrics([[1.0, 0.0]] * 5, [0] * 5, n_resamples=20)
    assert table["auroc"] == {
        "estimate": None,
        "low": None,
        "high": None,
        "reason": "all rows are of one class",
    }
    for test in ("kuiper", "spiegelhalter"):
        assert table[test]["statistic"] is None and table[test]["p_value"] is None
        assert table[test]["reason"].startswith("every confidence is 0")


def test_resamples_without_an_answer_are_left_out_and_counted():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    table = calibration_metrics(probabilities, [0, 0, 1], n_resamples=500)
    # All three draws right: (2/3)³; all wrong: (1/3)³.
    assert table["auroc"]["undefined_resamples"] / 500 == pytest.approx(1 / 3, abs=0.07)
    assert (table["auroc"]["low"], table["auroc"]["high"]) == (1.0, 1.0)
    assert "undefined_resamples" not in table["accuracy"]
    alone = calibration_metrics(probabilities[1:], [0, 1], n_resamples=1, seed=0)
    assert alone["auroc"]["undefined_resamples"] == 1
    assert alone["auroc"]["estimate"] == 1.0 and alone["auroc"]["low"] is None


def test_table_counts_its_groups():
    probabilities, label = calibrated_rows(30, 0)
    table = calibration_metrics(probabilities, label, group=np.arange(30) // 3, n_resamples=5)
    assert table["n_groups"] == 10


def test_table_of_a_timid_model_has_no_high_confidence_accuracy():
    table = calibration_metrics([[0.6, 0.4]] * 4, [0, 0, 1, 0], n_resamples=20)
    assert table["high_confidence"] == {
        "threshold": 0.9,
        "count": 0,
        "share": 0.0,
        "accuracy": None,
    }


def test_table_widens_with_groups_and_repeats_with_its_seed():
    probabilities, label = calibrated_rows(100, 0)
    probabilities, label = np.repeat(probabilities, 5, axis=0), np.repeat(label, 5)
    group = [f"g{i}" for i in np.repeat(np.arange(100), 5)]
    rows = calibration_metrics(probabilities, label, n_resamples=200)
    groups = calibration_metrics(probabilities, label, group, n_resamples=200)
    assert groups == calibration_metrics(probabilities, label, group, n_resamples=200)
    width = [t["log_loss"]["high"] - t["log_loss"]["low"] for t in (rows, groups)]
    assert width[1] > 1.7 * width[0]


def test_table_of_a_thousand_rows_takes_under_two_and_a_half_seconds():
    probabilities, label = calibrated_rows(1000, 0)
    start = time.process_time()
    calibration_metrics(probabilities, label, group=np.arange(1000) // 2)
    assert time.process_time() - start < 2.5


@pytest.mark.parametrize(
    "probabilities",
    [[[1.0, 0.0]] * 2, [[0.5, 0.5]] * 2, [[0.0, 0.0, 1.0]] * 2],
    ids=["certain", "undecided", "three labels"],
)
@pytest.mark.parametrize("label", [[0, 0], [0, 1], [1, 1]])
def test_two_constant_rows_have_a_table_without_nan(probabilities, label):
    table = calibration_metrics(probabilities, label, n_resamples=20)
    json.dumps(table, allow_nan=False)
    assert table["accuracy"]["estimate"] == np.mean(np.argmax(probabilities, axis=1) == label)


# One metric.


def two_models(n, seed):
    """(probabilities, label) of a sharp and of a calibrated model on the same rows."""
    probabilities, label = calibrated_rows(n, seed, 1.5)
    logit = np.log(probabilities[:, 0] / probabilities[:, 1])
    noise = np.random.default_rng(seed + 1).standard_normal(n)
    sharp = expit(2 * logit + 0.5 * noise)
    return (np.column_stack([sharp, 1 - sharp]), label), (probabilities, label)


def options_of(metric):
    return {"accuracy_at_coverage": {"coverage": 0.7}, "coverage_at_risk": {"risk": 0.1}}.get(
        metric, {}
    )


@pytest.mark.parametrize("kind", ["rows", "groups", "strata"])
def test_one_metric_is_its_row_of_the_table(kind):
    probabilities, label = calibrated_rows(120, 3)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == label
    group = None if kind == "rows" else [f"g{i // 3}" for i in range(120)]
    strata = np.arange(120) // 60 if kind == "strata" else None
    same = {"group": group, "strata": strata, "n_bins": 10, "n_resamples": 80, "seed": 5}
    table = calibration_metrics(probabilities, label, **same)
    table["accuracy_at_coverage"] = table["accuracy_at_coverage"][1] | {}
    table["coverage_at_risk"] = table["coverage_at_risk"][2] | {}
    assert table["accuracy_at_coverage"].pop("coverage") == 0.7
    assert table["coverage_at_risk"].pop("risk") == 0.1
    for metric in METRICS:
        found = measure(metric, probabilities, label, **same, **options_of(metric))
        assert found == pytest.approx(table[metric], abs=1e-12), metric
        if metric not in ("log_loss", "brier"):
            assert measure(metric, confidence, correct, **same, **options_of(metric)) == found
        assert ("null_p95" in found) == (metric in CALIBRATION_ERRORS)
        assert ("count" in found) == (metric == "mce")


@pytest.mark.parametrize("metric", METRICS)
def test_a_paired_difference_is_taken_on_the_same_resamples(metric):
    first, second = two_models(90, 0)
    group = np.arange(90) // 2
    same = {"group": group, "n_resamples": 50, **options_of(metric)}
    found = measure(metric, *first, reference=second, **same)
    assert set(found) == {"estimate", "low", "high"}
    values = [measure(metric, *one, **same)["estimate"] for one in (first, second)]
    assert found["estimate"] == pytest.approx(values[0] - values[1], abs=1e-12)
    turned = measure(metric, *second, reference=first, **same)
    assert (turned["low"], turned["high"]) == pytest.approx((-found["high"], -found["low"]))
    assert set(measure(metric, *first, reference=first, **same).values()) == {0.0}
    if metric in ("log_loss", "brier"):
        (p, label), (q, _) = first, second
        row = {"log_loss": lambda p: -np.log(p[np.arange(90), label])}.get(
            metric, lambda p: (p[:, 0] - (label == 0)) ** 2
        )
        expected = paired_difference(row(p), row(q), group, n_resamples=50)
        assert found == pytest.approx(expected)


def test_pairing_takes_out_what_two_models_share():
    first, second = two_models(300, 1)
    paired = measure("aurc", *first, reference=second, n_resamples=200)
    alone = [measure("aurc", *one, n_resamples=200) for one in (first, second)]
    separate = np.hypot(*(one["high"] - one["low"] for one in alone))
    assert paired["high"] - paired["low"] < 0.6 * separate


def test_a_stratified_interval_of_one_metric_is_narrower():
    rng = np.random.default_rng(0)
    easy = np.arange(400) < 200
    correct = rng.random(400) < np.where(easy, 0.98, 0.55)
    plain, stratified = (
        measure("accuracy", np.full(400, 0.8), correct, strata=strata, n_resamples=400)
        for strata in (None, easy)
    )
    width = [one["high"] - one["low"] for one in (plain, stratified)]
    assert width[1] < 0.9 * width[0]


def test_level_bins_and_seed_are_those_asked_for():
    probabilities, label = calibrated_rows(200, 0)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == label
    few = measure("ece", confidence, correct, n_bins=5, n_resamples=200)
    assert few["estimate"] == expected_calibration_error(confidence, correct, 5)
    null = null_calibration_error(confidence, 5, n_draws=200)
    assert (few["null_mean"], few["null_p95"]) == null
    narrow = measure("ece", confidence, correct, n_bins=5, n_resamples=200, level=0.5)
    assert few["low"] < narrow["low"] < narrow["high"] < few["high"]
    assert few == measure("ece", confidence, correct, n_bins=5, n_resamples=200)
    assert few != measure("ece", confidence, correct, n_bins=5, n_resamples=200, seed=1)


def test_a_ranking_is_measured_of_any_score():
    rng = np.random.default_rng(0)
    score = 5 * rng.standard_normal(100)
    event = rng.random(100) < expit(score)
    found = measure("auroc", score, event, n_resamples=100)
    assert found["estimate"] == pytest.approx(roc_auc_score(event, score))
    assert 0 < found["low"] < found["estimate"] < found["high"] <= 1


def shares_covered(metrics, n_models, n_resamples):
    """{metric: share of the 95 % intervals that hold what such rows show on average}."""
    rng = np.random.default_rng(0)

    def rows():
        first = rng.uniform(0.5, 1, 150)
        label = (rng.random(150) >= first - 0.25 * (first - 0.5)).astype(int)
        return np.column_stack([first, 1 - first]), label

    def values(data):
        probabilities, label = data
        plain = {"log_loss": log_loss, "brier": brier_score}
        answers = probabilities[:, 0], label == 0
        means = {"accuracy": answers[1].mean(), "mean_confidence": answers[0].mean()}
        return [
            means[m] if m in means else plain[m](*data) if m in plain else MEASURES[m](*answers)
            for m in metrics
        ]

    truth = dict(zip(metrics, np.mean([values(rows()) for _ in range(1500)], axis=0), strict=True))
    covered = dict.fromkeys(metrics, 0)
    for seed in range(n_models):
        data = rows()
        for m in metrics:
            found = measure(m, *data, n_resamples=n_resamples, seed=seed, **options_of(m))
            covered[m] += found["low"] <= truth[m] <= found["high"]
    return {m: count / n_models for m, count in covered.items()}


def test_intervals_cover_what_such_rows_show_on_average():
    """Of calibration errors, too: chance adds to them, and the interval says how much."""
    covered = shares_covered(("ece", "squared_calibration_error", "aurc"), 100, 150)
    assert min(covered.values()) >= 0.88


@pytest.mark.slow
def test_intervals_of_every_metric_cover_in_five_hundred_draws():
    covered = shares_covered(METRICS, 500, 200)
    for metric, share in covered.items():
        if metric in (*CALIBRATION_ERRORS, "discrimination", "coverage_at_risk", "uncertainty"):
            assert share >= (0.87 if metric in ("mce", "coverage_at_risk") else 0.9), metric
        else:
            assert 0.92 <= share <= 0.97, metric


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("probabilities", "label"),
    [
        ([[1.0, 0.0]] * 2, [0, 0]),
        ([[0.5, 0.5]] * 2, [0, 1]),
        ([[0.9, 0.1]] * 40, [0] * 40),
        ([[0.9, 0.1]] * 40, [1] * 40),
        ([[1.0, 0.0], [0.0, 1.0]] * 3, [0, 0] * 3),
        ([[0.2, 0.3, 0.5]] * 3, [0, 1, 2]),
    ],
    ids=["two rows", "undecided", "all right", "all wrong", "certain", "three labels"],
)
@pytest.mark.parametrize("group", ["rows", "groups"])
def test_a_metric_of_degenerate_rows_has_a_number_or_a_reason(metric, probabilities, label, group):
    names = None if group == "rows" else np.arange(len(label)) % 2
    found = measure(metric, probabilities, label, group=names, n_resamples=20, **options_of(metric))
    json.dumps(found, allow_nan=False)
    if found["estimate"] is None:
        assert metric == "auroc" and found["reason"] == "all rows are of one class"
    else:
        assert found["low"] <= found["high"]


def test_intervals_of_few_groups_are_too_narrow_and_of_enough_are_not():
    """What the reports say of fewer than 30 groups: 87 % with 10, 77 % with 5."""
    rng = np.random.default_rng(0)
    covered = {}
    for n_groups in (5, 10, FEW_GROUPS):
        hits = 0
        for seed in range(400):
            value = rng.exponential(1.0, n_groups).repeat(3) + 0.1 * rng.standard_normal(
                3 * n_groups
            )
            group = np.arange(3 * n_groups) // 3
            found = paired_difference(value, 0 * value, group, n_resamples=200, seed=seed)
            hits += found["low"] <= 1.0 <= found["high"]
        covered[n_groups] = hits / 400
    assert covered[5] < 0.82 and covered[10] < 0.9 and covered[FEW_GROUPS] > 0.9


# Comparison of methods.


def three_methods(n, seed):
    probabilities, label = calibrated_rows(n, seed, 1.5)
    logit = np.log(probabilities[:, 0] / probabilities[:, 1])
    sharp, flat = expit(2.5 * logit), expit(0.97 * logit)
    stack = {"raw": sharp, "good": probabilities[:, 0], "also good": flat}
    return {name: np.column_stack([p, 1 - p]) for name, p in stack.items()}, label


def test_compare_is_the_paired_t_test_when_rows_are_their_own_groups():
    methods, label = three_methods(200, 0)
    result = compare(methods, label)
    assert list(result) == ["good", "also good"]
    for name, scores in result.items():
        for score, rows in (
            ("log_loss", lambda p: -np.log(p[np.arange(200), label])),
            ("brier", lambda p: (p[:, 0] - (label == 0)) ** 2),
        ):
            a, b = rows(methods[name]), rows(methods["raw"])
            found = scores[score]
            assert found["p_value"] == pytest.approx(ttest_rel(a, b).pvalue)
            assert found["estimate"] == pytest.approx((a - b).mean())
            expected = paired_difference(a, b)
            assert found["low"] == pytest.approx(expected["low"])
            assert found["high"] == pytest.approx(expected["high"])
    json.dumps(result, allow_nan=False)


def test_compare_counts_copies_once():
    methods, label = three_methods(80, 1)
    alone = compare(methods, label)
    copied = {name: np.repeat(p, 4, axis=0) for name, p in methods.items()}
    grouped = compare(copied, np.repeat(label, 4), group=np.repeat(np.arange(80), 4))
    for name in alone:
        for score in alone[name]:
            assert grouped[name][score] == pytest.approx(alone[name][score])


def test_compare_with_unequal_groups_is_the_t_test_of_the_ratio():
    methods, label = three_methods(60, 2)
    group = np.repeat(np.arange(20), [1, 5] * 10)
    found = compare(methods, label, group=group)["good"]["brier"]
    difference = (methods["good"][:, 0] - (label == 0)) ** 2
    difference -= (methods["raw"][:, 0] - (label == 0)) ** 2
    # Linearised: the mean over rows is the mean over groups of what each adds to it.
    part = np.bincount(group, weights=difference - difference.mean()) * 20 / 60
    oracle = ttest_1samp(part + difference.mean(), 0)
    assert found["p_value"] == pytest.approx(oracle.pvalue)


def test_compare_takes_any_reference_and_any_number_of_labels():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((100, 4))
    methods = {name: softmax(t * logits, axis=1) for name, t in (("a", 1), ("b", 2), ("c", 0))}
    label = rng.integers(4, size=100)
    result = compare(methods, label, reference="b")
    assert list(result) == ["a", "c"]
    expected = log_loss(methods["c"], label) - log_loss(methods["b"], label)
    assert result["c"]["log_loss"]["estimate"] == pytest.approx(expected)


def test_compare_of_equal_methods_finds_nothing():
    methods, label = three_methods(50, 3)
    nearly = methods["raw"] + np.array([1e-15, -1e-15])
    result = compare({"raw": methods["raw"], "same": np.clip(nearly, 0, 1)}, label)
    assert result["same"]["log_loss"] == {
        "estimate": 0.0,
        "low": 0.0,
        "high": 0.0,
        "p_value": 1.0,
        "p_value_holm": 1.0,
    }


def test_p_values_of_equally_good_methods_are_uniform_and_groups_matter():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(60), 3)
    rejected = {"groups": 0, "rows": 0}
    for _ in range(150):
        p = np.repeat(rng.uniform(0.2, 0.8, 60), 3)
        label = np.repeat(rng.integers(2, size=60), 3)
        methods = {"raw": np.column_stack([p, 1 - p]), "mirrored": np.column_stack([1 - p, p])}
        for kind, given_group in (("groups", group), ("rows", None)):
            found = compare(methods, label, group=given_group)["mirrored"]["brier"]
            rejected[kind] += found["p_value"] < 0.05
    assert rejected["groups"] / 150 <= 0.1
    assert rejected["rows"] / 150 >= 0.15


def test_compare_within_strata_is_the_stratified_t_test():
    methods, label = three_methods(90, 6)
    strata = np.array(["a"] * 60 + ["b"] * 29 + ["alone"])
    found = compare(methods, label, strata=strata)["good"]["brier"]
    a, b = ((methods[name][:, 0] - (label == 0)) ** 2 for name in ("good", "raw"))
    difference = a - b
    variance = sum(
        len(part) * part.var(ddof=1) for part in (difference[strata == name] for name in ("a", "b"))
    )
    t = difference.mean() / (np.sqrt(variance) / 90)
    assert found["p_value"] == pytest.approx(2 * student_t.sf(abs(t), 90 - 3))
    expected = bootstrap_interval(np.mean, difference, strata=strata)
    assert (found["low"], found["high"]) == pytest.approx(expected)
    assert found["estimate"] == pytest.approx(difference.mean())


def test_one_stratum_changes_no_comparison():
    methods, label = three_methods(60, 7)
    group = np.arange(60) // 2
    plain = compare(methods, label, group=group)
    one = compare(methods, label, group=group, strata=["all"] * 60)
    for name in plain:
        for score in plain[name]:
            assert one[name][score] == pytest.approx(plain[name][score])


def test_strata_give_paired_differences_their_level_back():
    """Strata of fixed size and opposite differences: what lies between them is no error."""
    rng = np.random.default_rng(0)
    strata = np.arange(80) // 40
    covered, width = {"strata": 0, "none": 0}, {"strata": 0.0, "none": 0.0}
    for seed in range(200):
        value = np.where(strata == 0, 2.0, -2.0) + rng.standard_normal(80)
        for kind, names in (("strata", strata), ("none", None)):
            found = paired_difference(value, np.zeros(80), strata=names, n_resamples=200, seed=seed)
            covered[kind] += found["low"] <= 0 <= found["high"]
            width[kind] += found["high"] - found["low"]
    assert 0.9 <= covered["strata"] / 200 <= 0.98
    assert covered["none"] == 200 and width["strata"] < 0.6 * width["none"]


def test_holm_known_answer():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]).tolist() == [1.0, 1.0]
    assert holm([0.2]).tolist() == [0.2]


def test_compare_corrects_over_the_methods():
    methods, label = three_methods(150, 4)
    result = compare(methods, label)
    for score in ("log_loss", "brier"):
        found = [result[name][score] for name in result]
        corrected = holm([f["p_value"] for f in found])
        assert [f["p_value_holm"] for f in found] == pytest.approx(corrected.tolist())


def test_compare_repeats_with_its_seed():
    methods, label = three_methods(60, 5)
    assert compare(methods, label, seed=3) == compare(methods, label, seed=3)
    assert compare(methods, label, seed=3) != compare(methods, label, seed=4)


# Refusals.

two_rows = [[0.6, 0.4], [0.3, 0.7]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: expected_calibration_error([0.5, 1.03], [1, 1]),
            r"confidence must lie in \[0, 1\], got 1.03 at row 1",
        ),
        (
            lambda: expected_calibration_error([0.5, float("nan")], [1, 1]),
            "confidence must be finite, got nan at row 1",
        ),
        (lambda: expected_calibration_error([], []), "confidence must have at least 1 row"),
        (
            lambda: expected_calibration_error([[0.5]], [1]),
            r"confidence must have shape \(n,\), got \(1, 1\)",
        ),
        (lambda: expected_calibration_error(["a"], [1]), "confidence must hold numbers"),
        (
            lambda: expected_calibration_error([0.5], [1, 0]),
            r"correct must have as many rows as confidence \(1\), got 2",
        ),
        (
            lambda: expected_calibration_error([0.5, 0.6], [1, 2]),
            r"correct must be 0 or 1 \(False or True\), got 2.0 at row 1",
        ),
        (lambda: expected_calibration_error([0.5], [1], n_bins=0), "n_bins must be an integer"),
        (lambda: expected_calibration_error([0.5], [1], n_bins=2.5), "n_bins must be an integer"),
        (
            lambda: expected_calibration_error([0.5], [1], binning="equal"),
            'binning must be "width" or "mass", got \'equal\'',
        ),
        (lambda: maximum_calibration_error([0.5], [None]), "correct must be finite"),
        (lambda: null_calibration_error([-0.1]), "confidence must lie in"),
        (lambda: null_calibration_error([0.5], n_draws=0), "n_draws must be an integer"),
        (
            lambda: log_loss([[0.6, 0.4], [0.6, 0.6]], [0, 1]),
            "probabilities must sum to 1 in each row, got 1.2 at row 1",
        ),
        (lambda: log_loss([0.6, 0.4], [0, 1]), r"probabilities must have shape \(n, K\)"),
        (lambda: log_loss([[1.0], [1.0]], [0, 0]), "probabilities must have shape"),
        (lambda: log_loss([[1.5, -0.5]], [0]), r"probabilities must lie in \[0, 1\].* at row 0"),
        (lambda: log_loss([[np.nan, 1.0]], [0]), "probabilities must be finite"),
        (
            lambda: brier_score(two_rows, [0, 2]),
            "label must be a label index from 0 to 1, got 2.0 at row 1",
        ),
        (lambda: brier_score(two_rows, [-1, 0]), "label must be a label index from 0 to 1"),
        (lambda: brier_score(two_rows, [0.5, 0]), "label must be a label index from 0 to 1"),
        (lambda: brier_score(two_rows, [True, False]), "label indices from 0 to 1, got bool"),
        (lambda: brier_score(two_rows, ["positive", "negative"]), "label must hold numbers"),
        (lambda: brier_score(two_rows, [0]), "label must have as many rows as probabilities"),
        (lambda: calibration_metrics(two_rows[:1], [0]), "needs at least 2 rows, got 1"),
        (lambda: calibration_metrics(np.zeros((0, 2)), []), "probabilities must have at least 1"),
        (
            lambda: calibration_metrics(two_rows, [0, 1], group=["a", "a"]),
            "group must name at least 2 groups, got 1",
        ),
        (
            lambda: calibration_metrics(two_rows, [0, 1], group=["a"]),
            r"group must have as many rows as arrays \(2\), got 1",
        ),
        (lambda: bootstrap_interval(np.mean), "needs at least one array"),
        (lambda: bootstrap_interval(np.mean, []), "needs at least 2 rows, got 0"),
        (lambda: bootstrap_interval(np.mean, [1, 2], level=95), "level must lie between 0 and 1"),
        (
            lambda: bootstrap_interval(np.mean, [1, 2], [1]),
            r"array 1 must have as many rows as array 0 \(2\), got 1",
        ),
        (
            lambda: bootstrap_interval(np.mean, [1, 2], group=[["a"], ["b"]]),
            r"group must have shape \(n,\), got \(2, 1\)",
        ),
        (
            lambda: bootstrap_interval(np.mean, [1, 2], group=["a", None]),
            "group must not be missing, got None at row 1",
        ),
        (
            lambda: bootstrap_interval(np.mean, [1, 2], group=[1.0, float("nan")]),
            "group must not be missing, got nan at row 1",
        ),
        (
            lambda: bootstrap_interval(np.mean, [1, 2, 3], group=[0, 0, 1], strata=["x", "y", "y"]),
            "strata must be the same within a group, got x at row 0",
        ),
        (
            lambda: bootstrap_interval(np.mean, [1, 2], strata=["x", "y"]),
            "strata must hold at least 2 rows or groups somewhere",
        ),
        (
            lambda: bootstrap_interval(np.mean, [1, 2], strata=["x"]),
            r"strata must have as many rows as arrays \(2\), got 1",
        ),
        (
            lambda: null_calibration_error([0.5, 0.6], metric="brier"),
            "metric must be one of ece, .*, got 'brier'",
        ),
        (
            lambda: null_calibration_error([0.5], metric="squared_calibration_error"),
            "squared_calibration_error is undefined: no equal-mass bin holds two rows",
        ),
        (lambda: debiased_squared_calibration_error([0.5], [1]), "is undefined: no equal-mass bin"),
        (lambda: debiased_squared_calibration_error([0.5] * 4, [1] * 4, 0), "n_bins must be an"),
        (lambda: smooth_calibration_error([0.5, 1.5], [0, 1]), r"confidence must lie in \[0, 1\]"),
        (lambda: smooth_calibration_error([], []), "confidence must have at least 1 row"),
        (lambda: auroc([0.5, 0.6], [1, 1]), "auroc is undefined: all rows are of one class"),
        (lambda: auroc([0.5, np.inf], [0, 1]), "score must be finite, got inf at row 1"),
        (lambda: auroc([0.5, 0.6], [0, 3]), r"event must be 0 or 1 .*, got 3.0 at row 1"),
        (lambda: auroc([0.5, 0.6], [0]), "event must have as many rows as score"),
        (lambda: corp_decomposition([1.2], [1]), r"probability must lie in \[0, 1\], got 1.2"),
        (lambda: corp_decomposition([0.2], [1, 0]), "event must have as many rows as probability"),
        (lambda: aurc([0.5, np.nan], [1, 0]), "confidence must be finite, got nan at row 1"),
        (lambda: accuracy_at_coverage([0.5], [1], 1.2), r"coverage must lie in \[0, 1\], got 1.2"),
        (lambda: coverage_at_risk([0.5], [1], "1 %"), "risk must lie in .*, got '1 %'"),
        (lambda: coverage_at_risk([0.5], [1], float("nan")), r"risk must lie in \[0, 1\], got nan"),
        (lambda: kuiper_test([0.0, 1.0], [0, 1]), "kuiper is undefined: every confidence is 0 or"),
        (lambda: spiegelhalter_test([0.5, 0.5], [0, 1]), "spiegelhalter is undefined: every conf"),
        (lambda: clustered_wilson_interval([1, 0], ["a"]), "group must have as many rows as corr"),
        (lambda: clustered_wilson_interval([1, 2], [0, 1]), "correct must be 0 or 1"),
        (lambda: clustered_wilson_interval([], []), "correct must have at least 1 row"),
        (
            lambda: reliability_diagram([0.5, 0.6], [1, 0], group=[1]),
            r"group must have as many rows as confidence \(2\), got 1",
        ),
        (lambda: holm([]), "p_values must have at least 1 row"),
        (lambda: holm([0.1, 1.1]), r"p_values must lie in \[0, 1\], got 1.1 at row 1"),
        (lambda: compare({"a": two_rows}, [0, 1]), r"must hold the reference 'raw', got \['a'\]"),
        (lambda: compare({"raw": two_rows}, [0, 1]), "must hold a method besides 'raw'"),
        (
            lambda: compare({"raw": two_rows, "b": [[0.5, 0.6], [0, 1]]}, [0, 1]),
            "probabilities of 'b' must sum to 1 in each row",
        ),
        (
            lambda: compare({"raw": two_rows, "b": [[0.2, 0.3, 0.5]] * 2}, [0, 1]),
            r"probabilities of 'b' must have the shape of those of 'raw' \(\(2, 2\)\)",
        ),
        (
            lambda: compare({"raw": two_rows[:1], "b": two_rows[:1]}, [0]),
            "needs at least 2 rows, got 1",
        ),
        (lambda: paired_difference([1.0, 2.0], [1.0]), "statistic_b_rows must have as many rows"),
        (lambda: paired_difference([1.0, np.inf], [1, 1]), "statistic_a_rows must be finite"),
        (lambda: wilson_interval([3], [2]), "successes must not exceed count, got 3.0 at row 0"),
        (
            lambda: compare({"raw": two_rows, "b": two_rows}, [0, 1], strata=["x", "y"]),
            "strata must hold at least 2 rows or groups somewhere",
        ),
        (
            lambda: paired_difference([1, 2, 3], [1, 1, 1], [0, 0, 1], ["x", "y", "y"]),
            "strata must be the same within a group, got x at row 0",
        ),
        (
            lambda: null_calibration_error([0.5, 0.6], group=[0, 1]),
            "group needs correct, which says how alike the rows of a group are",
        ),
        (
            lambda: null_calibration_error([0.5, 0.6], correct=[1, 0], group=[0]),
            r"group must have as many rows as confidence \(2\), got 1",
        ),
        (lambda: kuiper_test([0.5, 0.6], [1, 0], group=["a", None]), "group must not be missing"),
        (lambda: kuiper_test([0.5, 0.6], [1, 0], [0, 1], n_draws=0), "n_draws must be an integer"),
        (lambda: kuiper_test([0.0, 1.0], [0, 1], [0, 1]), "kuiper is undefined: every confidence"),
        (lambda: spiegelhalter_test([0.5], [1], [0]), "spiegelhalter is undefined: every conf"),
        (lambda: measure("ecc", [0.5, 0.6], [1, 0]), "metric must be one of log_loss, .*got 'ecc'"),
        (lambda: measure("ece", [], []), "predicted must have at least 1 row"),
        (lambda: measure("ece", [0.5], [1]), "a bootstrap interval needs at least 2 rows, got 1"),
        (lambda: measure("ece", [0.5, 1.5], [1, 0]), r"confidence must lie in \[0, 1\], got 1.5"),
        (lambda: measure("ece", [0.5, np.nan], [1, 0]), "predicted must be finite, got nan at row"),
        (lambda: measure("ece", [0.5, 0.6], [1, 2]), "correct must be 0 or 1 .*got 2.0 at row 1"),
        (lambda: measure("ece", [0.5, 0.6], [1]), "correct must have as many rows as confidence"),
        (lambda: measure("ece", ["a", "b"], [1, 0]), "predicted must hold numbers"),
        (lambda: measure("ece", two_rows, [True, False]), "label indices from 0 to 1, got bool"),
        (lambda: measure("brier", two_rows, [0, 2]), "label must be a label index from 0 to 1"),
        (
            lambda: measure("brier", [0.5, 0.6], [1, 0]),
            r"brier needs probabilities of shape \(n, K\), got \(2,\)",
        ),
        (lambda: measure("ece", [0.5, 0.6], [1, 0], n_bins=0), "n_bins must be an integer"),
        (lambda: measure("ece", [0.5, 0.6], [1, 0], n_resamples=0), "n_resamples must be an int"),
        (lambda: measure("ece", [0.5, 0.6], [1, 0], level=95), "level must lie between 0 and 1"),
        (
            lambda: measure("accuracy_at_coverage", [0.5, 0.6], [1, 0]),
            r"coverage must lie in \[0, 1\], got None",
        ),
        (
            lambda: measure("coverage_at_risk", [0.5, 0.6], [1, 0], coverage=0.5),
            r"risk must lie in \[0, 1\], got None",
        ),
        (
            lambda: measure("aurc", two_rows, [0, 1], reference=np.array(two_rows)),
            r"reference must be \(predicted, truth\) of another model",
        ),
        (
            lambda: measure("aurc", two_rows, [0, 1], reference=(two_rows[:1], [0])),
            r"reference must have as many rows as predicted \(2\), got 1",
        ),
        (
            lambda: measure("brier", two_rows, [0, 1], reference=(two_rows, [0, 0])),
            "label of the reference must be of the same row, got 0 at row 1",
        ),
        (
            lambda: measure("aurc", [0.5, 0.6], [1, 0], group=["a", "a"]),
            "group must name at least 2 groups, got 1",
        ),
        (
            lambda: measure("aurc", [0.5, 0.6], [1, 0], strata=["x"]),
            r"strata must have as many rows as arrays \(2\), got 1",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_two_rows_that_agree_are_no_proof():
    """Equal differences have no variance; p is then what a sign test over the groups gives."""
    one, other = np.tile([0.6, 0.4], (2, 1)), np.tile([0.9, 0.1], (2, 1))
    found = compare({"raw": one, "other": other}, [0, 0])["other"]["log_loss"]
    assert found["estimate"] < 0 and found["p_value"] == 0.5


# Every public function of confidence and correct, or of probabilities and label.
OF_ANSWERS = {
    **MEASURES,
    "risk_coverage_curve": risk_coverage_curve,
    "risk_coverage_band": lambda c, k: risk_coverage_band(c, k, [0.5], n_resamples=5),
    "reliability_diagram": lambda c, k: reliability_diagram(c, k, n_null=5),
    "reliability_diagram, equal mass": lambda c, k: reliability_diagram(
        c, k, binning="mass", n_null=5
    ),
    "null of groups": lambda c, k: null_calibration_error(
        c, n_draws=5, correct=k, group=np.arange(np.size(c)) // 2
    ),
    "kuiper of groups": lambda c, k: kuiper_test(c, k, np.arange(np.size(c)) // 2, n_draws=5),
    **{
        f"measure {m}": lambda c, k, m=m: measure(m, c, k, n_resamples=5, **options_of(m))
        for m in METRICS
        if m not in ("log_loss", "brier")
    },
}
OF_LABELS = {
    "log_loss": log_loss,
    "brier_score": brier_score,
    "calibration_metrics": lambda p, y: calibration_metrics(p, y, n_resamples=5),
    "compare": lambda p, y: compare({"raw": p, "other": p}, y),
    **{
        f"measure {m}": lambda p, y, m=m: measure(m, p, y, n_resamples=5, **options_of(m))
        for m in METRICS
    },
}


BAD_ANSWERS = [
    ([], []),
    (None, None),
    (0.5, 1),
    ([[0.5, 0.6, 0.7]], [[1, 0, 1]]),
    ([0.5, np.nan], [1, 0]),
    ([0.5, -np.inf], [1, 0]),
    ([0.5, None], [1, 0]),
    (["high", "low"], [1, 0]),
    ([0.5, 0.6], [1, 2]),
    ([0.5, 0.6], [1, -1]),
    ([0.5, 0.6], [1, 0.5]),
    ([0.5, 0.6], [1, np.nan]),
    ([0.5, 0.6], ["yes", "no"]),
    ([0.5, 0.6], [1]),
    ([0.5, 0.6], [1, 0, 1]),
]
BAD_LABELS = [
    ([], []),
    (None, None),
    ([[0.5, 0.5], [0.5, np.nan]], [0, 1]),
    ([[0.5, 0.5], [np.inf, 0]], [0, 1]),
    ([[0.5, 0.5], [0.5, 0.6]], [0, 1]),
    ([[0.5, 0.5], [1.5, -0.5]], [0, 1]),
    ([[1.0], [1.0]], [0, 0]),
    ([[0.5, 0.5], [0.5]], [0, 1]),
    (two_rows, [0, 2]),
    (two_rows, [0, -1]),
    (two_rows, [0, 0.5]),
    (two_rows, [0, np.nan]),
    (two_rows, [True, False]),
    (two_rows, ["positive", "negative"]),
    (two_rows, [0]),
]


@pytest.mark.parametrize("name", OF_ANSWERS)
def test_every_function_of_answers_refuses_bad_rows(name):
    for confidence, correct in BAD_ANSWERS:
        with pytest.raises(ValueError, match="must"):
            OF_ANSWERS[name](confidence, correct)
    ranks = name == "auroc" or name in {f"measure {m}" for m in RANKINGS}
    for value in () if ranks else (-1e-9, 1 + 1e-9, 50.0):
        with pytest.raises(ValueError, match=r"(confidence|probability) must lie in \[0, 1\], got"):
            OF_ANSWERS[name]([0.5, value], [1, 0])


@pytest.mark.parametrize("name", OF_LABELS)
def test_every_function_of_labels_refuses_bad_rows(name):
    for probabilities, label in BAD_LABELS:
        with pytest.raises(ValueError, match="must"):
            OF_LABELS[name](probabilities, label)


def numbers_in(result):
    """All numbers of a nested result; a None stands beside a reason."""
    if not isinstance(result, dict):
        return np.ravel(result).tolist()
    unknown = [key for key, value in result.items() if value is None]
    assert bool(unknown) == ("reason" in result)
    known = [value for key, value in result.items() if key not in (*unknown, "reason")]
    return [number for value in known for number in numbers_in(value)]


@pytest.mark.parametrize("name", OF_ANSWERS)
def test_equal_confidences_have_an_answer_or_a_reason(name):
    for n, value, right in product((1, 2, 30), (0.0, 0.5, 0.7, 1.0), ("all", "none", "half")):
        correct = np.arange(n) % 2 == 0 if right == "half" else [right == "all"] * n
        try:
            result = OF_ANSWERS[name]([value] * n, correct)
        except ValueError as error:
            assert "is undefined: " in str(error) or (n == 1 and "at least 2 rows" in str(error))
            continue
        if "diagram" in name:  # empty bins are NaN, which the docstring says
            full = result["count"] > 0
            result = {k: v[full] if len(v) == len(full) else v for k, v in result.items()}
        assert np.isfinite(numbers_in(result)).all()
