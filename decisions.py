"""What to do with an answer: zones of confidence, certified automation, its cost, labels needed.

    calibration, test = (results.arrays(split) for split in ("calibration", "test"))
    scored = score_answers(calibration, test)
    table = automation(scored)
    costs = cost_table(scored, table, cost_error=10.0, cost_review=1.0)
    curves = sample_size_curves(calibration, test)

Calibrators, thresholds and cut-offs come from calibration rows alone; test rows say what became of
them. Rows of one near-duplicate group are never divided and never count as independent. An answer
is automated when its confidence is at least the threshold; a threshold of None automates nothing.
Every result is ready for JSON. Layer 1: no model, no plots.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from calibration import (
    Calibrator,
    calibrated_probabilities,
    cross_fitted_probabilities,
    fit_calibrator,
    select_calibrator,
)
from calibration_metrics import (
    as_count,
    bootstrap_interval,
    clustered_wilson_interval,
    expected_calibration_error,
    log_loss,
    null_calibration_error,
)
from risk_control import (
    certify_threshold,
    naive_threshold,
    selective_risk,
    split_calibration_rows,
    units_needed,
)
from settings import UserError

# What to do with an answer, by its confidence: lower edge of the zone, its name, the action.
ZONES = (
    (0.9, "90 % and above", "automate"),
    (0.7, "70 to 90 %", "review"),
    (0.5, "50 to 70 %", "manual"),
    (0.0, "below 50 %", "manual"),
)
PROMISES = (0.90, 0.95, 0.99)  # accuracy among the automated answers
DELTA = 0.1  # chance that a certified promise is broken
CERTIFYING_SHARE = 0.5  # of the calibration groups; the others fit the calibrator
LEAST_GROUPS = 4  # two to fit and choose a calibrator, two to certify a threshold
CURVE_SIZES = (50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
CURVE_METHODS = ("platt", "isotonic")
PROJECTED_SHARES = (0.1, 0.25, 0.5, 1.0)  # of all texts, the most confident ones
POWER = 0.8  # chance that a projected number of labels is enough
MOST_UNITS = 1_000_000  # a projection beyond is as good as never


# ----------------------------------------------------------------------------------------- zones


def zone_of(confidence):
    """(n,) index into ZONES of confidence (n,); one on an edge belongs to the zone above it."""
    edges = [low for low, _, _ in ZONES[::-1]]
    return len(ZONES) - np.digitize(confidence, edges)


def zone_table(confidence, correct, group):
    """What each of ZONES holds: its rows, and how often they are right.

    confidence: (n,) float in [0, 1]; correct: (n,) bool; group: (n,) near-duplicate groups.
    Returns one dict a zone, in the order of ZONES: name, action, count, share of all rows, accuracy
    with the low and high of its 95 % `clustered_wilson_interval`, mean_confidence; the last four
    are None for a zone without rows.
    """
    zone, table = zone_of(confidence), []
    for i, (_, name, action) in enumerate(ZONES):
        rows = zone == i
        count = int(rows.sum())
        entry = {"name": name, "action": action, "count": count, "share": count / len(zone)}
        measured = dict.fromkeys(("accuracy", "low", "high", "mean_confidence"))
        if count:
            low, high = clustered_wilson_interval(correct[rows], group[rows])
            accuracy = float(np.mean(correct[rows]))
            mean_confidence = float(np.mean(confidence[rows]))
            measured = dict(zip(measured, (accuracy, low, high, mean_confidence), strict=True))
        table.append(entry | measured)
    return table


# ------------------------------------------------------------------------------------ automation


@dataclass(frozen=True)
class Answers:
    """Calibrated answers to n rows: confidence (n,) float, correct (n,) bool, group (n,) str."""

    confidence: np.ndarray
    correct: np.ndarray
    group: np.ndarray

    @property
    def n_groups(self):
        return len(np.unique(self.group))


def calibrated_answers(calibrator, rows):
    """The `Answers` of a fitted calibrator to rows of `ModelResults.arrays`."""
    probabilities = calibrated_probabilities(calibrator, rows)
    correct = probabilities.argmax(axis=1) == rows["label"]
    return Answers(probabilities.max(axis=1), correct, rows["group"])


@dataclass(frozen=True)
class ScoredAnswers:
    """A calibrator, and its answers to rows that neither chose nor fitted it.

    selection: the table of `select_calibrator` on the fitting rows; n_fitting: how many these are.
    certifying: the other calibration rows, which set the thresholds; test: the test rows.
    fitted: the calibrator itself; a threshold holds for the confidences that it gives alone.
    """

    calibrator: str
    selection: dict
    n_fitting: int
    certifying: Answers
    test: Answers
    fitted: Calibrator


def enough_groups(calibration):
    """Whether the calibration rows can be divided into fitting and certifying rows."""
    return len(np.unique(calibration["group"])) >= LEAST_GROUPS


def _error_of(promise):
    """The share of errors that a promised accuracy allows; 1 − 0.9 alone would not be 0.1."""
    if not 0 < promise < 1:
        raise ValueError(f"promise must lie between 0 and 1, got {promise}")
    return round(1 - promise, 12)


def _check_rows(calibration, test):
    if test["split"] != "test":
        raise ValueError(f"test must be rows of the test split, got {test['split']!r}")
    if not enough_groups(calibration):
        raise UserError(
            f"calibration rows of at least {LEAST_GROUPS} near-duplicate groups are needed, got "
            f"{len(np.unique(calibration['group']))}; label more texts"
        )


def score_answers(calibration, test, seed=0):
    """`ScoredAnswers` from `ModelResults.arrays` of the calibration and of the test rows.

    The calibration rows are divided in halves by group: one chooses and fits the calibrator, the
    other is left for thresholds. Raises ValueError for rows of another split, UserError for fewer
    than LEAST_GROUPS groups of calibration rows.
    """
    _check_rows(calibration, test)
    fitting, certifying = split_calibration_rows(calibration, 1 - CERTIFYING_SHARE, seed)
    name, selection = select_calibrator(fitting, seed=seed)
    calibrator = fit_calibrator(name, fitting)
    return ScoredAnswers(
        calibrator=name,
        selection=selection,
        n_fitting=len(fitting["label"]),
        certifying=calibrated_answers(calibrator, certifying),
        test=calibrated_answers(calibrator, test),
        fitted=calibrator,
    )


def _on_test_rows(answers, threshold, alpha):
    """What a threshold does to the test rows; kept is None where nothing is automated."""
    risk = selective_risk(answers.confidence, answers.correct, threshold, group=answers.group)
    automated = answers.confidence >= (np.inf if threshold is None else threshold)
    expected = float((1 - answers.confidence[automated]).sum())
    kept = None if risk["risk"] is None else risk["risk"] <= alpha
    return risk | {"expected_errors": expected, "kept": kept}


def automation(scored, promises=PROMISES, delta=DELTA, seed=0):
    """What may be automated if a promised share of the automated answers is to be right.

    scored: `ScoredAnswers`; promises: accuracies between 0 and 1; delta: how often a certified
    threshold may break its promise, each promise by itself.
    Returns a dict:
      calibrator, selection, n_fitting, n_certifying, n_certifying_groups, n_test, n_test_groups,
      delta;
      promises: one dict each:
        promise, alpha: the promised accuracy, and the share of errors it allows;
        certified: `risk_control.certify_threshold` on the certifying rows, with
            "abstention_bound", the share that a person must answer whatever the ranking;
        naive: {"threshold"}: the lowest cut-off whose error on the same rows is at most alpha;
        both with "test": `risk_control.selective_risk` on the test rows, and in it
            "expected_errors": as many as the confidences of the automated rows announce, and
            "kept": whether the share of errors is at most alpha, None where nothing is automated.
    """
    certifying, test = scored.certifying, scored.test
    rows = []
    for promise in promises:
        alpha = _error_of(promise)
        certified = certify_threshold(
            certifying.confidence,
            certifying.correct,
            alpha,
            delta=delta,
            group=certifying.group,
            seed=seed,
        )
        naive = {"threshold": naive_threshold(certifying.confidence, certifying.correct, alpha)}
        for cut in (certified, naive):
            cut["test"] = _on_test_rows(test, cut["threshold"], alpha)
        rows.append({"promise": promise, "alpha": alpha, "certified": certified, "naive": naive})
    return {
        "calibrator": scored.calibrator,
        "selection": scored.selection,
        "n_fitting": scored.n_fitting,
        "n_certifying": len(certifying.correct),
        "n_certifying_groups": certifying.n_groups,
        "n_test": len(test.correct),
        "n_test_groups": test.n_groups,
        "delta": delta,
        "promises": rows,
    }


# ----------------------------------------------------------------------------------------- costs


def cost_table(scored, table, cost_error=10.0, cost_review=1.0, n_resamples=1000, seed=0):
    """What each way of deciding costs on the test rows.

    scored: `ScoredAnswers`; table: its `automation`; cost_error: of one wrong automated answer,
    above 0; cost_review: of one answer by a person, who is taken to be always right, at least 0;
    both in the same unit.
    Returns one dict a way: policy ("automate everything", "review everything", "naive", "certified"
    or "least expected cost"), promise (None where there is none), threshold, automated: the share
    of automated test rows, cost per 1,000 texts with the low and high of its 95 % interval, whole
    groups being drawn. "least expected cost" automates where an error is expected to cost no more
    than a review, cost_error · (1 − confidence) ≤ cost_review: the best rule if the confidence is
    right. Needs test rows of at least 2 groups.
    Source: Chow 1970, https://doi.org/10.1109/TIT.1970.1054406
    """
    for name, value, right in (
        ("cost_error", cost_error, 0 < cost_error < np.inf),
        ("cost_review", cost_review, 0 <= cost_review < np.inf),
    ):
        if not right:
            bound = "above" if name == "cost_error" else "at least"
            raise ValueError(f"{name} must be finite and {bound} 0, got {value}")
    policies = [("automate everything", None, 0.0), ("review everything", None, None)]
    for way in ("naive", "certified"):
        policies += [(way, row["promise"], row[way]["threshold"]) for row in table["promises"]]
    policies.append(("least expected cost", None, max(0.0, 1 - cost_review / cost_error)))
    test = scored.test
    automated = np.array(
        [test.confidence >= (np.inf if cut is None else cut) for _, _, cut in policies]
    ).T  # (n, policies)
    cost = 1000 * np.where(automated, cost_error * ~test.correct[:, None], cost_review)
    low, high = bootstrap_interval(
        lambda rows: rows.mean(axis=0), cost, group=test.group, n_resamples=n_resamples, seed=seed
    )
    return [
        {
            "policy": policy,
            "promise": promise,
            "threshold": threshold,
            "automated": float(automated[:, i].mean()),
            "estimate": float(cost[:, i].mean()),
            "low": float(low[i]),
            "high": float(high[i]),
        }
        for i, (policy, promise, threshold) in enumerate(policies)
    ]


# ---------------------------------------------------------------------------------- sample size


def _draw(rows, n, rng):
    """At least n of the rows, in whole groups drawn at random; at least LEAST_GROUPS groups."""
    _, member, size = np.unique(rows["group"], return_inverse=True, return_counts=True)
    order = rng.permutation(len(size))
    enough = np.searchsorted(np.cumsum(size[order]), n) + 1
    inside = np.isin(member, order[: max(enough, LEAST_GROUPS)])
    return {k: v[inside] if isinstance(v, np.ndarray) else v for k, v in rows.items()}


def _scores(calibrator, test, n_bins):
    answers = calibrated_answers(calibrator, test)
    return {
        "log_loss": log_loss(calibrated_probabilities(calibrator, test), test["label"]),
        "ece": expected_calibration_error(answers.confidence, answers.correct, n_bins),
    }


def _certified_on(rows, test, alpha, delta, seed):
    """What comes of fitting Platt scaling and certifying a threshold on halves of `rows`."""
    fitting, certifying = split_calibration_rows(rows, 1 - CERTIFYING_SHARE, seed)
    calibrator = fit_calibrator("platt", fitting)
    answers, fresh = (calibrated_answers(calibrator, part) for part in (certifying, test))
    threshold = certify_threshold(
        answers.confidence, answers.correct, alpha, delta=delta, group=answers.group, seed=seed
    )["threshold"]
    automated = fresh.confidence >= (np.inf if threshold is None else threshold)
    return {
        "certified": threshold is not None,
        "coverage": automated.mean(),
        "broken": bool(automated.any() and (~fresh.correct[automated]).mean() > alpha),
    }


def _null(confidence, n_bins, seed, correct=None, group=None):
    null = null_calibration_error(confidence, n_bins, seed=seed, correct=correct, group=group)
    return dict(zip(("mean", "p95"), null, strict=True))


def _band(values):
    """Mean and 5 to 95 % range of one value a draw."""
    low, high = np.quantile(values, [0.05, 0.95])
    return {"mean": float(np.mean(values)), "low": float(low), "high": float(high)}


def sample_size_curves(
    calibration, test, promise=PROMISES[0], delta=DELTA, n_draws=30, n_bins=20, seed=0
):
    """What more calibration rows buy: 50, 100, 200, 500, ... up to all of them.

    calibration, test: `ModelResults.arrays`. For each size n, whole groups are drawn n_draws times
    until n rows are together. Platt scaling and isotonic regression are fitted on them and judged
    on all test rows. A threshold for the accuracy `promise` is made from them too: Platt scaling
    fitted on one half of the groups, the threshold certified on the other.
    Returns a dict:
      n_calibration, n_test, promise, delta, n_draws, n_bins;
      raw: {"log_loss" (nats), "ece"} of the uncalibrated probabilities on the test rows;
      test_null: {"mean", "p95"} of the ECE of a perfectly calibrated model on the test rows, their
          groups being as alike as they are: what no calibrator can be seen to beat;
      sizes: one dict a size:
          n: rows asked for, at last all calibration rows; rows: mean number of rows drawn;
          platt, isotonic: {"log_loss", "ece"}, each {"mean", "low", "high"}: mean and 5 to 95 %
              range over the draws. All rows can be drawn in one way only;
          null_ece: {"mean", "p95"} of the ECE that a perfectly calibrated model with confidences
              spread like those of the test rows shows when measured on n independent rows;
          certified: {"share": draws in which a threshold could be certified, "coverage": share of
              the test rows automated, as mean and range, 0 where nothing was certified, "broken":
              draws whose threshold let a larger share of errors through on the test rows than
              promised}.
    Errors as of `score_answers`.
    """
    _check_rows(calibration, test)
    n_draws = as_count("n_draws", n_draws)
    alpha = _error_of(promise)
    whole = fit_calibrator("platt", calibration)
    answers = calibrated_answers(whole, test)
    n_calibration = len(calibration["label"])
    sizes = []
    for n in (*(size for size in CURVE_SIZES if size < n_calibration), n_calibration):
        drawn, scores, outcomes = [], {method: [] for method in CURVE_METHODS}, []
        for draw in range(n_draws):
            rows = _draw(calibration, n, np.random.default_rng([seed, n, draw]))
            drawn.append(len(rows["label"]))
            for method in CURVE_METHODS:
                scores[method].append(_scores(fit_calibrator(method, rows), test, n_bins))
            outcomes.append(_certified_on(rows, test, alpha, delta, seed + draw))
        by_method = {
            method: {key: _band([s[key] for s in scores[method]]) for key in ("log_loss", "ece")}
            for method in CURVE_METHODS
        }
        certified = {
            "share": float(np.mean([o["certified"] for o in outcomes])),
            "coverage": _band([o["coverage"] for o in outcomes]),
            "broken": float(np.mean([o["broken"] for o in outcomes])),
        }
        ranks = (np.arange(n) + 0.5) / n
        null_ece = _null(np.quantile(answers.confidence, ranks), n_bins, seed)
        sizes.append(
            {"n": n, "rows": float(np.mean(drawn)), **by_method}
            | {"null_ece": null_ece, "certified": certified}
        )
    return {
        "n_calibration": n_calibration,
        "n_test": len(test["label"]),
        "promise": promise,
        "delta": delta,
        "n_draws": n_draws,
        "n_bins": n_bins,
        "raw": _scores(fit_calibrator("raw", calibration), test, n_bins),
        "test_null": _null(answers.confidence, n_bins, seed, answers.correct, answers.group),
        "sizes": sizes,
    }


def units_to_certify(error, alpha, delta=DELTA, power=POWER):
    """Fewest independent answers on which "errors ≤ alpha" is certified with chance `power`.

    error: their true share of errors, in [0, 1]; alpha, delta as of `certify_threshold`, whose
    exact binomial test and least number of answers are meant. Found to within half a percent.
    Returns None where error ≥ alpha, which is certified by luck alone, and where MOST_UNITS are not
    enough. The threshold is taken to be known beforehand: a search for it, from the highest
    confidence down, can end before it.
    """
    if error >= alpha:
        return None
    least = units_needed(alpha, delta)
    n_steps = int(np.log(MOST_UNITS / least) / np.log(1.005)) + 1
    m = np.unique(np.ceil(least * 1.005 ** np.arange(n_steps)))
    # The most errors that pass: the largest c with P(at most c errors of m | alpha) ≤ delta.
    c = binom.ppf(delta, m, alpha)
    c -= binom.cdf(c, m, alpha) > delta
    enough = binom.cdf(c, m, error) >= power
    return int(m[np.argmax(enough)]) if enough.any() else None


def labels_needed(calibration, promises=PROMISES, delta=DELTA, seed=0):
    """How many labelled rows a promise is going to need, projected from the calibration rows.

    Platt scaling, cross-fitted by group, ranks the calibration rows by confidence; the error among
    the most confident share of them stands for the error there will be. Assumed: it stays what it
    was measured to be, the threshold is known beforehand, half of the labelled groups go into the
    calibrator (`split_calibration_rows`), one row a group counts, and POWER is chance enough.
    Returns a dict:
      n, rows_per_group, delta, power;
      minimum: {"promise", "units", "rows"} for each promise: with fewer labelled rows not even
          answers without a single error can be certified;
      shares: one dict a share of all texts that is to be automated: share, n: rows measured,
          accuracy with the low and high of its 95 % clustered interval, and needed: {"promise",
          "units", "rows"} for each promise, both None where the accuracy measured is not above the
          promise, or so little that MOST_UNITS are not enough.
    """
    probabilities = cross_fitted_probabilities("platt", calibration, seed=seed)
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == calibration["label"]
    order = np.argsort(-confidence, kind="stable")
    n = len(order)
    rows_per_group = n / len(np.unique(calibration["group"]))

    def needed(accuracy, share):
        rows = []
        for promise in promises:
            units = units_to_certify(round(1 - accuracy, 12), _error_of(promise), delta)
            labelled = units and int(np.ceil(units / share * rows_per_group / CERTIFYING_SHARE))
            rows.append({"promise": promise, "units": units, "rows": labelled})
        return rows

    shares = []
    for share in PROJECTED_SHARES:
        top = order[: max(1, round(share * n))]
        accuracy = float(correct[top].mean())
        low, high = clustered_wilson_interval(correct[top], calibration["group"][top])
        shares.append(
            {"share": share, "n": len(top), "accuracy": accuracy, "low": low, "high": high}
            | {"needed": needed(accuracy, share)}
        )
    return {
        "delta": delta,
        "power": POWER,
        "n": n,
        "rows_per_group": rows_per_group,
        "minimum": needed(1.0, 1.0),
        "shares": shares,
    }
