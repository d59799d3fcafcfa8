"""How far stated confidence is from the truth, with the uncertainty of every number.

Conventions, everywhere in this module:
  probabilities: (n, K) float, K ≥ 2; each row sums to 1 over the task's labels, in their order.
  label:         (n,) int, index of the true label.
  confidence:    (n,) float in [0, 1]; the largest probability of a row.
  correct:       (n,) bool; whether the label of that largest probability is the true one.
  group:         (n,) near-duplicate group of a row; the bootstrap draws whole groups.
  strata:        (n,) stratum of a row, the same within a group; each keeps its number of groups
                 in every resample.
Two labels are the case K = 2. What is said of confidence and correct holds as well of
P(first label) and "the true label is the first". Equal confidences are one cut-off: no result
depends on the order of the rows. Bad input is a ValueError naming the argument, the rule, the value
and the row (counted from 0).
"""

from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real

import numpy as np
from scipy.fft import dct, idct
from scipy.optimize import isotonic_regression
from scipy.sparse import csr_array
from scipy.special import ndtr, ndtri, stdtr

HIGH_CONFIDENCE = 0.9
COVERAGES = (0.5, 0.7, 0.9)  # at which the table gives the accuracy
RISKS = (0.01, 0.05, 0.1)  # at which the table gives the coverage
SUM_TOLERANCE = 1e-5  # float32 probabilities of a hundred labels stay within it
PROBABILITY_FLOOR = float(np.finfo(np.float64).eps)  # 2.2e-16: one row costs at most 36.04 nats
SIMULATION_BLOCK = 250_000  # numbers held at once in one array of a simulation or a bootstrap
SMOOTHING_GRID = 1024  # points on [0, 1] of the smooth calibration error
ROUNDING = 1e-12  # a difference of two scores below it is rounding
UNDEFINED = {  # what a measure cannot be computed from
    "auroc": "all rows are of one class",
    "squared_calibration_error": "no equal-mass bin holds two rows",
    "kuiper": "every confidence is 0 or 1",
    "spiegelhalter": "every confidence is 0, 0.5 or 1",
}


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
    if not isinstance(level, Real) or not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    return level


def as_names(name, values):
    """`values` as an (n,) array of comparable names, none of them missing."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape (n,), got {array.shape}")
    if array.dtype.kind in "fO":
        missing = np.array([v is None or v != v for v in array.tolist()], dtype=bool)
        _refuse_row(name, "must not be missing", array, missing)
    return array.astype(str) if array.dtype == object else array


def check_same_length(**arrays):
    """Raise a ValueError unless all named arrays have as many rows as the first."""
    (first_name, first), *others = arrays.items()
    for name, array in others:
        if len(array) != len(first):
            raise ValueError(
                f"{name} must have as many rows as {first_name} ({len(first)}), got {len(array)}"
            )


def _defined(name, value):
    if np.isnan(value):
        raise ValueError(f"{name} is undefined: {UNDEFINED[name]}")
    return float(value)


def as_confidence_and_correct(confidence, correct):
    confidence = as_vector("confidence", confidence, 0.0, 1.0)
    correct = as_flags("correct", correct)
    check_same_length(confidence=confidence, correct=correct)
    return confidence, correct


def _probabilities_and_label(probabilities, label, name="probabilities"):
    probabilities = as_probabilities(name, probabilities)
    label = as_labels("label", label, probabilities.shape[1])
    check_same_length(**{name: probabilities, "label": label})
    return probabilities, label


# Rows gathered by confidence: what every measure of confidence against correct is computed from.


def _prefix_sums(values):
    """(R, m) → (R, m + 1): sums of the first 0, 1, ... m columns."""
    return np.pad(np.cumsum(values, axis=1, dtype=np.float64), ((0, 0), (1, 0)))


def _first_above(cumulative, target):
    """(R, t) first column where cumulative (R, m), non-decreasing from ≥ 0, exceeds target (R, t).

    Every target lies below the last column of its row.
    """
    n_rows, width = cumulative.shape
    step = cumulative[:, -1].max() + 1.0  # sets the rows apart, so that one search serves all
    offset = step * np.arange(n_rows)[:, None]
    found = np.searchsorted((cumulative + offset).ravel(), target + offset, side="right")
    return found - width * np.arange(n_rows)[:, None]


def _ratio(numerator, denominator):
    """numerator / denominator, NaN where the denominator is 0."""
    return numerator / np.where(denominator == 0, np.nan, denominator)


@dataclass(frozen=True)
class _Cells:
    """Rows with the same confidence are one cell; R versions of the data are measured at once.

    value: (m,) distinct confidences, ascending.
    count: (R, m) rows of each cell, 0 where a resample drew none; (1, m) when all versions share
        them, as under simulated truth.
    hits: (R, m) of these the correct ones.
    size: rows of the data that the versions are drawn from.
    """

    value: np.ndarray
    count: np.ndarray
    hits: np.ndarray
    size: int

    @cached_property
    def total(self):
        """(R,) rows."""
        return self.count.sum(axis=1)

    @cached_property
    def n_correct(self):
        """(R,) correct rows."""
        return self.hits.sum(axis=1)

    @cached_property
    def gap(self):
        """(R, m) correct rows beyond the expected ones."""
        return self.hits - self.count * self.value

    @cached_property
    def descending(self):
        """(rows, errors, rows above, errors above), each (R, m), from the highest confidence."""
        rows = self.count[:, ::-1]
        errors = rows - self.hits[:, ::-1]
        above = (np.cumsum(part, axis=1) - part for part in (rows, errors))
        return rows, errors, *above

    @cached_property
    def recalibrated(self):
        """(R, m) accuracy by isotonic regression on the confidence; 0 in a cell without rows."""
        result = np.zeros(self.hits.shape)
        counts = np.broadcast_to(self.count, self.hits.shape)
        for row, count, hits in zip(result, counts, self.hits, strict=True):
            filled = count > 0
            rows = count[filled]
            row[filled] = isotonic_regression(hits[filled] / rows, weights=rows).x
        return result

    def brier(self, probability):
        """(R,) Brier score of giving every row of a cell the probability (m,) or (R, m)."""
        wrong = self.count - self.hits
        loss = self.hits * (1 - probability) ** 2 + wrong * probability**2
        return loss.sum(axis=1) / self.total


class _Layout:
    """Which row belongs to which cell; sorted once, used for every resample."""

    def __init__(self, confidence, correct):
        self.order = np.argsort(confidence, kind="stable")
        ranked = confidence[self.order]
        self.start = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])  # (m,)
        self.value = ranked[self.start]
        self.correct = correct[self.order]

    def cells(self, multiplicity):
        """`_Cells` of R versions in which row i occurs multiplicity[r, i] times, (R, n)."""
        rows = multiplicity[:, self.order].astype(np.float64)
        count, hits = (np.add.reduceat(x, self.start, axis=1) for x in (rows, rows * self.correct))
        return _Cells(self.value, count, hits, len(self.order))


def _cells(confidence, correct):
    """The one version that is the data itself."""
    return _Layout(confidence, correct).cells(np.ones((1, len(confidence)), dtype=np.int8))


def _block_size(width):
    """How many versions of `width` numbers are computed at once."""
    return max(1, SIMULATION_BLOCK // max(width, SMOOTHING_GRID))


def _simulated_truth(confidence, n_draws, seed):
    """Yield `_Cells` of blocks of draws in which each row is correct with its confidence."""
    cells = _cells(confidence, np.zeros(len(confidence), dtype=bool))
    rng = np.random.default_rng(seed)
    count = cells.count.astype(np.int64)
    step = _block_size(count.shape[1])
    for first in range(0, n_draws, step):
        size = (min(step, n_draws - first), count.shape[1])
        hits = rng.binomial(count, cells.value, size=size).astype(np.float64)
        yield replace(cells, hits=hits)


# Calibration error.


def _bins(cells, n_bins, binning):
    """(R, n_bins + 1) first cell of each bin, ending with m, and (n_bins + 1,) width edges.

    Where the bins of equal mass start depends on the version, and their edges on its cells.
    """
    # j / n_bins is the double nearest to the decimal a reader writes: 0.3 falls in [0.3, 0.4).
    edges = np.arange(n_bins + 1) / n_bins
    if binning == "width":
        inner = np.searchsorted(cells.value, edges[1:-1])[None, :]
    elif binning == "mass":
        rank = np.arange(1, n_bins) * cells.total[:, None] // n_bins
        inner = _first_above(np.cumsum(cells.count, axis=1), rank)
    else:
        raise ValueError(f'binning must be "width" or "mass", got {binning!r}')
    return np.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (0, len(cells.value)))), edges


def _bin_sums(cells, start):
    """(rows, correct rows, summed confidence) of the bins that begin at `start`: (R, n_bins)."""
    parts = (cells.count, cells.hits, cells.count * cells.value)
    return tuple(
        np.diff(np.take_along_axis(_prefix_sums(part), start, axis=1), axis=1) for part in parts
    )


def _ece(cells, n_bins, binning="width"):
    start, _ = _bins(cells, n_bins, binning)
    _, correct, expected = _bin_sums(cells, start)
    return np.abs(correct - expected).sum(axis=1) / cells.total


def _bin_gaps(cells, n_bins):
    """(rows, |accuracy − mean confidence|) of the equal-width bins, −1 in an empty one."""
    start, _ = _bins(cells, n_bins, "width")
    rows, correct, expected = _bin_sums(cells, start)
    return rows, np.where(rows > 0, np.abs(correct - expected) / np.maximum(rows, 1), -1.0)


def _mce(cells, n_bins):
    return _bin_gaps(cells, n_bins)[1].max(axis=1)


def _squared_error(cells, n_bins):
    """Of at most size // 2 bins, for a bin of one row says nothing; NaN where none holds two."""
    start, _ = _bins(cells, max(1, min(n_bins, cells.size // 2)), "mass")
    rows, correct, expected = _bin_sums(cells, start)
    usable = rows >= 2
    rows = np.where(usable, rows, np.nan)
    accuracy = correct / rows
    squared = ((correct - expected) / rows) ** 2 - accuracy * (1 - accuracy) / (rows - 1)
    total = np.nansum(squared * rows, axis=1) / cells.total
    return np.where(usable.any(axis=1), total, np.nan)


def _smooth_error(cells):
    """The σ at which the mean |smoothed gap| equals σ, by bisection, for each version."""
    # Cell-centred grid, linear weights; what falls outside is mirrored into the cell at the edge.
    position = cells.value * SMOOTHING_GRID - 0.5
    left = np.floor(position).astype(np.int64)
    share = position - left
    index = np.arange(len(position))
    deposit = csr_array(
        (
            np.concatenate([1 - share, share]),
            (
                np.clip(np.concatenate([left, left + 1]), 0, SMOOTHING_GRID - 1),
                np.concatenate([index, index]),
            ),
        ),
        shape=(SMOOTHING_GRID, len(position)),
    )
    gap = cells.gap / cells.total[:, None]
    # A Gaussian reflected at 0 and 1 acts on cosines, one factor each.
    wave = dct((deposit @ gap.T).T, axis=1)
    decay = -((np.pi * np.arange(SMOOTHING_GRID)) ** 2) / 2

    def smoothed(sigma):
        return np.abs(idct(wave * np.exp(decay * sigma[:, None] ** 2), axis=1)).sum(axis=1)

    low, high = np.zeros(len(gap)), np.ones(len(gap))
    for _ in range(12):  # to 2.4e-4
        sigma = (low + high) / 2
        above = smoothed(sigma) > sigma
        low, high = np.where(above, sigma, low), np.where(above, high, sigma)
    return smoothed(high)


def _miscalibration(cells):
    return np.maximum(cells.brier(cells.value) - cells.brier(cells.recalibrated), 0.0)


CALIBRATION_ERRORS = {
    "ece": _ece,
    "ece_equal_mass": lambda cells, n_bins: _ece(cells, n_bins, "mass"),
    "mce": _mce,
    "squared_calibration_error": _squared_error,
    "smooth_ece": lambda cells, n_bins: _smooth_error(cells),
    "miscalibration": lambda cells, n_bins: _miscalibration(cells),
}


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
    cells = _cells(*as_confidence_and_correct(confidence, correct))
    return float(_ece(cells, as_count("n_bins", n_bins), binning)[0])


def maximum_calibration_error(confidence, correct, n_bins=20):
    """Largest |accuracy − confidence| over the equal-width bins that hold a row.

    confidence: (n,) float in [0, 1]; correct: (n,) bool.
    Returns (value in [0, 1], number of rows in the bin that decided it). A bin of few rows can
    decide, so the count belongs beside the value. Of equal gaps the lowest bin decides.
    Source: Guo et al. 2017, eq. 5, https://arxiv.org/abs/1706.04599
    """
    cells = _cells(*as_confidence_and_correct(confidence, correct))
    rows, gap = _bin_gaps(cells, as_count("n_bins", n_bins))
    worst = int(gap[0].argmax())
    return float(gap[0, worst]), int(rows[0, worst])


def debiased_squared_calibration_error(confidence, correct, n_bins=20):
    """Mean squared (accuracy − confidence) over equal-mass bins, less what noise adds to it.

    confidence: (n,) float in [0, 1]; correct: (n,) bool, n ≥ 2; at most n // 2 bins are used.
    Returns a float in [−1, 1]: squared, not its root, and often below 0 when the confidences are
    calibrated: noise pushes it neither up nor down. A bin left with one row by equal confidences
    counts as 0. Raises ValueError for a single row.
    Source: Kumar et al. 2019, https://arxiv.org/abs/1909.10155
    """
    cells = _cells(*as_confidence_and_correct(confidence, correct))
    error = _squared_error(cells, as_count("n_bins", n_bins))[0]
    return _defined("squared_calibration_error", error)


def smooth_calibration_error(confidence, correct):
    """Calibration error without bins: mean |correct − confidence| after Gaussian smoothing.

    confidence: (n,) float in [0, 1]; correct: (n,) bool.
    The kernel, reflected at 0 and 1, has the width σ at which the smoothed error equals σ, so
    there is nothing to choose. Returns a float in [0, 1]; lower is better; σ is found to within
    2.4e-4. Continuous: it does not jump when a confidence moves by a hair. Biased upward for small
    n like every calibration error.
    Source: Błasiok and Nakkiran 2023, https://arxiv.org/abs/2309.12236
    """
    return float(_smooth_error(_cells(*as_confidence_and_correct(confidence, correct)))[0])


def _null_errors(confidence, names, n_bins, n_draws, seed):
    """{name: (n_draws,) error} of CALIBRATION_ERRORS on the same simulated truths."""
    n_bins, n_draws = as_count("n_bins", n_bins), as_count("n_draws", n_draws)
    blocks = [
        {name: CALIBRATION_ERRORS[name](cells, n_bins) for name in names}
        for cells in _simulated_truth(confidence, n_draws, seed)
    ]
    return {name: np.concatenate([block[name] for block in blocks]) for name in names}


def null_calibration_error(confidence, n_bins=20, n_draws=1000, seed=0, metric="ece"):
    """The calibration error that a perfectly calibrated model of these confidences would show.

    confidence: (n,) float in [0, 1]. Truth is drawn n_draws times, each row being correct with a
    probability equal to its confidence, independently of the other rows.
    metric: one of CALIBRATION_ERRORS: "ece", "ece_equal_mass", "mce", "squared_calibration_error"
    (n ≥ 2), "smooth_ece", "miscalibration"; n_bins matters to the first four.
    Returns (mean, 95th percentile). A measured error below the percentile is no evidence of
    miscalibration. Where near-duplicates are right or wrong together, calibrated errors are larger
    than this.
    Source: consistency resampling, Bröcker and Smith 2007, https://doi.org/10.1175/WAF993.1 , here
    with the confidences held fixed.
    """
    confidence = as_vector("confidence", confidence, 0.0, 1.0)
    if metric not in CALIBRATION_ERRORS:
        raise ValueError(f"metric must be one of {', '.join(CALIBRATION_ERRORS)}, got {metric!r}")
    error = _null_errors(confidence, [metric], n_bins, n_draws, seed)[metric]
    return _defined(metric, error.mean()), float(np.quantile(error, 0.95))


# Shares and the reliability diagram.


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


def _effective_share(correct, group, part, n_parts):
    """(share × rows, rows) of each part, (n_parts,), rows being worth as many independent ones.

    correct: (n,) bool; group: (n,) index of the group; part: (n,) index of the part.
    """
    key, member = np.unique(part * (group.max() + 1) + group, return_inverse=True)
    part_of = key // (group.max() + 1)  # a group within a part
    rows, hits = np.bincount(member), np.bincount(member, weights=correct)
    n, n_correct, n_groups, squares = (
        np.bincount(part_of, weights=x, minlength=n_parts)
        for x in (rows, hits, np.ones(len(key)), rows.astype(np.float64) ** 2)
    )
    share = n_correct / np.maximum(n, 1)
    spread = np.bincount(part_of, weights=(hits - rows * share[part_of]) ** 2, minlength=n_parts)
    most = squares / np.maximum(n, 1)  # design effect when the rows of a group are copies
    unknown = (n_groups < 2) | (n_correct == 0) | (n_correct == n)
    scale = np.where(unknown, 1.0, (n_groups - 1) * n * share * (1 - share))
    effect = np.where(unknown, most, n_groups * spread / scale)
    effective = n / np.clip(effect, 1.0, np.maximum(most, 1.0))
    return share * effective, effective


def clustered_wilson_interval(correct, group, level=0.95):
    """Wilson interval of the share of correct rows when the rows come in groups.

    correct: (n,) bool; group: (n,) group of each row; level: coverage, between 0 and 1.
    Returns (low, high), floats. The number of rows is divided by the design effect: the
    cluster-robust variance of the share over that of independent rows. It is at least 1 and at most
    Σ size² / n, the value for groups of copies, which is also taken where nothing can be estimated:
    one group, or all rows alike. Below about ten groups the estimate is itself uncertain.
    Source: design effect: Kish 1965, Survey Sampling; an effective sample size in an interval of a
    share: Korn and Graubard 1998, Survey Methodology 24:193
    """
    correct, group = as_flags("correct", correct), as_names("group", group)
    check_same_length(correct=correct, group=group)
    member = np.unique(group, return_inverse=True)[1]
    share, rows = _effective_share(correct, member, np.zeros(len(correct), dtype=np.int64), 1)
    low, high = wilson_interval(share, rows, level)
    return float(low[0]), float(high[0])


def reliability_diagram(
    confidence, correct, n_bins=20, binning="width", group=None, n_null=1000, seed=0
):
    """The numbers of a reliability diagram.

    confidence: (n,) float in [0, 1]; correct: (n,) bool; binning as in
    `expected_calibration_error`; group: (n,) or None.
    Returns a dict of arrays:
      edges: (n_bins + 1,) from 0 to 1; bin b holds edges[b] ≤ confidence < edges[b + 1], the last
          bin 1.0 as well;
      count: (n_bins,) int rows;
      mean_confidence, accuracy: (n_bins,) means over the rows of the bin;
      wilson_low, wilson_high: (n_bins,) 95 % interval of the accuracy: Wilson's of independent rows
          or, with group, that of `clustered_wilson_interval`, each bin having its design effect;
      null_low, null_high: (n_bins,) 95 % consistency band: the accuracy that a perfectly
          calibrated model with these confidences shows in the bin. An accuracy inside it is no
          evidence of miscalibration. It holds bin by bin: of 20 bins about one falls outside;
      corp_confidence, corp_accuracy: (k,) knots of the isotonic regression of correct on
          confidence, the first and last confidence of each of its steps, both non-decreasing;
      corp_null_low, corp_null_high: (k,) 95 % consistency band of that curve at each knot.
    All but edges and count are NaN where a bin is empty. Both bands take rows as independent.
    Source: Bröcker and Smith 2007, https://doi.org/10.1175/WAF993.1 ; the CORP curve: Dimitriadis
    et al. 2021, https://doi.org/10.1073/pnas.2016191118
    """
    confidence, correct = as_confidence_and_correct(confidence, correct)
    n_bins, n_null = as_count("n_bins", n_bins), as_count("n_null", n_null)
    cells = _cells(confidence, correct)
    start, edges = _bins(cells, n_bins, binning)
    if binning == "mass":
        edges[1:-1] = cells.value[start[0, 1:-1]]
    rows, n_correct, total = (part[0] for part in _bin_sums(cells, start))
    curve = cells.recalibrated[0]
    step = np.diff(curve) != 0
    knot = np.flatnonzero(np.r_[True, step] | np.r_[step, True])
    null_correct, null_curve = [], []
    for drawn in _simulated_truth(confidence, n_null, seed):
        null_correct.append(_bin_sums(drawn, start)[1])
        null_curve.append(drawn.recalibrated[:, knot])
    null, corp_null = (
        np.quantile(np.concatenate(draws), [0.025, 0.975], axis=0)
        for draws in (null_correct, null_curve)
    )
    if group is None:
        low, high = wilson_interval(n_correct, rows)
    else:
        group = as_names("group", group)
        check_same_length(confidence=confidence, group=group)
        member = np.unique(group, return_inverse=True)[1]
        part = np.searchsorted(edges[1:-1], confidence, side="right")
        low, high = wilson_interval(*_effective_share(correct, member, part, n_bins))
    return {
        "edges": edges,
        "count": rows.astype(np.int64),
        "mean_confidence": _ratio(total, rows),
        "accuracy": _ratio(n_correct, rows),
        "wilson_low": low,
        "wilson_high": high,
        "null_low": _ratio(null[0], rows),
        "null_high": _ratio(null[1], rows),
        "corp_confidence": cells.value[knot],
        "corp_accuracy": curve[knot],
        "corp_null_low": corp_null[0],
        "corp_null_high": corp_null[1],
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


# Discrimination, and what is gained by leaving the least confident rows to a person.


def _as_share(name, value):
    if not isinstance(value, Real) or not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
    return value


def _auroc(cells):
    """NaN where all rows are of one class."""
    misses = cells.count - cells.hits
    below = np.cumsum(misses, axis=1) - misses
    pairs = cells.n_correct * (cells.total - cells.n_correct)
    return _ratio((cells.hits * (below + misses / 2)).sum(axis=1), pairs)


def _uncertainty(cells):
    share = cells.n_correct / cells.total
    return share * (1 - share)


def _discrimination(cells):
    return np.maximum(_uncertainty(cells) - cells.brier(cells.recalibrated), 0.0)


def _harmonic(n):
    """(n + 1,) sums 1 + 1/2 + ... + 1/i for i = 0 ... n."""
    return np.r_[0.0, np.cumsum(1 / np.arange(1, n + 1))]


def _aurc(cells):
    rows, errors, rows_above, errors_above = cells.descending
    harmonic = _harmonic(int(cells.total.max()))
    first, last = (np.asarray(x, dtype=np.int64) for x in (rows_above, rows_above + rows))
    rate = errors / np.maximum(rows, 1)  # a row of a tie is wrong at this rate, in any place
    area = errors + (errors_above - rows_above * rate) * (harmonic[last] - harmonic[first])
    return area.sum(axis=1) / cells.total


def _excess_aurc(cells):
    harmonic = _harmonic(int(cells.total.max()))
    total, n_correct = (x.astype(np.int64) for x in (cells.total, cells.n_correct))
    best = total - n_correct - n_correct * (harmonic[total] - harmonic[n_correct])
    return np.maximum(_aurc(cells) - best / total, 0.0)


def _augrc(cells):
    rows, errors, _, errors_above = cells.descending
    return (rows * (errors_above + errors / 2)).sum(axis=1) / cells.total**2


def _accuracy_at_coverage(cells, coverage):
    rows, errors, rows_above, errors_above = cells.descending
    # 0.7 · 10 is 7.000000000000001 in doubles, and means 7 rows.
    wanted = np.maximum(np.ceil(coverage * cells.total - 1e-9), 1.0)[:, None]
    last = _first_above(rows_above + rows, wanted - 1)
    rows, errors, rows_above, errors_above = (
        np.take_along_axis(x, last, axis=1) for x in (rows, errors, rows_above, errors_above)
    )
    wrong = errors_above + (wanted - rows_above) * errors / rows
    return 1.0 - (wrong / wanted)[:, 0]


def _coverage_at_risk(cells, risk):
    rows, errors, rows_above, errors_above = cells.descending
    covered = rows_above + rows
    kept = (errors_above + errors) / np.maximum(covered, 1) <= risk
    return np.where(kept, covered, 0.0).max(axis=1) / cells.total


def auroc(score, event):
    """Probability that a row with the event has a higher score than one without; a tie is half.

    score: (n,) finite float on any scale; event: (n,) bool.
    Returns a float in [0, 1]; 0.5 says nothing, higher is better; strictly increasing maps of the
    score leave it as it is. Raises ValueError when all events are alike.
    Source: Hanley and McNeil 1982, https://doi.org/10.1148/radiology.143.1.7063747
    """
    score, event = as_vector("score", score), as_flags("event", event)
    check_same_length(score=score, event=event)
    return _defined("auroc", _auroc(_cells(score, event))[0])


def corp_decomposition(probability, event):
    """Brier score = miscalibration − discrimination + uncertainty, by isotonic recalibration.

    probability: (n,) float in [0, 1]; event: (n,) bool. The score is the mean of
    (probability − event)².
    Returns floats {"score", "miscalibration": what isotonic recalibration takes off the score,
    "discrimination": how far the recalibrated probabilities beat the constant base rate,
    "uncertainty": the score of that constant}; each ≥ 0. Strictly increasing maps of the
    probability leave discrimination as it is. Both terms are biased upward for small n.
    Source: Dimitriadis, Gneiting and Jordan 2021, https://doi.org/10.1073/pnas.2016191118
    """
    probability = as_vector("probability", probability, 0.0, 1.0)
    event = as_flags("event", event)
    check_same_length(probability=probability, event=event)
    cells = _cells(probability, event)
    return {
        "score": float(cells.brier(cells.value)[0]),
        "miscalibration": float(_miscalibration(cells)[0]),
        "discrimination": float(_discrimination(cells)[0]),
        "uncertainty": float(_uncertainty(cells)[0]),
    }


def risk_coverage_curve(confidence, correct):
    """What every threshold on the confidence would do on these rows.

    confidence: (n,) float in [0, 1]; correct: (n,) bool.
    Returns {"threshold", "coverage", "risk"}, each (m,) over the distinct confidences, descending:
    the share of rows with confidence ≥ threshold, and the share of errors among them. Not a
    promise for new rows: a threshold chosen here was chosen to look good here.
    Source: El-Yaniv and Wiener 2010, https://jmlr.org/papers/v11/el-yaniv10a.html
    """
    cells = _cells(*as_confidence_and_correct(confidence, correct))
    rows, errors, rows_above, errors_above = (part[0] for part in cells.descending)
    covered = rows_above + rows
    return {
        "threshold": cells.value[::-1].copy(),
        "coverage": covered / covered[-1],
        "risk": (errors_above + errors) / covered,
    }


def aurc(confidence, correct):
    """Area under the risk–coverage curve: mean over i of the error rate of the i surest rows.

    confidence: (n,) float in [0, 1]; correct: (n,) bool.
    Returns a float in [0, 1]; lower is better. Ties count as the mean over all their orders.
    Depends on the accuracy as much as on the ranking: compare `excess_aurc` or `augrc` as well.
    Source: Geifman et al. 2019, https://arxiv.org/abs/1805.08206
    """
    return float(_aurc(_cells(*as_confidence_and_correct(confidence, correct)))[0])


def excess_aurc(confidence, correct):
    """`aurc` less the one that a perfect ranking with the same number of errors has.

    confidence: (n,) float in [0, 1]; correct: (n,) bool. Returns a float in [0, 1]; 0 is perfect.
    The perfect ranking's area is summed exactly, not approximated.
    Source: Geifman et al. 2019, https://arxiv.org/abs/1805.08206
    """
    return float(_excess_aurc(_cells(*as_confidence_and_correct(confidence, correct)))[0])


def augrc(confidence, correct):
    """Area under the generalized risk–coverage curve: errors let through, over all thresholds.

    confidence: (n,) float in [0, 1]; correct: (n,) bool. The generalized risk of a threshold is the
    share of all rows that lie above it and are wrong; the area runs over coverage from 0 to 1,
    straight within a tie.
    Returns a float in [0, 0.5]; lower is better. Equals
    (1 − AUROC) · accuracy · (1 − accuracy) + (1 − accuracy)² / 2.
    Source: Traub et al. 2024, https://arxiv.org/abs/2407.01032
    """
    return float(_augrc(_cells(*as_confidence_and_correct(confidence, correct)))[0])


def accuracy_at_coverage(confidence, correct, coverage):
    """Accuracy of the ⌈coverage · n⌉ most confident rows, at least one.

    confidence: (n,) float in [0, 1]; correct: (n,) bool; coverage: float in [0, 1]. A tie at the
    cut counts as the mean over all its orders. Returns a float in [0, 1].
    """
    cells = _cells(*as_confidence_and_correct(confidence, correct))
    return float(_accuracy_at_coverage(cells, _as_share("coverage", coverage))[0])


def coverage_at_risk(confidence, correct, risk):
    """Largest share of rows above a threshold whose error rate is at most `risk`.

    confidence: (n,) float in [0, 1]; correct: (n,) bool; risk: float in [0, 1].
    Returns a float in [0, 1], 0 when no threshold does. Thresholds do not divide a tie. Describes
    these rows; on new rows the cut-off found here exceeds the risk about half the time.
    """
    cells = _cells(*as_confidence_and_correct(confidence, correct))
    return float(_coverage_at_risk(cells, _as_share("risk", risk))[0])


# Tests of calibration.


def _kuiper(cells):
    """(statistic, p-value) of the data, NaN where undefined."""
    sigma = np.sqrt((cells.count * cells.value * (1 - cells.value)).sum(axis=1))
    walk = _prefix_sums(cells.gap)
    statistic = _ratio(np.ptp(walk, axis=1), sigma)[0]
    # P(range of Brownian motion on [0, 1] > x); below 0.3 it is 1 to the last digit.
    k = np.arange(1, 31)
    tail = (8 * (-1.0) ** (k - 1) * k * ndtr(-k * np.maximum(statistic, 0.3))).sum()
    return statistic, np.clip(tail, 0.0, 1.0)


def _spiegelhalter(cells):
    """(statistic, p-value) of the data, NaN where undefined."""
    lean = 1 - 2 * cells.value
    variance = (cells.count * lean**2 * cells.value * (1 - cells.value)).sum(axis=1)
    statistic = _ratio((cells.gap * lean).sum(axis=1), np.sqrt(variance))[0]
    return statistic, 2 * ndtr(-np.abs(statistic))


def kuiper_test(confidence, correct):
    """Test of calibration by the range of the cumulative differences correct − confidence.

    confidence: (n,) float in [0, 1]; correct: (n,) bool, rows independent: near-duplicates make
    the p-value too small.
    Returns {"statistic": range over its standard deviation, at least 0, "p_value": in [0, 1], the
    probability of a larger range when the confidences are calibrated, asymptotic in n}. No bins,
    and sensitive to a deviation that keeps its sign over a stretch of confidences. The walk starts
    at 0 and is looked at between distinct confidences only.
    Raises ValueError when every confidence is 0 or 1.
    Source: Arrieta-Ibarra et al. 2022 (ECCE-R), https://jmlr.org/papers/v23/22-0658.html ; law of
    the range: Feller 1951, https://doi.org/10.1214/aoms/1177729589
    """
    statistic, p_value = _kuiper(_cells(*as_confidence_and_correct(confidence, correct)))
    return {"statistic": _defined("kuiper", statistic), "p_value": float(p_value)}


def spiegelhalter_test(confidence, correct):
    """Test of calibration by the Brier score that the confidences themselves announce.

    confidence: (n,) float in [0, 1]; correct: (n,) bool, rows independent: near-duplicates make
    the p-value too small.
    Returns {"statistic": z, normal under calibration, above 0 when the Brier score is larger than
    announced, "p_value": two-sided, in [0, 1]}. It can miss deviations that cancel in the score.
    Raises ValueError when every confidence is 0, 0.5 or 1.
    Source: Spiegelhalter 1986, https://doi.org/10.1002/sim.4780050506
    """
    statistic, p_value = _spiegelhalter(_cells(*as_confidence_and_correct(confidence, correct)))
    return {"statistic": _defined("spiegelhalter", statistic), "p_value": float(p_value)}


# Uncertainty.


def _units(n, group, strata):
    """(n,) index of the unit that a row is drawn with, and the units of each stratum."""
    if n < 2:
        raise ValueError(f"a bootstrap interval needs at least 2 rows, got {n}")
    member = np.arange(n)
    if group is not None:
        group = as_names("group", group)
        check_same_length(arrays=member, group=group)
        names, member = np.unique(group, return_inverse=True)
        if len(names) < 2:
            raise ValueError(f"group must name at least 2 groups, got {len(names)}")
    n_units = int(member.max()) + 1
    if strata is None:
        return member, [np.arange(n_units)]
    strata = as_names("strata", strata)
    check_same_length(arrays=member, strata=strata)
    stratum = np.unique(strata, return_inverse=True)[1]
    of_unit = np.empty(n_units, dtype=np.int64)
    of_unit[member] = stratum
    _refuse_row("strata", "must be the same within a group", strata, of_unit[member] != stratum)
    size = np.bincount(of_unit)
    if size.max() < 2:
        raise ValueError("strata must hold at least 2 rows or groups somewhere, got 1 in each")
    return member, np.split(np.argsort(of_unit, kind="stable"), np.cumsum(size)[:-1])


def _multiplicities(n, group, strata, n_resamples, seed):
    """Yield blocks (B, n) of how often each row occurs in each of n_resamples resamples."""
    member, units_of = _units(n, group, strata)
    rng = np.random.default_rng(seed)
    step = _block_size(n)
    for first in range(0, n_resamples, step):
        block = min(step, n_resamples - first)
        times = np.empty((block, sum(map(len, units_of))), dtype=np.int64)
        for units in units_of:
            size = len(units)
            drawn = rng.integers(size, size=(block, size)) + size * np.arange(block)[:, None]
            counted = np.bincount(drawn.ravel(), minlength=block * size)
            times[:, units] = counted.reshape(block, size)
        yield times[:, member]


def bootstrap_interval(
    statistic, *arrays, group=None, strata=None, n_resamples=1000, seed=0, level=0.95
):
    """Percentile bootstrap interval of `statistic(*arrays)`.

    statistic: takes the resampled arrays, returns a float, or (m,) floats for m statistics that
        share the same resamples. It must not depend on the order of the rows.
    arrays: each (n, ...); rows are drawn together, n ≥ 2.
    group: (n,) or None. Whole groups are drawn, because near-duplicates are not independent.
    strata: (n,) or None. Rows or groups are drawn within each stratum, as many as it has; for
        data whose number of rows a stratum was fixed beforehand.
    level: coverage of the interval, between 0 and 1.
    Returns (low, high), floats or (m,) arrays. The same seed gives the same interval.
    Limits: calibration errors are biased upward, on a resample even more than on the data, so
    their interval may lie above the estimate and does not cover the true error at `level`; a share
    of exactly 0 or 1 gets an interval of width 0; and below about 30 groups the interval is too
    narrow.
    Raises ValueError on unequal lengths, fewer than 2 rows or groups, a group in two strata, or
    when the statistic is not finite on a resample.
    Source: Efron and Tibshirani 1993, ch. 13; whole groups: Field and Welsh 2007,
    https://doi.org/10.1111/j.1467-9868.2007.00593.x
    """
    if not arrays:
        raise ValueError("bootstrap_interval needs at least one array")
    level = _as_level(level)
    n_resamples = as_count("n_resamples", n_resamples)
    tables = [np.atleast_1d(array) for array in arrays]
    check_same_length(**{f"array {i}": table for i, table in enumerate(tables)})
    row = np.arange(len(tables[0]))
    drawn = (
        np.repeat(row, times)
        for block in _multiplicities(len(row), group, strata, n_resamples, seed)
        for times in block
    )
    values = np.array([statistic(*(t[r] for t in tables)) for r in drawn], dtype=np.float64)
    undefined = ~np.isfinite(values.reshape(n_resamples, -1)).all(axis=1)
    if undefined.any():
        raise ValueError(
            f"statistic must be finite on every resample, got {values[undefined][0]} on "
            f"{int(undefined.sum())} of {n_resamples}"
        )
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return (float(low), float(high)) if values.ndim == 1 else (low, high)


def _mean_intervals(rows, group, n_resamples, seed, level=0.95):
    """(low, high), each (m,), of `bootstrap_interval` for the means of rows (n, m)."""
    means = [
        times @ rows / times.sum(axis=1, keepdims=True)
        for times in _multiplicities(len(rows), group, None, n_resamples, seed)
    ]
    return np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2], axis=0)


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
    low, high = _mean_intervals(
        difference[:, None], group, as_count("n_resamples", n_resamples), seed, _as_level(level)
    )
    return {"estimate": float(difference.mean()), "low": float(low[0]), "high": float(high[0])}


# The table.


def _all_measures(layout, scores, multiplicity, n_bins):
    """{name: (R,)} measures of R versions of the data, NaN where undefined.

    scores: (n, 2) log-loss and Brier score of each row.
    """
    cells = layout.cells(multiplicity)
    log_losses, briers = (multiplicity @ scores / cells.total[:, None]).T
    return {
        "accuracy": cells.n_correct / cells.total,
        "mean_confidence": (cells.count * cells.value).sum(axis=1) / cells.total,
        "log_loss": log_losses,
        "brier": briers,
        "auroc": _auroc(cells),
        **{name: error(cells, n_bins) for name, error in CALIBRATION_ERRORS.items()},
        "discrimination": _discrimination(cells),
        "uncertainty": _uncertainty(cells),
        "aurc": _aurc(cells),
        "excess_aurc": _excess_aurc(cells),
        "augrc": _augrc(cells),
        **{("coverage", c): _accuracy_at_coverage(cells, c) for c in COVERAGES},
        **{("risk", r): _coverage_at_risk(cells, r) for r in RISKS},
    }


def _with_interval(name, estimate, resampled):
    """{"estimate", "low", "high"}, and what is to be said where it is undefined."""
    defined = resampled[np.isfinite(resampled)]
    if np.isnan(estimate):
        return {"estimate": None, "low": None, "high": None, "reason": UNDEFINED[name]}
    result = {"estimate": float(estimate), "low": None, "high": None}
    if len(defined):
        low, high = np.quantile(defined, [0.025, 0.975])
        result |= {"low": float(low), "high": float(high)}
    else:
        result["reason"] = f"on every resample {UNDEFINED[name]}"
    if len(defined) < len(resampled):
        result["undefined_resamples"] = len(resampled) - len(defined)
    return result


def _test_of(name, statistic, p_value):
    if np.isnan(statistic):
        return {"statistic": None, "p_value": None, "reason": UNDEFINED[name]}
    return {"statistic": float(statistic), "p_value": float(p_value)}


def calibration_metrics(
    probabilities, label, group=None, strata=None, n_bins=20, n_resamples=1000, seed=0
):
    """Everything that is reported of one set of predictions, ready for JSON.

    probabilities: (n, K); label: (n,) int; n ≥ 2; group, strata: (n,) or None, as in
    `bootstrap_interval`. All but log_loss and brier are about the top label: confidence against
    correct.
    Returns a dict:
      n: rows; n_groups: groups, None without group;
      accuracy, mean_confidence, log_loss (nats), brier, auroc, ece (n_bins of equal width),
          ece_equal_mass, squared_calibration_error, smooth_ece, miscalibration, discrimination,
          uncertainty, aurc, excess_aurc, augrc: each {"estimate", "low", "high"} with the 95 %
          interval of `bootstrap_interval`, all from one set of resamples;
      mce: {"estimate", "count"}, count being the rows of the deciding bin;
      the calibration errors (ece, ece_equal_mass, mce, squared_calibration_error, smooth_ece,
          miscalibration) also have null_mean and null_p95 of `null_calibration_error`;
      accuracy_at_coverage: [{"coverage", "estimate", "low", "high"}] at 0.5, 0.7, 0.9;
      coverage_at_risk: [{"risk", "estimate", "low", "high"}] at 0.01, 0.05, 0.1;
      kuiper, spiegelhalter: {"statistic", "p_value"}, rows taken as independent;
      high_confidence: rows with confidence ≥ threshold (0.9): {"threshold", "count", "share",
          "accuracy"}, accuracy being None where there are none.
    What is undefined is None and has a "reason". Resamples on which a metric is undefined are left
    out of its interval and counted as "undefined_resamples". Time grows with n and n_resamples:
    about 1 s for 1,000 rows, minutes for 1,000,000.
    """
    probabilities, label = _probabilities_and_label(probabilities, label)
    n_bins, n_resamples = as_count("n_bins", n_bins), as_count("n_resamples", n_resamples)
    n, whole = len(label), np.ones((1, len(label)), dtype=np.int64)
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == label
    scores = np.column_stack(
        [_row_log_loss(probabilities, label), _row_brier(probabilities, label)]
    )
    layout = _Layout(confidence, correct)
    resampled = [
        _all_measures(layout, scores, multiplicity, n_bins)
        for multiplicity in _multiplicities(n, group, strata, n_resamples, seed)
    ]
    metrics = {
        name: _with_interval(name, value[0], np.concatenate([block[name] for block in resampled]))
        for name, value in _all_measures(layout, scores, whole, n_bins).items()
    }
    # The bootstrap of a maximum over bins says nothing of the maximum: no interval.
    mce, mce_count = maximum_calibration_error(confidence, correct, n_bins)
    metrics["mce"] = {"estimate": mce, "count": mce_count}
    for name, error in _null_errors(confidence, CALIBRATION_ERRORS, n_bins, 1000, seed).items():
        metrics[name]["null_mean"] = float(error.mean())
        metrics[name]["null_p95"] = float(np.quantile(error, 0.95))
    at_coverage = [{"coverage": c, **metrics.pop(("coverage", c))} for c in COVERAGES]
    at_risk = [{"risk": r, **metrics.pop(("risk", r))} for r in RISKS]
    high_rows = correct[confidence >= HIGH_CONFIDENCE]
    cells = layout.cells(whole)
    return {
        "n": n,
        "n_groups": None if group is None else len(np.unique(as_names("group", group))),
        **metrics,
        "accuracy_at_coverage": at_coverage,
        "coverage_at_risk": at_risk,
        "kuiper": _test_of("kuiper", *_kuiper(cells)),
        "spiegelhalter": _test_of("spiegelhalter", *_spiegelhalter(cells)),
        "high_confidence": {
            "threshold": HIGH_CONFIDENCE,
            "count": len(high_rows),
            "share": len(high_rows) / n,
            "accuracy": float(high_rows.mean()) if len(high_rows) else None,
        },
    }


def score_metrics(
    score, correct, probabilities, label, group=None, n_bins=20, n_resamples=1000, seed=0
):
    """How well a score ranks answers and, once made a probability, is believed; ready for JSON.

    score: (n,) float on any scale, higher for a surer answer; correct: (n,) bool, whether that
    answer is right; probabilities: (n, K) what a calibrator made of the score; label: (n,) int;
    n ≥ 2; group: (n,) or None.
    Returns {"accuracy", "auroc", "aurc": of score and correct; "log_loss" (nats), "ece": of
    probabilities and label}, each as in `calibration_metrics`, all from one set of resamples.
    """
    score, correct = as_vector("score", score), as_flags("correct", correct)
    probabilities, label = _probabilities_and_label(probabilities, label)
    check_same_length(score=score, correct=correct, label=label)
    n_bins, n_resamples = as_count("n_bins", n_bins), as_count("n_resamples", n_resamples)
    confidence, loss = probabilities.max(axis=1), _row_log_loss(probabilities, label)
    ranked = _Layout(score, correct)
    believed = _Layout(confidence, probabilities.argmax(axis=1) == label)

    def measures(multiplicity):
        cells, calibrated = ranked.cells(multiplicity), believed.cells(multiplicity)
        return {
            "accuracy": cells.n_correct / cells.total,
            "auroc": _auroc(cells),
            "aurc": _aurc(cells),
            "log_loss": multiplicity @ loss / cells.total,
            "ece": _ece(calibrated, n_bins),
        }

    whole = measures(np.ones((1, len(label)), dtype=np.int64))
    drawn = [measures(m) for m in _multiplicities(len(label), group, None, n_resamples, seed)]
    metrics = {
        name: _with_interval(name, value[0], np.concatenate([block[name] for block in drawn]))
        for name, value in whole.items()
    }
    null = _null_errors(confidence, ["ece"], n_bins, 1000, seed)["ece"]
    metrics["ece"] |= {"null_mean": float(null.mean()), "null_p95": float(np.quantile(null, 0.95))}
    return metrics


# Comparison of methods.


def ranking_difference(first, second, group=None, n_resamples=1000, seed=0):
    """What AUROC and AURC of a second way to score the same rows differ by from those of a first.

    first, second: (score (n,), correct (n,) bool) each, scores on any scale; n ≥ 2; group: (n,) or
    None. Returns {"auroc", "aurc"}, each {"estimate": second − first, "low", "high"} with the 95 %
    interval of `bootstrap_interval`; what is undefined is None and has a "reason".
    """
    layouts = []
    for name, (score, correct) in (("first", first), ("second", second)):
        score, correct = as_vector(f"score of the {name}", score), as_flags("correct", correct)
        check_same_length(score=score, correct=correct)
        layouts.append(_Layout(score, correct))
    n, n_resamples = len(first[0]), as_count("n_resamples", n_resamples)
    check_same_length(first=first[0], second=second[0])

    def differences(multiplicity):
        a, b = (layout.cells(multiplicity) for layout in layouts)
        return {"auroc": _auroc(b) - _auroc(a), "aurc": _aurc(b) - _aurc(a)}

    whole = differences(np.ones((1, n), dtype=np.int64))
    drawn = [differences(m) for m in _multiplicities(n, group, None, n_resamples, seed)]
    return {
        name: _with_interval(name, value[0], np.concatenate([block[name] for block in drawn]))
        for name, value in whole.items()
    }


def holm(p_values):
    """p-values corrected for their number by Holm's step-down method.

    p_values: (m,) float in [0, 1]. Returns (m,) float in [0, 1], in the same order: rejecting those
    below α keeps the probability of any false rejection at α, however the tests depend on each
    other.
    Source: Holm 1979, https://www.jstor.org/stable/4615733
    """
    p_values = as_vector("p_values", p_values, 0.0, 1.0)
    order = np.argsort(p_values, kind="stable")
    raised = p_values[order] * np.arange(len(order), 0, -1)
    result = np.empty(len(order))
    result[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return result


def _clustered_p_value(difference, member):
    """Two-sided p-value of mean difference 0, t-test with cluster-robust variance over groups.

    difference, member: (n,) value and index of the group of each row. Never below 2^(1 − groups),
    the least that flipping the signs of whole groups could give: few groups that happen to agree
    are no proof.
    """
    n, n_groups = len(difference), int(member.max()) + 1
    mean = difference.mean()
    spread = np.bincount(member, weights=difference - mean)
    error = np.sqrt(n_groups / (n_groups - 1) * (spread**2).sum()) / n
    if mean == 0:
        return 1.0
    least = 2.0 ** (1 - n_groups)
    if error == 0:
        return least
    return max(least, float(2 * stdtr(n_groups - 1, -np.abs(mean / error))))


def compare(probabilities_by_method, label, reference="raw", group=None, seed=0):
    """Whether each method's log-loss and Brier score differ from the reference's, row by row.

    probabilities_by_method: dict of (n, K) by name, the reference among them; label: (n,) int,
    n ≥ 2; group: (n,) or None.
    Returns for every other method {"log_loss": d, "brier": d}, d being the mean of method −
    reference: {"estimate": below 0 where the method is better, "low", "high": its 95 % bootstrap
    interval, "p_value": t-test with cluster-robust variance and groups − 1 degrees of freedom (a
    row being its own group without group), at least 2^(1 − groups), "p_value_holm": corrected over
    the methods, for each score}. Row differences below 1e-12 count as 0.
    Source: Liang and Zeger 1986, https://doi.org/10.1093/biomet/73.1.13 ; Holm 1979
    """
    if reference not in probabilities_by_method:
        raise ValueError(
            f"probabilities_by_method must hold the reference {reference!r}, "
            f"got {list(probabilities_by_method)}"
        )
    methods = [name for name in probabilities_by_method if name != reference]
    if not methods:
        raise ValueError(f"probabilities_by_method must hold a method besides {reference!r}")
    shape = np.shape(probabilities_by_method[reference])
    rows = {}
    for name in (reference, *methods):
        checked = _probabilities_and_label(
            probabilities_by_method[name], label, f"probabilities of {name!r}"
        )
        if checked[0].shape != shape:
            raise ValueError(
                f"probabilities of {name!r} must have the shape of those of {reference!r} "
                f"({shape}), got {checked[0].shape}"
            )
        rows[name] = np.column_stack([_row_log_loss(*checked), _row_brier(*checked)])  # (n, 2)
    difference = np.column_stack([rows[name] - rows[reference] for name in methods])  # (n, 2M)
    difference[np.abs(difference) < ROUNDING] = 0.0
    low, high = _mean_intervals(difference, group, 1000, seed)
    estimate = difference.mean(axis=0)
    member = _units(len(difference), group, None)[0]
    p_value = np.array([_clustered_p_value(column, member) for column in difference.T])
    corrected = np.empty(len(p_value))
    for score in (0, 1):  # log-loss, Brier
        corrected[score::2] = holm(p_value[score::2])
    keys = ("estimate", "low", "high", "p_value", "p_value_holm")
    columns = np.stack([estimate, low, high, p_value, corrected], axis=1).tolist()
    found = [dict(zip(keys, column, strict=True)) for column in columns]
    return {
        name: {"log_loss": found[2 * i], "brier": found[2 * i + 1]}
        for i, name in enumerate(methods)
    }
