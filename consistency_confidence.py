"""Response-consistency confidence: how often does a sampled model give the same answer?

    python consistency_confidence.py                          # one text, N = 1 ... 100 samples
    python consistency_confidence.py "Best worst thing ever" --samples 50

An answer of one token needs no generation: N independent generations are N draws from the one
next-token distribution, so the samples are drawn from the label probabilities that a single forward
pass gave. Identical in law to N calls of `generate`, at the cost of one pass (a test checks it).
"""

import argparse
import sys
from dataclasses import dataclass

import numpy as np

from calibration_metrics import wilson_interval
from records import CONSISTENCY, Prediction, label_probabilities
from settings import (
    EvaluationSettings,
    TaskSettings,
    UserError,
    add_arguments,
    from_arguments,
)


@dataclass(frozen=True)
class Consistency:
    """N samples of one text. counts: (K,) samples per label; the rest, `other`, were no answer."""

    counts: tuple[int, ...]
    other: int
    majority: int | None  # label drawn most often, one of equals by lot; None: no answer at all
    agreement: float  # share of the samples that gave the majority label
    low: float  # 95 % Wilson interval of the agreement
    high: float


def answer_distribution(label_logprobs):
    """(K + 1,) probabilities of the K labels and of anything else, from (K,) nats."""
    labels = np.exp(np.asarray(label_logprobs, dtype=np.float64))
    outcomes = np.append(labels, max(0.0, 1.0 - labels.sum()))
    return outcomes / outcomes.sum()


def sample_consistency(label_logprobs, n_samples, rng):
    """`Consistency` of n_samples draws from the answer distribution of one text.

    label_logprobs: (K,) nats at the sampling temperature (`classify_batch(..., temperature=T)`).
    rng: numpy Generator. Raises ValueError if n_samples < 1.
    """
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, got {n_samples}")
    draws = rng.multinomial(n_samples, answer_distribution(label_logprobs))
    counts = draws[:-1]
    most = int(counts.max())
    majority = int(rng.choice(np.flatnonzero(counts == most))) if most else None
    low, high = (float(v[0]) for v in wilson_interval([most], [n_samples]))
    return Consistency(
        tuple(int(c) for c in counts), int(draws[-1]), majority, most / n_samples, low, high
    )


def consistency_predictions(task, predictions, settings=None):
    """The consistency `Prediction` of every token-probability prediction, in the same order.

    predictions: made at the sampling temperature, which is 1 unless the settings say otherwise.
    label_logprobs are those of the smoothed shares (c + ½) / (n + K/2), so that a label nobody
    drew is improbable and not impossible (Krichevsky & Trofimov 1981). The draws of a text depend
    on the seed and its position only. A row with an error stays one.
    """
    settings = settings or EvaluationSettings()
    seeds = np.random.SeedSequence(settings.evaluation_seed).spawn(len(predictions))
    rows = []
    for prediction, seed in zip(predictions, seeds, strict=True):
        if prediction.error is not None:
            rows.append(Prediction(prediction.example_id, CONSISTENCY, error=prediction.error))
            continue
        drawn = sample_consistency(
            prediction.label_logprobs,
            settings.samples,
            np.random.default_rng(seed),
        )
        if drawn.majority is None:
            error = f"none of {settings.samples} samples was an answer"
            rows.append(Prediction(prediction.example_id, CONSISTENCY, error=error))
            continue
        counts = np.array(drawn.counts)
        logprobs = np.log((counts + 0.5) / (settings.samples + 0.5 * len(counts)))
        rows.append(
            Prediction(
                example_id=prediction.example_id,
                method=CONSISTENCY,
                label_logprobs=tuple(float(v) for v in logprobs),
                label_mass=float(counts.sum() / settings.samples),
                predicted=task.label_names[drawn.majority],
                probability=float(label_probabilities(logprobs)[0]),
                confidence=drawn.agreement,
                label_counts=drawn.counts,
                truncated=prediction.truncated,
            )
        )
    return rows


def main(argv=None):
    defaults = EvaluationSettings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="?", default="Best worst thing ever", help="text to classify")
    parser.add_argument("--model", default="embedded", help="preset, hub id or folder")
    parser.add_argument("--adapter", help="folder of a LoRA adapter")
    parser.add_argument("--samples", type=int, default=100, help="largest number of samples")
    parser.add_argument("--temperature", type=float, default=defaults.temperature)
    parser.add_argument("--seed", type=int, default=defaults.evaluation_seed)
    add_arguments(parser, TaskSettings)
    arguments = parser.parse_args(argv)
    if arguments.samples < 1 or arguments.temperature <= 0:
        parser.error("--samples must be at least 1 and --temperature above 0")
    from logprobs_confidence import TransformerLogprobsClassifier

    try:
        task = from_arguments(TaskSettings, arguments).build()
        classifier = TransformerLogprobsClassifier(arguments.model, arguments.adapter, task)
        prediction = classifier.classify(arguments.text, temperature=arguments.temperature)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    names = task.label_names
    wide = max(12, *map(len, names))
    exact = answer_distribution(prediction.label_logprobs)
    print(f"text:        {arguments.text}")
    shares = ", ".join(f"{n} {p:.4f}" for n, p in zip(names, exact, strict=False))
    print(f"one pass:    {shares}, other {exact[-1]:.4f}  (temperature {arguments.temperature:g})")
    print(f"{'samples':>8}  {'majority':<{wide}} {'agreement':>9}   95 % interval   counts")
    for n in [n for n in (1, 2, 5, 10, 20, 50) if n < arguments.samples] + [arguments.samples]:
        rng = np.random.default_rng(arguments.seed)
        c = sample_consistency(prediction.label_logprobs, n, rng)
        counts = ", ".join(f"{name} {k}" for name, k in zip(names, c.counts, strict=True))
        majority = "none" if c.majority is None else names[c.majority]
        print(
            f"{n:>8}  {majority:<{wide}} {c.agreement:>9.3f}   "
            f"{c.low:.3f} – {c.high:.3f}   {counts}, other {c.other}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
