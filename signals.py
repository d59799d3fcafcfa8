"""Every way to ask a model how sure it is: the methods, by name, and what follows from the rows.

    results = load_results("evaluation_cache/base_model_results.json")
    rows = method_arrays(results, "test", "entropy")
    rows["score"], rows["correct"]

A cache holds the rows of the methods that put something to the model (`records.Prediction`). The
others are computed from these here, so that no signal is stored twice. A method either gives a
distribution over the K labels, whose most probable one it predicts, or it only scores the answer
of token_probability. Either way `method_arrays` gives one score a row, higher meaning surer.
Layer 1: no model, no plots.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax, logit, xlogy

from records import (
    CONSISTENCY,
    MC_DROPOUT,
    P_TRUE,
    PARAPHRASE,
    TOKEN_PROBABILITY,
    VERBALISED,
    label_probabilities,
)
from settings import UserError

LEAST_SCORED = 0.5  # share of the rows that a method must score to be compared
LARGEST_LOGIT = 20.0  # nats; P(true) beyond it is 1 or 0 in the arithmetic of a model
CONTENT_FREE_TEXTS = ("N/A", "[MASK]", "...")  # texts that say nothing


# ------------------------------------------------------------------------------- the arithmetic


def entropy(probabilities):
    """(...,) entropy in nats of (..., K) probabilities, 0 log 0 being 0."""
    return -xlogy(probabilities, probabilities).sum(axis=-1)


def certainty(entropy_nats, n_labels):
    """1 − H / log K of an entropy H (nats) over K labels: 1 for one sure label, 0 for all alike."""
    return np.clip(1.0 - np.asarray(entropy_nats) / np.log(n_labels), 0.0, 1.0)


def dropout_uncertainty(pass_probabilities):
    """What the passes of Monte-Carlo dropout are unsure of, and why.

    pass_probabilities: (..., S, K), each row over K summing to 1.
    Returns {"predictive": entropy of the mean distribution, "expected": mean entropy of a pass,
    the part that stays whatever the weights (aleatoric), "mutual_information": their difference,
    what the passes disagree on (epistemic)}, each (...,) nats ≥ 0.
    Source: Gal 2016, Uncertainty in Deep Learning, section 3.3.1; Houlsby et al. 2011,
    https://arxiv.org/abs/1112.5745
    """
    p = np.asarray(pass_probabilities, dtype=np.float64)
    predictive, expected = entropy(p.mean(axis=-2)), entropy(p).mean(axis=-1)
    # Jensen's inequality makes the difference ≥ 0; below it is rounding.
    information = np.maximum(predictive - expected, 0.0)
    return {"predictive": predictive, "expected": expected, "mutual_information": information}


def prior_corrected(label_logprobs, prior):
    """(n, K) log-probabilities of (n, K) ones with the preference `prior` (K,) divided out.

    The corrected probability of a label is its probability over its prior, divided by the sum of
    these: the matrix W = diag(prior)⁻¹ of Zhao et al. 2021, section 5, and the shift by
    −log prior of Zhou et al. 2023, section 3.2.
    """
    return log_softmax(np.asarray(label_logprobs) - np.log(prior), axis=-1)


def mean_probabilities(label_logprobs):
    """(K,) mean over rows of the probabilities among the labels, from (n, K) log-probabilities."""
    return label_probabilities(label_logprobs).mean(axis=0)


STATED_PERCENTAGE = re.compile(r"\s*(100|[1-9]?[0-9])\s?%?\s*")


def stated_confidence(reply):
    """The fraction that a reply states, or None if it is no whole number from 0 to 100.

    Strict: the reply is the number, with % or without, and white space; no word, no sign, no
    decimals ("0.9" may mean 90 % or 0.9 %), no leading zero.
    """
    found = STATED_PERCENTAGE.fullmatch(reply)
    return int(found[1]) / 100 if found else None


# ---------------------------------------------------------------------------------- the methods


@dataclass(frozen=True)
class Method:
    """One way to ask.

    name: as in the cache; title: for tables and charts.
    source: the method whose stored rows it is computed from, beside those of token_probability.
    scale: unit and range of its score; higher is surer in every case.
    part: whether it brings a signal of its own to the blend. One that only restates the numbers of
        another does not.
    distribution: (own, rows, results) → (n, K) label log-probabilities, for a distribution that is
        not stored; score: (own, rows) → (n,), for a method that only scores. Both None: the stored
        rows are the method's distribution.
    """

    name: str
    title: str
    source: str
    scale: str
    part: bool = False
    distribution: Callable | None = None
    score: Callable | None = None


def _log_odds(own, rows):
    with np.errstate(divide="ignore"):
        return np.clip(logit(rows["confidence"]), -LARGEST_LOGIT, LARGEST_LOGIT)


def _stated(own, rows):
    return rows["confidence"]


def _own_certainty(own, rows):
    return certainty(entropy(label_probabilities(own["label_logprobs"])), _n_labels(own))


def _own_margin(own, rows):
    ranked = np.sort(own["label_logprobs"], axis=1)
    return ranked[:, -1] - ranked[:, -2]


def _answer_certainty(own, rows):
    counts = rows["label_counts"]
    return certainty(entropy(counts / counts.sum(axis=1, keepdims=True)), _n_labels(own))


def _agreement(own, rows):
    answers = rows["pass_logprobs"].argmax(axis=2)  # (n, wordings)
    return (answers == own["predicted"][:, None]).mean(axis=1)


def _dropout_certainty(kind):
    def score(own, rows):
        unsure = dropout_uncertainty(label_probabilities(rows["pass_logprobs"]))
        return certainty(unsure[kind], _n_labels(own))

    return score


def _contextually_calibrated(own, rows, results):
    return prior_corrected(own["label_logprobs"], content_free_prior(results))


def _batch_calibrated(own, rows, results):
    return prior_corrected(own["label_logprobs"], reference_prior(results))


def _n_labels(own):
    return own["label_logprobs"].shape[1]


PROBABILITY = "probability, 0 to 1"
SHARE = "share, 0 to 1"
CERTAINTY = "1 − H / log K, 0 to 1"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(TOKEN_PROBABILITY, "token probability", TOKEN_PROBABILITY, PROBABILITY, part=True),
        Method("margin", "margin", TOKEN_PROBABILITY, "nats ≥ 0", score=_own_margin),
        Method("entropy", "entropy", TOKEN_PROBABILITY, CERTAINTY, score=_own_certainty),
        Method(
            "contextual_calibration",
            "contextual calibration",
            TOKEN_PROBABILITY,
            PROBABILITY,
            distribution=_contextually_calibrated,
        ),
        Method(
            "batch_calibration",
            "batch calibration",
            TOKEN_PROBABILITY,
            PROBABILITY,
            distribution=_batch_calibrated,
        ),
        Method(CONSISTENCY, "consistency of samples", CONSISTENCY, SHARE, part=True),
        Method(
            "consistency_entropy",
            "entropy over samples",
            CONSISTENCY,
            CERTAINTY,
            score=_answer_certainty,
        ),
        Method(
            P_TRUE, "P(True)", P_TRUE, "log-odds in nats, −20 to 20", part=True, score=_log_odds
        ),
        Method(VERBALISED, "verbalised confidence", VERBALISED, SHARE, part=True, score=_stated),
        Method(PARAPHRASE, "mean over wordings", PARAPHRASE, PROBABILITY, part=True),
        Method(
            "paraphrase_agreement",
            "agreement of wordings",
            PARAPHRASE,
            SHARE,
            part=True,
            score=_agreement,
        ),
        Method(MC_DROPOUT, "Monte-Carlo dropout", MC_DROPOUT, PROBABILITY, part=True),
        Method(
            "mc_dropout_entropy",
            "entropy under dropout",
            MC_DROPOUT,
            CERTAINTY,
            score=_dropout_certainty("predictive"),
        ),
        Method(
            "mc_dropout_information",
            "mutual information",
            MC_DROPOUT,
            "1 − I / log K, 0 to 1",
            part=True,
            score=_dropout_certainty("mutual_information"),
        ),
    )
}


def content_free_prior(results):
    """(K,) what the model answers when the text says nothing: mean over the content-free texts.

    Raises UserError when none of them was scored.
    Source: Zhao et al. 2021, section 5, https://arxiv.org/abs/2102.09690
    """
    scored = results.run.get("signals", {}).get("content_free", [])
    if not scored:
        raise UserError(f"{results.name}: no content-free text was scored")
    return mean_probabilities(np.array([row["label_logprobs"] for row in scored]))


def reference_prior(results):
    """(K,) mean distribution over the labels on the reference set, which is the calibration rows.

    The set is frozen, where the paper takes the batch that is being classified: so the answer to a
    text does not depend on the texts beside it, and no test row is looked at. Labels are not used.
    Source: Zhou et al. 2023, section 3.2, https://arxiv.org/abs/2309.17249
    """
    return mean_probabilities(results.arrays("calibration")["label_logprobs"])


def _rows_of(arrays, keep):
    """The rows of `ModelResults.arrays` where `keep` (n,) bool holds."""
    return {k: v[keep] if isinstance(v, np.ndarray) else v for k, v in arrays.items()}


def _known(method):
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}; choose one of: {', '.join(METHODS)}")
    return METHODS[method]


def method_arrays(results, split, method):
    """What `method` says of the rows of one split that it scored, in the order of the examples.

    results: `ModelResults`; method: a name of METHODS.
    Returns a dict: split; id, category, domain, group (n,) str; label, predicted: (n,) int index
    into the labels; correct: (n,) bool; score: (n,) float, higher is surer, in the unit that the
    method's `scale` names; and for a method with a distribution label_logprobs: (n, K) nats, which
    need not be normalised.
    Raises UserError for an unknown method, or one that scored no row of this split.
    """
    spec = _known(method)
    own, rows = results.arrays(split), results.arrays(split, spec.source)
    own = _rows_of(own, np.isin(own["id"], rows["id"]))
    rows = _rows_of(rows, np.isin(rows["id"], own["id"]))
    if not len(own["id"]):
        raise UserError(f"{results.name}: {method} scored no {split} rows of token_probability's")
    keys = ("split", "id", "category", "domain", "group", "label")
    arrays = {key: own[key] for key in keys}
    if spec.score is not None:
        return arrays | {
            "predicted": own["predicted"],
            "correct": own["correct"],
            "score": spec.score(own, rows),
        }
    if spec.distribution is None:
        given = ("predicted", "correct", "label_logprobs")
        return arrays | {key: rows[key] for key in given} | {"score": rows["confidence"]}
    logprobs = spec.distribution(own, rows, results)
    predicted = logprobs.argmax(axis=1)
    return arrays | {
        "predicted": predicted,
        "correct": predicted == own["label"],
        "label_logprobs": logprobs,
        "score": label_probabilities(logprobs).max(axis=1),
    }


def method_cost(results, methods):
    """What asking takes a text, all that the `methods` (names) need being asked once.

    Returns {"passes": forward passes, of a whole prompt or of one generated token, "milliseconds"},
    means over the held-out rows.
    """
    sources = {TOKEN_PROBABILITY} | {_known(method).source for method in methods}
    asked = [[p for p in results.predictions if p.method == source] for source in sources]
    return {
        "passes": float(sum(np.mean([p.passes for p in rows]) for rows in asked)),
        "milliseconds": 1000 * float(sum(np.mean([p.latency_sec for p in rows]) for rows in asked)),
    }


def usable_methods(results):
    """(names of the methods that can be compared, {name: why not} of the others).

    A method is compared if it scored at least half of the rows of each split that
    token_probability scored: what most texts cannot have is no way to ask, and the texts that do
    have it are no fair sample.
    """
    usable, left_out = [], {}
    for name in METHODS:
        reason = _reason_against(results, name)
        if reason is None:
            usable.append(name)
        else:
            left_out[name] = reason
    return usable, left_out


def _reason_against(results, method):
    source = METHODS[method].source
    noted = results.run.get("signals", {}).get("left_out", {})
    if source in noted or method in noted:
        return noted.get(source) or noted[method]
    rows = [p for p in results.predictions if p.method == source]
    if not rows:
        return "not evaluated; see --signals of generate_evaluation_cache.py"
    if METHODS[method].distribution is _contextually_calibrated:
        try:
            content_free_prior(results)
        except UserError as error:
            return str(error)
    split_of = {e.id: e.split for e in results.examples}
    own = {p.example_id for p in results.predictions if _is_scored(p, TOKEN_PROBABILITY)}
    for split in ("calibration", "test"):
        wanted = [p for p in rows if p.example_id in own and split_of[p.example_id] == split]
        n_scored = sum(p.error is None for p in wanted)
        if n_scored < max(1, LEAST_SCORED * len(wanted)):
            errors = [p.error for p in wanted if p.error is not None]
            first = f"; the first error: {errors[0]}" if errors else ""
            return f"scored {n_scored:,} of {len(wanted):,} {split} rows{first}"
    return None


def _is_scored(prediction, method):
    return prediction.method == method and prediction.error is None
