"""Calibrators against published values, scikit-learn and simulation; splits, files, refusals."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_softmax, logit, softmax
from sklearn.calibration import _sigmoid_calibration
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from calibration import (
    CALIBRATORS,
    IdentityCalibrator,
    IsotonicRegressionCalibrator,
    PlattScalingCalibrator,
    TemperatureScalingCalibrator,
    calibrated_log_loss,
    calibrated_probabilities,
    evaluate_calibrator,
    fit_calibrator,
    load_calibrator,
    one_vs_rest_scores,
    save_calibrator,
)
from calibration_metrics import calibration_metrics, log_loss
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

    # The same loss as a logistic regression in which every row counts, in part, as both classes.
    n_true, n_false = label.sum(), (~label).sum()
    target = np.where(label, (n_true + 1) / (n_true + 2), 1 / (n_false + 2))
    oracle = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000, solver="newton-cholesky").fit(
        np.tile(margin, 2)[:, None],
        np.repeat([1, 0], len(margin)),
        sample_weight=np.concatenate([target, 1 - target]),
    )
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


def test_isotonic_beats_every_other_monotone_map_on_its_own_rows():
    margin, label = overconfident_rows(300, 2)
    loss = {
        name: sklearn_log_loss(label, cls().fit(margin, label).predict_proba(margin))
        for name, cls in CALIBRATORS.items()
    }
    assert loss["isotonic"] < min(loss["platt"], loss["temperature"]) < loss["raw"]


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
def test_binary_predictions_are_probabilities_in_the_order_of_the_margin(name, rows, new):
    margin, label = rows
    calibrator = CALIBRATORS[name]().fit(margin, label)
    new = np.sort(new)
    probability = calibrator.predict_proba(new)
    assert probability.shape == new.shape
    assert ((probability >= 0) & (probability <= 1)).all()
    rising = np.diff(probability)
    if name == "platt" and calibrator.parameters["maps"][0]["slope"] < 0:
        rising = -rising
    assert (rising >= -1e-15).all()


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
def test_monotone_calibrators_keep_auroc(name):
    margin, label = overconfident_rows(400, 7)
    new, new_label = overconfident_rows(400, 8)
    probability = CALIBRATORS[name]().fit(margin, label).predict_proba(new)
    tolerance = 0.01 if name == "isotonic" else 0  # its steps tie rows, which count one half
    assert roc_auc_score(new_label, probability) == pytest.approx(
        roc_auc_score(new_label, new), abs=tolerance
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
    if name in ("platt", "isotonic"):
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
    with pytest.raises(UserError, match=r"unknown calibrator 'plat'; choose one of: raw, platt"):
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
        (lambda: calibrated_log_loss([1.0], [1]), "margin must have at least 2 rows"),
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
