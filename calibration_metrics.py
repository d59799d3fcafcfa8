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

    expected_calibration_error(confidence, correct)               # a number
    measure("ece", confidence, correct, group=group)              # with its interval and null band
    measure("aurc", *first, reference=second, group=group)        # paired: first − second
    calibration_metrics(probabilities, label, group)              # everything
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from numbers import Real

import numpy as np
from scipy.fft import dct, idct
from scipy.optimize import isotonic_regression
from scipy.special import ndtr, ndtri, stdtr

HIGH_CONFIDENCE = 0.9
COVERAGES = (0.5, 0.7, 0.9)  # at which the table gives the accuracy
RISKS = (0.01, 0.05, 0.1)  # at which the table gives the coverage
SUM_TOLERANCE = 1e-5  # float32 probabilities of a hundred labels stay within it
PROBABILITY_FLOOR = float(np.finfo(np.float64).eps)  # 2.2e-16: one row costs at most 36.04 nats
SIMULATION_BLOCK = 250_000  # numbers held at once in one array of a simulation or a bootstrap
SMOOTHING_GRID = 1024  # points on [0, 1] of the smooth calibration error
ROUNDING = 1e-12  # a difference of two scores below it is rounding
FEW_GROUPS = 30  # a bootstrap interval of fewer is too narrow
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


def _members(group, name, rows):
    """(n,) index of the group of each of the rows (n,), called `name`; None: each is its own."""
    if group is None:
        return np.arange(len(rows))
    group = as_names("group", group)
    check_same_length(**{name: rows, "group": group})
    return np.unique(group, return_inverse=True)[1]


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
    sums = np.zeros((len(values), values.shape[1] + 1))
    np.cumsum(values, axis=1, out=sums[:, 1:])
    return sums


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


@lru_cache(maxsize=1)
def _harmonic(n):
    """(n + 1,) sums 1 + 1/2 + ... + 1/i for i = 0 ... n."""
    return np.r_[0.0, np.cumsum(1 / np.arange(1, n + 1))]


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
    def sums(self):
        """(rows, correct rows, expected correct rows) of the first 0, 1, ... m cells."""
        return tuple(map(_prefix_sums, (self.count, self.hits, self.count * self.value)))

    @cached_property
    def total(self):
        """(R,) rows."""
        return self.sums[0][:, -1]

    @cached_property
    def n_correct(self):
        """(R,) correct rows."""
        return self.sums[1][:, -1]

    @cached_property
    def above(self):
        """(rows, errors), each (R, m + 1), of the 0, 1, ... m cells of highest confidence."""
        rows, correct, _ = self.sums
        return tuple(part[:, -1:] - part[:, ::-1] for part in (rows, rows - correct))

    @cached_property
    def aurc(self):
        """(R,) area under the risk–coverage curve."""
        rows, errors = self.above
        of_cell = np.diff(errors, axis=1)
        rate = of_cell / np.maximum(np.diff(rows, axis=1), 1)  # of a row of a tie, in any place
        places = np.diff(_harmonic(int(self.total.max()))[rows.astype(np.int64)], axis=1)
        area = of_cell + (errors[:, :-1] - rows[:, :-1] * rate) * places
        return area.sum(axis=1) / self.total

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
    """Which row belongs to which cell; sorted once, used for every version of the data.

    order: (n,) rows by ascending confidence; value: (m,) as of `_Cells`.
    """

    def __init__(self, confidence, correct):
        self.order = np.argsort(confidence, kind="stable")
        ranked = confidence[self.order]
        self.start = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])  # (m,)
        self.value = ranked[self.start]
        self.correct = correct[self.order]

    def gathered(self, rows):
        """(R, m) sums over the rows of each cell, of values (R, n) of the rows in `order`."""
        rows = rows.astype(np.float64)
        alone = len(self.start) == len(self.order)
        return rows if alone else np.add.reduceat(rows, self.start, axis=1)

    def cells(self, times):
        """`_Cells` of R versions in which the rows, in `order`, occur times (R, n)."""
        count, hits = self.gathered(times), self.gathered(times * self.correct)
        return _Cells(self.value, count, hits, len(self.order))


def _cells(confidence, correct):
    """The one version that is the data itself."""
    return _Layout(confidence, correct).cells(np.ones((1, len(confidence))))


def _block_size(width):
    """How many versions of `width` numbers are computed at once."""
    return max(1, SIMULATION_BLOCK // max(width, SMOOTHING_GRID))


def _common_luck(layout, member):
    """The share of groups, in [0, 1], whose rows have their luck in common: how alike they are.

    member: (n,) index of the group of each row in the layout's order. If in that share of the
    groups one draw decided over all rows, residuals of the same group would have the covariance
    that they have. They are taken from the isotonic regression, for what all rows of a confidence
    have in common is miscalibration, not luck. 1, copies, where the rows cannot tell.
    """
    cells = layout.cells(np.ones((1, len(member))))
    expected = np.repeat(cells.recalibrated[0], cells.count[0].astype(np.int64))  # ascending
    residual = layout.correct - expected
    by_group = np.argsort(member, kind="stable")
    size = np.bincount(member)
    later = np.empty(len(member))  # rows of the same group after this one
    later[by_group] = np.cumsum(size)[member[by_group]] - 1 - np.arange(len(member))

    def over_pairs(value):  # sum of the products of all ordered pairs of two rows of a group
        return (np.bincount(member, weights=value) ** 2).sum() - (value**2).sum()

    # Rows that share a draw are both right with the lower of their two probabilities.
    largest = 2 * (expected * later).sum() - over_pairs(expected)
    if largest <= ROUNDING:
        return 1.0
    return float(np.clip(over_pairs(residual) / largest, 0.0, 1.0))


def _simulated_truth(confidence, n_draws, seed, correct=None, member=None):
    """Yield `_Cells` of blocks of draws in which each row is correct with its confidence.

    Independently of the others or, with member (n,), the index of its group, with luck in common
    as far as correct (n,) shows it.
    """
    n = len(confidence)
    layout = _Layout(confidence, np.zeros(n, dtype=bool) if member is None else correct)
    cells = layout.cells(np.ones((1, n)))
    count = cells.count.astype(np.int64)
    rng = np.random.default_rng(seed)
    if member is not None:
        member = member[layout.order]
        n_groups, share = int(member.max()) + 1, _common_luck(layout, member)
        own, common, joined = rng.spawn(3)
    step = _block_size(n)
    for first in range(0, n_draws, step):
        block = min(step, n_draws - first)
        if member is None:
            hits = rng.binomial(count, cells.value, size=(block, count.shape[1]))
            hits = hits.astype(np.float64)
        else:
            of_group = common.random((block, n_groups))
            of_group[joined.random((block, n_groups)) >= share] = np.nan  # each row for itself
            luck, alone = of_group[:, member], own.random((block, n))
            luck = np.where(np.isnan(luck), alone, luck)
            hits = layout.gathered(luck < confidence[layout.order])
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
        inner = _first_above(cells.sums[0][:, 1:], rank)
    else:
        raise ValueError(f'binning must be "width" or "mass", got {binning!r}')
    return np.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (0, len(cells.value)))), edges


def _bin_sums(cells, start):
    """(rows, correct rows, summed confidence) of the bins that begin at `start`: (R, n_bins)."""
    return tuple(np.diff(np.take_along_axis(part, start, axis=1), axis=1) for part in cells.sums)


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
    left = np.arange(-1, SMOOTHING_GRID)
    start = np.searchsorted(position, np.append(left, SMOOTHING_GRID))
    _, correct, expected = cells.sums
    gap = correct - expected
    moment = _prefix_sums((cells.hits - cells.count * cells.value) * position)
    gap, moment = (np.diff(part[:, start], axis=1) for part in (gap, moment))
    to_right = moment - left * gap
    grid = np.zeros((len(gap), SMOOTHING_GRID + 2))
    grid[:, :-1] += gap - to_right
    grid[:, 1:] += to_right
    grid[:, 1] += grid[:, 0]
    grid[:, -2] += grid[:, -1]
    # A Gaussian reflected at 0 and 1 acts on cosines, one factor each.
    wave = dct(grid[:, 1:-1] / cells.total[:, None], axis=1)
    decay = -((np.pi * np.arange(SMOOTHING_GRID)) ** 2) / 2

    def smoothed(sigma):
        return np.abs(idct(wave * np.exp(decay * sigma[:, None] ** 2), axis=1)).sum(axis=1)

    low, high = np.zeros(len(wave)), np.ones(len(wave))
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


def _null_values(confidence, kernels, n_draws, seed, correct=None, member=None):
    """{name: (n_draws,)} of kernels {name: function of `_Cells`} on the same simulated truths."""
    blocks = [
        {name: kernel(cells) for name, kernel in kernels.items()}
        for cells in _simulated_truth(confidence, n_draws, seed, correct, member)
    ]
    return {name: np.concatenate([block[name] for block in blocks]) for name in kernels}


def _error_kernels(names, n_bins):
    """{name: function of `_Cells`} of the calibration errors."""
    return {name: partial(CALIBRATION_ERRORS[name], n_bins=n_bins) for name in names}


def null_calibration_error(
    confidence, n_bins=20, n_draws=1000, seed=0, metric="ece", correct=None, group=None
):
    """The calibration error that a perfectly calibrated model of these confidences would show.

    confidence: (n,) float in [0, 1]. Truth is drawn n_draws times, each row being correct with a
    probability equal to its confidence.
    metric: one of CALIBRATION_ERRORS: "ece", "ece_equal_mass", "mce", "squared_calibration_error"
    (n ≥ 2), "smooth_ece", "miscalibration"; n_bins matters to the first four.
    group: (n,) or None. Without it rows are independent of each other. Near-duplicates are right or
    wrong together, which adds to the errors of a calibrated model as well; correct (n,) bool says
    how much: in a share of the groups one draw decides over all rows, the share that gives the
    residuals within groups the covariance that they have.
    Returns (mean, 95th percentile). A measured error below the percentile is no evidence of
    miscalibration.
    Source: consistency resampling, Bröcker and Smith 2007, https://doi.org/10.1175/WAF993.1 , here
    with the confidences held fixed.
    """
    confidence = as_vector("confidence", confidence, 0.0, 1.0)
    if metric not in CALIBRATION_ERRORS:
        raise ValueError(f"metric must be one of {', '.join(CALIBRATION_ERRORS)}, got {metric!r}")
    kernels = _error_kernels([metric], as_count("n_bins", n_bins))
    member = None
    if group is not None:
        if correct is None:
            raise ValueError("group needs correct, which says how alike the rows of a group are")
        confidence, correct = as_confidence_and_correct(confidence, correct)
        member = _members(group, "confidence", confidence)
    n_draws = as_count("n_draws", n_draws)
    error = _null_values(confidence, kernels, n_draws, seed, correct, member)[metric]
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
    correct = as_flags("correct", correct)
    member = _members(group, "correct", correct)
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
    All but edges and count are NaN where a bin is empty. With group, both bands let the rows of a
    group be right or wrong together as `null_calibration_error` does.
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
    member = None if group is None else _members(group, "confidence", confidence)
    null_correct, null_curve = [], []
    for drawn in _simulated_truth(confidence, n_null, seed, correct, member):
        null_correct.append(_bin_sums(drawn, start)[1])
        null_curve.append(drawn.recalibrated[:, knot])
    null, corp_null = (
        np.quantile(np.concatenate(draws), [0.025, 0.975], axis=0)
        for draws in (null_correct, null_curve)
    )
    if member is None:
        low, high = wilson_interval(n_correct, rows)
    else:
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
    rows, correct, _ = cells.sums
    misses = rows - correct
    below = misses[:, :-1] + misses[:, 1:]  # twice the rows below, of a tie half
    pairs = cells.n_correct * (cells.total - cells.n_correct)
    return _ratio((cells.hits * below).sum(axis=1) / 2, pairs)


def _uncertainty(cells):
    share = cells.n_correct / cells.total
    return share * (1 - share)


def _discrimination(cells):
    return np.maximum(_uncertainty(cells) - cells.brier(cells.recalibrated), 0.0)


def _excess_aurc(cells):
    harmonic = _harmonic(int(cells.total.max()))
    total, n_correct = (x.astype(np.int64) for x in (cells.total, cells.n_correct))
    best = total - n_correct - n_correct * (harmonic[total] - harmonic[n_correct])
    return np.maximum(cells.aurc - best / total, 0.0)


def _augrc(cells):
    rows, errors = cells.above
    area = np.diff(rows, axis=1) * (errors[:, :-1] + errors[:, 1:]) / 2
    return area.sum(axis=1) / cells.total**2


def _accuracy_at_coverage(cells, coverage):
    rows, errors = cells.above
    # 0.7 · 10 is 7.000000000000001 in doubles, and means 7 rows.
    wanted = np.maximum(np.ceil(coverage * cells.total - 1e-9), 1.0)[:, None]
    last = _first_above(rows[:, 1:], wanted - 1)
    before, wrong = (np.take_along_axis(x, last, axis=1) for x in (rows, errors))
    of_cell, wrong_of_cell = (
        np.take_along_axis(np.diff(x, axis=1), last, axis=1) for x in (rows, errors)
    )
    wrong = wrong + (wanted - before) * wrong_of_cell / of_cell
    return 1.0 - (wrong / wanted)[:, 0]


def _coverage_at_risk(cells, risk):
    rows, errors = (x[:, 1:] for x in cells.above)
    kept = errors / np.maximum(rows, 1) <= risk
    return np.where(kept, rows, 0.0).max(axis=1) / cells.total


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
    promise for new rows: a threshold chosen here was chosen to look good here. With intervals:
    `risk_coverage_band`; at one coverage or risk: `measure`.
    Source: El-Yaniv and Wiener 2010, https://jmlr.org/papers/v11/el-yaniv10a.html
    """
    cells = _cells(*as_confidence_and_correct(confidence, correct))
    rows, errors = (part[0, 1:] for part in cells.above)
    return {
        "threshold": cells.value[::-1].copy(),
        "coverage": rows / rows[-1],
        "risk": errors / rows,
    }


def aurc(confidence, correct):
    """Area under the risk–coverage curve: mean over i of the error rate of the i surest rows.

    confidence: (n,) float in [0, 1]; correct: (n,) bool.
    Returns a float in [0, 1]; lower is better. Ties count as the mean over all their orders.
    Depends on the accuracy as much as on the ranking: compare `excess_aurc` or `augrc` as well.
    Source: Geifman et al. 2019, https://arxiv.org/abs/1805.08206
    """
    return float(_cells(*as_confidence_and_correct(confidence, correct)).aurc[0])


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
    """(R,) statistics, NaN where undefined."""
    sigma = np.sqrt((cells.count * cells.value * (1 - cells.value)).sum(axis=1))
    _, correct, expected = cells.sums
    return _ratio(np.ptp(correct - expected, axis=1), sigma)


def _kuiper_p_value(statistic):
    # P(range of Brownian motion on [0, 1] > x); below 0.3 it is 1 to the last digit.
    k = np.arange(1, 31)
    tail = (8 * (-1.0) ** (k - 1) * k * ndtr(-k * np.maximum(statistic, 0.3))).sum()
    return np.clip(tail, 0.0, 1.0)


def _spiegelhalter(cells):
    """(R,) statistics, NaN where undefined."""
    lean = 1 - 2 * cells.value
    variance = (cells.count * lean**2 * cells.value * (1 - cells.value)).sum(axis=1)
    gap = cells.hits - cells.count * cells.value
    return _ratio((gap * lean).sum(axis=1), np.sqrt(variance))


CALIBRATION_TESTS = {  # statistic of `_Cells`, and its p-value when rows are independent
    "kuiper": (_kuiper, _kuiper_p_value),
    "spiegelhalter": (_spiegelhalter, lambda statistic: 2 * ndtr(-np.abs(statistic))),
}


def _calibration_test(name, cells, null=None):
    """{"statistic", "p_value"}: the law of the statistic, or where it lies among null (n_draws,).

    NaN where undefined.
    """
    of_cells, p_value = CALIBRATION_TESTS[name]
    statistic = of_cells(cells)[0]
    if null is None:
        return {"statistic": float(statistic), "p_value": float(p_value(statistic))}
    as_large = np.abs(null) >= np.abs(statistic) - ROUNDING
    return {"statistic": float(statistic), "p_value": float((1 + as_large.sum()) / (1 + len(null)))}


def _tested(name, confidence, correct, group, n_draws, seed):
    confidence, correct = as_confidence_and_correct(confidence, correct)
    null = None
    if group is not None:
        member = _members(group, "confidence", confidence)
        kernels, n_draws = {name: CALIBRATION_TESTS[name][0]}, as_count("n_draws", n_draws)
        null = _null_values(confidence, kernels, n_draws, seed, correct, member)[name]
    result = _calibration_test(name, _cells(confidence, correct), null)
    _defined(name, result["statistic"])
    return result


def kuiper_test(confidence, correct, group=None, n_draws=1000, seed=0):
    """Test of calibration by the range of the cumulative differences correct − confidence.

    confidence: (n,) float in [0, 1]; correct: (n,) bool; group: (n,) or None.
    Returns {"statistic": range over the standard deviation of its end if rows were independent, at
    least 0, "p_value": in [0, 1], the probability of a larger range when the confidences are
    calibrated}. No bins, and sensitive to a deviation that keeps its sign over a stretch of
    confidences. The walk starts at 0 and is looked at between distinct confidences only.
    Without group the p-value takes rows as independent and is asymptotic in n. With it, it is the
    share of n_draws simulated truths, as of `null_calibration_error` with group, whose statistic is
    as large: at least 1 / (n_draws + 1).
    Raises ValueError when every confidence is 0 or 1.
    Source: Arrieta-Ibarra et al. 2022 (ECCE-R), https://jmlr.org/papers/v23/22-0658.html ; law of
    the range: Feller 1951, https://doi.org/10.1214/aoms/1177729589
    """
    return _tested("kuiper", confidence, correct, group, n_draws, seed)


def spiegelhalter_test(confidence, correct, group=None, n_draws=1000, seed=0):
    """Test of calibration by the Brier score that the confidences themselves announce.

    confidence: (n,) float in [0, 1]; correct: (n,) bool; group: (n,) or None, as of `kuiper_test`.
    Returns {"statistic": z, normal under calibration of independent rows, above 0 when the Brier
    score is larger than announced, "p_value": two-sided, in [0, 1]}. It can miss deviations that
    cancel in the score.
    Raises ValueError when every confidence is 0, 0.5 or 1.
    Source: Spiegelhalter 1986, https://doi.org/10.1002/sim.4780050506
    """
    return _tested("spiegelhalter", confidence, correct, group, n_draws, seed)


# Uncertainty.


@dataclass(frozen=True)
class _Units:
    """What is drawn: rows or whole groups, within their strata.

    member: (n,) index of the unit of each row; of_strata: the (h,) units of each stratum.
    """

    member: np.ndarray
    of_strata: list

    @cached_property
    def number(self):
        return sum(map(len, self.of_strata))

    def sums(self, rows):
        """(units, m) sums of rows (n, m) over the rows of each unit."""
        columns = [np.bincount(self.member, column, self.number) for column in rows.T]
        return np.column_stack(columns)

    def draws(self, n_resamples, seed):
        """Yield blocks (B, units) of how often each unit occurs in each of n_resamples."""
        rng = np.random.default_rng(seed)
        step = _block_size(len(self.member))
        for first in range(0, n_resamples, step):
            block = min(step, n_resamples - first)
            times = np.empty((block, self.number))
            for units in self.of_strata:
                size = len(units)
                drawn = rng.integers(size, size=(block, size)) + size * np.arange(block)[:, None]
                counted = np.bincount(drawn.ravel(), minlength=block * size)
                times[:, units] = counted.reshape(block, size)
            yield times


def _units(n, group, strata):
    """The `_Units` of n ≥ 2 rows."""
    if n < 2:
        raise ValueError(f"a bootstrap interval needs at least 2 rows, got {n}")
    member = _members(group, "arrays", np.arange(n))
    n_units = int(member.max()) + 1
    if n_units < 2:
        raise ValueError(f"group must name at least 2 groups, got {n_units}")
    if strata is None:
        return _Units(member, [np.arange(n_units)])
    strata = as_names("strata", strata)
    check_same_length(arrays=member, strata=strata)
    stratum = np.unique(strata, return_inverse=True)[1]
    of_unit = np.empty(n_units, dtype=np.int64)
    of_unit[member] = stratum
    _refuse_row("strata", "must be the same within a group", strata, of_unit[member] != stratum)
    size = np.bincount(of_unit)
    if size.max() < 2:
        raise ValueError("strata must hold at least 2 rows or groups somewhere, got 1 in each")
    of_strata = np.split(np.argsort(of_unit, kind="stable"), np.cumsum(size)[:-1])
    return _Units(member, of_strata)


def bootstrap_interval(
    statistic, *arrays, group=None, strata=None, n_resamples=1000, seed=0, level=0.95
):
    """Percentile bootstrap interval of `statistic(*arrays)`, whatever it is.

    statistic: takes the resampled arrays, returns a float, or (m,) floats for m statistics that
        share the same resamples. It must not depend on the order of the rows.
    arrays: each (n, ...); rows are drawn together, n ≥ 2.
    group: (n,) or None. Whole groups are drawn, because near-duplicates are not independent.
    strata: (n,) or None. Rows or groups are drawn within each stratum, as many as it has; for
        data whose number of rows a stratum was fixed beforehand.
    level: coverage of the interval, between 0 and 1.
    Returns (low, high), floats or (m,) arrays. The same seed gives the same interval.
    Limits: a statistic that is biased on the data, as calibration errors are, is so even more on a
    resample, and its interval is off by the difference: `measure` takes that off. A share of
    exactly 0 or 1 gets an interval of width 0; below about FEW_GROUPS groups the interval is too
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
    units = _units(len(row), group, strata)
    drawn = (
        np.repeat(row, times[units.member].astype(np.int64))
        for block in units.draws(n_resamples, seed)
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


def _mean_intervals(rows, units, n_resamples, seed, level=0.95):
    """(low, high), each (m,), of `bootstrap_interval` for the means of rows (n, m)."""
    sums, size = units.sums(rows), np.bincount(units.member)
    means = [times @ sums / (times @ size)[:, None] for times in units.draws(n_resamples, seed)]
    return np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2], axis=0)


def paired_difference(
    statistic_a_rows,
    statistic_b_rows,
    group=None,
    strata=None,
    n_resamples=1000,
    seed=0,
    level=0.95,
):
    """Mean of a − b over the same rows, with its bootstrap interval.

    statistic_a_rows, statistic_b_rows: (n,) one value a row for each of two models: log-loss,
        squared error, correct. Anything that is a mean over rows; for others see `measure`.
    group, strata: (n,) or None, as in `bootstrap_interval`.
    Returns {"estimate", "low", "high"}; an interval without 0 says that the models differ. Pairing
    removes the difficulty of the rows, which two separate intervals count twice.
    """
    a = as_vector("statistic_a_rows", statistic_a_rows)
    b = as_vector("statistic_b_rows", statistic_b_rows)
    check_same_length(statistic_a_rows=a, statistic_b_rows=b)
    difference = a - b
    low, high = _mean_intervals(
        difference[:, None],
        _units(len(a), group, strata),
        as_count("n_resamples", n_resamples),
        seed,
        _as_level(level),
    )
    return {"estimate": float(difference.mean()), "low": float(low[0]), "high": float(high[0])}


# One metric, and the table of all: estimates with intervals and null bands.

ROW_SCORES = {"log_loss": _row_log_loss, "brier": _row_brier}
# Of `_Cells` and the one thing that may be chosen: the number of bins, a coverage or a risk.
CELL_METRICS = {
    "accuracy": lambda cells, _: cells.n_correct / cells.total,
    "mean_confidence": lambda cells, _: (cells.count * cells.value).sum(axis=1) / cells.total,
    "auroc": lambda cells, _: _auroc(cells),
    **CALIBRATION_ERRORS,
    "discrimination": lambda cells, _: _discrimination(cells),
    "uncertainty": lambda cells, _: _uncertainty(cells),
    "aurc": lambda cells, _: cells.aurc,
    "excess_aurc": lambda cells, _: _excess_aurc(cells),
    "augrc": lambda cells, _: _augrc(cells),
    "accuracy_at_coverage": _accuracy_at_coverage,
    "coverage_at_risk": _coverage_at_risk,
}
METRICS = (*ROW_SCORES, *CELL_METRICS)
AT = {"accuracy_at_coverage", "coverage_at_risk"}  # of a share that must be named
RANKINGS = {"auroc", "aurc", "excess_aurc", "augrc", *AT}  # only the order of the rows matters
# Chance adds to these on the data, and once more on a resample; below 0 they cannot be.
BIASED_UPWARD = {*CALIBRATION_ERRORS, "discrimination"}
MAY_BE_NEGATIVE = {"squared_calibration_error"}


class _Sample:
    """The checked rows of one model, laid out for any number of resamples of their units."""

    def __init__(self, predicted, truth, metric=None):
        self.probabilities, self.label = None, None
        if as_floats("predicted", predicted).ndim == 2:
            self.probabilities, self.label = _probabilities_and_label(predicted, truth)
            self.confidence = self.probabilities.max(axis=1)
            self.correct = self.probabilities.argmax(axis=1) == self.label
            return
        if metric in ROW_SCORES:
            shape = np.shape(predicted)
            raise ValueError(f"{metric} needs probabilities of shape (n, K), got {shape}")
        scale = (-np.inf, np.inf) if metric in RANKINGS else (0.0, 1.0)
        self.confidence = as_vector("confidence", predicted, *scale)
        self.correct = as_flags("correct", truth)
        check_same_length(confidence=self.confidence, correct=self.correct)

    def partner(self, reference, metric):
        """The `_Sample` of reference, (predicted, truth) of another model on the same rows."""
        if not isinstance(reference, tuple | list) or len(reference) != 2:
            raise ValueError("reference must be (predicted, truth) of another model")
        other = _Sample(*reference, metric)
        check_same_length(predicted=self.confidence, reference=other.confidence)
        if self.label is not None and other.label is not None:
            differ = self.label != other.label
            _refuse_row("label of the reference", "must be of the same row", other.label, differ)
        return other

    def __len__(self):
        return len(self.confidence)

    @cached_property
    def layout(self):
        return _Layout(self.confidence, self.correct)

    def evaluator(self, units, asked):
        """A function from times (R, units) to {key: (R,)}.

        asked: {key: (metric, what it is asked for)}.
        """
        scored = {metric for metric, _ in asked.values()} & set(ROW_SCORES)
        size = np.bincount(units.member)
        sums = {
            score: units.sums(ROW_SCORES[score](self.probabilities, self.label)[:, None])
            for score in scored
        }
        of_cells = any(metric in CELL_METRICS for metric, _ in asked.values())
        member = units.member[self.layout.order] if of_cells else None

        def evaluate(times):
            cells = self.layout.cells(times[:, member]) if of_cells else None
            return {
                key: (times @ sums[metric])[:, 0] / (times @ size)
                if metric in scored
                else CELL_METRICS[metric](cells, option)
                for key, (metric, option) in asked.items()
            }

        return evaluate

    def mce_count(self, n_bins):
        return maximum_calibration_error(self.confidence, self.correct, n_bins)[1]

    def null(self, kernels, n_draws, seed, units, group):
        """`_null_values`; the units are groups if group is not None."""
        member = None if group is None else units.member
        return _null_values(self.confidence, kernels, n_draws, seed, self.correct, member)


def _with_interval(metric, estimate, resampled, level, paired=False):
    """{"estimate", "low", "high"}, and what is to be said where it is undefined."""
    if np.isnan(estimate):
        return {"estimate": None, "low": None, "high": None, "reason": UNDEFINED[metric]}
    defined = resampled[np.isfinite(resampled)]
    result = {"estimate": float(estimate), "low": None, "high": None}
    if len(defined):
        limits = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
        if metric in BIASED_UPWARD:
            limits -= defined.mean() - estimate
            if not paired and metric not in MAY_BE_NEGATIVE:
                limits = np.maximum(limits, 0.0)
        result |= {"low": float(limits[0]), "high": float(limits[1])}
    else:
        result["reason"] = f"on every resample {UNDEFINED[metric]}"
    if len(defined) < len(resampled):
        result["undefined_resamples"] = len(resampled) - len(defined)
    return result


def _intervals(evaluate, asked, units, n_resamples, seed, level, paired=False):
    """{key: `_with_interval`} of what evaluate, as of `_Sample.evaluator`, finds."""
    whole = evaluate(np.ones((1, units.number)))
    blocks = [evaluate(times) for times in units.draws(n_resamples, seed)]
    return {
        key: _with_interval(
            metric, whole[key][0], np.concatenate([b[key] for b in blocks]), level, paired
        )
        for key, (metric, _) in asked.items()
    }


def _add_null(result, error):
    """Put the mean and the 95th percentile of null errors (n_draws,) into result."""
    if result["estimate"] is not None:
        result["null_mean"] = float(error.mean())
        result["null_p95"] = float(np.quantile(error, 0.95))


def measure(
    metric,
    predicted,
    truth,
    reference=None,
    group=None,
    strata=None,
    n_bins=20,
    coverage=None,
    risk=None,
    n_resamples=1000,
    seed=0,
    level=0.95,
):
    """One metric with its bootstrap interval and, for a calibration error, its null band.

    metric: one of METRICS, named as in the table of `calibration_metrics`.
    predicted, truth: probabilities (n, K) and label (n,) int, of whose top label all metrics but
        log_loss and brier are; or, for these, confidence (n,) and correct (n,) bool. For RANKINGS
        the confidence may be a score on any scale. n ≥ 2.
    reference: None, or (predicted, truth) of another model on the same rows in the same order: what
        is measured is then the difference to it, first − reference, on the same resamples.
    group, strata: (n,) or None, as in `bootstrap_interval`.
    n_bins: of the calibration errors that have bins; coverage: in [0, 1], of
        "accuracy_at_coverage"; risk: in [0, 1], of "coverage_at_risk".
    n_resamples: bootstrap resamples, and simulated truths of the null band; level: of the interval.
    Returns a dict, ready for JSON:
      estimate: the number that the plain function gives;
      low, high: its interval. Chance adds to a calibration error and to discrimination on the data,
          and once more on a resample; what it adds there on average is taken off. So the interval
          is about what such rows show on average, chance included: compare it with null_mean;
      count: for "mce", the rows of the bin that decides the estimate;
      null_mean, null_p95: for a calibration error without reference, mean and 95th percentile of
          `null_calibration_error` under the same group.
    What is undefined is None, with a "reason"; resamples on which the metric is undefined are left
    out and counted as "undefined_resamples". Below FEW_GROUPS rows or groups the interval is too
    narrow, and a share of exactly 0 or 1 has an interval of width 0. Takes 0.1 to 0.3 s for 1,000
    rows, and for 1,000,000 about 0.15 s a resample.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    option = as_count("n_bins", n_bins)
    if metric == "accuracy_at_coverage":
        option = _as_share("coverage", coverage)
    if metric == "coverage_at_risk":
        option = _as_share("risk", risk)
    level, n_resamples = _as_level(level), as_count("n_resamples", n_resamples)
    first = _Sample(predicted, truth, metric)
    units, asked = _units(len(first), group, strata), {metric: (metric, option)}
    evaluate = first.evaluator(units, asked)
    if reference is not None:
        of_first, of_second = evaluate, first.partner(reference, metric).evaluator(units, asked)

        def evaluate(times):
            return {metric: of_first(times)[metric] - of_second(times)[metric]}

    paired = reference is not None
    found = _intervals(evaluate, asked, units, n_resamples, seed, level, paired)[metric]
    if paired:
        return found
    if metric == "mce":
        found["count"] = first.mce_count(n_bins)
    if metric in CALIBRATION_ERRORS:
        null = first.null(_error_kernels([metric], n_bins), n_resamples, seed, units, group)
        _add_null(found, null[metric])
    return found


def risk_coverage_band(
    confidence,
    correct,
    coverage,
    group=None,
    strata=None,
    n_resamples=1000,
    seed=0,
    level=0.95,
):
    """The risk–coverage curve at chosen coverages, each with its bootstrap interval.

    confidence: (n,) float in [0, 1]; correct: (n,) bool, n ≥ 2. coverage: (m,) float in [0, 1].
    group, strata, n_resamples, seed, level: as for `bootstrap_interval`.
    Returns {"coverage", "risk", "low", "high"}, each (m,): the share of errors among the surest
    rows of that share (at least one), 1 − `accuracy_at_coverage`, and its interval. The intervals
    hold one by one, not all together, and each is as narrow as few rows allow: where no or every
    row is wrong it has no width.
    """
    coverage = as_vector("coverage", coverage, 0.0, 1.0)
    level, n_resamples = _as_level(level), as_count("n_resamples", n_resamples)
    sample = _Sample(*as_confidence_and_correct(confidence, correct))
    units = _units(len(sample), group, strata)
    asked = {i: ("accuracy_at_coverage", share) for i, share in enumerate(coverage)}
    evaluate = sample.evaluator(units, asked)
    found = _intervals(evaluate, asked, units, n_resamples, seed, level).values()
    return {
        "coverage": coverage,
        "risk": np.array([1 - at["estimate"] for at in found]),
        "low": np.array([1 - at["high"] for at in found]),
        "high": np.array([1 - at["low"] for at in found]),
    }


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
          ece_equal_mass, mce, squared_calibration_error, smooth_ece, miscalibration,
          discrimination, uncertainty, aurc, excess_aurc, augrc: each what `measure` gives of it at
          95 %: estimate, low and high, mce also the count, the calibration errors (ece,
          ece_equal_mass, mce, squared_calibration_error, smooth_ece, miscalibration) also
          null_mean and null_p95; all from one set of resamples and one of simulated truths;
      accuracy_at_coverage: [{"coverage", "estimate", "low", "high"}] at 0.5, 0.7, 0.9;
      coverage_at_risk: [{"risk", "estimate", "low", "high"}] at 0.01, 0.05, 0.1;
      kuiper, spiegelhalter: {"statistic", "p_value"} as of `kuiper_test` with this group;
      high_confidence: rows with confidence ≥ threshold (0.9): {"threshold", "count", "share",
          "accuracy"}, accuracy being None where there are none.
    What is undefined is None and has a "reason". Resamples on which a metric is undefined are left
    out of its interval and counted as "undefined_resamples".
    n_resamples is the number of bootstrap resamples and of simulated truths, and what time is spent
    on: about 0.5 s for 1,000 rows, 20 s for 100,000 and 3 minutes for 1,000,000, in proportion to
    n_resamples; less than 400 MB.
    """
    sample = _Sample(*_probabilities_and_label(probabilities, label))
    n_bins, n_resamples = as_count("n_bins", n_bins), as_count("n_resamples", n_resamples)
    units = _units(len(sample), group, strata)
    asked = {
        **{metric: (metric, n_bins) for metric in METRICS if metric not in AT},
        **{("coverage", c): ("accuracy_at_coverage", c) for c in COVERAGES},
        **{("risk", r): ("coverage_at_risk", r) for r in RISKS},
    }
    metrics = _intervals(sample.evaluator(units, asked), asked, units, n_resamples, seed, 0.95)
    metrics["mce"]["count"] = sample.mce_count(n_bins)
    kernels = _error_kernels(CALIBRATION_ERRORS, n_bins)
    if group is not None:
        kernels |= {name: statistic for name, (statistic, _) in CALIBRATION_TESTS.items()}
    null = sample.null(kernels, n_resamples, seed, units, group)
    for name in CALIBRATION_ERRORS:
        _add_null(metrics[name], null[name])
    at_coverage = [{"coverage": c, **metrics.pop(("coverage", c))} for c in COVERAGES]
    at_risk = [{"risk": r, **metrics.pop(("risk", r))} for r in RISKS]
    high_rows = sample.correct[sample.confidence >= HIGH_CONFIDENCE]
    cells = sample.layout.cells(np.ones((1, len(sample))))
    tests = {name: _calibration_test(name, cells, null.get(name)) for name in CALIBRATION_TESTS}
    for name, result in tests.items():
        if np.isnan(result["statistic"]):
            tests[name] = {"statistic": None, "p_value": None, "reason": UNDEFINED[name]}
    return {
        "n": len(sample),
        "n_groups": None if group is None else units.number,
        **metrics,
        "accuracy_at_coverage": at_coverage,
        "coverage_at_risk": at_risk,
        **tests,
        "high_confidence": {
            "threshold": HIGH_CONFIDENCE,
            "count": len(high_rows),
            "share": len(high_rows) / len(sample),
            "accuracy": float(high_rows.mean()) if len(high_rows) else None,
        },
    }


# Comparison of methods.


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


def _clustered_p_value(difference, units):
    """Two-sided p-value of mean difference 0, t-test with the variance between units of a stratum.

    difference: (n,) value of each row. Never below 2^−(degrees of freedom), the least that flipping
    the signs of whole groups could give: few groups that happen to agree are no proof.
    """
    mean = difference.mean()
    spread = units.sums((difference - mean)[:, None])[:, 0]
    drawn = [spread[of_stratum] for of_stratum in units.of_strata if len(of_stratum) > 1]
    freedom = sum(len(part) - 1 for part in drawn)
    error = np.sqrt(sum(len(part) * part.var(ddof=1) for part in drawn)) / len(difference)
    least = 2.0**-freedom
    if mean == 0:
        return 1.0
    if error == 0:
        return least
    return max(least, float(2 * stdtr(freedom, -np.abs(mean / error))))


def compare(probabilities_by_method, label, reference="raw", group=None, strata=None, seed=0):
    """Whether each method's log-loss and Brier score differ from the reference's, row by row.

    probabilities_by_method: dict of (n, K) by name, the reference among them; label: (n,) int,
    n ≥ 2; group, strata: (n,) or None, as in `bootstrap_interval`.
    Returns for every other method {"log_loss": d, "brier": d}, d being the mean of method −
    reference: {"estimate": below 0 where the method is better, "low", "high": its 95 % bootstrap
    interval, "p_value": t-test with the cluster-robust variance within strata and groups − strata
    degrees of freedom (a row being its own group without group, all one stratum without strata), at
    least 2^−(degrees of freedom), "p_value_holm": corrected over the methods, for each score}. Row
    differences below 1e-12 count as 0.
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
    rows, shape = {}, None
    for name in (reference, *methods):
        checked = _probabilities_and_label(
            probabilities_by_method[name], label, f"probabilities of {name!r}"
        )
        shape = shape or checked[0].shape
        if checked[0].shape != shape:
            raise ValueError(
                f"probabilities of {name!r} must have the shape of those of {reference!r} "
                f"({shape}), got {checked[0].shape}"
            )
        rows[name] = np.column_stack([_row_log_loss(*checked), _row_brier(*checked)])  # (n, 2)
    difference = np.column_stack([rows[name] - rows[reference] for name in methods])  # (n, 2M)
    difference[np.abs(difference) < ROUNDING] = 0.0
    units = _units(len(difference), group, strata)
    low, high = _mean_intervals(difference, units, 1000, seed)
    estimate = difference.mean(axis=0)
    p_value = np.array([_clustered_p_value(column, units) for column in difference.T])
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
