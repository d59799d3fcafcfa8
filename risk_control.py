"""Thresholds that keep a promise: automate when confidence ≥ t, send the rest to a person.

The promise, for an error rate alpha and a probability delta: with probability at least 1 − delta
over the certifying rows, the error among all future automated decisions is at most alpha. "No
threshold can be certified" is an answer: threshold None, nothing is automated.

Conventions as in calibration_metrics.py: confidence (n,) float in [0, 1], correct (n,) bool, group
(n,) near-duplicate group. Bad input is a ValueError naming the argument, the rule and the value.

The order of work: `split_calibration_rows`; fit the calibrator on the first part; with it,
`certify_threshold` on the second; `selective_risk` at that threshold on the test rows.
"""

import math
from collections import Counter
from numbers import Real

import numpy as np
from scipy.special import bdtr, betaincinv

from calibration_metrics import (
    as_confidence_and_correct,
    as_flags,
    as_names,
    check_same_length,
)


def _as_open_share(name, value):
    """`value` as a float strictly between 0 and 1."""
    if not isinstance(value, Real) or not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value!r}")
    return float(value)


def _as_group(group, confidence):
    group = as_names("group", group)
    check_same_length(confidence=confidence, group=group)
    return group


def _one_row_a_group(group, seed):
    """Index of one row of each group, every row of a group being equally likely."""
    number = {}
    member = np.array([number.setdefault(name, len(number)) for name in group.tolist()])
    order = np.random.default_rng(seed).permutation(len(group))
    chosen = np.empty(len(number), dtype=np.int64)
    chosen[member[order]] = order  # the last of a group stays
    return chosen


def _candidates(confidence, correct):
    """(m,) distinct confidences, highest first, with the rows and the errors at or above each."""
    order = np.argsort(-confidence)
    ordered = confidence[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)  # of each tie
    return ordered[last], last + 1, np.cumsum(~correct[order])[last]


def units_needed(alpha, delta=0.1):
    """Independent units below which `certify_threshold` certifies nothing."""
    alpha, delta = _as_open_share("alpha", alpha), _as_open_share("delta", delta)
    return 2 * math.ceil(math.log(delta) / math.log1p(-alpha)) + 1


def certify_threshold(confidence, correct, alpha, delta=0.1, group=None, seed=0):
    """The lowest threshold t whose promise P(wrong | confidence ≥ t) ≤ alpha can be certified.

    confidence: (n,) float in [0, 1]; correct: (n,) bool. Rows that fitted neither the model nor
        its calibrator, from the same source as the rows to be decided.
    alpha: error rate among automated decisions; delta: probability that the promise is broken;
        both strictly between 0 and 1.
    group: (n,) or None. Near-duplicates are not independent: one row drawn from each group (seed)
        is tested, the others are not. The promise then holds for the population in which a group
        is drawn first and one of its rows second, so that every group counts once; it is the
        population of rows when the size of a group says nothing about confidence or error. Without
        group, rows must be independent.
    Returns a dict, ready for JSON:
      threshold: automate when confidence ≥ threshold, compared as unrounded float64; or None;
      alpha, delta; n: rows; n_units: rows tested, one a group; units_needed: below so many units
          nothing can be certified;
      automated, share, errors: of all n rows those at or above the threshold, their share of n,
          and the wrong ones among them;
      units_automated, unit_errors, p_value: the same of the tested units, and the exact binomial
          P(at most unit_errors of units_automated wrong | error rate alpha), at most delta;
          p_value is None without a threshold;
      abstention_bound: `abstention_bound` of the tested units: what no ranking could avoid;
      reason: None, or why there is no threshold.

    Procedure: fixed-sequence testing (Learn then Test). The distinct confidences are tested from
    the highest down, each at level delta by the binomial tail of all units at or above it, equal
    confidences together; the first failure ends it and the last success is the threshold. It
    begins at the highest confidence with more than 2 ⌈ln delta / ln(1 − alpha)⌉ units at or above
    it: half as many could pass only without a single error.

    Why it holds though the candidates come from the data: p-values change at observed confidences
    alone, so testing these in order is testing every real number in order. The true risk rises
    above alpha at fixed, unknown thresholds, and whoever goes below such a t₀ has passed it. The
    units at or above t₀ are, given their number, independent draws of risk at least alpha, so that
    happens with probability at most delta. Where the risk is above alpha already at the beginning,
    the first test stands in for t₀. The unit that sets the beginning is no random draw from those
    at or above it, and the first test gives it no credit: an error of it counts, the unit does
    not. So the promise holds for any distribution of confidences without ties, however error and
    confidence are related; where ties hold the beginning, it holds when the error rate does not
    rise with the confidence. It is a promise about one alpha and one score: the best of several
    certified thresholds is not certified, and neither is a threshold below the returned one.
    Source: Angelopoulos et al. 2021, https://arxiv.org/abs/2110.01052 ; binomial tail: Clopper and
    Pearson 1934, https://doi.org/10.1093/biomet/26.4.404
    """
    confidence, correct = as_confidence_and_correct(confidence, correct)
    alpha, delta = _as_open_share("alpha", alpha), _as_open_share("delta", delta)
    n = len(confidence)
    unit = slice(None) if group is None else _one_row_a_group(_as_group(group, confidence), seed)
    unit_correct = correct[unit]
    threshold, count, errors = _candidates(confidence[unit], unit_correct)
    needed = units_needed(alpha, delta)
    result = {
        "threshold": None,
        "alpha": alpha,
        "delta": delta,
        "n": n,
        "n_units": len(unit_correct),
        "units_needed": needed,
        "automated": 0,
        "share": 0.0,
        "errors": 0,
        "units_automated": 0,
        "unit_errors": 0,
        "p_value": None,
        "abstention_bound": abstention_bound(unit_correct, alpha, delta),
        "reason": None,
    }
    if len(unit_correct) < needed:
        reason = f"at least {needed} units must be tested, got {len(unit_correct)}"
        return result | {"reason": reason}
    first = np.searchsorted(count, needed)
    threshold, count, errors = threshold[first:], count[first:], errors[first:]
    p_value = bdtr(errors, count, alpha)
    tested = p_value.copy()
    tested[0] = bdtr(min(errors[0], count[0] - 1), count[0] - 1, alpha)
    failed = tested > delta
    n_passed = int(failed.argmax()) if failed.any() else len(failed)
    if n_passed == 0:
        reason = (
            f"of the {count[0]} most confident units {errors[0]} are wrong: error rates above "
            f"{alpha:g} are not ruled out (p = {tested[0]:.3g}, more than delta = {delta:g})"
        )
        return result | {"reason": reason}
    last = n_passed - 1
    automated = confidence >= threshold[last]
    return result | {
        "threshold": float(threshold[last]),
        "automated": int(automated.sum()),
        "share": float(automated.mean()),
        "errors": int((~correct[automated]).sum()),
        "units_automated": int(count[last]),
        "unit_errors": int(errors[last]),
        "p_value": float(p_value[last]),
    }


def naive_threshold(confidence, correct, alpha):
    """The lowest confidence at or above which at most a share alpha of these rows is wrong.

    confidence: (n,) float in [0, 1]; correct: (n,) bool; alpha strictly between 0 and 1.
    Returns a float, or None where there is none. It promises nothing: chosen to look good on these
    rows, it breaks alpha on new ones in about every second draw where alpha is hard to keep. For
    contrast with `certify_threshold`.
    """
    confidence, correct = as_confidence_and_correct(confidence, correct)
    alpha = _as_open_share("alpha", alpha)
    threshold, count, errors = _candidates(confidence, correct)
    kept = np.flatnonzero(errors / count <= alpha)
    return float(threshold[kept[-1]]) if len(kept) else None


def abstention_bound(correct, alpha, delta=0.1):
    """The share that any rule must send to a person for an error of at most alpha on the rest.

    correct: (n,) bool, independent rows; alpha, delta: strictly between 0 and 1.
    Returns {"estimate", "low"}, both in [0, 1): max(0, (error − alpha) / (1 − alpha)) at the error
    rate of the rows, and at its exact lower confidence limit of level 1 − delta. Only a ranking
    that puts every error below every right answer attains it.
    """
    correct = as_flags("correct", correct)
    alpha, delta = _as_open_share("alpha", alpha), _as_open_share("delta", delta)
    n, errors = len(correct), int((~correct).sum())
    low = betaincinv(errors, n - errors + 1, delta) if errors else 0.0
    estimate, low = (max(0.0, (e - alpha) / (1 - alpha)) for e in (errors / n, float(low)))
    return {"estimate": estimate, "low": low}


def selective_risk(confidence, correct, threshold, group=None, level=0.95):
    """What a threshold does on rows that did not choose it.

    confidence: (n,) float in [0, 1]; correct: (n,) bool; threshold: in [0, 1], or None for
        abstaining on everything; level: of the upper limit, strictly between 0 and 1.
    Returns a dict, ready for JSON:
      threshold, level, n; automated: rows with confidence ≥ threshold; coverage: their share of n;
      errors: wrong ones among them; risk: errors / automated;
      risk_upper: one-sided upper confidence limit of the risk (Clopper–Pearson), exact for
          independent rows. With group (n,), the rows count as (Σ m)² / Σ m² independent ones, m
          being the automated rows of each group: as if those of a group were always right or
          wrong together, which is cautious.
    risk and risk_upper are None where nothing is automated.
    Source: an effective number of rows in Clopper and Pearson's limit: Korn and Graubard 1998,
    Survey Methodology 24, 193–201
    """
    confidence, correct = as_confidence_and_correct(confidence, correct)
    level = _as_open_share("level", level)
    if threshold is not None and (not isinstance(threshold, Real) or not 0 <= threshold <= 1):
        raise ValueError(f"threshold must be None or lie in [0, 1], got {threshold!r}")
    group = None if group is None else _as_group(group, confidence)
    automated = np.zeros(len(correct), dtype=bool) if threshold is None else confidence >= threshold
    count, errors = int(automated.sum()), int((~correct[automated]).sum())
    result = {
        "threshold": None if threshold is None else float(threshold),
        "level": level,
        "n": len(correct),
        "automated": count,
        "coverage": count / len(correct),
        "errors": errors,
        "risk": None,
        "risk_upper": None,
    }
    if count == 0:
        return result
    risk, effective = errors / count, float(count)
    if group is not None:
        size = Counter(group[automated].tolist()).values()
        effective = count**2 / sum(m * m for m in size)
    right = effective * (count - errors) / count
    upper = betaincinv(risk * effective + 1, right, level) if right else 1.0
    return result | {"risk": risk, "risk_upper": float(upper)}


def split_calibration_rows(rows, fraction=0.5, seed=0):
    """(fitting rows, certifying rows): a calibrator is fitted on the first, a threshold on the
    second, so that certified rows fitted nothing.

    rows: `records.ModelResults.arrays("calibration")`; fraction: share of the groups that fit,
        strictly between 0 and 1; each part gets at least one group, none is divided.
    Both parts are dicts like `rows`, in the same order, still of split "calibration". Which groups
    fit depends on the set of groups and the seed alone.
    Raises ValueError for rows of another split and for fewer than 2 groups.
    """
    if rows["split"] != "calibration":
        raise ValueError(f"rows must be of the calibration split, got {rows['split']!r}")
    fraction = _as_open_share("fraction", fraction)
    group = rows["group"].tolist()
    names = sorted(set(group))
    if len(names) < 2:
        raise ValueError(f"rows must be of at least 2 groups to be divided, got {len(names)}")
    n_fit = min(max(round(fraction * len(names)), 1), len(names) - 1)
    drawn = np.random.default_rng(seed).permutation(len(names))[:n_fit]
    fitting = {names[i] for i in drawn}
    fits = np.array([name in fitting for name in group])

    def part(chosen):
        return {k: v if k == "split" else v[chosen] for k, v in rows.items()}

    return part(fits), part(~fits)
