"""Methods judged side by side: scikit-learn as oracle, splits kept apart, what chance explains."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import simulated_cache
from blend import SignalBlend, blend_identity, fit_blend, signal_rows
from calibration_metrics import (
    aurc,
    compare,
    expected_calibration_error,
    holm,
    log_loss,
    measure,
)
from records import CONSISTENCY, MC_DROPOUT, P_TRUE, TOKEN_PROBABILITY, VERBALISED, load_results
from signal_comparison import COMBINED, TITLES, judge_signals
from signals import METHODS, method_arrays


@pytest.fixture(scope="module")
def results():
    return {
        name: load_results(simulated_cache.simulated_cache(name) / "finetuned_model_results.json")
        for name in ("two", "four")
    }


@pytest.fixture(scope="module")
def judged(results):
    return {name: judge_signals(one, n_resamples=200) for name, one in results.items()}


def test_every_method_that_can_be_is_judged_and_combined_comes_last(judged):
    for one in judged.values():
        assert list(one["methods"]) == [*METHODS, COMBINED] == list(TITLES)
        assert one["left_out"] == {}


def test_measures_agree_with_their_definitions(results, judged):
    for name, one in results.items():
        for method in (TOKEN_PROBABILITY, "entropy", P_TRUE, VERBALISED, CONSISTENCY):
            rows, metrics = method_arrays(one, "test", method), judged[name]["methods"][method]
            estimate = {key: value["estimate"] for key, value in metrics["metrics"].items()}
            assert metrics["n"] == len(rows["id"])
            assert estimate["accuracy"] == pytest.approx(rows["correct"].mean())
            assert estimate["auroc"] == pytest.approx(roc_auc_score(rows["correct"], rows["score"]))
            if method != P_TRUE:  # `aurc` takes confidences, these are log-odds
                assert estimate["aurc"] == pytest.approx(aurc(rows["score"], rows["correct"]))
            fitting, test = (signal_rows(one, s, [method]) for s in ("calibration", "test"))
            platt = SignalBlend().fit(fitting, method).predict_proba(test)
            right = platt.argmax(axis=1) == test["label"]
            assert estimate["log_loss"] == pytest.approx(log_loss(platt, test["label"]))
            ece = expected_calibration_error(platt.max(axis=1), right)
            assert estimate["ece"] == pytest.approx(ece)


def test_differences_are_paired_and_corrected_over_the_methods(results, judged):
    one = results["two"]
    fitting, test = (
        signal_rows(one, s, [TOKEN_PROBABILITY, P_TRUE]) for s in ("calibration", "test")
    )
    p = {m: SignalBlend().fit(fitting, m).predict_proba(test) for m in test["signals"]}
    expected = compare(p, test["label"], TOKEN_PROBABILITY, test["group"])[P_TRUE]["log_loss"]
    methods = judged["two"]["methods"]
    found = methods[P_TRUE]["difference"]["log_loss"]
    for key in ("estimate", "low", "high", "p_value"):
        assert found[key] == pytest.approx(expected[key])
    for score in ("log_loss", "accuracy"):
        tests = [m["difference"][score] for m in methods.values() if m["difference"]]
        corrected = holm([t["p_value"] for t in tests])
        assert [t["p_value_holm"] for t in tests] == pytest.approx(corrected)
    assert methods[TOKEN_PROBABILITY]["difference"] is None


def test_a_divided_out_prior_is_what_platt_scaling_of_two_labels_does_anyway(judged):
    for method in ("batch_calibration", "contextual_calibration"):
        difference = judged["two"]["methods"][method]["difference"]["log_loss"]
        assert difference["estimate"] == difference["low"] == difference["high"] == 0.0
        assert difference["p_value"] == 1.0


def test_a_score_leaves_the_accuracy_as_it_is(judged):
    for one in judged.values():
        for name, method in METHODS.items():
            if method.score is not None:
                accuracy = one["methods"][name]["difference"]["accuracy"]
                assert accuracy["estimate"] == accuracy["low"] == accuracy["high"] == 0.0


def test_a_method_is_compared_on_the_rows_that_it_scored(results, judged):
    one = results["four"]
    rows = method_arrays(one, "test", VERBALISED)
    own = method_arrays(one, "test", TOKEN_PROBABILITY)
    kept = np.isin(own["id"], rows["id"])
    assert 0 < kept.sum() < len(kept)
    expected = roc_auc_score(rows["correct"], rows["score"])
    expected -= roc_auc_score(own["correct"][kept], own["score"][kept])
    found = judged["four"]["methods"][VERBALISED]["difference"]["auroc"]["estimate"]
    assert found == pytest.approx(expected)


def test_test_rows_fit_nothing(results):
    """With every test label turned round the fits stay what they were."""
    one = results["four"]
    names = one.task.label_names
    turned = [
        replace(e, label=names[(names.index(e.label) + 1) % 4]) if e.split == "test" else e
        for e in one.examples
    ]
    other = judge_signals(replace(one, examples=tuple(turned)), n_resamples=20)
    same = judge_signals(one, n_resamples=20)
    assert other["combined"]["blend"] == same["combined"]["blend"]
    assert other["combined"]["selection"] == same["combined"]["selection"]
    before, after = (
        x["methods"]["margin"]["metrics"]["accuracy"]["estimate"] for x in (same, other)
    )
    assert before != after


def test_the_blend_is_that_of_the_calibration_rows_and_beats_its_parts(results, judged):
    for name, one in results.items():
        combined = judged[name]["combined"]
        parts = list(combined["selection"]["parts"])
        assert VERBALISED in combined["left_out"] and VERBALISED not in parts
        blend, selection = fit_blend(signal_rows(one, "calibration", parts))
        assert combined["blend"] == blend.to_json() and combined["selection"] == selection
        assert combined["identity"] == blend_identity(one)
        assert P_TRUE in blend.parts  # the simulation's best signal
        assert combined["worse_than"] == []
        assert TOKEN_PROBABILITY in combined["better_than"]
        losses = {p: judged[name]["methods"][p]["metrics"]["log_loss"]["estimate"] for p in parts}
        assert combined["best_part"] == min(losses, key=losses.get)
        tests = combined["difference"]
        assert set(tests) == set(parts)
        corrected = holm([t["p_value"] for t in tests.values()])
        assert [t["p_value_holm"] for t in tests.values()] == pytest.approx(corrected)
        of = judged[name]["methods"][COMBINED]["metrics"]["log_loss"]["estimate"]
        for part, difference in tests.items():
            assert difference["estimate"] == pytest.approx(of - losses[part], abs=1e-9)


def test_the_blend_costs_all_that_its_parts_need(results, judged):
    cost = {name: m["cost"] for name, m in judged["two"]["methods"].items()}
    assert cost[TOKEN_PROBABILITY]["passes"] == 1.0
    assert cost[COMBINED]["passes"] == pytest.approx(1 + 0 + 1 + 4 + 5)
    assert cost[MC_DROPOUT]["milliseconds"] == pytest.approx(24.0)


def test_a_base_model_has_no_dropout_and_says_so():
    base = load_results(simulated_cache.simulated_cache("two") / "base_model_results.json")
    judged = judge_signals(base, n_resamples=20)
    assert judged["left_out"][MC_DROPOUT] == "the base model has no LoRA layers to drop out"
    assert judged["combined"]["left_out"][MC_DROPOUT] == judged["left_out"][MC_DROPOUT]
    assert MC_DROPOUT not in judged["methods"]


def test_with_nothing_but_token_probability_the_blend_is_it(results):
    one = results["two"]
    alone = [p for p in one.predictions if p.method == TOKEN_PROBABILITY]
    judged = judge_signals(replace(one, predictions=tuple(alone)), n_resamples=20)
    assert judged["combined"]["blend"]["parameters"]["anchor"] == TOKEN_PROBABILITY
    difference = judged["methods"][COMBINED]["difference"]["log_loss"]
    assert difference["estimate"] == 0.0 and judged["combined"]["worse_than"] == []


# A score on any scale.


@pytest.mark.parametrize("metric", ["auroc", "aurc"])
def test_a_ranking_does_not_differ_from_a_rising_map_of_itself(metric):
    rng = np.random.default_rng(1)
    correct = rng.random(300) < 0.7
    score, group = rng.normal(0, 1, 300) + correct, np.arange(300) // 3
    first = (score, correct)
    same = measure(metric, np.exp(score), correct, reference=first, group=group)
    assert same["estimate"] == same["low"] == same["high"] == 0.0
    turned = measure(metric, -score, correct, reference=first, group=group)
    worse = turned["high"] < 0 if metric == "auroc" else turned["low"] > 0
    assert worse
