"""Promises kept in simulation, and agreement with brute force, scipy and MAPIE."""

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import beta, binom, binomtest

from risk_control import (
    abstention_bound,
    certify_threshold,
    naive_threshold,
    selective_risk,
    split_calibration_rows,
)

N_DRAWS = 500
LOGIT_SCALE = 2.5932580577  # logit ~ N(0, scale²) has an accuracy of .816
steady = settings(derandomize=True, deadline=None, max_examples=60)


def most_breaks(probability, n_draws=N_DRAWS):
    """So many of n_draws promises, each broken with `probability`, are broken in 99 % of cases."""
    return int(binom.ppf(0.99, n_draws, probability))


def calibrated_rows(n, rng):
    """Confidences of a perfectly calibrated model of accuracy .816, and whether it was right."""
    confidence = expit(np.abs(LOGIT_SCALE * rng.standard_normal(n)))
    return confidence, rng.random(n) < confidence


def calibrated_risk():
    """threshold → its true risk under `calibrated_rows`, by numerical integration."""
    logit = np.linspace(30.0, 0.0, 30_001)
    density = np.exp(-((logit / LOGIT_SCALE) ** 2) / 2)
    risk = np.cumsum(density * expit(-logit)) / np.cumsum(density)
    descending = -expit(logit)
    return lambda threshold: np.interp(-threshold, descending, risk)


class Population:
    """Confidences with given probabilities and error rates, and the true risk of a threshold."""

    def __init__(self, confidence, probability, error_rate):
        order = np.argsort(-np.asarray(confidence))
        self.confidence = np.asarray(confidence, dtype=float)[order]
        self.probability = (np.asarray(probability) / np.sum(probability))[order]
        self.error_rate = np.asarray(error_rate, dtype=float)[order]

    def draw(self, n, rng):
        row = rng.choice(len(self.confidence), n, p=self.probability)
        return self.confidence[row], rng.random(n) >= self.error_rate[row]

    def risk(self, threshold):
        above = self.confidence >= threshold
        return np.average(self.error_rate[above], weights=self.probability[above])


def brute_force(confidence, correct, alpha, delta):
    """The procedure as its docstring tells it, one threshold after the other."""
    needed = 2 * int(np.ceil(np.log(delta) / np.log(1 - alpha))) + 1
    certified = None
    begun = False
    for threshold in sorted(set(confidence), reverse=True):
        above = [k for c, k in zip(confidence, correct, strict=True) if c >= threshold]
        count, errors = len(above), len(above) - sum(above)
        if count < needed:
            continue
        if not begun:  # no credit for the unit that sets the beginning
            count = count - 1
            errors = min(errors, count)
            begun = True
        if binomtest(errors, count, alpha, alternative="less").pvalue > delta:
            return certified
        certified = threshold
    return certified


few_rows = st.lists(
    st.tuples(st.sampled_from([0.5, 0.6, 0.75, 0.9, 1.0]) | st.floats(0, 1), st.integers(0, 9)),
    min_size=1,
    max_size=60,
).map(lambda rows: (np.array([c for c, _ in rows]), np.array([k > 0 for _, k in rows])))


# The procedure.


@steady
@given(few_rows, st.sampled_from([0.05, 0.2, 0.5]), st.sampled_from([0.1, 0.4]))
def test_certified_threshold_is_that_of_brute_force(rows, alpha, delta):
    confidence, correct = rows
    found = certify_threshold(confidence, correct, alpha, delta)
    assert found["threshold"] == brute_force(confidence, correct, alpha, delta)
    assert (found["threshold"] is None) == (found["reason"] is not None)


def test_brute_force_agrees_where_the_sequence_is_long():
    thresholds = set()
    for seed in range(10):
        confidence, correct = calibrated_rows(400, np.random.default_rng(seed))
        confidence = confidence.round(2)
        threshold = certify_threshold(confidence, correct, 0.1)["threshold"]
        assert threshold == brute_force(confidence, correct, 0.1, 0.1)
        thresholds.add(threshold)
    assert len(thresholds) > 5


@steady
@given(few_rows, st.randoms(use_true_random=False))
def test_row_order_does_not_matter(rows, random):
    confidence, correct = rows
    order = list(range(len(confidence)))
    random.shuffle(order)
    for alpha in (0.2, 0.5):
        assert certify_threshold(confidence[order], correct[order], alpha) == certify_threshold(
            confidence, correct, alpha
        )
        assert naive_threshold(confidence[order], correct[order], alpha) == naive_threshold(
            confidence, correct, alpha
        )


def test_a_strictly_increasing_map_of_the_confidence_moves_only_the_threshold():
    confidence, correct = calibrated_rows(1000, np.random.default_rng(0))
    found = certify_threshold(confidence, correct, 0.1)
    mapped = certify_threshold(confidence**3, correct, 0.1)
    assert mapped.pop("threshold") == found.pop("threshold") ** 3
    assert mapped == found


def test_result_describes_its_threshold_and_is_ready_for_json():
    confidence, correct = calibrated_rows(1000, np.random.default_rng(2))
    found = certify_threshold(confidence, correct, 0.1, 0.05)
    above = confidence >= found["threshold"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["alpha"], found["delta"], found["n"], found["n_units"]) == (0.1, 0.05, 1000, 1000)
    assert found["units_needed"] == 59  # 2 ⌈28.4⌉ + 1
    assert found["automated"] == found["units_automated"] == above.sum()
    assert found["share"] == above.mean()
    assert found["errors"] == found["unit_errors"] == (~correct[above]).sum()
    tail = binom.cdf(found["errors"], found["automated"], 0.1)
    assert found["p_value"] == pytest.approx(tail, rel=1e-10)
    assert found["p_value"] <= 0.05
    assert found["abstention_bound"] == abstention_bound(correct, 0.1, 0.05)


def test_equal_confidences_are_automated_together_or_not_at_all():
    confidence = np.repeat([0.9, 0.8], 200)
    correct = np.ones(400, dtype=bool)
    correct[200:230] = False  # the second tie would pass up to about half of its errors
    assert certify_threshold(confidence, correct, 0.05)["threshold"] == 0.9
    found = certify_threshold(confidence, correct, 0.1)
    assert (found["threshold"], found["automated"], found["errors"]) == (0.8, 400, 30)


def test_the_sequence_ends_at_the_first_failure():
    confidence = np.concatenate([np.full(200, 0.9), np.full(40, 0.8), np.full(5000, 0.7)])
    correct = np.ones(len(confidence), dtype=bool)
    correct[200:240] = False  # harmless once the 5,000 right ones follow, but they come later
    assert naive_threshold(confidence, correct, 0.05) == 0.7
    assert certify_threshold(confidence, correct, 0.05)["threshold"] == 0.9


@pytest.mark.parametrize(
    ("n", "wrong", "threshold"), [(91, 0, 0.7), (91, 1, 0.7), (91, 2, None), (90, 0, None)]
)
def test_all_confidences_equal(n, wrong, threshold):
    correct = np.arange(n) >= wrong
    assert certify_threshold(np.full(n, 0.7), correct, 0.05)["threshold"] == threshold


def test_the_first_test_gives_no_credit_for_the_row_that_sets_it():
    # P(at most 2 of 106 wrong) is below .1 at 5 %, of 105 above it; the 106th row sets the start.
    delta = binom.cdf(2, 106, 0.05) + 1e-6
    needed = 2 * int(np.ceil(np.log(delta) / np.log(0.95))) + 1
    confidence = np.full(106, 0.9)
    assert needed <= 106
    assert certify_threshold(confidence, np.arange(106) >= 2, 0.05, delta)["threshold"] is None
    delta = binom.cdf(2, 105, 0.05) + 1e-6
    assert certify_threshold(confidence, np.arange(106) >= 2, 0.05, delta)["threshold"] == 0.9


@pytest.mark.parametrize("n", [1, 2, 90])
@pytest.mark.parametrize("right", [True, False])
def test_too_few_rows_never_certify(n, right):
    found = certify_threshold(np.linspace(0, 1, n), np.full(n, right), 0.05)
    assert found["threshold"] is None
    assert found["p_value"] is None
    assert (found["automated"], found["share"], found["errors"]) == (0, 0.0, 0)
    assert found["reason"] == f"at least 91 units must be tested, got {n}"
    json.dumps(found, allow_nan=False)


def test_all_rows_wrong_never_certify():
    found = certify_threshold(np.linspace(0, 1, 500), np.zeros(500), 0.05)
    assert found["threshold"] is None
    assert "of the 91 most confident units 91 are wrong" in found["reason"]
    assert "p = 1, more than delta = 0.1" in found["reason"]
    assert found["abstention_bound"] == {"estimate": 1.0, "low": pytest.approx(0.99516, abs=1e-5)}


def test_exact_zero_and_one_are_confidences_like_others():
    confidence = np.repeat([0.0, 1.0], 300)
    assert certify_threshold(confidence, np.ones(600), 0.05)["threshold"] == 0.0
    assert certify_threshold(confidence, confidence, 0.05)["threshold"] == 1.0


# The promise.


def test_the_promise_is_kept_where_the_naive_cut_off_breaks_it_every_second_time():
    risk = calibrated_risk()
    assert risk(0.0) == pytest.approx(1 - 0.816, abs=1e-4)
    broken, naive_broken = 0, 0
    for seed in range(N_DRAWS):
        rows = calibrated_rows(1000, np.random.default_rng(seed))
        threshold = certify_threshold(*rows, alpha=0.05)["threshold"]
        broken += threshold is not None and risk(threshold) > 0.05
        naive_broken += risk(naive_threshold(*rows, alpha=0.05)) > 0.05
    assert 0.03 <= broken / N_DRAWS <= 0.08
    assert 0.45 <= naive_broken / N_DRAWS <= 0.65


UNIFORM = np.ones(1000)
HARD_POPULATIONS = {
    "error just above alpha everywhere": (np.arange(1000) / 1000, UNIFORM, 0.1001 * UNIFORM),
    "error up and down": (
        np.arange(1000) / 1000,
        UNIFORM,
        np.where(np.arange(1000) % 2, 0.2004, 0.0),
    ),
    "the surer the worse": (np.arange(1000) / 1000, UNIFORM, np.linspace(0.08, 0.14, 1000)),
    "risk crosses alpha three times": (
        np.arange(1000) / 1000,
        UNIFORM,
        np.select([np.arange(1000) > x for x in (950, 850, 600)], [0.06, 0.16, 0.06], 0.2),
    ),
    "ten ties": (np.arange(10) / 10, np.ones(10), np.full(10, 0.1001)),
    "two ties, the upper one worse": ([0.9, 0.5], [0.1, 0.9], [0.2, 0.0891]),
}


@pytest.mark.parametrize("name", HARD_POPULATIONS)
@pytest.mark.parametrize("delta", [0.1, 0.3])
def test_the_promise_is_kept_however_error_and_confidence_are_related(name, delta):
    population = Population(*HARD_POPULATIONS[name])
    broken = 0
    for seed in range(N_DRAWS):
        rows = population.draw(300, np.random.default_rng(seed))
        threshold = certify_threshold(*rows, alpha=0.1, delta=delta)["threshold"]
        broken += threshold is not None and population.risk(threshold) > 0.1
    assert broken <= most_breaks(delta)


def test_grouped_rows_keep_the_promise_only_with_their_groups():
    # Three copies of each row, with an error rate just above alpha: no threshold is good.
    broken, ignored = 0, 0
    for seed in range(N_DRAWS):
        rng = np.random.default_rng(seed)
        group = np.repeat(np.arange(300), 3)
        confidence, correct = rng.random(300)[group], (rng.random(300) >= 0.051)[group]
        certified = certify_threshold(confidence, correct, 0.05, group=group, seed=seed)
        broken += certified["threshold"] is not None
        ignored += certify_threshold(confidence, correct, 0.05)["threshold"] is not None
    assert broken <= most_breaks(0.1)
    assert ignored > most_breaks(0.1)


def test_with_groups_the_promise_is_about_the_population_of_groups():
    # Singletons err in 2 % of cases, groups of nine in 20 %: 3.8 % of groups, 11 % of rows.
    rng = np.random.default_rng(0)
    size = np.where(np.arange(5000) % 10 == 0, 9, 1)
    group = np.repeat(np.arange(5000), size)
    correct = rng.random(len(group)) >= np.where(size == 9, 0.2, 0.02)[group]
    found = certify_threshold(np.full(len(group), 0.9), correct, 0.05, group=group)
    assert found["threshold"] == 0.9
    assert found["units_automated"] == 5000
    assert found["unit_errors"] / 5000 == pytest.approx(0.038, abs=0.01)
    assert found["errors"] / found["automated"] == pytest.approx(0.11, abs=0.01)


def test_one_row_is_drawn_from_each_group_and_each_equally_often():
    group = np.array(["b", "a", "c", "a", "a", "b"])
    confidence = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    drawn = []
    for seed in range(3000):
        found = certify_threshold(confidence, np.ones(6), 0.9, 0.9, group=group, seed=seed)
        assert (found["n"], found["n_units"], found["units_needed"]) == (6, 3, 3)
        drawn.append(found["threshold"])  # the least sure of the three drawn rows
    # One of a's, b's and c's rows: 0.1 is the least with chance 1/2, 0.2 with 1/2 · 1/3, ...
    share = {c: drawn.count(c) / 3000 for c in set(drawn)}
    assert share == pytest.approx({0.1: 1 / 2, 0.2: 1 / 6, 0.3: 1 / 3}, abs=0.03)


def test_a_seed_gives_the_same_draw_again():
    rng = np.random.default_rng(0)
    confidence, correct = calibrated_rows(900, rng)
    group = rng.integers(300, size=900)
    results = [
        certify_threshold(confidence, correct, 0.1, group=group, seed=seed) for seed in (0, 0, 1)
    ]
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_groups_of_one_row_change_nothing():
    confidence, correct = calibrated_rows(1000, np.random.default_rng(0))
    names = [f"group {i}" for i in range(1000)]
    alone = certify_threshold(confidence, correct, 0.1)
    assert certify_threshold(confidence, correct, 0.1, group=names) == alone


@pytest.mark.filterwarnings("ignore:Fixed sequence testing requires a monotonic risk")
def test_threshold_and_p_value_agree_with_mapie_on_the_same_grid():
    mapie = pytest.importorskip("mapie.risk_control")

    class ErrorRate(mapie.BinaryRisk):
        """MAPIE rounds n · (errors / n) up, where 1e-16 too much makes it one error more."""

        def get_value_and_effective_sample_size(self, truth, decision):
            value, size = super().get_value_and_effective_sample_size(truth, decision)
            return value * (1 - 1e-12), size

    error_rate = ErrorRate(
        risk_occurrence=lambda truth, decision: truth != decision,
        risk_condition=lambda truth, decision: decision == 1,
        higher_is_better=False,
    )
    compared = 0
    for seed in range(8):
        confidence, correct = calibrated_rows(2000, np.random.default_rng(seed))
        confidence = confidence.round(2)
        found = certify_threshold(confidence, correct, 0.05)
        if found["threshold"] is None:
            continue
        grid = np.unique(confidence)
        grid = grid[[(confidence >= t).sum() >= found["units_needed"] for t in grid]]
        controller = mapie.BinaryClassificationController(
            predict_function=lambda c: np.column_stack([1 - c, c]),
            risk=error_rate,
            target_level=0.05,
            confidence_level=0.9,
            best_predict_param_choice=error_rate,
            list_predict_params=grid,
            fwer_method="fixed_sequence",
        )
        controller.calibrate(confidence, correct.astype(int))
        assert np.min(controller.valid_predict_params) == found["threshold"]
        p_value = np.ravel(controller.p_values)[grid == found["threshold"]]
        assert p_value == pytest.approx(found["p_value"], rel=1e-9)
        compared += 1
    assert compared >= 5


# The naive cut-off and the bound.


def test_naive_threshold_is_the_lowest_cut_off_that_looks_good():
    confidence = [0.9, 0.8, 0.8, 0.7, 0.6, 0.5]
    correct = [1, 1, 0, 1, 1, 0]
    assert naive_threshold(confidence, correct, 0.2) == 0.6
    assert naive_threshold(confidence, correct, 0.19) == 0.9
    assert naive_threshold(confidence, correct, 0.4) == 0.5


def test_naive_threshold_is_none_where_every_cut_off_looks_bad():
    assert naive_threshold([0.9, 0.8], [0, 1], 0.4) is None
    assert naive_threshold([0.9], [0], 0.4) is None


def test_naive_threshold_accepts_a_share_of_exactly_alpha():
    for errors, n in ((1, 20), (3, 30), (7, 10), (29, 100)):
        assert naive_threshold(np.full(n, 0.9), np.arange(n) >= errors, errors / n) == 0.9


def test_abstention_bound_is_what_a_perfect_ranking_must_abstain():
    correct = np.arange(10_000) >= 2000  # a fifth is wrong
    bound = abstention_bound(correct, 0.05)
    assert bound["estimate"] == pytest.approx(0.15 / 0.95)
    ranked = np.linspace(0, 1, 10_000)
    abstained = (ranked < naive_threshold(ranked, correct, 0.05)).mean()
    assert abstained == pytest.approx(bound["estimate"], abs=2e-4)


def test_abstention_bound_is_zero_where_nothing_need_be_abstained():
    assert abstention_bound([True] * 50, 0.05) == {"estimate": 0.0, "low": 0.0}
    assert abstention_bound([True] * 19 + [False], 0.05) == {"estimate": 0.0, "low": 0.0}
    assert abstention_bound([False], 0.05)["estimate"] == 1.0


def test_abstention_bound_uses_the_exact_lower_limit():
    bound = abstention_bound(np.arange(200) >= 60, 0.1, 0.05)
    limit = binomtest(60, 200, alternative="greater").proportion_ci(0.95, "exact").low
    assert bound["low"] == pytest.approx((limit - 0.1) / 0.9)


def test_lower_limit_of_the_abstention_bound_holds():
    errors = np.random.default_rng(0).binomial(200, 0.2, size=N_DRAWS)
    needed = (0.2 - 0.1) / 0.9
    low = [abstention_bound(np.arange(200) >= k, 0.1, 0.1)["low"] for k in errors]
    assert np.sum(np.array(low) > needed) <= most_breaks(0.1)


# Fresh rows.


def test_selective_risk_counts_rows_at_or_above_the_threshold():
    found = selective_risk([0.9, 0.8, 0.8, 0.3], [1, 1, 0, 0], 0.8)
    upper = binomtest(1, 3, alternative="less").proportion_ci(0.95, "exact").high
    assert found == {
        "threshold": 0.8,
        "level": 0.95,
        "n": 4,
        "automated": 3,
        "coverage": 0.75,
        "errors": 1,
        "risk": 1 / 3,
        "risk_upper": pytest.approx(upper, rel=1e-9),
    }
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("threshold", [None, 0.95])
@pytest.mark.parametrize("group", [None, ["a", "a"]])
def test_risk_is_none_where_nothing_is_automated(threshold, group):
    found = selective_risk([0.9, 0.8], [1, 0], threshold, group)
    assert (found["threshold"], found["automated"], found["coverage"]) == (threshold, 0, 0.0)
    assert (found["errors"], found["risk"], found["risk_upper"]) == (0, None, None)


@pytest.mark.parametrize(("errors", "level"), [(0, 0.95), (1, 0.9), (25, 0.5), (49, 0.95)])
def test_risk_limit_is_exact_for_independent_rows(errors, level):
    found = selective_risk(np.full(50, 0.9), np.arange(50) >= errors, 0.9, level=level)
    oracle = binomtest(errors, 50, alternative="less").proportion_ci(level, "exact").high
    assert found["risk_upper"] == pytest.approx(oracle, rel=1e-9)


def test_risk_limit_is_one_where_all_are_wrong():
    assert selective_risk([0.9] * 5, [0] * 5, 0.5)["risk_upper"] == 1.0
    assert selective_risk([0.9] * 5, [0] * 5, 0.5, ["a", "a", "a", "b", "b"])["risk_upper"] == 1.0


def test_copies_of_a_row_do_not_sharpen_the_risk_limit():
    group = np.repeat(np.arange(40), 3)
    correct = np.arange(40) >= 4
    once = selective_risk(np.full(40, 0.9), correct, 0.9)["risk_upper"]
    thrice = selective_risk(np.full(120, 0.9), correct[group], 0.9, group)["risk_upper"]
    assert thrice == pytest.approx(once, rel=1e-12)
    assert selective_risk(np.full(120, 0.9), correct[group], 0.9)["risk_upper"] < once


def test_unequal_groups_count_as_the_effective_number_of_rows():
    found = selective_risk([0.9] * 4 + [0.1], [0, 1, 1, 1, 1], 0.5, [1, 1, 1, 2, 2])
    effective = (3 + 1) ** 2 / (3**2 + 1**2)
    oracle = beta.ppf(0.95, effective / 4 + 1, effective * 3 / 4)
    assert found["risk_upper"] == pytest.approx(oracle, rel=1e-9)


@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
def test_risk_limit_covers_the_risk_of_grouped_rows(alike):
    missed = 0
    for seed in range(N_DRAWS):
        rng = np.random.default_rng(seed)
        group = np.repeat(np.arange(100), rng.integers(1, 6, size=100))
        shared = rng.random(100)[group] < 0.1
        correct = ~np.where(rng.random(len(group)) < alike, shared, rng.random(len(group)) < 0.1)
        found = selective_risk(np.full(len(group), 0.9), correct, 0.5, group, level=0.9)
        missed += found["risk_upper"] < 0.1
    assert missed <= most_breaks(0.1)


def test_a_certified_threshold_goes_through_json_and_automates_the_same_rows():
    confidence, correct = calibrated_rows(1000, np.random.default_rng(0))
    found = certify_threshold(confidence, correct, 0.1)
    again = json.loads(json.dumps(found))["threshold"]
    assert selective_risk(confidence, correct, again)["automated"] == found["automated"]


# The division of the calibration rows.


def arrays(n, n_groups, split="calibration"):
    group = np.random.default_rng(0).integers(n_groups, size=n)
    return {
        "split": split,
        "id": np.array([f"row {i}" for i in range(n)]),
        "group": np.array([f"group {g}" for g in group]),
        "label_logprobs": np.random.default_rng(1).normal(size=(n, 2)),
        "correct": group % 2 == 0,
    }


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.99])
def test_split_divides_groups_and_keeps_every_row_once(fraction):
    rows = arrays(300, 100)
    fitting, certifying = split_calibration_rows(rows, fraction)
    assert fitting.keys() == certifying.keys() == rows.keys()
    assert fitting["split"] == certifying["split"] == "calibration"
    names = set(fitting["group"])
    assert names.isdisjoint(certifying["group"])
    assert len(names) == round(fraction * len(set(rows["group"])))
    assert sorted([*fitting["id"], *certifying["id"]]) == sorted(rows["id"])
    for part in (fitting, certifying):
        row = [int(name.removeprefix("row ")) for name in part["id"]]
        assert row == sorted(row)
        for name in ("group", "label_logprobs", "correct"):
            assert (part[name] == rows[name][row]).all()


def test_split_depends_on_groups_and_seed_alone():
    rows = arrays(200, 50)
    reverse = {k: v if k == "split" else v[::-1] for k, v in rows.items()}
    fitting = set(split_calibration_rows(rows)[0]["id"])
    assert set(split_calibration_rows(reverse)[0]["id"]) == fitting
    assert set(split_calibration_rows(rows, seed=1)[0]["id"]) != fitting


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_each_part_gets_a_group(fraction):
    rows = {"split": "calibration", "group": np.array(["a", "a", "b"])}
    parts = split_calibration_rows(rows, fraction)
    assert sorted(len(set(part["group"])) for part in parts) == [1, 1]


def test_split_refuses_rows_that_are_not_calibration_rows():
    with pytest.raises(ValueError, match="must be of the calibration split, got 'test'"):
        split_calibration_rows(arrays(20, 5, "test"))


def test_split_refuses_a_single_group():
    with pytest.raises(ValueError, match="at least 2 groups to be divided, got 1"):
        split_calibration_rows(arrays(20, 1))


# Bad input and size.


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([], [], "confidence must have at least 1 row"),
        ([0.5, np.nan], [1, 0], "confidence must be finite, got nan at row 1"),
        ([np.inf], [1], "confidence must be finite, got inf at row 0"),
        ([1.03], [1], r"confidence must lie in \[0, 1\], got 1.03 at row 0"),
        ([0.5, 0.6], [1, 2], r"correct must be 0 or 1 .*, got 2.0 at row 1"),
        ([0.5, 0.6], [1], "correct must have as many rows as confidence"),
        ([[0.5]], [1], r"confidence must have shape \(n,\)"),
    ],
)
def test_bad_rows_are_refused(confidence, correct, message):
    for function in (certify_threshold, naive_threshold, selective_risk):
        with pytest.raises(ValueError, match=message):
            function(confidence, correct, 0.5)


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, np.nan, np.inf, True, None, "0.05"])
def test_shares_that_are_not_between_0_and_1_are_refused(value):
    rows = [0.9, 0.8], [1, 0]
    calls = {
        "alpha": [
            lambda: certify_threshold(*rows, value),
            lambda: naive_threshold(*rows, value),
            lambda: abstention_bound(rows[1], value),
        ],
        "delta": [
            lambda: certify_threshold(*rows, 0.05, value),
            lambda: abstention_bound(rows[1], 0.05, value),
        ],
        "level": [lambda: selective_risk(*rows, 0.5, level=value)],
        "fraction": [lambda: split_calibration_rows(arrays(20, 5), value)],
    }
    for name, functions in calls.items():
        for function in functions:
            with pytest.raises(ValueError, match=f"{name} must lie strictly between 0 and 1, got"):
                function()


@pytest.mark.parametrize("threshold", [-0.1, 1.1, np.nan, "0.5"])
def test_a_threshold_outside_0_to_1_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold must be None or lie in"):
        selective_risk([0.9], [1], threshold)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (["a"], "group must have as many rows as confidence"),
        ([["a"], ["b"]], r"group must have shape \(n,\)"),
    ],
)
def test_bad_groups_are_refused(group, message):
    for call in (
        lambda: certify_threshold([0.9, 0.8], [1, 0], 0.05, group=group),
        lambda: selective_risk([0.9, 0.8], [1, 0], 0.5, group),
        lambda: selective_risk([0.9, 0.8], [1, 0], None, group),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_extreme_promises_are_answered():
    rows = np.full(2000, 0.9), np.ones(2000)
    assert certify_threshold(*rows, alpha=1e-12)["threshold"] is None
    assert certify_threshold(*rows, alpha=0.05, delta=1e-12)["threshold"] == 0.9
    assert certify_threshold(*rows, alpha=1 - 1e-12, delta=1 - 1e-12)["threshold"] == 0.9


def test_a_million_rows_take_less_than_two_seconds():
    rng = np.random.default_rng(0)
    confidence, correct = calibrated_rows(1_000_000, rng)
    group = rng.integers(300_000, size=1_000_000)
    for call in (
        lambda: certify_threshold(confidence, correct, 0.05),
        lambda: certify_threshold(confidence, correct, 0.05, group=group),
        lambda: naive_threshold(confidence, correct, 0.05),
        lambda: selective_risk(confidence, correct, 0.9, group),
    ):
        started = time.process_time()
        call()
        assert time.process_time() - started < 2.0


def test_missing_groups_are_refused():
    with pytest.raises(ValueError, match="group must not be missing"):
        certify_threshold([0.9] * 50, [True] * 50, 0.1, group=[None] * 50)
