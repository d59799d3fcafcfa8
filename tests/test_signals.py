"""The methods: known values, priors divided out, strict reading of replies, one score a row."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import entropy as scipy_entropy
from scipy.stats import rankdata

import simulated_cache
from records import (
    CONSISTENCY,
    MC_DROPOUT,
    P_TRUE,
    PARAPHRASE,
    TOKEN_PROBABILITY,
    VERBALISED,
    label_probabilities,
    load_results,
)
from settings import UserError
from signals import (
    METHODS,
    certainty,
    content_free_prior,
    dropout_uncertainty,
    entropy,
    mean_probabilities,
    method_arrays,
    method_cost,
    prior_corrected,
    reference_prior,
    stated_confidence,
    usable_methods,
)

STORED = (TOKEN_PROBABILITY, CONSISTENCY, PARAPHRASE, MC_DROPOUT, P_TRUE, VERBALISED)


@pytest.fixture(scope="module")
def results():
    """{cache: {model: ModelResults}} of simulated models with two and with four labels."""
    folders = {name: simulated_cache.simulated_cache(name) for name in ("two", "four")}
    return {
        name: {m: load_results(folder / f"{m}_model_results.json") for m in ("base", "finetuned")}
        for name, folder in folders.items()
    }


def rows_of(results, method):
    return [p for p in results.predictions if p.method == method]


# The arithmetic.


def test_entropy_and_certainty_have_their_known_values():
    p = np.array([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    assert entropy(p) == pytest.approx([math.log(4), 0.0, math.log(2)])
    assert certainty(entropy(p), 4) == pytest.approx([0.0, 1.0, 0.5])
    random = np.random.default_rng(0).dirichlet(np.ones(5), 20)
    assert entropy(random) == pytest.approx(scipy_entropy(random, axis=1))


def test_passes_that_agree_have_no_mutual_information_and_those_that_differ_have():
    same = np.tile([0.7, 0.2, 0.1], (6, 1))
    unsure = dropout_uncertainty(same)
    assert unsure["mutual_information"] == pytest.approx(0.0, abs=1e-15)
    assert unsure["predictive"] == pytest.approx(scipy_entropy([0.7, 0.2, 0.1]))
    opposite = dropout_uncertainty([[1.0, 0.0], [0.0, 1.0]])
    assert opposite["mutual_information"] == pytest.approx(math.log(2))
    assert opposite["expected"] == 0.0


@hypothesis_settings(deadline=None)
@given(arrays(np.float64, (3, 4, 3), elements=st.floats(-30, 0)))
def test_mutual_information_is_never_negative_and_the_parts_add_up(scores):
    unsure = dropout_uncertainty(label_probabilities(scores))
    assert (unsure["mutual_information"] >= 0).all()
    total = unsure["expected"] + unsure["mutual_information"]
    np.testing.assert_allclose(total, unsure["predictive"], atol=1e-12)


def test_a_prior_divided_out_of_itself_leaves_all_labels_alike():
    biased = np.log([[0.7, 0.2, 0.1]])
    corrected = np.exp(prior_corrected(biased, mean_probabilities(biased)))
    assert corrected == pytest.approx(np.full((1, 3), 1 / 3))


def test_a_corrected_prior_shifts_the_margin_of_every_row_alike():
    rng = np.random.default_rng(0)
    logprobs = np.log(rng.dirichlet([6, 2], 500))
    prior = mean_probabilities(logprobs)
    shifts = np.diff(prior_corrected(logprobs, prior)) - np.diff(logprobs)
    assert shifts == pytest.approx(np.full((500, 1), np.log(prior[0] / prior[1])))
    # Of probability over prior, the linear form, every label has the mean 1 on the reference set.
    assert (np.exp(logprobs) / prior).mean(axis=0) == pytest.approx([1.0, 1.0])
    moved = np.exp(prior_corrected(logprobs, prior))[:, 0].mean()
    assert abs(moved - 0.5) < abs(np.exp(logprobs)[:, 0].mean() - 0.5) / 5


@pytest.mark.parametrize(
    ("reply", "confidence"),
    [
        ("85", 0.85),
        (" 85\n", 0.85),
        ("85%", 0.85),
        ("85 %", 0.85),
        ("0", 0.0),
        ("7", 0.07),
        ("100", 1.0),
        ("100 %", 1.0),
        ("", None),
        ("101", None),
        ("1000", None),
        ("-5", None),
        ("+5", None),
        ("085", None),
        ("00", None),
        ("85.5", None),
        ("0.85", None),
        ("85.", None),
        ("85/100", None),
        ("85 to 90", None),
        ("85\n85", None),
        ("8 5", None),
        ("about 85", None),
        ("Confidence: 85", None),
        ("85 percent", None),
        ("eighty-five", None),
        ("Yes", None),
        ("٨٥", None),
        ("８５", None),
    ],
)
def test_a_reply_is_read_strictly(reply, confidence):
    assert stated_confidence(reply) == confidence


# The methods.


def test_every_method_has_one_score_for_each_row_that_it_scored(results):
    for of in results.values():
        for model, one in of.items():
            usable, _ = usable_methods(one)
            for method in usable:
                rows = method_arrays(one, "test", method)
                n = len(rows["id"])
                scored = {p.example_id for p in rows_of(one, METHODS[method].source) if not p.error}
                expected = [e.id for e in one.examples if e.split == "test" and e.id in scored]
                assert rows["id"].tolist() == expected
                assert rows["split"] == "test"
                assert rows["score"].shape == rows["predicted"].shape == (n,)
                assert np.isfinite(rows["score"]).all(), (model, method)
                np.testing.assert_array_equal(rows["correct"], rows["label"] == rows["predicted"])
                if METHODS[method].score is None:
                    assert rows["label_logprobs"].shape == (n, len(one.task.labels))
                else:
                    assert "label_logprobs" not in rows
                if method not in ("margin", P_TRUE):
                    assert ((rows["score"] >= 0) & (rows["score"] <= 1)).all()


def test_methods_that_only_score_rate_the_answer_of_token_probability(results):
    one = results["four"]["finetuned"]
    own = method_arrays(one, "test", TOKEN_PROBABILITY)
    answer = dict(zip(own["id"], own["predicted"], strict=True))
    for name, method in METHODS.items():
        if method.score is not None:
            rows = method_arrays(one, "test", name)
            assert rows["predicted"].tolist() == [answer[i] for i in rows["id"]]


def test_of_two_labels_margin_and_entropy_rank_as_the_probability_among_the_labels(results):
    one = results["two"]["base"]
    share = label_probabilities(method_arrays(one, "test", TOKEN_PROBABILITY)["label_logprobs"])
    expected = rankdata(share.max(axis=1).round(9))
    for method in ("margin", "entropy"):
        score = method_arrays(one, "test", method)["score"]
        assert np.corrcoef(rankdata(score.round(9)), expected)[0, 1] > 0.999


def test_scores_follow_from_the_rows_they_are_computed_from(results):
    one = results["four"]["finetuned"]
    of = {method: {p.example_id: p for p in rows_of(one, method)} for method in STORED}
    names = one.task.label_names
    for method, score in (
        ("margin", lambda i: of[TOKEN_PROBABILITY][i].margin),
        (
            "consistency_entropy",
            lambda i: 1 - scipy_entropy(of[CONSISTENCY][i].label_counts, base=4),
        ),
        (
            "paraphrase_agreement",
            lambda i: np.mean(
                [
                    names[int(np.argmax(p))] == of[TOKEN_PROBABILITY][i].predicted
                    for p in of[PARAPHRASE][i].pass_logprobs
                ]
            ),
        ),
        (
            "mc_dropout_entropy",
            lambda i: (
                1
                - scipy_entropy(
                    label_probabilities(of[MC_DROPOUT][i].pass_logprobs).mean(0), base=4
                )
            ),
        ),
        (P_TRUE, lambda i: math.log(of[P_TRUE][i].confidence / (1 - of[P_TRUE][i].confidence))),
        (VERBALISED, lambda i: of[VERBALISED][i].confidence),
        (PARAPHRASE, lambda i: of[PARAPHRASE][i].confidence),
    ):
        rows = method_arrays(one, "test", method)
        expected = [score(i) for i in rows["id"].tolist()]
        np.testing.assert_allclose(rows["score"], expected, atol=1e-9, err_msg=method)


def test_p_true_of_exactly_one_stays_finite(results):
    one = results["two"]["base"]
    sure = [replace(p, confidence=1.0) if p.method == P_TRUE else p for p in one.predictions]
    rows = method_arrays(replace(one, predictions=tuple(sure)), "test", P_TRUE)
    assert (rows["score"] == 20.0).all()


def test_contextual_calibration_divides_out_what_content_free_texts_say(results):
    one = results["four"]["base"]
    prior = content_free_prior(one)
    assert prior == pytest.approx(label_probabilities(np.arange(4)))
    own = method_arrays(one, "test", TOKEN_PROBABILITY)["label_logprobs"]
    corrected = label_probabilities(
        method_arrays(one, "test", "contextual_calibration")["label_logprobs"]
    )
    expected = np.exp(own) / prior
    np.testing.assert_allclose(corrected, expected / expected.sum(axis=1, keepdims=True))


def test_batch_calibration_takes_its_prior_from_calibration_rows_alone(results):
    one = results["two"]["base"]
    logprobs = one.arrays("calibration")["label_logprobs"]
    prior = reference_prior(one)
    assert prior == pytest.approx(label_probabilities(logprobs).mean(axis=0))
    test_ids = {e.id for e in one.examples if e.split == "test"}
    flipped = [
        replace(p, label_logprobs=p.label_logprobs[::-1])
        if p.method == TOKEN_PROBABILITY and p.example_id in test_ids
        else p
        for p in one.predictions
    ]
    assert reference_prior(replace(one, predictions=tuple(flipped))) == pytest.approx(prior)


def test_a_shared_signal_is_paid_for_once(results):
    one = results["two"]["finetuned"]
    own = method_cost(one, [TOKEN_PROBABILITY])
    assert own == pytest.approx({"passes": 1.0, "milliseconds": 4.0})
    assert method_cost(one, ["margin", "batch_calibration"]) == own
    assert method_cost(one, [CONSISTENCY]) == pytest.approx({"passes": 1.0, "milliseconds": 4.01})
    wordings = method_cost(one, [PARAPHRASE])
    assert wordings == pytest.approx({"passes": 5.0, "milliseconds": 20.0})
    assert method_cost(one, [PARAPHRASE, "paraphrase_agreement", "entropy"]) == wordings
    assert method_cost(one, [PARAPHRASE, MC_DROPOUT])["passes"] == pytest.approx(10.0)


def test_what_cannot_be_compared_says_why(results):
    one = results["two"]["base"]
    usable, left_out = usable_methods(one)
    assert set(usable) | set(left_out) == set(METHODS)
    dropout = {n for n, m in METHODS.items() if m.source == MC_DROPOUT}
    assert left_out == dict.fromkeys(dropout, "the base model has no LoRA layers to drop out")
    assert VERBALISED in usable  # two replies in three were a number

    def without(method, keep):
        rows = [p for p in one.predictions if p.method != method or keep(p)]
        return usable_methods(replace(one, predictions=tuple(rows)))[1]

    assert "not evaluated; see --signals" in without(P_TRUE, lambda p: False)[P_TRUE]
    unread = [
        replace(p, error="the reply 'Yes' is no whole number from 0 to 100")
        if p.method == VERBALISED
        else p
        for p in one.predictions
    ]
    reason = usable_methods(replace(one, predictions=tuple(unread)))[1][VERBALISED]
    assert reason.startswith("scored 0 of 1,000 calibration rows; the first error: the reply 'Yes'")
    run = {**one.run, "signals": {**one.run["signals"], "content_free": []}}
    assert (
        "no content-free text was scored"
        in usable_methods(replace(one, run=run))[1]["contextual_calibration"]
    )


def test_an_unknown_method_is_refused_with_the_known_ones(results):
    with pytest.raises(
        UserError, match=r"unknown method 'vibes'; choose one of: token_probability"
    ):
        method_arrays(results["two"]["base"], "test", "vibes")
    with pytest.raises(UserError, match="no scored test rows of mc_dropout"):
        method_arrays(results["two"]["base"], "test", "mc_dropout_entropy")
