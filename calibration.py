"""Maps from what a model says to probabilities that hold.

Every calibrator has one protocol: `fit(margin, label)`, `predict_proba(margin)`, `to_json()`,
`from_json(data)` and a `name`.
  two labels: margin (n,) = log p_first − log p_second, nats; label (n,) bool: the true label is the
              first one. predict_proba gives (n,) P(first label).
  K > 2:      margin (n, K) = log-probabilities of the labels, nats, normalised or not; label (n,)
              int index. predict_proba gives (n, K), each row summing to 1.
`fit_calibrator` and `evaluate_calibrator` do the same on rows of `records.ModelResults.arrays` and
keep the splits apart: fitted on calibration rows, judged on test rows, by log-loss and Brier score
before ECE. `select_calibrator` chooses one by what it predicts, on calibration rows alone, of rows
it was not fitted on.

A new calibrator is a subclass with `_parameters` and `_apply` (or, for a map of one score to one
probability, a subclass of `OneVsRestCalibrator`) and a line in `CALIBRATORS`.
"""

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_expit, log_softmax, logit, logsumexp, softmax
from sklearn.isotonic import IsotonicRegression

from calibration_metrics import (
    PROBABILITY_FLOOR,
    as_count,
    as_flags,
    as_floats,
    as_labels,
    calibration_metrics,
    check_same_length,
    log_loss,
)
from records import SCHEMA_VERSION, read_json, write_json
from settings import UserError
from settings import fingerprint as fingerprint_of

LARGEST_MARGIN = 1e6  # nats; more is a masked token or an overflow, not what a model said
TEMPERATURE_RANGE = (0.01, 100.0)
BEND_RIDGE = 1.0  # nats: cost of a standardised bend with coefficient √2
TIE_RIDGE = 1e-8  # likewise of every coefficient: no more than chooses among maps equally good
KNOT_LEVELS = (0.05, 0.275, 0.5, 0.725, 0.95)  # Harrell 2015, Regression Modeling Strategies, 2.4.6
HISTOGRAM_BINS = 15
FIT_AGAIN = "fit the calibrator again: python generate_evaluation_cache.py --force"


def as_margin(margin):
    """`margin` as (n,) or (n, K) float64 with K > 2, finite, within ± 1e6 nats."""
    array = as_floats("margin", margin, -LARGEST_MARGIN, LARGEST_MARGIN)
    if array.ndim > 2 or (array.ndim == 2 and array.shape[1] < 3):
        raise ValueError(
            f"margin must have shape (n,) for two labels or (n, K) with K > 2, got {array.shape}"
        )
    return array


def _margin_and_label(margin, label):
    margin = as_margin(margin)
    label = (
        as_flags("label", label) if margin.ndim == 1 else as_labels("label", label, margin.shape[1])
    )
    check_same_length(margin=margin, label=label)
    return margin, label


def _n_labels(margin):
    return 2 if margin.ndim == 1 else margin.shape[1]


def _label_index(margin, label):
    """(n,) index of the true label: of two labels the first, True, has index 0."""
    return np.where(label, 0, 1) if margin.ndim == 1 else label


def _logits(margin):
    """(n, K) logits of mean 0 in each row, whose softmax is what the margin stands for."""
    if margin.ndim == 1:
        return np.column_stack([margin / 2, -margin / 2])
    return margin - margin.mean(axis=1, keepdims=True)


def _all_labels(probability):
    """(n, K) from what predict_proba gives."""
    if probability.ndim == 2:
        return probability
    return np.column_stack([probability, 1.0 - probability])


class Calibrator(ABC):
    """The protocol, its checks and its JSON; see the module's docstring for shapes.

    n_labels: number of labels it was fitted for, None before `fit`.
    n_rows: number of rows it was fitted on.
    parameters: what was fitted, as plain JSON values.
    fitted_ids: ids of the rows it was fitted on, where `fit_calibrator` knew them.
    """

    name: str

    def __init__(self):
        self.n_labels = None
        self.n_rows = 0
        self.parameters = {}
        self.fitted_ids = ()

    @abstractmethod
    def _parameters(self, margin, label):
        """The fitted parameters, plain JSON values, from checked arrays."""

    @abstractmethod
    def _apply(self, margin):
        """Probabilities, (n,) or (n, K), of a checked margin under `self.parameters`."""

    def fit(self, margin, label):
        """Fit to margin (n,) and label (n,) bool, or (n, K) and (n,) int; n ≥ 1. Returns self."""
        margin, label = _margin_and_label(margin, label)
        self.parameters = self._parameters(margin, label)
        self.n_labels, self.n_rows, self.fitted_ids = _n_labels(margin), len(margin), ()
        return self

    def predict_proba(self, margin):
        """P(first label), (n,), for margin (n,); probabilities (n, K) for margin (n, K)."""
        return self._apply(self._margin_to_predict(margin))

    def _margin_to_predict(self, margin):
        margin = as_margin(margin)
        if self.n_labels is None:
            raise ValueError(f"calibrator {self.name!r} must be fitted before it predicts")
        if _n_labels(margin) != self.n_labels:
            raise ValueError(
                f"margin must be of {self.n_labels} labels, as fitted, got {_n_labels(margin)}"
            )
        return margin

    def to_json(self):
        return {
            "name": self.name,
            "n_labels": self.n_labels,
            "n_rows": self.n_rows,
            "parameters": self.parameters,
            "fitted_ids": list(self.fitted_ids),
        }

    @classmethod
    def from_json(cls, data):
        """The calibrator that `to_json` described.

        Raises LookupError, TypeError or ValueError when `data` is of another calibrator or damaged.
        """
        if data["name"] != cls.name:
            raise ValueError(f"name must be {cls.name!r}, got {data['name']!r}")
        calibrator = cls()
        calibrator.n_labels = as_count("n_labels", data["n_labels"], least=2)
        calibrator.n_rows = as_count("n_rows", data["n_rows"])
        calibrator.parameters = data["parameters"]
        calibrator.fitted_ids = tuple(data["fitted_ids"])
        probe = np.diag([0.0, *[LARGEST_MARGIN] * (calibrator.n_labels - 1)])
        if calibrator.n_labels == 2:
            probe = np.array([-LARGEST_MARGIN, 0.0, LARGEST_MARGIN])
        with np.errstate(all="ignore"):  # a division by 0 ends in a NaN, which is refused
            as_floats("parameters", calibrator.predict_proba(probe), 0.0, 1.0)
        return calibrator


class IdentityCalibrator(Calibrator):
    """The model's own probabilities: what every calibrator has to beat."""

    name = "raw"

    def _parameters(self, margin, label):
        return {}

    def _apply(self, margin):
        return expit(margin) if margin.ndim == 1 else softmax(margin, axis=1)


class TemperatureScalingCalibrator(Calibrator):
    """softmax(log p / T) with the T that minimises log-loss; for two labels σ(margin / T).

    parameters: {"temperature": T in [0.01, 100]}; T > 1 makes the model less sure. The search is
    over log T within these bounds, where the loss has one minimum, so it can neither explode nor
    turn negative. Rows that the model gets all right drive T towards 0.01, rows of which it
    knows nothing towards 100; where no T is better than 1, as for margins of 0, T is 1.
    Source: Guo et al. 2017, section 4.2, https://arxiv.org/abs/1706.04599
    """

    name = "temperature"

    def _parameters(self, margin, label):
        logits, row = _logits(margin), np.arange(len(margin))
        index = _label_index(margin, label)

        def loss(log_temperature):
            scaled = log_softmax(logits / np.exp(log_temperature), axis=1)
            return -scaled[row, index].mean()

        found = minimize_scalar(
            loss, bounds=np.log(TEMPERATURE_RANGE), method="bounded", options={"xatol": 1e-8}
        )
        return {"temperature": float(np.exp(min((0.0, found.x), key=loss)))}

    def _apply(self, margin):
        scaled = margin / self.parameters["temperature"]
        return expit(scaled) if margin.ndim == 1 else softmax(scaled, axis=1)


def _minimise(loss, hessian, start):
    """The minimum of a convex function; loss gives (value, gradient)."""
    return minimize(
        loss, start, jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-9}
    ).x


def _standardised(columns):
    """(columns − centre) / scale, centre and scale of columns (n, ...).

    A column whose spread is rounding, not signal, becomes 0 with scale 1.
    """
    centre, scale = columns.mean(axis=0), columns.std(axis=0)
    flat = np.ptp(columns, axis=0) <= 1e-9 * np.maximum(1.0, np.abs(columns).max(axis=0))
    scale = np.where(flat, 1.0, scale)
    return np.where(flat, 0.0, columns - centre) / scale, centre, scale


class VectorScalingCalibrator(Calibrator):
    """softmax(scale ∘ log p + bias): a scale and a bias for each label, by least log-loss.

    log p is centred first, each row to mean 0, so that the answer is the same for normalised and
    unnormalised log-probabilities. parameters: {"scale": K floats, "bias": K floats in nats, of sum
    0}. The targets are Platt's for K labels, (N + 1) / (N + K) for the true label of N fitted rows
    and 1 / (N + K) for each other, which keep the fit finite on separable rows and for labels that
    no row has. For two labels this is Platt scaling.
    Source: Guo et al. 2017, section 4.2, https://arxiv.org/abs/1706.04599
    """

    name = "vector"

    def _parameters(self, margin, label):
        x, centre, spread = _standardised(_logits(margin))
        n, n_labels = x.shape
        index = _label_index(margin, label)
        count = np.bincount(index, minlength=n_labels)
        # (n, K): row i of the small table is the target of a row whose true label is i
        target = ((1 + np.diag(count)) / (count + n_labels)[:, None])[index]
        ridge = TIE_RIDGE / n

        def loss(theta):
            log_p = log_softmax(x * theta[:n_labels] + theta[n_labels:], axis=1)
            miss = np.exp(log_p) - target
            gradient = np.concatenate([(miss * x).sum(axis=0), miss.sum(axis=0)]) / n
            value = -(target * log_p).sum() / n + ridge * theta @ theta / 2
            return value, gradient + ridge * theta

        def hessian(theta):
            p = softmax(x * theta[:n_labels] + theta[n_labels:], axis=1)
            px = p * x
            both = np.hstack([px, p])  # (n, 2K)
            square, mixed, single = (np.diag(a.sum(axis=0)) for a in (px * x, px, p))
            curvature = np.block([[square, mixed], [mixed, single]]) - both.T @ both
            return curvature / n + ridge * np.eye(len(theta))

        theta = _minimise(loss, hessian, np.zeros(2 * n_labels))
        scale = theta[:n_labels] / spread
        bias = theta[n_labels:] - scale * centre
        return {"scale": scale.tolist(), "bias": (bias - bias.mean()).tolist()}

    def _apply(self, margin):
        scale, bias = np.array(self.parameters["scale"]), np.array(self.parameters["bias"])
        probability = softmax(scale * _logits(margin) + bias, axis=1)
        return probability[:, 0] if margin.ndim == 1 else probability


def one_vs_rest_scores(margin):
    """(n, 1) for margin (n,); for (n, K) the (n, K) log pₖ − log(1 − pₖ) in nats."""
    if margin.ndim == 1:
        return margin[:, None]
    # Without this, rows of the same answer but another label mass would differ by rounding.
    margin = margin - margin.max(axis=1, keepdims=True)
    n_labels = margin.shape[1]
    rest = [logsumexp(np.delete(margin, k, axis=1), axis=1) for k in range(n_labels)]
    return margin - np.column_stack(rest)


class OneVsRestCalibrator(Calibrator):
    """A map of one score to one probability: a single one for two labels, one a label for K > 2.

    For K > 2 each label's map is fitted on log pₖ − log(1 − pₖ) against "the true label is k", and
    the K outputs are divided by their sum. parameters: {"maps": [one dict of `_fit_map` each]}.
    Source: Zadrozny and Elkan 2002, https://doi.org/10.1145/775047.775151
    """

    @abstractmethod
    def _fit_map(self, score, flag):
        """Plain JSON parameters of one map from score (n,) nats and flag (n,) bool."""

    @abstractmethod
    def _apply_map(self, parameters, score):
        """(n,) probabilities of score (n,) under the parameters of one map."""

    def _parameters(self, margin, label):
        score = one_vs_rest_scores(margin)
        flag = label[:, None] if margin.ndim == 1 else np.arange(margin.shape[1]) == label[:, None]
        columns = range(score.shape[1])
        return {"maps": [self._fit_map(score[:, k], flag[:, k]) for k in columns]}

    def _each_map(self, evaluate, margin):
        """evaluate(parameters, score) of every map: (n,) for margin (n,), (n, K) for (n, K)."""
        maps = zip(self.parameters["maps"], one_vs_rest_scores(margin).T, strict=True)
        values = np.column_stack([evaluate(one, score) for one, score in maps])
        return values[:, 0] if margin.ndim == 1 else values

    def _apply(self, margin):
        probability = self._each_map(self._apply_map, margin)
        if margin.ndim == 1:
            return probability
        # Far out every σ can underflow to 0; the floor keeps the sum above 0.
        probability = np.maximum(probability, np.finfo(np.float64).tiny)
        return probability / probability.sum(axis=1, keepdims=True)


# Maps that are a logistic regression on features of the margin.


def _fit_logistic(features, flag, ridge=0.0):
    """(coefficients (d,), intercept) of the σ(features · coefficients + intercept) of least loss.

    features: (n, d); flag: (n,) bool; ridge: float or (d,), weight in nats of half the squared
    coefficient of each standardised feature. The targets are Platt's (N₊ + 1) / (N₊ + 2) and
    1 / (N₋ + 2) in place of 1 and 0, which keep the fit finite on separable rows and make it
    constant on rows of one class. A feature without spread gets coefficient 0.
    """
    n, n_true = len(flag), int(flag.sum())
    target = np.where(flag, (n_true + 1) / (n_true + 2), 1 / (n - n_true + 2))
    x, centre, scale = _standardised(features)
    design = np.column_stack([x, np.ones(n)])
    weight = np.append(np.broadcast_to(ridge, x.shape[1]) + TIE_RIDGE, 0.0) / n

    def loss(theta):
        z = design @ theta
        gradient = design.T @ (expit(z) - target) / n + weight * theta
        return np.mean(np.logaddexp(0.0, z) - target * z) + weight @ theta**2 / 2, gradient

    def hessian(theta):
        p = expit(design @ theta)
        return (design.T * (p * (1 - p))) @ design / n + np.diag(weight)

    theta = _minimise(loss, hessian, np.append(np.zeros(x.shape[1]), logit(target.mean())))
    coefficients = theta[:-1] / scale
    return coefficients, float(theta[-1] - coefficients @ centre)


class PlattScalingCalibrator(OneVsRestCalibrator):
    """σ(slope · margin + intercept): logistic regression on the margin, not on probabilities.

    Each map: {"slope", "intercept"}; a negative slope means that the margin points the wrong way
    on the fitted rows. Targets are Platt's (N₊ + 1) / (N₊ + 2) and 1 / (N₋ + 2), which keep the
    fit finite on separable rows and on rows of one class, where the map is constant.
    Source: Platt 1999, section 2.2; the loss as in Lin, Lin and Weng 2007,
    https://doi.org/10.1007/s10994-007-5018-6
    """

    name = "platt"

    def _fit_map(self, score, flag):
        (slope,), intercept = _fit_logistic(score[:, None], flag)
        return {"slope": float(slope), "intercept": intercept}

    def _apply_map(self, parameters, score):
        return expit(parameters["slope"] * score + parameters["intercept"])


class BetaCalibrator(OneVsRestCalibrator):
    """σ(a · log p − b · log(1 − p) + c) with p = σ(margin) and a, b ≥ 0; a = b is Platt scaling.

    Each map: {"a", "b", "c"}. Towards the first label the log-odds grow with b a nat of margin,
    towards the second with a, so each side may be overconfident in its own measure. The map never
    falls: a coefficient that would be negative is 0 and the others are fitted without it; with
    both 0 it is constant. Platt's targets keep it finite.
    Source: Kull, Silva Filho and Flach 2017, http://proceedings.mlr.press/v54/kull17a.html
    """

    name = "beta"

    def _features(self, score):
        return np.column_stack([log_expit(score), -log_expit(-score)])

    def _fit_map(self, score, flag):
        features = self._features(score)
        # Both features grow with the margin. Hence the best map with a, b ≥ 0 leaves out exactly
        # those that would be negative.
        fitted, kept = np.full(2, -1.0), np.array([True, True])
        while (fitted < 0).any():
            fitted = np.zeros(2)
            fitted[kept], c = _fit_logistic(features[:, kept], flag)
            kept &= fitted >= 0
        return {"a": float(fitted[0]), "b": float(fitted[1]), "c": c}

    def _apply_map(self, parameters, score):
        a, b, c = (parameters[key] for key in "abc")
        return expit(self._features(score) @ np.array([a, b]) + c)


class QuadraticCalibrator(OneVsRestCalibrator):
    """σ(curvature · x² + slope · x + intercept), x = (margin − centre) / scale.

    Each map: {"centre", "scale": mean and standard deviation of the fitted margins, in nats;
    "slope", "curvature", "intercept"}. A ridge on the curvature pulls the map towards Platt scaling
    where rows are few; Platt's targets keep it finite. It turns back at one end, so margins far
    beyond the fitted ones get answers that are not to be trusted, and ranks may change.
    Source: polynomial logistic regression; how it does beside others: CalArena,
    https://arxiv.org/abs/2605.30188
    """

    name = "quadratic"

    def _fit_map(self, score, flag):
        x, centre, scale = _standardised(score)
        features = np.column_stack([x, x**2])
        (slope, curvature), intercept = _fit_logistic(features, flag, ridge=[0.0, BEND_RIDGE])
        return {
            "centre": float(centre),
            "scale": float(scale),
            "slope": float(slope),
            "curvature": float(curvature),
            "intercept": intercept,
        }

    def _apply_map(self, parameters, score):
        x = (score - parameters["centre"]) / parameters["scale"]
        return expit(
            (parameters["curvature"] * x + parameters["slope"]) * x + parameters["intercept"]
        )


def _natural_spline(x, knots, values):
    """The natural cubic spline through (knots (m,), values (m,) or (m, d)) at x (n,), m ≥ 2.

    Returns (n,) or (n, d); a straight line beyond the first and the last knot.
    """
    spline = CubicSpline(knots, values, bc_type="natural")
    inside = np.clip(x, knots[0], knots[-1])
    beyond = (x - inside).reshape(-1, *[1] * (np.ndim(values) - 1))
    return spline(inside) + spline(inside, 1) * beyond


class SplineCalibrator(OneVsRestCalibrator):
    """σ(natural cubic spline of the margin): log-odds that bend between the knots, not beyond.

    Each map: {"knots": margins in nats, ascending; "log_odds": what the spline goes through there}.
    The knots are at five quantiles of the fitted margins, from 0.05 to 0.95, fewer where these
    nearly coincide; with fewer than three the map is Platt scaling. A ridge on the bends pulls it
    towards Platt scaling where rows are few; Platt's targets keep it finite. It may fall between
    knots, so ranks may change.
    Source: natural splines: Hastie, Tibshirani and Friedman 2009, section 5.2.1; in calibration:
    Gupta et al. 2021, https://arxiv.org/abs/2006.12800
    """

    name = "spline"

    def _fit_map(self, score, flag):
        x, centre, scale = _standardised(score)
        knots = np.unique(np.quantile(x, KNOT_LEVELS).round(2))
        if len(knots) < 3:
            knots = np.array([-1.0, 1.0])

        def features(x):
            bends = _natural_spline(x, knots, np.eye(len(knots)))[:, 1:-1]
            return np.column_stack([x, bends])

        ridge = [0.0] + [BEND_RIDGE] * (len(knots) - 2)
        coefficients, intercept = _fit_logistic(features(x), flag, ridge)
        return {
            "knots": (centre + scale * knots).tolist(),
            "log_odds": (features(knots) @ coefficients + intercept).tolist(),
        }

    def _apply_map(self, parameters, score):
        return expit(_natural_spline(score, parameters["knots"], parameters["log_odds"]))


# Maps by counting.


def _succession_limits(n):
    """The least and the largest share that n rows are evidence for.

    n rows of which none was true are, by the rule of succession, evidence for 1 / (n + 2), not 0.
    """
    return 1 / (n + 2), 1 - 1 / (n + 2)


class HistogramBinningCalibrator(OneVsRestCalibrator):
    """The share of true rows in each of 15 bins of equal count: a warning example.

    It shows how a good calibration error is bought: inside a bin every answer gets the same
    probability, so what the model knew about their order is lost, and two margins on both sides of
    an edge, however close, may differ by much. Each map: {"edges": inner edges, margins in nats;
    "probability": one a bin}; a margin on an edge is in the bin above it, equal margins share a
    bin, so there may be fewer bins. Shares are clipped to [1 / (n + 2), 1 − 1 / (n + 2)].
    Source: Zadrozny and Elkan 2001, section 3.3, https://dl.acm.org/doi/10.5555/645530.655658
    """

    name = "histogram"

    def _fit_map(self, score, flag):
        n = len(score)
        ascending = np.sort(score)
        edges = np.unique(ascending[np.arange(1, HISTOGRAM_BINS) * n // HISTOGRAM_BINS])
        edges = edges[edges > ascending[0]]
        bin_index = np.searchsorted(edges, score, side="right")
        share = np.bincount(bin_index, weights=flag) / np.bincount(bin_index)
        return {
            "edges": edges.tolist(),
            "probability": np.clip(share, *_succession_limits(n)).tolist(),
        }

    def _apply_map(self, parameters, score):
        bin_index = np.searchsorted(parameters["edges"], score, side="right")
        return np.array(parameters["probability"])[bin_index]


class IsotonicRegressionCalibrator(OneVsRestCalibrator):
    """The best non-decreasing step map from the margin, interpolated between its steps.

    Each map: {"margin", "probability": its corners; "clipped_fraction": the share of fitted rows
    whose value was clipped}. Values are clipped to [1 / (n + 2), 1 − 1 / (n + 2)], because a 0 or 1
    would make the log-loss infinite; `clipped_fraction` says of how many answers. Outside the
    fitted margins the map stays at its end values. Wants thousands of rows: below 1,000 Platt and
    temperature scaling are the better choice.
    Source: Zadrozny and Elkan 2002, https://doi.org/10.1145/775047.775151
    """

    name = "isotonic"

    def _fit_map(self, score, flag):
        fitted = IsotonicRegression(out_of_bounds="clip").fit(score, flag)
        low, high = _succession_limits(len(flag))
        value = fitted.predict(score)
        return {
            "margin": fitted.X_thresholds_.tolist(),
            "probability": np.clip(fitted.y_thresholds_, low, high).tolist(),
            "clipped_fraction": float(((value < low) | (value > high)).mean()),
        }

    def _apply_map(self, parameters, score):
        return np.interp(score, parameters["margin"], parameters["probability"])

    def clipped_fraction(self, margin):
        """Share of the values for margin (n,) or (n, K), new rows or not, that are clipped.

        A float in [0, 1]; for K > 2 over all rows and labels, before they are divided by their sum.
        """
        value = self._each_map(self._apply_map, self._margin_to_predict(margin))
        return float(np.isin(value, _succession_limits(self.n_rows)).mean())


def _isotonic_with_one_more(count, n_true):
    """The isotonic fit at each of k ascending scores, if one more true row stood there.

    count, n_true: (k,) int, rows and true rows of each distinct score. Returns (k,) float.
    The fit is a slope of the greatest convex minorant of the points (rows, true rows), cumulated.
    One more true row between two neighbours lifts what follows by (1, 1), and the slope there is
    that of the common tangent of the minorant of the points before and of the points after. It
    grows with the score, so both ends of the tangent only ever move up: O(k) after sorting.
    """
    k = len(count)
    x = [0, *np.cumsum(count).tolist()]
    y = [0, *np.cumsum(n_true).tolist()]

    def bends_down(a, b, c):  # b lies on or above the line from a to c
        return (y[b] - y[a]) * (x[c] - x[b]) >= (y[c] - y[b]) * (x[b] - x[a])

    # following[i]: the corner after i of the minorant of the points i, ..., k
    following = list(range(1, k + 2))
    for i in range(k - 2, -1, -1):
        after = following[i]
        while after < k and bends_down(i, after, following[after]):
            after = following[after]
        following[i] = after

    before, first = [], 0  # before[first:]: corners of the minorant of the points up to the score
    right, fit = 1, []
    for i in range(1, k + 1):
        while len(before) - first >= 2 and bends_down(before[-2], before[-1], i - 1):
            before.pop()
        before.append(i - 1)
        right = max(right, i)
        while True:
            left = before[first]
            dx, dy = x[right] - x[left] + 1, y[right] - y[left] + 1
            if right < k:
                after = following[right]
                if (y[after] - y[right]) * dx < dy * (x[after] - x[right]):
                    right = after
                    continue
            if len(before) - first >= 2:
                after = before[first + 1]
                if (y[after] - y[left]) * dx < dy * (x[after] - x[left]):
                    first += 1
                    continue
            break
        fit.append(dy / dx)
    return np.array(fit)


class VennAbersCalibrator(OneVsRestCalibrator):
    """Two isotonic fits for each answer, as if it were one more row, false (p0) and true (p1).

    One of the two is calibrated by construction whatever the model is (for exchangeable rows); how
    far they are apart says how much the rows near this margin can tell. `predict_interval` gives
    (p0, p1), `predict_proba` the single p1 / (1 − p0 + p1), which lies between them and loses least
    log-loss in the worse case. Never 0 or 1, so nothing is clipped. Each map: {"lower_margin",
    "lower": where p0 rises, nats, and its values; "upper_margin", "upper": where p1 rises}.
    Source: Vovk, Petej and Fedorova 2015, https://arxiv.org/abs/1511.00213
    """

    name = "venn_abers"

    def _fit_map(self, score, flag):
        distinct, member = np.unique(score, return_inverse=True)
        count = np.bincount(member)
        n_true = np.bincount(member[flag], minlength=len(distinct))
        upper = _isotonic_with_one_more(count, n_true)
        lower = 1.0 - _isotonic_with_one_more(count[::-1], (count - n_true)[::-1])[::-1]
        rises = np.append(True, np.diff(lower) > 0)  # p0 holds from a score to the next
        lasts = np.append(np.diff(upper) > 0, True)  # p1 holds up to a score from the one before
        return {
            "lower_margin": distinct[rises].tolist(),
            "lower": [0.0, *lower[rises].tolist()],
            "upper_margin": distinct[lasts].tolist(),
            "upper": [*upper[lasts].tolist(), 1.0],
        }

    def _lower(self, parameters, score):
        step = np.searchsorted(parameters["lower_margin"], score, side="right")
        return np.array(parameters["lower"])[step]

    def _upper(self, parameters, score):
        step = np.searchsorted(parameters["upper_margin"], score, side="left")
        return np.array(parameters["upper"])[step]

    def _apply_map(self, parameters, score):
        p0, p1 = self._lower(parameters, score), self._upper(parameters, score)
        return p1 / (1 - p0 + p1)

    def predict_interval(self, margin):
        """(p0, p1) for margin (n,) or (n, K), each of its shape, 0 ≤ p0 < p1 ≤ 1.

        For K > 2 of each label against the rest, before the K single answers are divided by their
        sum.
        """
        margin = self._margin_to_predict(margin)
        return self._each_map(self._lower, margin), self._each_map(self._upper, margin)


# From simple to flexible, the order in which `select_calibrator` prefers them.
CALIBRATORS: dict[str, type[Calibrator]] = {
    cls.name: cls
    for cls in (
        IdentityCalibrator,
        TemperatureScalingCalibrator,
        PlattScalingCalibrator,
        VectorScalingCalibrator,
        BetaCalibrator,
        QuadraticCalibrator,
        SplineCalibrator,
        HistogramBinningCalibrator,
        IsotonicRegressionCalibrator,
        VennAbersCalibrator,
    )
}


def calibrators_for(n_labels):
    """The names of the calibrators that differ for so many labels, from simple to flexible.

    All of them; for two labels without vector scaling, which is Platt scaling there.
    """
    n_labels = as_count("n_labels", n_labels, least=2)
    return tuple(name for name in CALIBRATORS if n_labels > 2 or name != "vector")


# Rows of `records.ModelResults.arrays`, and the separation of the splits.


def require_split(rows, split):
    if rows["split"] != split:
        raise ValueError(f"rows must be of the {split} split, got {rows['split']!r}")


def rows_margin(rows):
    """The margin, (n,) or (n, K), of rows with label_logprobs (n, K)."""
    logprobs = rows["label_logprobs"]
    return logprobs[:, 0] - logprobs[:, 1] if logprobs.shape[1] == 2 else logprobs


def _rows_margin_and_label(rows):
    """What `Calibrator.fit` takes, from calibration rows; ValueError for rows of another split."""
    require_split(rows, "calibration")
    margin, label = rows_margin(rows), rows["label"]
    return margin, label == 0 if margin.ndim == 1 else label


def _new_calibrator(name):
    if name not in CALIBRATORS:
        raise UserError(f"unknown calibrator {name!r}; choose one of: {', '.join(CALIBRATORS)}")
    return CALIBRATORS[name]()


def fit_calibrator(name, rows):
    """The calibrator `name` of `CALIBRATORS`, fitted on `ModelResults.arrays("calibration")`.

    Raises ValueError for rows of another split, UserError for an unknown name.
    """
    calibrator = _new_calibrator(name).fit(*_rows_margin_and_label(rows))
    calibrator.fitted_ids = tuple(str(row_id) for row_id in rows["id"])
    return calibrator


def calibrated_probabilities(calibrator, rows):
    """(n, K) probabilities in label order for rows of any split; for K = 2 column 0 is P(first)."""
    return _all_labels(calibrator.predict_proba(rows_margin(rows)))


def evaluate_calibrator(calibrator, rows, n_bins=20, n_resamples=1000, seed=0):
    """`calibration_metrics` of the calibrator on `ModelResults.arrays("test")`, groups kept whole.

    Raises ValueError for rows of another split, and for rows it was fitted on: a calibrator looks
    perfect there by construction.
    """
    require_split(rows, "test")
    if seen := set(calibrator.fitted_ids).intersection(str(row_id) for row_id in rows["id"]):
        raise ValueError(
            f"rows must be unseen by the calibrator, got {len(seen)} it was fitted on, "
            f"among them {min(seen)!r}"
        )
    return calibration_metrics(
        calibrated_probabilities(calibrator, rows),
        rows["label"],
        group=rows["group"],
        n_bins=n_bins,
        n_resamples=n_resamples,
        seed=seed,
    )


# Cross-fitting: every row is predicted by a calibrator that was fitted on other groups.


def group_folds(group, n_folds=5, seed=0):
    """(n,) fold of each row, 0 ≤ fold < n_folds, from its group (n,): a group is in one fold.

    n_folds is lowered to the number of groups where these are fewer. Raises ValueError for rows of
    a single group.
    """
    names, member = np.unique(group, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"rows of at least 2 groups are needed for folds, got {len(names)}")
    n_folds = min(as_count("n_folds", n_folds, least=2), len(names))
    return (np.random.default_rng(seed).permutation(len(names)) % n_folds)[member]


def _cross_fitted(name, margin, label, group, n_folds, seed):
    """(n, K) out-of-fold probabilities of checked margin and label; group: (n,)."""
    fold = group_folds(group, n_folds, seed)
    probability = np.empty((len(margin), _n_labels(margin)))
    for k in range(fold.max() + 1):
        held = fold == k
        calibrator = _new_calibrator(name).fit(margin[~held], label[~held])
        probability[held] = _all_labels(calibrator.predict_proba(margin[held]))
    return probability


def cross_fitted_probabilities(name, rows, n_folds=5, seed=0):
    """(n, K) probabilities of calibration rows, each from a calibrator fitted on the other folds.

    For data too few to be divided once: every row is used, and none is judged by a fit that has
    seen it. Folds hold whole groups and depend on the names of the groups and the seed alone, not
    on the order of the rows; n_folds is lowered to the number of groups where these are fewer.
    Raises ValueError for rows of another split or of a single group, UserError for an unknown name.
    """
    margin, label = _margin_and_label(*_rows_margin_and_label(rows))
    return _cross_fitted(name, margin, label, rows["group"], n_folds, seed)


def cross_fitted_log_loss(name, rows, n_folds=5, seed=0):
    """Mean log-loss (nats) of `cross_fitted_probabilities`: how `name` does on unseen rows."""
    return log_loss(cross_fitted_probabilities(name, rows, n_folds, seed), rows["label"])


def mean_and_standard_error(value, group):
    """Mean of value (n,) and its standard error, rows of one group (n,) not being independent."""
    _, member = np.unique(group, return_inverse=True)
    total = np.bincount(member, weights=value - value.mean())
    n_groups = len(total)
    error = np.sqrt(n_groups / (n_groups - 1) * (total @ total)) / len(value)
    return float(value.mean()), float(error)


def select_calibrator(rows, n_folds=5, seed=0):
    """The calibrator to use, chosen by cross-fitted log-loss on calibration rows, and why.

    Of all calibrators whose log-loss is within one standard error of the lowest it is the simplest,
    which comes first in `CALIBRATORS`: what is not clearly better on these rows is not worth the
    risk on others. The standard error is that of the paired difference to the lowest, clustered by
    group. ECE chooses nothing: it ranks calibrators in another order than their predictions do.
    Returns (name, table); table has for every name of `calibrators_for`, in that order, in nats:
      log_loss, standard_error: its mean over the rows, and the error of that mean;
      difference, difference_standard_error: to the lowest log_loss; 0 and 0 for the lowest itself.
    Raises ValueError for rows of another split or of a single group.
    Source: one standard error: Breiman et al. 1984, Classification and Regression Trees, 3.4.3
    """
    label, group = rows["label"], rows["group"]
    losses = {}
    for name in calibrators_for(rows["label_logprobs"].shape[1]):
        probability = cross_fitted_probabilities(name, rows, n_folds, seed)
        chosen = probability[np.arange(len(label)), label]
        losses[name] = -np.log(np.maximum(chosen, PROBABILITY_FLOOR))
    lowest = min(losses.values(), key=np.mean)
    table = {}
    for name, loss in losses.items():
        mean, error = mean_and_standard_error(loss, group)
        difference, difference_error = mean_and_standard_error(loss - lowest, group)
        table[name] = {
            "log_loss": mean,
            "standard_error": error,
            "difference": difference,
            "difference_standard_error": difference_error,
        }
    near = [n for n, row in table.items() if row["difference"] <= row["difference_standard_error"]]
    return near[0], table


def calibrated_log_loss(margin, label, n_folds=5, seed=0):
    """Log-loss (nats) that the margins reach once calibrated: what ranks training checkpoints.

    Each row is predicted by a calibrator fitted on the other folds: Platt scaling for two labels,
    temperature scaling for more. So a checkpoint is not punished for being overconfident, which
    calibration mends afterwards, only for what it cannot tell apart.
    margin, label: as for `Calibrator.fit`, n ≥ 2; n_folds is lowered to n where rows are fewer.
    Folds depend on n and seed alone, so checkpoints scored on the same rows share them.
    Source: "refine, then calibrate", Berta et al. 2025, https://arxiv.org/abs/2501.19195
    """
    margin, label = _margin_and_label(margin, label)
    name = "platt" if margin.ndim == 1 else "temperature"
    probability = _cross_fitted(name, margin, label, np.arange(len(margin)), n_folds, seed)
    return log_loss(probability, _label_index(margin, label))


# Files.


def _require_fingerprint(identity):
    if not isinstance(identity.get("fingerprint"), str):
        raise ValueError(f'identity must have a "fingerprint", got the keys {sorted(identity)}')


def save_calibrator(path, calibrator, identity):
    """Write the calibrator and what it was fitted for to `path`, whole or not at all.

    identity: dict of model, adapter, prompt, label words, tokenizer, dtype and the "fingerprint"
    over these: `ModelResults.identity`.
    """
    _require_fingerprint(identity)
    if calibrator.n_labels is None:
        raise ValueError(f"calibrator {calibrator.name!r} must be fitted before it is saved")
    data = {
        "schema_version": SCHEMA_VERSION,
        "identity": identity,
        "calibrator": calibrator.to_json(),
    }
    write_json(path, data)


def _shortened(value):
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _differing_parts(saved, wanted):
    """What differs between two identities, a list of words; parts compare as their JSON."""
    parts = []
    for key in sorted((set(saved) | set(wanted)) - {"fingerprint"}):
        a, b = saved.get(key), wanted.get(key)
        if fingerprint_of(a) != fingerprint_of(b):
            parts.append(f"{key} ({_shortened(a)}, now {_shortened(b)})")
    return parts


def load_calibrator(path, identity, kinds=CALIBRATORS):
    """The calibrator that `save_calibrator` wrote to `path` for the same identity.

    kinds: {name: class} of what may be in the file. Raises UserError when it is missing or damaged,
    or was fitted for another identity; the message then shows both fingerprints and the parts that
    differ.
    """
    _require_fingerprint(identity)
    data = read_json(path, FIT_AGAIN)
    if data.get("schema_version") != SCHEMA_VERSION:
        found = data.get("schema_version")
        raise UserError(f"{path} has schema {found}, not {SCHEMA_VERSION}; {FIT_AGAIN}")
    try:
        saved = data["identity"]
        calibrator = kinds[data["calibrator"]["name"]].from_json(data["calibrator"])
        same = saved["fingerprint"] == identity["fingerprint"]
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}); {FIT_AGAIN}"
        ) from None
    if not same:
        parts = "; ".join(_differing_parts(saved, identity)) or "no part that both name"
        raise UserError(
            f"{path} was fitted for {saved['fingerprint']}, not for {identity['fingerprint']}; "
            f"different: {parts}. "
            f"Use what it was fitted for, or {FIT_AGAIN}"
        )
    return calibrator


class NoCalibrator(UserError):
    """The evaluation holds no calibrator of the model, adapter, prompt and dtype that is asked."""


def cached_calibrator(cache_dir, identity):
    """(calibrator, entry): what calibrated_results.json has for exactly this identity.

    calibrator: the one that cross-fitting on the calibration rows chose; entry: the model's part of
    the file, docs/CACHE_SCHEMA.md. Raises NoCalibrator, saying why, where the file or the model in
    it is missing; UserError where the file is damaged.
    """
    _require_fingerprint(identity)
    path = Path(cache_dir) / "calibrated_results.json"
    if not path.exists():
        raise NoCalibrator(f"there is no {path}; generate_evaluation_cache.py makes it")
    cache = read_json(path, FIT_AGAIN)
    if cache.get("schema_version") != SCHEMA_VERSION:
        found = cache.get("schema_version")
        raise UserError(f"{path} has schema {found}, not {SCHEMA_VERSION}; {FIT_AGAIN}")
    try:
        differences = {}
        for name, entry in cache["models"].items():
            if entry["identity"]["fingerprint"] == identity["fingerprint"]:
                chosen = entry["selection"]["chosen"]
                return CALIBRATORS[chosen].from_json(entry["calibrators"][chosen]), entry
            differences[name] = _differing_parts(entry["identity"], identity)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); {FIT_AGAIN}") from error
    reason = f"{path} has no calibrator of exactly this model, adapter, question and dtype"
    if differences:
        nearest = min(differences, key=lambda name: len(differences[name]))
        reason += f"; from {nearest} in there it differs in {'; '.join(differences[nearest])}"
    raise NoCalibrator(reason)
