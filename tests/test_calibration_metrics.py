"""Calibration metrics against published values, scikit-learn, brute force and simulation."""

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from scipy.stats import binom, binomtest
from sklearn.metrics import brier_score_loss
from sklearn.metrics import log_loss as sklearn_log_loss

from calibration_metrics import (
    bootstrap_interval,
    brier_score,
    calibration_metrics,
    expected_calibration_error,
    log_loss,
    maximum_calibration_error,
    null_calibration_error,
    paired_difference,
    reliability_diagram,
    wilson_interval,
)

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
            curves = set(diagram) - {"edges", "count"}
            assert all(np.isnan(diagram[key][b]) for key in curves)


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


@steady
@given(confidence_and_correct, st.randoms(use_true_random=False))
def test_row_order_does_not_matter(rows, random):
    confidence, correct = rows
    order = list(range(len(confidence)))
    random.shuffle(order)
    for binning in ("width", "mass"):
        a = expected_calibration_error(confidence, correct, 5, binning)
        b = expected_calibration_error(confidence[order], correct[order], 5, binning)
        assert a == pytest.approx(b, abs=1e-12)
        assert 0 <= a <= 1
    a, b = (
        maximum_calibration_error(confidence, correct),
        maximum_calibration_error(confidence[order], correct[order]),
    )
    assert a[0] == pytest.approx(b[0], abs=1e-12)


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
    monkeypatch.setattr("calibration_metrics.NULL_BLOCK", 120)
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


# The table.


def test_table_agrees_with_the_single_functions_and_is_json():
    probabilities, label = calibrated_rows(500, 0)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == label
    table = calibration_metrics(probabilities, label, n_resamples=200)
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert list(table) == [
        "n",
        "accuracy",
        "mean_confidence",
        "log_loss",
        "brier",
        "ece",
        "mce",
        "high_confidence",
    ]
    assert table["n"] == 500
    expected = {
        "accuracy": correct.mean(),
        "mean_confidence": confidence.mean(),
        "log_loss": log_loss(probabilities, label),
        "brier": brier_score(probabilities, label),
        "ece": expected_calibration_error(confidence, correct),
    }
    for name, value in expected.items():
        assert table[name]["estimate"] == pytest.approx(value)
        assert table[name]["low"] <= table[name]["high"]
        if name != "ece":
            assert table[name]["low"] < value < table[name]["high"]
    null = (table["ece"]["null_mean"], table["ece"]["null_p95"])
    assert null == null_calibration_error(confidence)
    assert tuple(table["mce"].values()) == maximum_calibration_error(confidence, correct)
    high = confidence >= 0.9
    assert table["high_confidence"] == {
        "threshold": 0.9,
        "count": high.sum(),
        "share": pytest.approx(high.mean()),
        "accuracy": pytest.approx(correct[high].mean()),
    }


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


def test_table_of_a_thousand_rows_takes_under_three_seconds():
    probabilities, label = calibrated_rows(1000, 0)
    start = time.process_time()
    calibration_metrics(probabilities, label, group=np.arange(1000) // 2)
    assert time.process_time() - start < 3


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
        (lambda: paired_difference([1.0, 2.0], [1.0]), "statistic_b_rows must have as many rows"),
        (lambda: paired_difference([1.0, np.inf], [1, 1]), "statistic_a_rows must be finite"),
        (lambda: wilson_interval([3], [2]), "successes must not exceed count, got 3.0 at row 0"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
