"""One confidence out of several signals: a logistic blend, fitted and chosen on calibration rows.

    rows = signal_rows(results, "calibration", parts)
    blend, selection = fit_blend(rows)
    blend.predict_proba(signal_rows(results, "test", blend.parts))     # (n, K)
    save_blend("blend.json", blend, results)

No weight is set by hand. With one part the blend is Platt scaling of that part, which is how the
methods are judged side by side; with several, one of them, the anchor, is free and every other is
paid for. So the strongest penalty is the anchor alone, and cross-fitting decides how far from it
the blend may go. Layer 1: no model, no plots.
"""

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from calibration import (
    group_folds,
    load_calibrator,
    mean_and_standard_error,
    require_split,
    save_calibrator,
)
from calibration_metrics import PROBABILITY_FLOOR, as_count, as_floats
from settings import fingerprint
from signals import METHODS, method_arrays, usable_methods

PENALTIES = (1000.0, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0)  # nats of a standardised weight of √2
LEAST_BLENDED = 0.95  # share of the rows that a signal must score to become a part
TIE_RIDGE = 1e-8  # no more than chooses among weights equally good


def blendable_parts(results):
    """(methods that can be parts of a blend, {name: why not} of the others that bring a signal).

    A part scored at least 95 % of the calibration rows: a row that lacks a part has no blend.
    """
    usable, left_out = usable_methods(results)
    n_rows = len(results.arrays("calibration")["id"])
    parts, reasons = [], {}
    for name, method in METHODS.items():
        if not method.part:
            continue
        if name not in usable:
            reasons[name] = left_out[name]
            continue
        n_scored = len(method_arrays(results, "calibration", name)["id"])
        if n_scored < LEAST_BLENDED * n_rows:
            reasons[name] = f"scored {n_scored:,} of {n_rows:,} calibration rows"
        else:
            parts.append(name)
    return parts, reasons


def signal_rows(results, split, methods):
    """The rows of one split that all `methods` scored, with the signal of each.

    results: `ModelResults`; methods: names of `signals.METHODS`.
    Returns a dict: split; id, group: (n,) str; label: (n,) int; answer: (n,) int, what
    token_probability predicts; n_labels: K; signals: for each method (n, K) label log-probabilities
    in nats or, where it only scores, (n,) its score.
    """
    own = results.arrays(split)
    arrays = {method: method_arrays(results, split, method) for method in methods}
    common = own["id"]
    for one in arrays.values():
        common = common[np.isin(common, one["id"])]
    kept = np.isin(own["id"], common)
    return {
        "split": split,
        **{key: own[key][kept] for key in ("id", "group", "label")},
        "answer": own["predicted"][kept],
        "n_labels": own["label_logprobs"].shape[1],
        "signals": {
            method: one.get("label_logprobs", one["score"])[np.isin(one["id"], common)]
            for method, one in arrays.items()
        },
    }


def rows_where(rows, keep):
    """The rows of `signal_rows` where `keep` (n,) bool holds."""
    columns = {key: rows[key][keep] for key in ("id", "group", "label", "answer")}
    return rows | columns | {"signals": {k: v[keep] for k, v in rows["signals"].items()}}


class SignalBlend:
    """softmax over the labels of Σ weight · signal + bias: one weight a part, one bias a label.

    A part with a distribution speaks of every label k: its signal for k is log pₖ, centred over the
    labels, in units of its spread. A part that only scores speaks of the answer of
    token_probability: its standardised score counts for that label alone, beside a constant that
    the answer is worth by itself. The weights are shared by the labels, so that they need no more
    rows for twenty labels than for two and mean the same for each; for two labels this is a
    logistic regression on the signed margins and the signed scores, and with a single distribution
    as its part it is Platt scaling.

    Fitted by least log-loss with Platt's targets for K labels, (N + 1) / (N + K) for the true one
    of the N rows that have it, plus penalty / 2 · Σ weight² (nats) over all weights but the
    anchor's, which are free like the biases. An infinite penalty leaves the anchor alone.

    parts: names of `signals.METHODS`; anchor: one of them; penalty: float > 0, None for infinite.
    parameters: {"parts": [{"name", "weight", "centre", "scale"}], "answer": weight of the constant,
    "bias": K floats of sum 0}, with anchor and penalty.
    Source: conditional logit with shared weights: McFadden 1974; stacking: Wolpert 1992,
    https://doi.org/10.1016/S0893-6080(05)80023-1
    """

    name = "combined"

    def __init__(self):
        self.n_labels = None
        self.n_rows = 0
        self.parameters = {}
        self.fitted_ids = ()

    @property
    def parts(self):
        return [part["name"] for part in self.parameters["parts"]]

    def fit(self, rows, anchor, penalty=None):
        """Fit to `signal_rows` of the calibration split, n ≥ 1. Returns self.

        Without a penalty the anchor is the only part. Raises ValueError for rows of another split.
        """
        require_split(rows, "calibration")
        names = [anchor] if penalty is None else list(rows["signals"])
        parts = [{"name": name, **_moments(rows["signals"][name])} for name in names]
        design = _design(parts, rows)  # (n, K, parts and the constant)
        paid = [0.0 if name == anchor else penalty for name in names]
        paid.append(0.0 if rows["signals"][anchor].ndim == 1 else penalty or np.inf)
        weights, bias = _fit_softmax(design, rows["label"], np.array(paid))
        for part, weight in zip(parts, weights, strict=False):
            part["weight"] = float(weight)
        self.n_labels, self.n_rows = rows["n_labels"], len(rows["label"])
        self.fitted_ids = tuple(str(row_id) for row_id in rows["id"])
        self.parameters = {
            "anchor": anchor,
            "penalty": penalty,
            "parts": parts,
            "answer": float(weights[-1]),
            "bias": bias.tolist(),
        }
        return self

    def predict_proba(self, rows):
        """(n, K) probabilities in label order of `signal_rows` that hold all parts."""
        if self.n_labels is None:
            raise ValueError("the blend must be fitted before it predicts")
        if rows["n_labels"] != self.n_labels:
            raise ValueError(
                f"rows must be of {self.n_labels} labels, as fitted, got {rows['n_labels']}"
            )
        weights = [
            *(part["weight"] for part in self.parameters["parts"]),
            self.parameters["answer"],
        ]
        design = _design(self.parameters["parts"], rows)
        return softmax(design @ np.array(weights) + np.array(self.parameters["bias"]), axis=1)

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
        """The blend that `to_json` described.

        Raises LookupError, TypeError or ValueError when `data` is of something else or damaged.
        """
        if data["name"] != cls.name:
            raise ValueError(f"name must be {cls.name!r}, got {data['name']!r}")
        blend = cls()
        blend.n_labels = as_count("n_labels", data["n_labels"], least=2)
        blend.n_rows = as_count("n_rows", data["n_rows"])
        blend.fitted_ids = tuple(data["fitted_ids"])
        blend.parameters = data["parameters"]
        parts = blend.parameters["parts"]
        numbers = [part[key] for part in parts for key in ("weight", "centre", "scale")]
        as_floats("parameters", [*numbers, blend.parameters["answer"], *blend.parameters["bias"]])
        if unknown := {part["name"] for part in parts} - set(METHODS):
            raise ValueError(f"unknown part {min(unknown)!r}")
        if blend.parameters["anchor"] not in blend.parts or min(p["scale"] for p in parts) <= 0:
            raise ValueError("the anchor must be a part and every scale above 0")
        if len(blend.parameters["bias"]) != blend.n_labels:
            raise ValueError(f"bias must hold {blend.n_labels} numbers")
        return blend


def _moments(signal):
    """{"centre", "scale"} that standardise a signal; a flat one has scale 1."""
    if signal.ndim == 2:
        centred = signal - signal.mean(axis=1, keepdims=True)
        centre, scale = 0.0, float(np.sqrt((centred**2).mean()))
    else:
        centre, scale = float(signal.mean()), float(signal.std())
    return {"centre": centre, "scale": scale if scale > 1e-9 * max(1.0, abs(centre)) else 1.0}


def _design(parts, rows):
    """(n, K, P + 1) what each part, and the constant of the answer, says for each label."""
    answer = np.eye(rows["n_labels"])[rows["answer"]]  # (n, K)
    columns = []
    for part in parts:
        signal = rows["signals"][part["name"]]
        if signal.ndim == 2:
            columns.append((signal - signal.mean(axis=1, keepdims=True)) / part["scale"])
        else:
            columns.append(((signal - part["centre"]) / part["scale"])[:, None] * answer)
    return np.stack([*columns, answer], axis=2)


def _fit_softmax(design, label, penalty):
    """(weights (P,), bias (K,)) of least penalised log-loss; an infinite penalty means weight 0.

    design: (n, K, P); label: (n,) int; penalty: (P,) nats of half the squared weight.
    """
    n, n_labels, n_weights = design.shape
    kept = np.isfinite(penalty)
    columns = np.concatenate(
        [design[:, :, kept], np.broadcast_to(np.eye(n_labels), (n, n_labels, n_labels))], axis=2
    )
    count = np.bincount(label, minlength=n_labels)
    target = ((1 + np.diag(count)) / (count + n_labels)[:, None])[label]
    ridge = (np.append(penalty[kept], np.zeros(n_labels)) + TIE_RIDGE) / n

    def loss(theta):
        log_p = log_softmax(columns @ theta, axis=1)
        gradient = np.einsum("nk,nkp->p", np.exp(log_p) - target, columns) / n
        value = -(target * log_p).sum() / n + (ridge * theta) @ theta / 2
        return value, gradient + ridge * theta

    def hessian(theta):
        p = softmax(columns @ theta, axis=1)
        mean = np.einsum("nk,nkp->np", p, columns)
        curvature = np.einsum("nk,nkp,nkq->pq", p, columns, columns, optimize=True) - mean.T @ mean
        return curvature / n + np.diag(ridge)

    start = np.zeros(columns.shape[2])
    options = {"gtol": 1e-9}
    found = minimize(loss, start, jac=True, hess=hessian, method="trust-exact", options=options).x
    weights = np.zeros(n_weights)
    weights[kept] = found[: kept.sum()]
    bias = found[kept.sum() :]
    return weights, bias - bias.mean()


# The choice of anchor and penalty, by what is predicted of rows that were not fitted on.


def cross_fitted_losses(rows, anchor, penalty=None, n_folds=5, seed=0):
    """(n,) log-loss (nats) of calibration rows, each under a blend fitted on the other folds."""
    fold = group_folds(rows["group"], n_folds, seed)
    chosen = np.empty(len(fold))
    for k in range(fold.max() + 1):
        held = rows_where(rows, fold == k)
        blend = SignalBlend().fit(rows_where(rows, fold != k), anchor, penalty)
        chosen[fold == k] = blend.predict_proba(held)[np.arange(len(held["label"])), held["label"]]
    return -np.log(np.maximum(chosen, PROBABILITY_FLOOR))


def fit_blend(rows, n_folds=5, seed=0):
    """The blend of the signals in `signal_rows` of the calibration split, and why it is so.

    The anchor is the first part, in the order of `signals.METHODS` from one pass a text to many,
    whose cross-fitted log-loss by itself is within one standard error of the lowest (paired,
    clustered by group). Of the penalties, from infinite to 1, the largest is taken of which the
    same is true, as in `calibration.select_calibrator`: what is not clearly better on these rows
    is not paid for.
    Returns (`SignalBlend` fitted on all rows, selection); selection is a dict ready for JSON:
      anchor; parts: {name: its cross-fitted "log_loss" alone};
      penalties: [{"penalty": None for infinite, "log_loss", "difference" to the lowest,
          "difference_standard_error"}]; penalty: the chosen one.
    Raises ValueError for rows of another split or of a single group.
    """
    alone = {name: cross_fitted_losses(rows, name, None, n_folds, seed) for name in rows["signals"]}
    best = min(alone.values(), key=np.mean)
    anchor = next(name for name in METHODS if name in alone and _is_near(alone[name], best, rows))
    losses = {None: alone[anchor]}
    if len(alone) > 1:
        for penalty in PENALTIES:
            losses[penalty] = cross_fitted_losses(rows, anchor, penalty, n_folds, seed)
    lowest = min(losses.values(), key=np.mean)
    table = []
    for penalty, loss in losses.items():
        difference, error = mean_and_standard_error(loss - lowest, rows["group"])
        table.append(
            {
                "penalty": penalty,
                "log_loss": float(loss.mean()),
                "difference": difference,
                "difference_standard_error": error,
            }
        )
    near = [row for row in table if row["difference"] <= row["difference_standard_error"]]
    selection = {
        "anchor": anchor,
        "parts": {name: {"log_loss": float(loss.mean())} for name, loss in alone.items()},
        "penalties": table,
        "penalty": near[0]["penalty"],
    }
    return SignalBlend().fit(rows, anchor, near[0]["penalty"]), selection


def _is_near(loss, lowest, rows):
    difference, error = mean_and_standard_error(loss - lowest, rows["group"])
    return difference <= error


# Files.


def blend_identity(results):
    """What a blend is tied to: the model's identity and how its signals were asked for."""
    asked = ("samples", "temperature", "dropout_passes")
    parts = {k: v for k, v in results.identity.items() if k != "fingerprint"}
    parts["signals"] = {key: results.run["evaluation"][key] for key in asked}
    parts["signals"]["wordings"] = results.run["signals"]["wordings"]
    return {**parts, "fingerprint": fingerprint(parts)}


def save_blend(path, blend, results):
    """Write the blend and what it was fitted for to `path`, whole or not at all."""
    save_calibrator(path, blend, blend_identity(results))


def load_blend(path, results):
    """The blend that `save_blend` wrote to `path` for the same model and signals.

    Raises UserError as `calibration.load_calibrator` does.
    """
    return load_calibrator(path, blend_identity(results), {SignalBlend.name: SignalBlend})
