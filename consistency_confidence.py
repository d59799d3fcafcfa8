"""Consistency confidence: does the answer stay when chance, the wording or the weights change?

    python consistency_confidence.py                          # one text, N = 1 ... 100 samples
    python consistency_confidence.py "Best worst thing ever" --samples 50
    python consistency_confidence.py "It was fine." --adapter fine_tuned_sentiment_model

Response consistency: N sampled answers. An answer of one token needs no generation: N independent
generations are N draws from the one next-token distribution, so the samples are drawn from the
label probabilities that a single forward pass gave. Identical in law to N calls of `generate`, at
the cost of one pass (a test checks it). Paraphrase consistency: the same question in other words,
a full pass each. Monte-Carlo dropout: the same prompt with parts of a LoRA adapter switched off at
random, a full pass each.
"""

import argparse
import sys
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import logsumexp

from calibration_metrics import wilson_interval
from records import (
    CONSISTENCY,
    MC_DROPOUT,
    PARAPHRASE,
    Prediction,
    label_probabilities,
    prediction_from_logprobs,
)
from settings import (
    EvaluationSettings,
    Label,
    ModelSettings,
    TaskSettings,
    UserError,
    add_arguments,
    from_arguments,
)
from signals import dropout_uncertainty


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
    return consistency_of(draws[:-1], n_samples, rng)


def consistency_of(counts, n_samples, rng):
    """`Consistency` of n_samples of which counts, (K,) int array, gave each label."""
    most = int(counts.max())
    majority = int(rng.choice(np.flatnonzero(counts == most))) if most else None
    low, high = (float(v[0]) for v in wilson_interval([most], [n_samples]))
    return Consistency(
        tuple(int(c) for c in counts),
        n_samples - int(counts.sum()),
        majority,
        most / n_samples,
        low,
        high,
    )


def consistency_predictions(task, predictions, settings=None, positions=None):
    """The consistency `Prediction` of every token-probability prediction, in the same order.

    predictions: made at the sampling temperature, which is 1 unless the settings say otherwise.
    positions: [int] place of each among all that are evaluated (default: 0, 1, 2, ...).
    label_logprobs are those of the smoothed shares (c + ½) / (n + K/2), so that a label nobody
    drew is improbable and not impossible (Krichevsky & Trofimov 1981). The draws of a text depend
    on the seed and its position only. A row with an error stays one.
    """
    settings = settings or EvaluationSettings()
    positions = range(len(predictions)) if positions is None else positions
    rows = []
    for prediction, position in zip(predictions, positions, strict=True):
        if prediction.error is not None:
            rows.append(Prediction(prediction.example_id, CONSISTENCY, error=prediction.error))
            continue
        drawn = sample_consistency(
            prediction.label_logprobs,
            settings.samples,
            np.random.default_rng([settings.evaluation_seed, position]),
        )
        rows.append(_of_samples(prediction.example_id, task, drawn, prediction.truncated))
    return rows


def prediction_from_draws(example_id, task, counts, n_samples, truncated=False, latency_sec=None):
    """The consistency `Prediction` of answers that were really drawn, counts (K,) of n_samples."""
    drawn = consistency_of(np.array(counts), n_samples, np.random.default_rng(0))
    return replace(_of_samples(example_id, task, drawn, truncated), latency_sec=latency_sec)


def _of_samples(example_id, task, drawn, truncated):
    """The `Prediction` of a `Consistency`."""
    n_samples = sum(drawn.counts) + drawn.other
    if drawn.majority is None:
        error = f"none of {n_samples} samples was an answer"
        return Prediction(example_id, CONSISTENCY, error=error)
    counts = np.array(drawn.counts)
    logprobs = np.log((counts + 0.5) / (n_samples + 0.5 * len(counts)))
    return Prediction(
        example_id=example_id,
        method=CONSISTENCY,
        label_logprobs=tuple(float(v) for v in logprobs),
        label_mass=float(counts.sum() / n_samples),
        predicted=task.label_names[drawn.majority],
        probability=float(label_probabilities(logprobs)[0]),
        confidence=drawn.agreement,
        label_counts=drawn.counts,
        truncated=truncated,
    )


# Other wordings of the question.


def other_wordings(task):
    """[Task] that ask the question of `task` in other words, with its labels in their order.

    The task's own wordings, then its negated ones, to which the two labels answer with each other's
    words; for a task without any, what can be put around every question.
    """
    alone = replace(task, wordings=(), negated=())
    questions = task.wordings
    if not questions and not task.negated:
        ask = task.question
        last = f"{ask} Give only the answer." if "{text}" in ask else f"Text: {{text}}\n\n{ask}"
        questions = (f"Question: {ask}", f"Read the text, then answer. {ask}", last)
    asked = [replace(alone, question=question) for question in questions]
    if task.negated:
        first, second = task.labels
        swapped = (Label(first.name, second.words), Label(second.name, first.words))
        asked += [replace(alone, question=q, labels=swapped) for q in task.negated]
    return asked


def paraphrase_predictions(siblings, texts, own):
    """What the model says of each text over all wordings of the question.

    siblings: a classifier for each of `other_wordings`. own: the token-probability `Prediction` of
    each of the texts, none of them an error. The log-probabilities of a label are averaged over the
    wordings, the task's own among them, and so is the margin.
    """
    asked = [sibling.classify_batch(texts, [row.example_id for row in own]) for sibling in siblings]
    return [
        _averaged(siblings[0].task, PARAPHRASE, [first, *others], lambda p: np.mean(p, axis=0))
        for first, *others in zip(own, *asked, strict=True)
    ]


def dropout_predictions(classifier, texts, own, n_passes, seed):
    """What `n_passes` random sub-networks of a fine-tuned model say of each text.

    classifier: with an active adapter; own: as for `paraphrase_predictions`. The probabilities of a
    label are averaged over the passes. The sub-networks depend on the seed (int) alone, and all
    texts are asked of the same ones. Raises UserError where there is no dropout.
    Source: Gal and Ghahramani 2016, https://arxiv.org/abs/1506.02142
    """
    ids, asked = [row.example_id for row in own], []
    for state in np.random.SeedSequence(seed).generate_state(n_passes):
        with classifier.dropout(int(state)):
            asked.append(classifier.classify_batch(texts, ids))
    return [
        _averaged(classifier.task, MC_DROPOUT, passes, lambda p: logsumexp(p, 0) - np.log(len(p)))
        for passes in zip(*asked, strict=True)
    ]


def _averaged(task, method, passes, mean):
    """The `Prediction` of a text from those of its passes; mean: (M, K) nats → (K,) nats."""
    for row in passes:
        if row.error is not None:
            return Prediction(row.example_id, method, error=row.error)
    logprobs = np.array([row.label_logprobs for row in passes])
    slack = None
    if any(row.label_slack is not None for row in passes):  # the mean of upper bounds is one too
        unread = np.array([row.label_slack or np.zeros(logprobs.shape[1]) for row in passes])
        with np.errstate(divide="ignore"):
            least = np.log(np.maximum(np.exp(logprobs) - unread, 0.0))
        slack = np.exp(mean(logprobs)) - np.exp(mean(least))
    return prediction_from_logprobs(
        passes[0].example_id,
        task,
        mean(logprobs),
        method=method,
        label_slack=slack,
        # float32 has no more digits, and there are many of these numbers
        pass_logprobs=tuple(tuple(float(f"{v:.7g}") for v in row) for row in logprobs),
        truncated=any(row.truncated for row in passes),
    )


# One text in detail.

SAMPLE_SIZES = (1, 2, 5, 10, 20, 50, 100)


def convergence_lines(task, label_logprobs, n_samples=100, seed=0):
    """How the samples of one text converge on its probabilities: one line for each size up to N.

    label_logprobs: (K,) nats at the sampling temperature. The samples of a line begin with those of
    the line before.
    """
    exact, k = answer_distribution(label_logprobs), len(label_logprobs)
    names = task.label_names
    wide = max(8, *map(len, names))
    answer = int(np.argmax(label_logprobs))
    draws = np.random.default_rng(seed).choice(k + 1, size=n_samples, p=exact)
    lines = [
        f"{'samples':>8}  {'majority':<{wide}}  {'agreement':>9}  {'95 % interval':>15}  "
        f"{f'minus p({names[answer]})':>{wide + 9}}  counts"
    ]
    for n in [n for n in SAMPLE_SIZES if n < n_samples] + [n_samples]:
        counts = np.bincount(draws[:n], minlength=k + 1)
        most = int(counts[:k].max())
        majority = names[int(counts[:k].argmax())] if most else "none"
        low, high = (float(v[0]) for v in wilson_interval([most], [n]))
        shown = ", ".join(f"{name} {c}" for name, c in zip(names, counts, strict=False))
        distance = counts[answer] / n - exact[answer]
        lines.append(
            f"{n:>8}  {majority:<{wide}}  {most / n:>9.3f}  {f'{low:.3f} – {high:.3f}':>15}  "
            f"{distance:>+{wide + 9}.3f}  {shown}, other {counts[k]}"
        )
    return lines


def wording_lines(classifier, text, own):
    """What the model answers to each wording of the question about one text."""
    task = classifier.task
    wordings = other_wordings(task)
    siblings = [classifier.for_task(other) for other in wordings]
    (row,) = paraphrase_predictions(siblings, [text], [own])
    if row.error is not None:
        raise UserError(row.error)
    answers = [max(zip(one, task.label_names, strict=True))[1] for one in row.pass_logprobs]
    wide = max(8, *map(len, task.label_names))
    lines = [f"{'answer':<{wide}}  {'margin, nats':>12}  question"]
    for other, answer, logprobs in zip([task, *wordings], answers, row.pass_logprobs, strict=True):
        first, second = sorted(logprobs)[:-3:-1]
        meaning = " (negated)" if other.labels != task.labels else ""
        lines.append(f"{answer:<{wide}}  {first - second:>12.3f}  {other.question}{meaning}")
    agree = answers.count(own.predicted)
    lines.append(
        f"{agree} of {len(answers)} wordings give {own.predicted}; averaged over them: "
        f"{row.predicted}, margin {row.margin:.3f} nats"
    )
    return lines


def dropout_lines(classifier, text, own, n_passes, seed):
    """What a fine-tuned model answers when parts of its adapter are switched off at random."""
    (row,) = dropout_predictions(classifier, [text], [own], n_passes, seed)
    if row.error is not None:
        raise UserError(row.error)
    passes = label_probabilities(row.pass_logprobs)  # (S, K)
    unsure = dropout_uncertainty(passes)
    first = classifier.task.label_names[0]
    return [
        f"{n_passes} passes: P({first}) from {passes[:, 0].min():.4f} to {passes[:, 0].max():.4f}, "
        f"mean {passes[:, 0].mean():.4f}",
        f"entropy of the mean {unsure['predictive']:.4f} nats = mean entropy of a pass "
        f"{unsure['expected']:.4f} (in the text) + mutual information "
        f"{unsure['mutual_information']:.4f} (in the weights)",
    ]


def main(argv=None):
    defaults = EvaluationSettings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="?", default="Best worst thing ever", help="text to classify")
    parser.add_argument(
        "--model", default="embedded", help="base, finetuned, preset, hub id or folder"
    )
    parser.add_argument("--adapter", help="folder of a LoRA adapter; its task is the default")
    parser.add_argument("--samples", type=int, default=100, help="largest number of samples")
    parser.add_argument("--temperature", type=float, default=defaults.temperature)
    parser.add_argument("--dropout-passes", type=int, default=defaults.dropout_passes)
    parser.add_argument("--seed", type=int, default=defaults.evaluation_seed)
    add_arguments(parser, TaskSettings)
    arguments = parser.parse_args(argv)
    if min(arguments.samples, arguments.dropout_passes) < 1 or not arguments.temperature > 0:
        parser.error("--samples and --dropout-passes must be at least 1, --temperature above 0")
    if arguments.seed < 0:
        parser.error(f"--seed must be at least 0, got {arguments.seed}")
    from logprobs_confidence import load_classifier

    text = arguments.text
    try:
        given = from_arguments(TaskSettings, arguments)
        task = None if given == TaskSettings() else given.build()
        settings = ModelSettings(model=arguments.model)
        classifier = load_classifier(settings, arguments.adapter, task)
        task = classifier.task
        own = classifier.classify(text)
        sampled = classifier.classify(text, temperature=arguments.temperature).label_logprobs
        exact = answer_distribution(sampled)
        shares = ", ".join(f"{n} {p:.4f}" for n, p in zip(task.label_names, exact, strict=False))
        lines = [
            f"text:      {text}",
            f"one pass:  {shares}, other {exact[-1]:.4f}  (temperature {arguments.temperature:g})",
            "",
            "Sampled answers",
            *convergence_lines(task, sampled, arguments.samples, arguments.seed),
            "",
            "The same question in other words",
            *wording_lines(classifier, text, own),
        ]
        if classifier.adapter_active:
            seed, n_passes = arguments.seed, arguments.dropout_passes
            lines += ["", "Monte-Carlo dropout over the adapter"]
            lines += dropout_lines(classifier, text, own, n_passes, seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
