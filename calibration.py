"""Maps from what a model says to probabilities that hold.

Every calibrator has one protocol: `fit(margin, label)`, `predict_proba(margin)`, `to_json()`,
`from_json(data)` and a `name`.
  two labels: margin (n,) = log p_first − log p_second, nats; label (n,) bool: the true label is the
              first one. predict_proba gives (n,) P(first label).
  K > 2:      margin (n, K) = log-probabilities of the labels, nats, normalised or not; label (n,)
              int index. predict_proba gives (n, K), each row summing to 1.
`fit_calibrator` and `evaluate_calibrator` do the same on rows of `records.ModelResults.arrays` and
keep the splits apart: fitted on calibration rows, judged on test rows, by log-loss and Brier score
before ECE.

A new calibrator is a subclass with `_parameters` and `_apply` (or, for a map of one score to one
probability, a subclass of `OneVsRestCalibrator`) and a line in `CALIBRATORS`.
"""

from abc import ABC, abstractmethod

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax, logit, logsumexp, softmax
from sklearn.isotonic import IsotonicRegression

from calibration_metrics import (
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
    """(n, K) unnormalised log-probabilities with the same softmax as the margin stands for."""
    return np.column_stack([margin, np.zeros_like(margin)]) if margin.ndim == 1 else margin


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
        margin = as_margin(margin)
        if self.n_labels is None:
            raise ValueError(f"calibrator {self.name!r} must be fitted before it predicts")
        if _n_labels(margin) != self.n_labels:
            raise ValueError(
                f"margin must be of {self.n_labels} labels, as fitted, got {_n_labels(margin)}"
            )
        return self._apply(margin)

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

        Raises KeyError, TypeError or ValueError when `data` is of another calibrator or damaged.
        """
        if data["name"] != cls.name:
            raise ValueError(f"name must be {cls.name!r}, got {data['name']!r}")
        calibrator = cls()
        calibrator.n_labels = as_count("n_labels", data["n_labels"], least=2)
        calibrator.n_rows = as_count("n_rows", data["n_rows"])
        calibrator.parameters = data["parameters"]
        calibrator.fitted_ids = tuple(data["fitted_ids"])
        probe = np.zeros(1) if calibrator.n_labels == 2 else np.zeros((1, calibrator.n_labels))
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


def one_vs_rest_scores(margin):
    """(n, 1) for margin (n,); for (n, K) the (n, K) log pₖ − log(1 − pₖ) in nats."""
    if margin.ndim == 1:
        return margin[:, None]
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

    def _apply(self, margin):
        maps = zip(self.parameters["maps"], one_vs_rest_scores(margin).T, strict=True)
        probability = np.column_stack([self._apply_map(one, score) for one, score in maps])
        if margin.ndim == 1:
            return probability[:, 0]
        # Far out every σ can underflow to 0; the floor keeps the sum above 0.
        probability = np.maximum(probability, np.finfo(np.float64).tiny)
        return probability / probability.sum(axis=1, keepdims=True)


def _fit_sigmoid(score, target):
    """(slope, intercept) of the σ(slope · score + intercept) with least log-loss.

    score: (n,) float; target: (n,) float, strictly between 0 and 1. The loss is convex and, with
    such targets, has a finite minimum; a score without spread gets slope 0.
    """
    start = logit(target.mean())
    low, spread = score.min(), np.ptp(score)
    if spread <= 1e-9 * max(1.0, np.abs(score).max()):  # rounding, not signal
        return 0.0, float(start)
    design = np.column_stack([(score - low) / spread, np.ones_like(score)])

    def loss(theta):
        z = design @ theta
        gradient = design.T @ (expit(z) - target) / len(z)
        return np.mean(np.logaddexp(0.0, z) - target * z), gradient

    def hessian(theta):
        p = expit(design @ theta)
        return (design.T * (p * (1 - p))) @ design / len(p)

    theta = minimize(
        loss, [0.0, start], jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-9}
    ).x
    slope = theta[0] / spread
    return float(slope), float(theta[1] - slope * low)


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
        n_true = int(flag.sum())
        n_false = len(flag) - n_true
        target = np.where(flag, (n_true + 1) / (n_true + 2), 1 / (n_false + 2))
        slope, intercept = _fit_sigmoid(score, target)
        return {"slope": slope, "intercept": intercept}

    def _apply_map(self, parameters, score):
        return expit(parameters["slope"] * score + parameters["intercept"])


class IsotonicRegressionCalibrator(OneVsRestCalibrator):
    """The best non-decreasing step map from the margin, interpolated between its steps.

    Each map: {"margin", "probability": its corners; "clipped_fraction": the share of fitted rows
    whose value was clipped}. Values are clipped to [1 / (n + 2), 1 − 1 / (n + 2)]: n rows of which
    none was true are, by the rule of succession, no evidence for less, and a 0 would make the
    log-loss infinite. Outside the fitted margins the map stays at its end values. Wants thousands
    of rows: below 1,000 Platt and temperature scaling are the better choice.
    Source: Zadrozny and Elkan 2002, https://doi.org/10.1145/775047.775151
    """

    name = "isotonic"

    def _fit_map(self, score, flag):
        fitted = IsotonicRegression(out_of_bounds="clip").fit(score, flag)
        low = 1 / (len(flag) + 2)
        value = fitted.predict(score)
        return {
            "margin": fitted.X_thresholds_.tolist(),
            "probability": np.clip(fitted.y_thresholds_, low, 1 - low).tolist(),
            "clipped_fraction": float(((value < low) | (value > 1 - low)).mean()),
        }

    def _apply_map(self, parameters, score):
        return np.interp(score, parameters["margin"], parameters["probability"])


CALIBRATORS: dict[str, type[Calibrator]] = {
    cls.name: cls
    for cls in (
        IdentityCalibrator,
        PlattScalingCalibrator,
        TemperatureScalingCalibrator,
        IsotonicRegressionCalibrator,
    )
}


# Rows of `records.ModelResults.arrays`, and the separation of the splits.


def _require_split(rows, split):
    if rows["split"] != split:
        raise ValueError(f"rows must be of the {split} split, got {rows['split']!r}")


def rows_margin(rows):
    """The margin, (n,) or (n, K), of rows with label_logprobs (n, K)."""
    logprobs = rows["label_logprobs"]
    return logprobs[:, 0] - logprobs[:, 1] if logprobs.shape[1] == 2 else logprobs


def fit_calibrator(name, rows):
    """The calibrator `name` of `CALIBRATORS`, fitted on `ModelResults.arrays("calibration")`.

    Raises ValueError for rows of another split, UserError for an unknown name.
    """
    if name not in CALIBRATORS:
        raise UserError(f"unknown calibrator {name!r}; choose one of: {', '.join(CALIBRATORS)}")
    _require_split(rows, "calibration")
    calibrator = CALIBRATORS[name]()
    margin, label = rows_margin(rows), rows["label"]
    calibrator.fit(margin, label == 0 if margin.ndim == 1 else label)
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
    _require_split(rows, "test")
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
    n = len(margin)
    if n < 2:
        raise ValueError(f"margin must have at least 2 rows to be divided into folds, got {n}")
    n_folds = min(as_count("n_folds", n_folds, least=2), n)
    fold = np.random.default_rng(seed).permutation(n) % n_folds
    probability = np.empty((n, _n_labels(margin)))
    for k in range(n_folds):
        held = fold == k
        method = PlattScalingCalibrator() if margin.ndim == 1 else TemperatureScalingCalibrator()
        method.fit(margin[~held], label[~held])
        probability[held] = _all_labels(method.predict_proba(margin[held]))
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
    """What differs between two identities, in words; parts compare as the JSON they become."""
    parts = []
    for key in sorted((set(saved) | set(wanted)) - {"fingerprint"}):
        a, b = saved.get(key), wanted.get(key)
        if fingerprint_of(a) != fingerprint_of(b):
            parts.append(f"{key} ({_shortened(a)}, now {_shortened(b)})")
    return "; ".join(parts) or "no part that both name"


def load_calibrator(path, identity):
    """The calibrator that `save_calibrator` wrote to `path` for the same identity.

    Raises UserError when the file is missing or damaged, or when it was fitted for another
    identity; the message then shows both fingerprints and the parts that differ.
    """
    _require_fingerprint(identity)
    data = read_json(path, FIT_AGAIN)
    if data.get("schema_version") != SCHEMA_VERSION:
        found = data.get("schema_version")
        raise UserError(f"{path} has schema {found}, not {SCHEMA_VERSION}; {FIT_AGAIN}")
    try:
        saved = data["identity"]
        calibrator = CALIBRATORS[data["calibrator"]["name"]].from_json(data["calibrator"])
        same = saved["fingerprint"] == identity["fingerprint"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}); {FIT_AGAIN}"
        ) from None
    if not same:
        raise UserError(
            f"{path} was fitted for {saved['fingerprint']}, not for {identity['fingerprint']}; "
            f"different: {_differing_parts(saved, identity)}. "
            f"Use what it was fitted for, or {FIT_AGAIN}"
        )
    return calibrator
