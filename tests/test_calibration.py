"""Calibrators against published values, scikit-learn and simulation; splits, files, refusals."""

import json
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, logit, softmax
from sklearn.calibration import _sigmoid_calibration
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from calibration import (
    CALIBRATORS,
    BetaCalibrator,
    HistogramBinningCalibrator,
    IdentityCalibrator,
    IsotonicRegressionCalibrator,
    PlattScalingCalibrator,
    QuadraticCalibrator,
    SplineCalibrator,
    TemperatureScalingCalibrator,
    VectorScalingCalibrator,
    VennAbersCalibrator,
    calibrated_log_loss,
    calibrated_probabilities,
    calibrators_for,
    cross_fitted_log_loss,
    cross_fitted_probabilities,
    evaluate_calibrator,
    fit_calibrator,
    load_calibrator,
    one_vs_rest_scores,
    save_calibrator,
    select_calibrator,
)
from calibration_metrics import calibration_metrics, expected_calibration_error, log_loss
from records import Example, ModelResults, prediction_from_logprobs
from settings import SENTIMENT, Label, Task, UserError, fingerprint

steady = settings(derandomize=True, deadline=None, max_examples=50)
TOPIC = Task("topic", "What is it about?", tuple(Label(w, (w,)) for w in ("sport", "work", "food")))
IDENTITY_PARTS = {
    "model": "embedded",
    "adapter": None,
    "prompt": "Is this text positive?",
    "label_words": [["Yes", "yes"], ["No", "no"]],
    "tokenizer": "0a1b",
    "dtype": "bfloat16",
}
IDENTITY = IDENTITY_PARTS | {"fingerprint": fingerprint(IDENTITY_PARTS)}


def overconfident_rows(n, seed, temperature=3.0):
    """Margin (n,) and label (n,) of a model whose margin is `temperature` times the true logit."""
    rng = np.random.default_rng(seed)
    true_logit = 1.5 * rng.standard_normal(n) + 0.3
    return temperature * true_logit, rng.random(n) < expit(true_logit)


def overconfident_rows_of_three(n, seed, temperature=2.0):
    """Log-probabilities (n, 3), with a label mass below 1, and the true label (n,)."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.standard_normal((n, 3))
    label = (softmax(logits, axis=1).cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    return log_softmax(temperature * logits, axis=1) - rng.random((n, 1)), label


def platt_targets(label):
    """(n,) what stands for 1 and 0 in Platt's loss."""
    n_true, n_false = label.sum(), (~label).sum()
    return np.where(label, (n_true + 1) / (n_true + 2), 1 / (n_false + 2))


def rows_with_platt_targets(features, label):
    """Arguments of a fit in which every row counts, in part, as both classes: Platt's loss."""
    target = platt_targets(label)
    return (
        np.concatenate([features, features]),
        np.repeat([1, 0], len(label)),
        np.concatenate([target, 1 - target]),
    )


def logistic_oracle(features, label):
    """Unpenalised logistic regression of scikit-learn under Platt's targets."""
    x, y, weight = rows_with_platt_targets(features, label)
    oracle = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000, solver="newton-cholesky")
    return oracle.fit(x, y, sample_weight=weight)


def model_results(task, label_logprobs, label, split_of):
    """Results of a model with the given label log-probabilities (n, K)."""
    examples = tuple(
        Example(f"e{i}", "", task.label_names[k], group=f"g{i // 2}", split=split_of(i))
        for i, k in enumerate(label)
    )
    predictions = tuple(
        prediction_from_logprobs(e.id, task, row)
        for e, row in zip(examples, label_logprobs, strict=True)
    )
    return ModelResults("model", task, IDENTITY, examples, predictions, {})


def half_and_half(i):
    return "calibration" if i % 4 < 2 else "test"


@pytest.fixture(scope="module")
def sentiment_results():
    margin, first = overconfident_rows(1600, 5)
    logprobs = log_softmax(np.column_stack([margin, np.zeros_like(margin)]), axis=1) - 0.1
    return model_results(SENTIMENT, logprobs, np.where(first, 0, 1), half_and_half)


@pytest.fixture(scope="module")
def topic_results():
    return model_results(TOPIC, *overconfident_rows_of_three(1600, 6), half_and_half)


@pytest.fixture(params=["two labels", "three labels"])
def results(request, sentiment_results, topic_results):
    return sentiment_results if request.param == "two labels" else topic_results


every_calibrator = pytest.mark.parametrize("name", CALIBRATORS)
margins = st.floats(-50, 50, allow_subnormal=False)
binary_rows = st.lists(st.tuples(margins, st.booleans()), min_size=1, max_size=30).map(
    lambda rows: (np.array([m for m, _ in rows]), np.array([y for _, y in rows]))
)
rows_of_three = st.lists(
    st.tuples(margins, margins, margins, st.integers(0, 2)), min_size=1, max_size=20
).map(lambda rows: (np.array([r[:3] for r in rows]), np.array([r[3] for r in rows])))


# Known answers and oracles.


def test_platt_known_answer():
    fitted = PlattScalingCalibrator().fit([5, -4, 1], [1, 0, 0]).parameters["maps"][0]
    assert fitted["slope"] == pytest.approx(0.2026, abs=5e-5)
    assert fitted["intercept"] == pytest.approx(-0.6524, abs=5e-5)


@pytest.mark.parametrize("seed", range(3))
def test_platt_agrees_with_scikit_learn(seed):
    margin, label = overconfident_rows(300, seed)
    fitted = PlattScalingCalibrator().fit(margin, label)
    a, b = _sigmoid_calibration(margin, label)
    assert fitted.predict_proba(margin) == pytest.approx(expit(-(a * margin + b)), abs=1e-4)

    oracle = logistic_oracle(margin[:, None], label)
    expected = oracle.predict_proba(margin[:, None])[:, 1]
    assert fitted.predict_proba(margin) == pytest.approx(expected, abs=1e-7)


def test_platt_is_near_plain_logistic_regression_on_many_margins():
    margin, label = overconfident_rows(5000, 0)
    oracle = LogisticRegression(C=np.inf).fit(margin[:, None], label)
    fitted = PlattScalingCalibrator().fit(margin, label).parameters["maps"][0]
    assert fitted["slope"] == pytest.approx(oracle.coef_[0, 0], rel=0.01)
    assert fitted["intercept"] == pytest.approx(oracle.intercept_[0], abs=0.01)


def test_isotonic_agrees_with_scikit_learn():
    margin, label = overconfident_rows(400, 1)
    margin = margin.round(1)  # with ties
    new = np.linspace(-30, 30, 500)
    low = 1 / 402
    oracle = IsotonicRegression(out_of_bounds="clip", y_min=low, y_max=1 - low).fit(margin, label)
    fitted = IsotonicRegressionCalibrator().fit(margin, label)
    assert fitted.predict_proba(margin) == pytest.approx(oracle.predict(margin), abs=1e-12)
    assert fitted.predict_proba(new) == pytest.approx(oracle.predict(new), abs=1e-12)


def test_isotonic_reports_what_it_clipped():
    margin, label = [-3, -2, -1, 1, 2, 3], [0, 0, 1, 0, 1, 1]
    fitted = IsotonicRegressionCalibrator().fit(margin, label)
    expected = [1 / 8, 1 / 8, 0.5, 0.5, 7 / 8, 7 / 8]
    assert fitted.predict_proba(margin) == pytest.approx(expected)
    assert fitted.parameters["maps"][0]["clipped_fraction"] == pytest.approx(4 / 6)
    assert fitted.clipped_fraction(margin) == pytest.approx(4 / 6)
    assert fitted.clipped_fraction([-9.0, -1.5, 0.0, 1.5]) == pytest.approx(1 / 4)


def test_isotonic_counts_what_it_clipped_of_every_label():
    logprobs, label = overconfident_rows_of_three(60, 1)
    fitted = IsotonicRegressionCalibrator().fit(logprobs, label)
    shares = [one["clipped_fraction"] for one in fitted.parameters["maps"]]
    assert 0 < np.mean(shares) < 1
    assert fitted.clipped_fraction(logprobs) == pytest.approx(np.mean(shares))


def test_isotonic_beats_every_smooth_monotone_map_on_its_own_rows():
    margin, label = overconfident_rows(300, 2)
    loss = {
        name: sklearn_log_loss(label, CALIBRATORS[name]().fit(margin, label).predict_proba(margin))
        for name in ("raw", "temperature", "platt", "beta", "isotonic")
    }
    assert loss["isotonic"] < min(loss["platt"], loss["beta"], loss["temperature"]) < loss["raw"]


@pytest.mark.parametrize("truth", [0.2, 1.0, 3.0, 12.0])
def test_temperature_is_recovered(truth):
    margin, label = overconfident_rows(20_000, 3, truth)
    fitted = TemperatureScalingCalibrator().fit(margin, label).parameters["temperature"]
    assert fitted == pytest.approx(truth, rel=0.1)
    logprobs, label = overconfident_rows_of_three(20_000, 3, truth)
    fitted = TemperatureScalingCalibrator().fit(logprobs, label).parameters["temperature"]
    assert fitted == pytest.approx(truth, rel=0.1)


def test_temperature_agrees_with_a_fine_grid():
    margin, label = overconfident_rows(300, 4)
    grid = np.geomspace(0.01, 100, 4001)
    away = np.where(label, -margin, margin)
    loss = [np.logaddexp(0, away / t).mean() for t in grid]
    fitted = TemperatureScalingCalibrator().fit(margin, label).parameters["temperature"]
    assert fitted == pytest.approx(grid[np.argmin(loss)], rel=0.003)


def bent(margin):
    """True log-odds of a model that is overconfident on one side only."""
    return np.where(margin > 0, 0.2 * margin, 0.8 * margin)


def bent_rows(n, seed):
    rng = np.random.default_rng(seed)
    margin = 4 * rng.standard_normal(n)
    return margin, rng.random(n) < expit(bent(margin))


@pytest.mark.parametrize("rows", [overconfident_rows, bent_rows])
def test_beta_agrees_with_betacal(rows):
    betacal = pytest.importorskip("betacal")
    margin, label = rows(400, 0)
    p, y, weight = rows_with_platt_targets(expit(margin), label)
    plain, weighted = betacal.BetaCalibration("abm"), betacal.BetaCalibration("abm")
    with warnings.catch_warnings():  # it changes the filters
        plain.fit(expit(margin), label)
        weighted.fit(p, y, sample_weight=weight)
    fitted = BetaCalibrator().fit(margin, label)
    probability = fitted.predict_proba(margin)
    assert probability == pytest.approx(weighted.predict(expit(margin)), abs=2e-4)
    assert probability == pytest.approx(plain.predict(expit(margin)), abs=0.02)  # other targets
    fitted = fitted.parameters["maps"][0]
    assert [fitted["a"], fitted["b"]] == pytest.approx(weighted.calibrator_.map_[:2], abs=2e-3)


@pytest.mark.parametrize("seed", range(12))
def test_beta_is_the_best_map_with_coefficients_of_at_least_0(seed):
    """Random labels and few rows, so that the bounds often bind."""
    rng = np.random.default_rng(seed)
    margin, label = 2 * rng.standard_normal(12), rng.random(12) < 0.5
    label[:2] = True, False
    target = platt_targets(label)
    rising = np.column_stack([-np.log1p(np.exp(-margin)), np.log1p(np.exp(margin)), np.ones(12)])

    def loss(theta):
        z = rising @ theta
        return np.mean(np.logaddexp(0, z) - target * z), rising.T @ (expit(z) - target) / 12

    bounds = [(0, None), (0, None), (None, None)]
    oracle = minimize(loss, [1, 1, 0], jac=True, bounds=bounds, tol=1e-14)
    fitted = BetaCalibrator().fit(margin, label)
    abc = [fitted.parameters["maps"][0][key] for key in "abc"]
    assert min(abc[:2]) >= 0
    assert loss(abc)[0] <= oracle.fun + 1e-9
    assert fitted.predict_proba(margin) == pytest.approx(expit(rising @ oracle.x), abs=2e-4)


def test_beta_bounds_bind_when_the_margin_points_the_wrong_way():
    margin, label = overconfident_rows(200, 3)
    fitted = BetaCalibrator().fit(-margin, label)
    assert [fitted.parameters["maps"][0][key] for key in "ab"] == [0.0, 0.0]
    assert fitted.predict_proba([-5.0, 5.0]) == pytest.approx([platt_targets(label).mean()] * 2)


def test_quadratic_agrees_with_scikit_learn_where_rows_outweigh_the_ridge():
    margin, label = bent_rows(20_000, 1)
    features = np.column_stack([margin, margin**2])
    expected = logistic_oracle(features, label).predict_proba(features)[:, 1]
    probability = QuadraticCalibrator().fit(margin, label).predict_proba(margin)
    assert probability == pytest.approx(expected, abs=2e-3)


def truncated_powers(x, knots):
    """(n, m − 1): the natural cubic splines with m knots, less the constant, written out."""

    def d(k):
        cubes = [np.maximum(x - knots[j], 0) ** 3 for j in (k, -1)]
        return (cubes[0] - cubes[1]) / (knots[-1] - knots[k])

    return np.column_stack([x, *(d(k) - d(len(knots) - 2) for k in range(len(knots) - 2))])


def test_spline_agrees_with_scikit_learn_where_rows_outweigh_the_ridge():
    margin, label = bent_rows(20_000, 2)
    fitted = SplineCalibrator().fit(margin, label)
    knots = np.array(fitted.parameters["maps"][0]["knots"])
    levels = [0.05, 0.275, 0.5, 0.725, 0.95]
    assert knots == pytest.approx(np.quantile(margin, levels), abs=0.03)
    features = truncated_powers(margin, knots)
    expected = logistic_oracle(features, label).predict_proba(features)[:, 1]
    assert fitted.predict_proba(margin) == pytest.approx(expected, abs=2e-3)


def test_spline_goes_through_its_knots_and_is_straight_beyond():
    fitted = SplineCalibrator().fit(*bent_rows(300, 3))
    curve = fitted.parameters["maps"][0]
    knots, log_odds = np.array(curve["knots"]), np.array(curve["log_odds"])
    assert logit(fitted.predict_proba(knots)) == pytest.approx(log_odds)
    for end in (knots[-1] + np.arange(4), knots[0] - np.arange(4)):
        assert np.diff(logit(fitted.predict_proba(end)), 2) == pytest.approx([0, 0], abs=1e-9)


@pytest.mark.parametrize("name", ["beta", "spline", "quadratic"])
def test_flexible_maps_learn_a_bend_that_platt_cannot(name):
    margin, label = bent_rows(4000, 4)
    new = np.linspace(-12, 12, 200)
    truth = expit(bent(new))
    error = {
        n: np.abs(CALIBRATORS[n]().fit(margin, label).predict_proba(new) - truth).mean()
        for n in (name, "platt")
    }
    assert error[name] < 0.6 * error["platt"]


@pytest.mark.parametrize("cls", [QuadraticCalibrator, SplineCalibrator])
def test_the_ridge_takes_back_most_of_the_bend_of_few_rows(cls):
    """Of 25 rows the bends are mostly noise; without a ridge the same features follow it."""
    grid = np.linspace(-8, 8, 50)
    bend, bend_without_ridge = [], []
    for seed in range(10):
        margin, label = overconfident_rows(25, seed)
        fitted = cls().fit(margin, label)
        knots = np.array(fitted.parameters["maps"][0].get("knots", []))

        def features(x, knots=knots):
            return truncated_powers(x, knots) if len(knots) else np.column_stack([x, x**2])

        oracle = logistic_oracle(features(margin), label)
        straight = PlattScalingCalibrator().fit(margin, label).predict_proba(grid)
        bend.append(np.abs(fitted.predict_proba(grid) - straight).mean())
        without = oracle.predict_proba(features(grid))[:, 1]
        bend_without_ridge.append(np.abs(without - straight).mean())
    assert np.mean(bend) < 0.75 * np.mean(bend_without_ridge)


def test_two_distinct_margins_leave_nothing_to_bend():
    margin, label = np.array([-1.0] * 6 + [2.0] * 6), np.array([0, 0, 0, 0, 1, 1] * 2, dtype=bool)
    label[6:] = ~label[6:]
    platt = PlattScalingCalibrator().fit(margin, label).predict_proba(margin)
    for cls in (QuadraticCalibrator, SplineCalibrator, VectorScalingCalibrator, BetaCalibrator):
        assert cls().fit(margin, label).predict_proba(margin) == pytest.approx(platt, abs=1e-6)


def test_knots_that_nearly_coincide_are_one():
    """Between knots a billionth of a nat apart there is only noise for a spline to bend to."""
    rng = np.random.default_rng(0)
    margin = np.concatenate([1e-10 * np.arange(400), 3 * rng.standard_normal(40)])
    label = rng.random(440) < expit(margin)
    new = np.linspace(-9, 9, 20)
    platt = PlattScalingCalibrator().fit(margin, label).predict_proba(new)
    assert SplineCalibrator().fit(margin, label).predict_proba(new) == pytest.approx(platt)


def test_vector_scaling_of_two_labels_is_platt_scaling():
    margin, label = overconfident_rows(300, 0)
    new = np.linspace(-20, 20, 50)
    vector = VectorScalingCalibrator().fit(margin - 2, label).predict_proba(new)
    platt = PlattScalingCalibrator().fit(margin - 2, label).predict_proba(new)
    assert vector == pytest.approx(platt, abs=1e-6)
    assert "vector" not in calibrators_for(2)
    assert calibrators_for(3) == tuple(CALIBRATORS)


def test_vector_scaling_recovers_scales_and_biases():
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((30_000, 4))
    logits -= logits.mean(axis=1, keepdims=True)
    scale, bias = np.array([0.5, 1.0, 1.5, 0.3]), np.array([0.5, -0.5, 0.25, -0.25])
    truth = softmax(scale * logits + bias, axis=1)
    label = (truth.cumsum(axis=1) < rng.random((30_000, 1))).sum(axis=1)
    fitted = VectorScalingCalibrator().fit(log_softmax(logits, axis=1), label)
    assert fitted.parameters["scale"] == pytest.approx(scale, abs=0.08)
    assert fitted.parameters["bias"] == pytest.approx(bias, abs=0.08)
    assert np.abs(fitted.predict_proba(logits) - truth).mean() < 0.01


def test_vector_scaling_meets_its_targets_at_the_optimum():
    """Where the gradient is 0, residuals have mean 0 and do not go with a label's own logit."""
    logprobs, label = overconfident_rows_of_three(200, 1)
    probability = VectorScalingCalibrator().fit(logprobs, label).predict_proba(logprobs)
    count = np.bincount(label)
    target = (1 + np.diag(count))[label] / (count + 3)[label][:, None]
    x = logprobs - logprobs.mean(axis=1, keepdims=True)
    assert (probability - target).sum(axis=0) == pytest.approx([0] * 3, abs=1e-5)
    assert ((probability - target) * x).sum(axis=0) == pytest.approx([0] * 3, abs=1e-5)


def test_vector_scaling_gives_a_label_that_no_row_has_a_small_probability():
    logprobs, label = overconfident_rows_of_three(200, 2)
    label = np.minimum(label, 1)
    fitted = VectorScalingCalibrator().fit(logprobs, label)
    mean = fitted.predict_proba(logprobs).mean(axis=0)
    count = np.bincount(label)
    assert mean[2] == pytest.approx((count / (count + 3)).sum() / 200, rel=1e-4)


def test_histogram_known_answer():
    margin = np.arange(30.0)
    label = np.array([False] * 14 + [True, False] + [True] * 14)
    fitted = HistogramBinningCalibrator().fit(margin, label)
    assert fitted.parameters["maps"][0]["edges"] == list(np.arange(2.0, 30, 2))
    expected = np.clip(label.reshape(15, 2).mean(axis=1), 1 / 32, 31 / 32).repeat(2)
    assert fitted.predict_proba(margin) == pytest.approx(expected)
    outside = fitted.predict_proba([-99.0, 1.99, 2.0, 99.0])
    assert outside == pytest.approx([1 / 32, 1 / 32, 1 / 32, 31 / 32])
    assert fitted.predict_proba([13.99, 14.0]) == pytest.approx([1 / 32, 0.5])


def test_histogram_keeps_equal_margins_in_one_bin():
    margin = np.array([0.0] * 50 + [1.0] * 2 + [2.0] * 48)
    fitted = HistogramBinningCalibrator().fit(margin, np.arange(100) % 3 == 0)
    assert fitted.parameters["maps"][0]["edges"] == [2.0]
    assert fitted.predict_proba([0.0, 1.0, 2.0]) == pytest.approx([18 / 52, 18 / 52, 16 / 48])


def test_histogram_looks_perfect_on_its_own_rows_and_loses_on_others():
    margin, label = overconfident_rows(600, 20)
    new, new_label = overconfident_rows(5000, 21)
    histogram = HistogramBinningCalibrator().fit(margin, label)
    platt = PlattScalingCalibrator().fit(margin, label)
    assert expected_calibration_error(histogram.predict_proba(margin), label) < 1e-3
    assert expected_calibration_error(platt.predict_proba(margin), label) > 0.01
    loss = [sklearn_log_loss(new_label, one.predict_proba(new)) for one in (histogram, platt)]
    assert loss[0] > loss[1] + 0.01
    auroc = [roc_auc_score(new_label, one.predict_proba(new)) for one in (histogram, platt)]
    assert auroc[0] < auroc[1]


def one_more_row(margin, label, new):
    """(p0, p1) of each new margin, by fitting scikit-learn's isotonic regression with it."""
    return tuple(
        np.array(
            [
                IsotonicRegression()
                .fit(np.append(margin, m), np.append(label, truth))
                .predict([m])[0]
                for m in new
            ]
        )
        for truth in (0, 1)
    )


@settings(steady, max_examples=40)
@given(
    rows=st.lists(st.tuples(st.integers(-6, 6), st.booleans()), min_size=1, max_size=40),
    new=st.lists(st.integers(-14, 14), min_size=1, max_size=4),
)
def test_venn_abers_is_isotonic_regression_with_one_more_row(rows, new):
    margin, label = np.array([float(m) for m, _ in rows]), np.array([y for _, y in rows])
    new = np.array(new) / 2  # on, between and beyond the fitted margins
    fitted = VennAbersCalibrator().fit(margin, label)
    p0, p1 = fitted.predict_interval(new)
    expected = one_more_row(margin, label, new)
    assert p0 == pytest.approx(expected[0], abs=1e-12)
    assert p1 == pytest.approx(expected[1], abs=1e-12)
    assert (p0 < p1).all()
    probability = fitted.predict_proba(new)
    assert probability == pytest.approx(p1 / (1 - p0 + p1))
    assert ((p0 <= probability) & (probability <= p1)).all()


@pytest.mark.parametrize("decimals", [1, 12])
def test_venn_abers_agrees_with_the_package(decimals):
    margin, label = overconfident_rows(1500, 0)
    margin = margin.round(decimals)
    new = np.linspace(-15, 15, 301).round(1)
    with np.errstate(divide="ignore", invalid="ignore"):  # which its import does for good
        oracle = pytest.importorskip("venn_abers").VennAbers()
        oracle.fit(np.column_stack([expit(-margin), expit(margin)]), label.astype(int))
        expected, interval = oracle.predict_proba(np.column_stack([expit(-new), expit(new)]))
    fitted = VennAbersCalibrator().fit(margin, label)
    assert fitted.predict_proba(new) == pytest.approx(expected[:, 1], abs=1e-12)
    assert np.column_stack(fitted.predict_interval(new)) == pytest.approx(interval, abs=1e-12)


def test_venn_abers_interval_narrows_with_rows():
    width = []
    for n in (100, 1000, 10_000):
        p0, p1 = VennAbersCalibrator().fit(*overconfident_rows(n, 1)).predict_interval([-1.0, 1.0])
        width.append((p1 - p0).mean())
    assert width[0] > 2 * width[1] > 4 * width[2]


def test_venn_abers_of_three_labels_gives_an_interval_for_each():
    logprobs, label = overconfident_rows_of_three(200, 1)
    fitted = VennAbersCalibrator().fit(logprobs, label)
    p0, p1 = fitted.predict_interval(logprobs)
    score = one_vs_rest_scores(logprobs)
    for k in range(3):
        alone = VennAbersCalibrator().fit(score[:, k], label == k).predict_interval(score[:, k])
        assert (p0[:, k] == alone[0]).all()
        assert (p1[:, k] == alone[1]).all()
    together = p1 / (1 - p0 + p1)
    expected = together / together.sum(axis=1, keepdims=True)
    assert fitted.predict_proba(logprobs) == pytest.approx(expected)


@every_calibrator
def test_fitting_a_million_rows_takes_seconds(name):
    """Time grows in proportion to the rows: a fifth of them, a fifth of the limits."""
    margin, label = overconfident_rows(200_000, 0)
    started = time.process_time()
    CALIBRATORS[name]().fit(margin, label)
    assert time.process_time() - started < (30 if name == "venn_abers" else 5) / 5


def test_one_vs_rest_scores_of_two_columns_are_the_margin_and_its_opposite():
    margin, _ = overconfident_rows(50, 0)
    two_columns = np.column_stack([margin, np.zeros(50)]) - 3.0
    assert one_vs_rest_scores(two_columns) == pytest.approx(np.column_stack([margin, -margin]))


def test_one_vs_rest_score_is_the_logit_of_the_normalised_probability():
    logprobs, _ = overconfident_rows_of_three(50, 0)
    assert one_vs_rest_scores(logprobs) == pytest.approx(logit(softmax(logprobs, axis=1)))


# What every calibrator owes.


@every_calibrator
@steady
@given(rows=binary_rows, new=st.lists(margins, min_size=2, max_size=10))
def test_binary_predictions_are_probabilities(name, rows, new):
    probability = CALIBRATORS[name]().fit(*rows).predict_proba(new)
    assert probability.shape == (len(new),)
    assert ((probability >= 0) & (probability <= 1)).all()


NEVER_FALLING = ["raw", "temperature", "beta", "isotonic", "venn_abers"]


@pytest.mark.parametrize("name", NEVER_FALLING)
@steady
@given(rows=binary_rows, new=st.lists(margins, min_size=2, max_size=10))
def test_monotone_calibrators_keep_the_order_of_the_margin(name, rows, new):
    probability = CALIBRATORS[name]().fit(*rows).predict_proba(np.sort(new))
    assert (np.diff(probability) >= -1e-15).all()


@pytest.mark.parametrize("name", ["raw", "temperature", "platt", "vector", "beta"])
@steady
@given(
    rows=st.lists(st.tuples(st.integers(-16, 16), st.booleans()), min_size=2, max_size=30).filter(
        lambda rows: len({y for _, y in rows}) == 2
    )
)
def test_strictly_monotone_calibrators_never_change_auroc(name, rows):
    margin, label = np.array([m / 4 for m, _ in rows]), np.array([y for _, y in rows])
    probability = CALIBRATORS[name]().fit(margin, label).predict_proba(margin)
    auroc = roc_auc_score(label, margin)
    if np.ptp(probability) < 1e-9:  # constant: nothing was to be learned
        assert np.ptp(margin) == 0 or name in ("platt", "vector", "beta")
    elif probability[margin.argmax()] > probability[margin.argmin()]:
        assert roc_auc_score(label, probability) == pytest.approx(auroc)
    else:  # on these rows the margin points the wrong way
        assert name in ("platt", "vector")
        assert roc_auc_score(label, probability) == pytest.approx(1 - auroc)


@steady
@given(rows=binary_rows, three=rows_of_three)
def test_identity_changes_nothing(rows, three):
    fitted = IdentityCalibrator().fit(*rows)
    assert (fitted.predict_proba(rows[0]) == expit(rows[0])).all()
    fitted = IdentityCalibrator().fit(*three)
    assert (fitted.predict_proba(three[0]) == softmax(three[0], axis=1)).all()


@every_calibrator
@steady
@given(rows=rows_of_three, shift=st.lists(st.integers(-9, 9), min_size=20, max_size=20))
def test_label_mass_does_not_matter(name, rows, shift):
    """Normalised or not, log-probabilities stand for the same answer."""
    logprobs, label = rows[0].round(), rows[1]  # whole numbers, so that no step is crossed
    shifted = logprobs + np.array(shift[: len(label)])[:, None]
    expected = CALIBRATORS[name]().fit(logprobs, label).predict_proba(logprobs)
    assert CALIBRATORS[name]().fit(shifted, label).predict_proba(shifted) == pytest.approx(
        expected, abs=1e-6
    )


@every_calibrator
@steady
@given(rows=rows_of_three, new=rows_of_three)
def test_predictions_of_three_labels_are_probabilities(name, rows, new):
    probability = CALIBRATORS[name]().fit(*rows).predict_proba(new[0])
    assert probability.shape == new[0].shape
    assert (probability >= 0).all()
    assert probability.sum(axis=1) == pytest.approx(np.ones(len(new[0])))


@every_calibrator
@steady
@given(rows=binary_rows, random=st.randoms(use_true_random=False))
def test_row_order_does_not_matter(name, rows, random):
    margin, label = rows
    order = list(range(len(margin)))
    random.shuffle(order)
    a = CALIBRATORS[name]().fit(margin, label).predict_proba(margin)
    b = CALIBRATORS[name]().fit(margin[order], label[order]).predict_proba(margin)
    assert a == pytest.approx(b, abs=1e-6)


@every_calibrator
def test_calibrators_nearly_keep_auroc_on_new_rows(name):
    margin, label = overconfident_rows(400, 7)
    new, new_label = overconfident_rows(400, 8)
    probability = CALIBRATORS[name]().fit(margin, label).predict_proba(new)
    strict = name in ("raw", "temperature", "platt", "vector", "beta")
    assert roc_auc_score(new_label, probability) == pytest.approx(
        roc_auc_score(new_label, new), abs=0 if strict else 0.02
    )


@pytest.mark.parametrize("rows", [overconfident_rows, overconfident_rows_of_three])
@pytest.mark.parametrize("name", [name for name in CALIBRATORS if name != "raw"])
def test_calibration_mends_overconfidence_on_rows_never_seen(name, rows):
    fitted, raw = CALIBRATORS[name]().fit(*rows(2000, 10)), IdentityCalibrator()
    margin, label = rows(2000, 11)
    raw.fit(margin, label)
    after, before = (
        sklearn_log_loss(label, calibrator.predict_proba(margin)) for calibrator in (fitted, raw)
    )
    assert after < before - 0.02


def test_platt_learns_a_bias_that_temperature_cannot():
    margin, label = overconfident_rows(2000, 12)
    margin = margin - 4
    platt, temperature = (
        sklearn_log_loss(label, cls().fit(margin, label).predict_proba(margin))
        for cls in (PlattScalingCalibrator, TemperatureScalingCalibrator)
    )
    assert platt < temperature - 0.02


@pytest.mark.parametrize("scale", [1e-6, 1, 1e5])
@pytest.mark.parametrize("n", [2, 20, 2000])
def test_platt_does_not_explode_on_separable_rows(scale, n):
    """At the optimum the margin-weighted mean of P over the true rows is Platt's target.

    So the true row of least margin, 1, stays below that target, (n/2 + 1) / (n/2 + 2), which
    bounds the slope by its log-odds, log(n/2 + 1).
    """
    positive = np.linspace(1, 2, n // 2)
    margin = scale * np.concatenate([-positive, positive])
    fitted = PlattScalingCalibrator().fit(margin, margin > 0)
    probability = fitted.predict_proba(scale * positive)
    target = (n / 2 + 1) / (n / 2 + 2)
    assert np.average(probability, weights=positive) == pytest.approx(target, abs=1e-7)
    slope = fitted.parameters["maps"][0]["slope"] * scale
    assert 0 < slope <= np.log(n / 2 + 1) + 1e-6


@every_calibrator
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("truth", [True, False])
def test_one_class_gives_a_finite_answer_on_the_right_side(name, n, truth):
    margin = np.linspace(0.1, 3, n) * (1 if truth else -1)
    probability = CALIBRATORS[name]().fit(margin, [truth] * n).predict_proba(margin)
    assert ((probability > 0.5) == truth).all()
    if name not in ("raw", "temperature", "venn_abers"):
        expected = (n + 1) / (n + 2) if truth else 1 / (n + 2)
        assert probability == pytest.approx(np.full(n, expected), abs=1e-6)


def test_constant_margins_give_the_base_rate_or_stay():
    margin, label = np.full(8, 0.0), [1, 1, 1, 1, 1, 1, 0, 0]
    assert TemperatureScalingCalibrator().fit(margin, label).parameters["temperature"] == 1.0
    platt = PlattScalingCalibrator().fit(margin, label)
    assert platt.parameters["maps"][0]["slope"] == 0.0
    assert platt.predict_proba([-9.0, 0.0, 9.0]) == pytest.approx([(6 * 7 / 8 + 2 / 4) / 8] * 3)
    isotonic = IsotonicRegressionCalibrator().fit(margin, label)
    assert isotonic.predict_proba([-9.0, 0.0, 9.0]) == pytest.approx([0.75] * 3)


def test_rounding_noise_on_a_constant_margin_is_no_signal():
    margin = 1e5 + 1e-9 * np.arange(8)
    assert 0 < np.ptp(margin) < 1e-7
    platt = PlattScalingCalibrator().fit(margin, [0, 0, 0, 0, 1, 1, 1, 1])
    assert platt.predict_proba([-9.0, 1e5, 2e5]) == pytest.approx([0.5] * 3)


def test_outputs_that_all_underflow_still_sum_to_one():
    steep = {"slope": 1e3, "intercept": -1e6}
    data = {"name": "platt", "n_labels": 3, "n_rows": 9, "parameters": {"maps": [steep] * 3}}
    calibrator = PlattScalingCalibrator.from_json(data | {"fitted_ids": []})
    assert calibrator.predict_proba([[0.0, 0.0, 0.0]]) == pytest.approx(np.full((1, 3), 1 / 3))


@every_calibrator
def test_margins_of_the_largest_size_stay_finite(name):
    margin = np.array([-1e6, -1.0, 1.0, 1e6])
    probability = CALIBRATORS[name]().fit(margin, [0, 1, 0, 1]).predict_proba(margin)
    assert ((probability >= 0) & (probability <= 1)).all()
    logprobs = np.array([[0, -1e6, -1e6], [-1e6, 0, -5], [-1e6, -1e6, 0.0]])
    probability = CALIBRATORS[name]().fit(logprobs, [0, 1, 2]).predict_proba(logprobs)
    assert probability.sum(axis=1) == pytest.approx(np.ones(3))


# Rows and splits.


@every_calibrator
def test_calibrators_fit_on_calibration_rows_and_are_judged_on_test_rows(name, results):
    rows = results.arrays("test")
    calibrator = fit_calibrator(name, results.arrays("calibration"))
    assert calibrator.name == name
    assert calibrator.n_rows == 800
    probability = calibrated_probabilities(calibrator, rows)
    assert probability.shape == rows["label_logprobs"].shape
    table = evaluate_calibrator(calibrator, rows, n_resamples=50)
    assert table == calibration_metrics(
        probability, rows["label"], group=rows["group"], n_resamples=50
    )
    raw = softmax(rows["label_logprobs"], axis=1)
    if name == "raw":
        assert probability == pytest.approx(raw)
    else:
        assert table["log_loss"]["high"] < log_loss(raw, rows["label"])
        assert (
            table["ece"]["estimate"]
            < 0.6 * calibration_metrics(raw, rows["label"], n_resamples=2)["ece"]["estimate"]
        )


def test_column_0_is_the_first_label(sentiment_results):
    rows = sentiment_results.arrays("test")
    calibrator = fit_calibrator("platt", sentiment_results.arrays("calibration"))
    probability = calibrated_probabilities(calibrator, rows)
    assert roc_auc_score(rows["label"] == 0, probability[:, 0]) > 0.7  # 0.3 if swapped
    margin = rows["label_logprobs"][:, 0] - rows["label_logprobs"][:, 1]
    assert (probability[:, 0] == calibrator.predict_proba(margin)).all()


def test_fitting_refuses_rows_of_another_split(results):
    with pytest.raises(ValueError, match="rows must be of the calibration split, got 'test'"):
        fit_calibrator("platt", results.arrays("test"))


def test_evaluation_refuses_rows_of_another_split(results):
    rows = results.arrays("calibration")
    with pytest.raises(ValueError, match="rows must be of the test split, got 'calibration'"):
        evaluate_calibrator(fit_calibrator("platt", rows), rows)


def test_evaluation_refuses_fitted_rows_under_another_split(sentiment_results, tmp_path):
    """As after a division of the same data with another seed; also once saved and loaded."""
    calibrator = fit_calibrator("platt", sentiment_results.arrays("calibration"))
    save_calibrator(tmp_path / "platt.json", calibrator, IDENTITY)
    rows = sentiment_results.arrays("test")
    rows["id"] = np.where(rows["id"] == "e3", "e1", rows["id"])
    for fitted in (calibrator, load_calibrator(tmp_path / "platt.json", IDENTITY)):
        with pytest.raises(ValueError, match=r"got 1 it was fitted on, among them 'e1'"):
            evaluate_calibrator(fitted, rows)


def test_unknown_calibrator_names_the_choices(results):
    with pytest.raises(
        UserError, match=r"unknown calibrator 'plat'; choose one of: raw, temperature"
    ):
        fit_calibrator("plat", results.arrays("calibration"))


# Cross-fitted log-loss.


def test_calibrated_log_loss_does_not_punish_overconfidence():
    margin, label = overconfident_rows(1000, 0)
    once = calibrated_log_loss(margin, label)
    assert calibrated_log_loss(10 * margin, label) == pytest.approx(once, abs=1e-6)
    assert calibrated_log_loss(margin - 7, label) == pytest.approx(once, abs=1e-6)
    true_loss = sklearn_log_loss(label, expit(margin / 3))
    assert once == pytest.approx(true_loss, abs=0.01)


def test_calibrated_log_loss_of_three_labels_does_not_punish_overconfidence():
    logprobs, label = overconfident_rows_of_three(1000, 0)
    once = calibrated_log_loss(logprobs, label)
    assert calibrated_log_loss(5 * logprobs, label) == pytest.approx(once, abs=1e-5)
    assert once < sklearn_log_loss(label, softmax(logprobs, axis=1)) - 0.05


def test_calibrated_log_loss_prefers_the_model_that_tells_more_apart():
    margin, label = overconfident_rows(1000, 0)
    noise = 6 * np.random.default_rng(1).standard_normal(1000)
    assert calibrated_log_loss(margin, label) < calibrated_log_loss(margin + noise, label) - 0.05


def test_calibrated_log_loss_is_never_fitted_on_the_row_it_predicts():
    """Margins of pure noise cannot beat the base rate, unless a row has seen its own label."""
    rng = np.random.default_rng(0)
    losses = [
        calibrated_log_loss(rng.standard_normal(6), np.array([0, 1] * 3), seed=s)
        for s in range(100)
    ]
    assert np.mean(losses) > np.log(2)


@pytest.mark.parametrize("n", [2, 3, 7])
@pytest.mark.parametrize("truth", [True, False])
def test_calibrated_log_loss_of_one_class_and_few_rows_is_finite(n, truth):
    margin = np.linspace(-1, 1, n)
    assert 0 < calibrated_log_loss(margin, [truth] * n) < np.log(2)
    logprobs = log_softmax(np.column_stack([margin, -margin, 0 * margin]), axis=1)
    assert np.isfinite(calibrated_log_loss(logprobs, [int(truth)] * n))


def test_calibrated_log_loss_of_one_rare_row_is_finite():
    """The fold that holds the only other class is predicted by a fit on one class."""
    assert 0 < calibrated_log_loss([3.0, 2, 1, 2, 3, -2], [1, 1, 1, 1, 1, 0]) < 2


# Cross-fitting and selection.


def grouped_rows(margin, label, group):
    """Calibration rows of two labels, as `ModelResults.arrays` gives them; label: (n,) bool."""
    logprobs = log_softmax(np.column_stack([margin, np.zeros(len(margin))]), axis=1)
    return {
        "split": "calibration",
        "id": np.array([f"e{i}" for i in range(len(margin))]),
        "group": np.array([f"g{g}" for g in group]),
        "label": np.where(label, 0, 1),
        "label_logprobs": logprobs,
    }


@every_calibrator
def test_cross_fitted_rows_do_not_see_the_labels_of_their_group(name, results):
    rows = results.arrays("calibration")
    once = cross_fitted_probabilities(name, rows)
    assert once.shape == rows["label_logprobs"].shape
    assert once.sum(axis=1) == pytest.approx(np.ones(len(once)))
    mine = rows["group"] == rows["group"][7]
    turned = rows | {"label": np.where(mine, (rows["label"] + 1) % 2, rows["label"])}
    again = cross_fitted_probabilities(name, turned)
    assert (again[mine] == once[mine]).all()
    assert (again != once).any() == (name != "raw")


@pytest.mark.parametrize("name", ["temperature", "spline", "venn_abers"])
def test_cross_fitting_does_not_depend_on_row_order(name, sentiment_results):
    rows = sentiment_results.arrays("calibration")
    order = np.random.default_rng(0).permutation(len(rows["label"]))
    mixed = {k: v if k == "split" else v[order] for k, v in rows.items()}
    expected = cross_fitted_probabilities(name, rows)[order]
    assert cross_fitted_probabilities(name, mixed) == pytest.approx(expected, abs=1e-6)


def test_near_duplicates_do_not_make_a_flexible_map_look_good():
    """Three copies a text with labels of chance: a copy in another fold would give them away."""
    rng = np.random.default_rng(0)
    margin, label = np.sort(rng.standard_normal(300)).repeat(3), (rng.random(300) < 0.5).repeat(3)
    group = np.arange(300).repeat(3)
    honest = cross_fitted_log_loss("isotonic", grouped_rows(margin, label, group))
    rows_apart = cross_fitted_log_loss("isotonic", grouped_rows(margin, label, np.arange(900)))
    assert honest > np.log(2)
    assert rows_apart < honest - 0.01


def test_cross_fitted_log_loss_is_the_log_loss_of_the_probabilities(results):
    rows = results.arrays("calibration")
    for name in ("raw", "platt"):
        probability = cross_fitted_probabilities(name, rows, n_folds=3, seed=1)
        expected = sklearn_log_loss(rows["label"], probability)
        assert cross_fitted_log_loss(name, rows, n_folds=3, seed=1) == pytest.approx(expected)
    raw = softmax(rows["label_logprobs"], axis=1)
    assert cross_fitted_probabilities("raw", rows) == pytest.approx(raw)


def test_cross_fitted_log_loss_predicts_the_loss_on_test_rows(results):
    rows, test = results.arrays("calibration"), results.arrays("test")
    for name in CALIBRATORS:
        unseen = calibrated_probabilities(fit_calibrator(name, rows), test)
        assert cross_fitted_log_loss(name, rows) == pytest.approx(
            log_loss(unseen, test["label"]), abs=0.12
        )


def test_fewer_groups_than_folds_leave_one_group_out():
    margin, label = overconfident_rows(9, 0)
    group = np.arange(9) // 3
    probability = cross_fitted_probabilities("platt", grouped_rows(margin, label, group))
    for g in range(3):
        fitted = PlattScalingCalibrator().fit(margin[group != g], label[group != g])
        expected = fitted.predict_proba(margin[group == g])
        assert probability[group == g, 0] == pytest.approx(expected)


@pytest.mark.parametrize("call", [cross_fitted_probabilities, cross_fitted_log_loss])
def test_cross_fitting_refuses_what_it_cannot_divide(call, results):
    with pytest.raises(ValueError, match="rows must be of the calibration split, got 'test'"):
        call("platt", results.arrays("test"))
    with pytest.raises(UserError, match="unknown calibrator 'plat'"):
        call("plat", results.arrays("calibration"))
    one = grouped_rows(*overconfident_rows(5, 0), np.zeros(5))
    with pytest.raises(ValueError, match="rows of at least 2 groups are needed for folds, got 1"):
        call("platt", one)
    with pytest.raises(ValueError, match="n_folds must be an integer of at least 2, got 1"):
        call("platt", results.arrays("calibration"), n_folds=1)


def test_selection_takes_the_first_within_one_standard_error(results):
    rows = results.arrays("calibration")
    name, table = select_calibrator(rows)
    assert tuple(table) == calibrators_for(rows["label_logprobs"].shape[1])
    losses = {
        n: -np.log(cross_fitted_probabilities(n, rows)[np.arange(800), rows["label"]])
        for n in table
    }
    lowest = min(losses, key=lambda n: losses[n].mean())
    near = []
    for n, loss in losses.items():
        row = table[n]
        assert row["log_loss"] == pytest.approx(loss.mean())
        assert row["difference"] == pytest.approx(loss.mean() - losses[lowest].mean(), abs=1e-12)
        pairs = (loss - losses[lowest]).reshape(-1, 2).mean(axis=1)  # groups are pairs of rows
        error = pairs.std(ddof=1) / np.sqrt(len(pairs))
        assert row["difference_standard_error"] == pytest.approx(error, abs=1e-12)
        if row["difference"] <= error:
            near.append(n)
    assert table[lowest]["difference"] == table[lowest]["difference_standard_error"] == 0
    assert name == near[0] != "raw"
    assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_one_standard_error_is_that_of_the_paired_difference():
    """Rows differ in difficulty by far more than calibrators do on the same row."""
    rows = grouped_rows(*overconfident_rows(1000, 5, temperature=1.5), np.arange(1000))
    name, table = select_calibrator(rows)
    raw = table["raw"]
    assert 2 * raw["difference_standard_error"] < raw["difference"] < raw["standard_error"]
    assert name == "temperature"


def test_copies_of_a_row_do_not_lower_the_standard_error():
    margin, label = overconfident_rows(200, 0)
    three = grouped_rows(margin.repeat(3), label.repeat(3), np.arange(200).repeat(3))
    loss = np.logaddexp(0, np.where(label, -margin, margin))
    _, table = select_calibrator(three)
    assert table["raw"]["log_loss"] == pytest.approx(loss.mean())
    assert table["raw"]["standard_error"] == pytest.approx(loss.std(ddof=1) / np.sqrt(200))


def selected(rows_of, n, seeds):
    """How often each calibrator is selected over independent draws."""
    names = [select_calibrator(grouped_rows(*rows_of(n, s), np.arange(n)))[0] for s in seeds]
    return {name: names.count(name) for name in set(names)}


def test_selection_leaves_a_calibrated_model_alone():
    counts = selected(lambda n, seed: overconfident_rows(n, seed, temperature=1.0), 300, range(20))
    assert counts["raw"] >= 12


def test_selection_prefers_the_simplest_of_those_that_mend():
    counts = selected(overconfident_rows, 1000, range(5))
    assert counts.get("temperature", 0) >= 4


def test_selection_takes_a_bend_where_there_is_one():
    assert set(selected(bent_rows, 4000, range(4))) <= {"beta", "quadratic", "spline"}


def test_selection_refuses_test_rows_and_a_single_group(results):
    with pytest.raises(ValueError, match="rows must be of the calibration split, got 'test'"):
        select_calibrator(results.arrays("test"))
    with pytest.raises(ValueError, match="rows of at least 2 groups"):
        select_calibrator(grouped_rows(*overconfident_rows(5, 0), np.zeros(5)))


@pytest.mark.parametrize("n", [2, 3, 12])
@pytest.mark.parametrize("truth", [True, False])
def test_selection_on_few_rows_of_one_class_is_finite(n, truth):
    rows = grouped_rows(np.linspace(-1, 1, n), np.full(n, truth), np.arange(n))
    name, table = select_calibrator(rows)
    assert name in table
    assert all(np.isfinite(list(row.values())).all() for row in table.values())


# Files.


@every_calibrator
def test_json_round_trip_predicts_the_same(name, results):
    calibrator = fit_calibrator(name, results.arrays("calibration"))
    data = json.loads(json.dumps(calibrator.to_json(), allow_nan=False))
    copy = CALIBRATORS[name].from_json(data)
    assert copy.to_json() == calibrator.to_json()
    rows = results.arrays("test")
    expected = calibrated_probabilities(calibrator, rows)
    assert (calibrated_probabilities(copy, rows) == expected).all()


@every_calibrator
def test_saved_calibrator_loads_for_the_same_identity(name, results, tmp_path):
    calibrator = fit_calibrator(name, results.arrays("calibration"))
    path = tmp_path / "folder" / "calibrator.json"
    save_calibrator(path, calibrator, IDENTITY)
    assert load_calibrator(path, IDENTITY).to_json() == calibrator.to_json()


def test_loading_for_another_identity_shows_what_differs(tmp_path):
    path = tmp_path / "platt.json"
    save_calibrator(path, PlattScalingCalibrator().fit([1.0, -1.0], [1, 0]), IDENTITY)
    parts = IDENTITY_PARTS | {"dtype": "float32", "prompt": "Is this text negative?" * 9}
    other = parts | {"fingerprint": fingerprint(parts)}
    with pytest.raises(UserError) as error:
        load_calibrator(path, other)
    message = str(error.value)
    assert IDENTITY["fingerprint"] in message
    assert other["fingerprint"] in message
    assert "dtype ('bfloat16', now 'float32')" in message
    assert "prompt ('Is this text positive?', now 'Is this text negative?Is" in message
    assert "model" not in message.split("different: ")[1]
    assert len(message) < 600


def test_identity_compares_as_the_json_it_becomes(tmp_path):
    identity = IDENTITY | {"label_words": (("Yes", "yes"), ("No", "no"))}
    path = tmp_path / "platt.json"
    save_calibrator(path, PlattScalingCalibrator().fit([1.0, -1.0], [1, 0]), identity)
    other = identity | {"dtype": "float16", "fingerprint": "0" * 16}
    with pytest.raises(UserError, match=r"different: dtype \('bfloat16', now 'float16'\)\. "):
        load_calibrator(path, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=99), "schema 99"),
        (lambda d: d.pop("identity"), "damaged"),
        (lambda d: d.update(calibrator=[]), "damaged"),
        (lambda d: d["calibrator"].update(name="magic"), "damaged.*magic"),
        (lambda d: d["calibrator"].update(name="isotonic"), "damaged"),
        (lambda d: d["calibrator"].update(n_labels=1), "damaged.*n_labels"),
        (lambda d: d["calibrator"].update(n_labels=3), "damaged"),
        (lambda d: d["calibrator"].pop("parameters"), "damaged"),
        (lambda d: d["calibrator"]["parameters"]["maps"][0].update(slope="steep"), "damaged"),
        (lambda d: d["calibrator"]["parameters"]["maps"][0].update(slope=float("nan")), "damaged"),
        (lambda d: d["calibrator"]["parameters"].update(maps=[]), "damaged"),
        (
            lambda d: d["calibrator"].update(name="temperature", parameters={"temperature": 0}),
            "damaged.*parameters must be finite",
        ),
        (
            lambda d: d["calibrator"].update(
                name="histogram", parameters={"maps": [{"edges": [0], "probability": [0.5]}]}
            ),
            "damaged.*IndexError",
        ),
    ],
)
def test_damaged_file_is_a_user_error_with_the_next_step(tmp_path, change, message):
    path = tmp_path / "platt.json"
    save_calibrator(path, PlattScalingCalibrator().fit([1.0, -1.0], [1, 0]), IDENTITY)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=message + r".*fit the calibrator again: python"):
        load_calibrator(path, IDENTITY)


def test_missing_file_is_a_user_error_with_the_next_step(tmp_path):
    with pytest.raises(UserError, match="does not exist; fit the calibrator again"):
        load_calibrator(tmp_path / "none.json", IDENTITY)


# Refusals.


def fitted():
    return PlattScalingCalibrator().fit([1.0, -1.0], [1, 0])


@every_calibrator
@pytest.mark.parametrize(
    ("margin", "label", "message"),
    [
        ([], [], "margin must have at least 1 row"),
        ([1.0, np.nan], [1, 0], "margin must be finite, got nan at row 1"),
        ([-np.inf, 1.0], [1, 0], "margin must be finite, got -inf at row 0"),
        ([1.0, 1e300], [1, 0], r"margin must lie in \[-1e\+06, 1e\+06\], got 1e\+300 at row 1"),
        ([1.0, 2.0], [1, 2], "label must be 0 or 1 .*got 2.0 at row 1"),
        ([1.0, 2.0], [-1, 1], "label must be 0 or 1 .*got -1.0 at row 0"),
        ([1.0, 2.0], [1], r"label must have as many rows as margin \(2\), got 1"),
        ([[1.0, 2.0]], [0], r"margin must have shape \(n,\) for two labels or \(n, K\)"),
        (1.0, [1], "margin must have at least 1 row"),
        ([[0.0, -1.0, -2.0]], [3], "label must be a label index from 0 to 2, got 3.0 at row 0"),
        ([[0.0, -1.0, -2.0]], [True], "label must hold label indices from 0 to 2, got bool"),
        ([[0.0, -1.0, np.nan]], [0], "margin must be finite"),
    ],
)
def test_fit_refuses_bad_input_by_name(name, margin, label, message):
    with pytest.raises(ValueError, match=message):
        CALIBRATORS[name]().fit(margin, label)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PlattScalingCalibrator().predict_proba([1.0]), "'platt' must be fitted before"),
        (lambda: fitted().predict_proba([[0.0, -1.0, -2.0]]), "margin must be of 2 labels"),
        (lambda: fitted().predict_proba([np.nan]), "margin must be finite"),
        (
            lambda: IsotonicRegressionCalibrator.from_json(fitted().to_json()),
            "name must be 'isotonic', got 'platt'",
        ),
        (lambda: calibrated_log_loss([1.0], [1]), "rows of at least 2 groups are needed .*got 1"),
        (lambda: VennAbersCalibrator().predict_interval([1.0]), "'venn_abers' must be fitted"),
        (lambda: IsotonicRegressionCalibrator().clipped_fraction([1.0]), "must be fitted before"),
        (lambda: calibrators_for(1), "n_labels must be an integer of at least 2, got 1"),
        (lambda: calibrated_log_loss([1.0, 2.0], [1, 0], n_folds=1), "n_folds must be an integer"),
        (lambda: calibrated_log_loss([1.0, np.inf], [1, 0]), "margin must be finite"),
        (
            lambda: save_calibrator("never.json", PlattScalingCalibrator(), IDENTITY),
            "'platt' must be fitted before it is saved",
        ),
        (
            lambda: save_calibrator("never.json", fitted(), {"model": "m"}),
            r"identity must have a \"fingerprint\", got the keys \['model'\]",
        ),
        (lambda: load_calibrator("never.json", {}), "identity must have a"),
    ],
)
def test_misuse_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
