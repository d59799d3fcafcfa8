"""How far stated confidence is from the truth, with the uncertainty of every number.

Conventions, everywhere in this module:
  probabilities: (n, K) float, K ≥ 2; each row sums to 1 over the task's labels, in their order.
  label:         (n,) int, index of the true label.
  confidence:    (n,) float in [0, 1]; the largest probability of a row.
  correct:       (n,) bool; whether the label of that largest probability is the true one.
  group:         (n,) near-duplicate group of a row; the bootstrap draws whole groups.
Two labels are the case K = 2. Bad input is a ValueError naming the argument, the rule, the value
and the row (counted from 0).
"""

import numpy as np
from scipy.special import ndtri

HIGH_CONFIDENCE = 0.9
SUM_TOLERANCE = 1e-5  # float32 probabilities of a hundred labels stay within it
PROBABILITY_FLOOR = float(np.finfo(np.float64).eps)  # 2.2e-16: one row costs at most 36.04 nats
NULL_BLOCK = 4_000_000  # random numbers held at once while simulating


# Argument checks, shared with calibration.py.


def _refuse_row(name, rule, values, bad):
    """Raise a ValueError about the first row of `values` where `bad` holds, if there is one."""
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(f"{name} {rule}, got {values[row]} at row {row}")


def as_floats(name, values, low=-np.inf, high=np.inf):
    """`values` as a float64 array of at least one row, all finite and within [low, high]."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold numbers: {error}") from None
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"{name} must have at least 1 row, got shape {array.shape}")
    rows = array.reshape(len(array), -1)
    _refuse_row(name, "must be finite", array, ~np.isfinite(rows).all(axis=1))
    outside = ((rows < low) | (rows > high)).any(axis=1)
    _refuse_row(name, f"must lie in [{low:g}, {high:g}]", array, outside)
    return array


def as_vector(name, values, low=-np.inf, high=np.inf):
    """`values` as (n,) float64 with n ≥ 1, all finite and within [low, high]."""
    array = as_floats(name, values, low, high)
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape (n,), got {array.shape}")
    return array


def as_flags(name, values):
    """`values` as (n,) bool with n ≥ 1; numbers are accepted when each is 0 or 1."""
    array = as_vector(name, values)
    _refuse_row(name, "must be 0 or 1 (False or True)", array, (array != 0) & (array != 1))
    return array.astype(bool)


def as_labels(name, values, n_labels):
    """`values` as (n,) int64 label indices, 0 ≤ index < n_labels.

    Truth values are refused: True would be index 1, the second label, where a reader means the
    first.
    """
    if np.asarray(values).dtype == bool:
        raise ValueError(f"{name} must hold label indices from 0 to {n_labels - 1}, got bool")
    array = as_vector(name, values)
    outside = (array < 0) | (array >= n_labels) | (array != np.floor(array))
    _refuse_row(name, f"must be a label index from 0 to {n_labels - 1}", array, outside)
    return array.astype(np.int64)


def as_probabilities(name, values):
    """`values` as (n, K) float64, K ≥ 2, within [0, 1], each row summing to 1."""
    array = as_floats(name, values, 0.0, 1.0)
    if array.ndim != 2 or array.shape[1] < 2:
        raise ValueError(f"{name} must have shape (n, K) with K ≥ 2, got {array.shape}")
    total = array.sum(axis=1)
    _refuse_row(name, "must sum to 1 in each row", total, np.abs(total - 1.0) > SUM_TOLERANCE)
    return array


def as_count(name, value, least=1):
    """`value` as an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def _as_level(level):
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    return level


def check_same_length(**arrays):
    """Raise a ValueError unless all named arrays have as many rows as the first."""
    (first_name, first), *others = arrays.items()
    for name, array in others:
        if len(array) != len(first):
            raise ValueError(
                f"{name} must have as many rows as {first_name} ({len(first)}), got {len(array)}"
            )


def _confidence_and_correct(confidence, correct):
    confidence = as_vector("confidence", confidence, 0.0, 1.0)
    correct = as_flags("correct", correct)
    check_same_length(confidence=confidence, correct=correct)
    return confidence, correct


def _probabilities_and_label(probabilities, label):
    probabilities = as_probabilities("probabilities", probabilities)
    label = as_labels("label", label, probabilities.shape[1])
    check_same_length(probabilities=probabilities, label=label)
    return probabilities, label


# Binned calibration error.


def _bin(confidence, n_bins, binning):
    """(n_bins + 1,) edges and the (n,) bin of each row: edges[b] ≤ confidence < edges[b + 1]."""
    n_bins = as_count("n_bins", n_bins)
    # j / n_bins is the double nearest to the decimal a reader writes: 0.3 falls in [0.3, 0.4).
    edges = np.arange(n_bins + 1) / n_bins
    if binning == "mass":
        n = len(confidence)
        edges[1:-1] = np.sort(confidence)[np.arange(1, n_bins) * n // n_bins]
    elif binning != "width":
        raise ValueError(f'binning must be "width" or "mass", got {binning!r}')
    return edges, np.searchsorted(edges[1:-1], confidence, side="right")


def _ece(bin_index, gap):
    """ECE from the (n,) bins and the (n,) signed gaps correct − confidence."""
    return np.abs(np.bincount(bin_index, weights=gap)).sum() / len(gap)


def expected_calibration_error(confidence, correct, n_bins=20, binning="width"):
    """Mean |accuracy − confidence| over the bins, weighted by bin count.

    confidence: (n,) float in [0, 1]; 1.0 falls in the last bin, 0.0 in the first.
    correct:    (n,) bool.
    binning:    "width": bins of equal width, closed on the left, so that the 0.5 of an undecided
                binary classifier starts a bin; "mass": bins of equal count, cut at the sample
                quantiles, with equal confidences kept in one bin.
    Returns a float in [0, 1]; lower is better. Biased upward for small n: read it beside
    `null_calibration_error`. Raises ValueError on empty input, unequal lengths, NaN, or values
    outside [0, 1].
    Source: Guo et al. 2017, eq. 3, https://arxiv.org/abs/1706.04599 ; equal mass: Nguyen and
    O'Connor 2015, https://arxiv.org/abs/1508.05154
    """
    confidence, correct = _confidence_and_correct(confidence, correct)
    _, bin_index = _bin(confidence, n_bins, binning)
    return float(_ece(bin_index, correct - confidence))


def maximum_calibration_error(confidence, correct, n_bins=20):
    """Largest |accuracy − confidence| over the equal-width bins that hold a row.

    confidence: (n,) float in [0, 1]; correct: (n,) bool.
    Returns (value in [0, 1], number of rows in the bin that decided it). The emptiest bin usually
    decides, so the count belongs beside the value. Of equal gaps the lowest bin decides.
    Source: Guo et al. 2017, eq. 5, https://arxiv.org/abs/1706.04599
    """
    confidence, correct = _confidence_and_correct(confidence, correct)
    _, bin_index = _bin(confidence, n_bins, "width")
    count = np.bincount(bin_index)
    gap = np.abs(np.bincount(bin_index, weights=correct - confidence)) / np.maximum(count, 1)
    worst = int(np.where(count, gap, -1.0).argmax())
    return float(gap[worst]), int(count[worst])


def _null_correct(confidence, bin_index, n_bins, n_draws, seed):
    """(n_draws, n_bins) correct answers a bin, if each row is correct with its confidence."""
    rng = np.random.default_rng(seed)
    order = np.argsort(bin_index, kind="stable")
    occupied, start = np.unique(bin_index[order], return_index=True)
    probability = confidence[order]
    result = np.zeros((n_draws, n_bins))
    step = max(1, NULL_BLOCK // len(confidence))
    for first in range(0, n_draws, step):
        last = min(first + step, n_draws)
        correct = rng.random((last - first, len(probability))) < probability
        result[first:last, occupied] = np.add.reduceat(correct, start, axis=1, dtype=np.int64)
    return result


def null_calibration_error(confidence, n_bins=20, n_draws=1000, seed=0):
    """The equal-width ECE that a perfectly calibrated model of these confidences would show.

    confidence: (n,) float in [0, 1]. Truth is drawn n_draws times, each row being correct with a
    probability equal to its confidence.
    Returns (mean, 95th percentile) of the ECE. A measured ECE below the percentile is no evidence
    of miscalibration.
    Source: consistency resampling, Bröcker and Smith 2007, https://doi.org/10.1175/WAF993.1 , here
    with the confidences held fixed.
    """
    confidence = as_vector("confidence", confidence, 0.0, 1.0)
    n_draws = as_count("n_draws", n_draws)
    _, bin_index = _bin(confidence, n_bins, "width")
    correct = _null_correct(confidence, bin_index, n_bins, n_draws, seed)
    expected = np.bincount(bin_index, weights=confidence, minlength=n_bins)
    ece = np.abs(correct - expected).sum(axis=1) / len(confidence)
    return float(ece.mean()), float(np.quantile(ece, 0.95))


def wilson_interval(successes, count, level=0.95):
    """Wilson score interval of the shares successes / count.

    successes, count: (m,) with 0 ≤ successes ≤ count; level: coverage, between 0 and 1.
    Returns (low, high), each (m,) within [0, 1]; NaN where count is 0.
    Source: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953
    """
    k, n = as_vector("successes", successes, low=0.0), as_vector("count", count, low=0.0)
    check_same_length(count=n, successes=k)
    _refuse_row("successes", "must not exceed count", k, k > n)
    z = ndtri((1 + _as_level(level)) / 2)
    known = np.where(n > 0, n, np.nan)
    centre = (k + z**2 / 2) / (known + z**2)
    half = z * np.sqrt(k * (known - k) / known + z**2 / 4) / (known + z**2)
    return np.clip(centre - half, 0.0, 1.0), np.clip(centre + half, 0.0, 1.0)


def reliability_diagram(confidence, correct, n_bins=20, binning="width", n_null=1000, seed=0):
    """The numbers of a reliability diagram.

    confidence: (n,) float in [0, 1]; correct: (n,) bool; binning as in
    `expected_calibration_error`.
    Returns a dict of arrays:
      edges: (n_bins + 1,) from 0 to 1; bin b holds edges[b] ≤ confidence < edges[b + 1], the last
          bin 1.0 as well;
      count: (n_bins,) int rows;
      mean_confidence, accuracy: (n_bins,) means over the rows of the bin;
      wilson_low, wilson_high: (n_bins,) 95 % Wilson interval of the accuracy, rows taken as
          independent;
      null_low, null_high: (n_bins,) 95 % consistency band: the accuracy that a perfectly
          calibrated model with these confidences shows in the bin. An accuracy inside it is no
          evidence of miscalibration. It holds bin by bin: of 20 bins about one falls outside.
    All but edges and count are NaN where a bin is empty.
    Source: Bröcker and Smith 2007, https://doi.org/10.1175/WAF993.1
    """
    confidence, correct = _confidence_and_correct(confidence, correct)
    edges, bin_index = _bin(confidence, n_bins, binning)
    n_null = as_count("n_null", n_null)
    count = np.bincount(bin_index, minlength=n_bins)
    rows = np.where(count, count, np.nan)
    n_correct = np.bincount(bin_index, weights=correct, minlength=n_bins)
    wilson_low, wilson_high = wilson_interval(n_correct, count)
    null = _null_correct(confidence, bin_index, n_bins, n_null, seed)
    null_low, null_high = np.quantile(null, [0.025, 0.975], axis=0) / rows
    return {
        "edges": edges,
        "count": count,
        "mean_confidence": np.bincount(bin_index, weights=confidence, minlength=n_bins) / rows,
        "accuracy": n_correct / rows,
        "wilson_low": wilson_low,
        "wilson_high": wilson_high,
        "null_low": null_low,
        "null_high": null_high,
    }


# Proper scores.


def _row_log_loss(probabilities, label):
    chosen = probabilities[np.arange(len(label)), label]
    # − 0.0 would be printed for a certain and right row.
    return np.abs(np.log(np.maximum(chosen, PROBABILITY_FLOOR)))


def _row_brier(probabilities, label):
    truth = np.arange(probabilities.shape[1]) == label[:, None]  # (n, K)
    return ((probabilities - truth) ** 2).sum(axis=1) / 2


def log_loss(probabilities, label):
    """Mean −log probability of the true label, in nats; lower is better.

    probabilities: (n, K); label: (n,) int. Probabilities below 2.2e-16 count as 2.2e-16, so that
    one row costs at most 36.04 nats and a 0 at the true label does not make the mean infinite.
    """
    return float(_row_log_loss(*_probabilities_and_label(probabilities, label)).mean())


def brier_score(probabilities, label):
    """Mean over rows of half the sum over labels of (p − y)²; in [0, 1], lower is better.

    probabilities: (n, K); label: (n,) int. The half makes it the usual binary Brier score
    (p₀ − y₀)² at K = 2; the multi-class score of Brier 1950 is twice this.
    """
    return float(_row_brier(*_probabilities_and_label(probabilities, label)).mean())


# Uncertainty.


def _resamples(n, group, n_resamples, seed):
    """Yield the row indices of each bootstrap resample of n rows, or of the groups they form."""
    rng = np.random.default_rng(seed)
    if group is None:
        if n < 2:
            raise ValueError(f"a bootstrap interval needs at least 2 rows, got {n}")
        for _ in range(n_resamples):
            yield rng.integers(n, size=n)
        return
    names, member = np.unique(group, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"group must name at least 2 groups, got {len(names)}")
    order = np.argsort(member, kind="stable")  # rows, one group after the other
    size = np.bincount(member)
    start = np.cumsum(size) - size
    for _ in range(n_resamples):
        drawn = rng.integers(len(names), size=len(names))
        length = size[drawn]
        offset = start[drawn] - (np.cumsum(length) - length)
        yield order[np.repeat(offset, length) + np.arange(length.sum())]


def bootstrap_interval(statistic, *arrays, group=None, n_resamples=1000, seed=0, level=0.95):
    """Percentile bootstrap interval of `statistic(*arrays)`.

    statistic: takes the resampled arrays, returns a float, or (m,) floats for m statistics that
        share the same resamples.
    arrays: each (n, ...); rows are drawn together, n ≥ 2.
    group: (n,) or None. Whole groups are drawn, because near-duplicates are not independent.
    level: coverage of the interval, between 0 and 1.
    Returns (low, high), floats or (m,) arrays. The same seed gives the same interval.
    Limits: the ECE is biased upward, on a resample even more than on the data, so its interval may
    lie above the estimate and does not cover the true error at `level`; a share of exactly 0 or 1
    gets an interval of width 0; and below about 30 groups the interval is too narrow.
    Raises ValueError on unequal lengths, fewer than 2 rows or groups, or when the statistic is not
    finite on a resample.
    Source: Efron and Tibshirani 1993, ch. 13; whole groups: Field and Welsh 2007,
    https://doi.org/10.1111/j.1467-9868.2007.00593.x
    """
    if not arrays:
        raise ValueError("bootstrap_interval needs at least one array")
    level = _as_level(level)
    n_resamples = as_count("n_resamples", n_resamples)
    tables = [np.atleast_1d(array) for array in arrays]
    check_same_length(**{f"array {i}": table for i, table in enumerate(tables)})
    if group is not None:
        group = np.asarray(group).astype(str)
        if group.ndim != 1:
            raise ValueError(f"group must have shape (n,), got {group.shape}")
        check_same_length(arrays=tables[0], group=group)
    rows = _resamples(len(tables[0]), group, n_resamples, seed)
    values = np.array([statistic(*(t[r] for t in tables)) for r in rows], dtype=np.float64)
    undefined = ~np.isfinite(values.reshape(n_resamples, -1)).all(axis=1)
    if undefined.any():
        raise ValueError(
            f"statistic must be finite on every resample, got {values[undefined][0]} on "
            f"{int(undefined.sum())} of {n_resamples}"
        )
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return (float(low), float(high)) if values.ndim == 1 else (low, high)


def paired_difference(
    statistic_a_rows, statistic_b_rows, group=None, n_resamples=1000, seed=0, level=0.95
):
    """Mean of a − b over the same rows, with its bootstrap interval.

    statistic_a_rows, statistic_b_rows: (n,) one value a row for each of two models: log-loss,
        squared error, correct. Anything that is a mean over rows; not the ECE.
    Returns {"estimate", "low", "high"}; an interval without 0 says that the models differ. Pairing
    removes the difficulty of the rows, which two separate intervals count twice.
    """
    a = as_vector("statistic_a_rows", statistic_a_rows)
    b = as_vector("statistic_b_rows", statistic_b_rows)
    check_same_length(statistic_a_rows=a, statistic_b_rows=b)
    difference = a - b
    low, high = bootstrap_interval(
        np.mean, difference, group=group, n_resamples=n_resamples, seed=seed, level=level
    )
    return {"estimate": float(difference.mean()), "low": low, "high": high}


def calibration_metrics(probabilities, label, group=None, n_bins=20, n_resamples=1000, seed=0):
    """Everything that is reported of one set of predictions, ready for JSON.

    probabilities: (n, K); label: (n,) int; n ≥ 2; group: (n,) or None.
    Returns a dict:
      n: rows;
      accuracy, mean_confidence, log_loss (nats), brier, ece (n_bins of equal width): each
          {"estimate", "low", "high"} with the 95 % interval of `bootstrap_interval`, all from one
          set of resamples; ece also has null_mean and null_p95 of `null_calibration_error`;
      mce: {"estimate", "count"}, count being the rows of the deciding bin;
      high_confidence: rows with confidence ≥ threshold (0.9): {"threshold", "count", "share",
          "accuracy"}, accuracy being None where there are none.
    """
    probabilities, label = _probabilities_and_label(probabilities, label)
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == label
    _, bin_index = _bin(confidence, n_bins, "width")
    columns = {
        "accuracy": correct.astype(np.float64),
        "mean_confidence": confidence,
        "log_loss": _row_log_loss(probabilities, label),
        "brier": _row_brier(probabilities, label),
    }
    rows = np.column_stack(list(columns.values()))  # (n, 4)

    def table(rows, bin_index):
        return np.append(rows.mean(axis=0), _ece(bin_index, rows[:, 0] - rows[:, 1]))

    low, high = bootstrap_interval(
        table, rows, bin_index, group=group, n_resamples=n_resamples, seed=seed
    )
    interval = zip([*columns, "ece"], table(rows, bin_index), low, high, strict=True)
    result = {"n": len(label)}
    for name, *values in interval:
        result[name] = dict(zip(("estimate", "low", "high"), map(float, values), strict=True))
    null_mean, null_p95 = null_calibration_error(confidence, n_bins, seed=seed)
    result["ece"] |= {"null_mean": null_mean, "null_p95": null_p95}
    mce, mce_count = maximum_calibration_error(confidence, correct, n_bins)
    result["mce"] = {"estimate": mce, "count": mce_count}
    high_rows = correct[confidence >= HIGH_CONFIDENCE]
    result["high_confidence"] = {
        "threshold": HIGH_CONFIDENCE,
        "count": len(high_rows),
        "share": len(high_rows) / len(label),
        "accuracy": float(high_rows.mean()) if len(high_rows) else None,
    }
    return result
