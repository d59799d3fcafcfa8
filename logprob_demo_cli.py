"""What a language model computes for one text, step by step: from token probabilities to an answer.

    python logprob_demo_cli.py "Best worst thing ever"
    python logprob_demo_cli.py "Best worst thing ever" --compare     # base beside fine-tuned
    python logprob_demo_cli.py "Best worst thing ever" --quiet       # negative 0.8125
    python logprob_demo_cli.py "The film was" --raw-prompt --max-new-tokens 5 --temperature 2
    python logprob_demo_cli.py --file texts.txt --task toxicity --json
    python logprob_demo_cli.py --backend openai --base-url http://127.0.0.1:8000/v1 \\
        --model meta-llama/Llama-3.1-8B-Instruct "Best worst thing ever"

Shows the prompt as the model reads it, the most probable next tokens, how their probabilities add
up to those of the labels, and what the resulting confidence means. If evaluation_cache/ holds a
calibrator of exactly this model, it also says how often such an answer is right. A server names its
most probable tokens only: what needs all of them is refused, and a probability that it does not
give is shown as the most that it can be, with a ≤.
Exit codes: 0 done, 1 failed, 2 bad usage.
"""

import argparse
import json
import math
import os
import re
import sys
import textwrap
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from unicodedata import category, east_asian_width

import numpy as np

from logprobs_confidence import (
    Explanation,
    TokenProbability,
    load_classifier,
    text_problem,
    visible_token,
)
from records import LOW_LABEL_MASS, Prediction, label_probabilities
from report import MODEL_TITLES
from settings import (
    LOCAL,
    EvaluationSettings,
    ModelSettings,
    Task,
    UserError,
    add_arguments,
    add_classifier_arguments,
    read_task,
)
from table_files import decoded_lines, text_lines

WIDTH = 80  # columns of a terminal
LONGEST_TOKEN = 21  # columns; what is longer is cut
NEIGHBOURS = 0.05  # answers whose calibrated probability differs by at most this are "such answers"
SURENESS = ((0.95, "It is almost certain"), (0.8, "It is fairly sure"), (0.6, "It leans that way"))
BOLD, FAINT, YELLOW = "1", "2", "33"  # ANSI codes
SERVER_FLAGS = ("backend", "base_url", "tokenizer")  # the fields of `ModelSettings` with a flag
LABEL_COLOURS = ("36", "35", "32", "34")  # of the labels in their order, then from the first again


# ----------------------------------------------------------------------------- what is looked at


@dataclass(frozen=True)
class DemoSettings:
    """top_k: next tokens shown. temperature: None shows the model's own probabilities alone.
    max_new_tokens: tokens that are written; seed: of drawing them at a temperature."""

    top_k: int = 8
    temperature: float | None = None
    max_new_tokens: int = 0
    seed: int = EvaluationSettings.evaluation_seed
    raw_prompt: bool = False


@dataclass(frozen=True)
class Distribution:
    """The next-token distribution at one place. logprobs: (V,) nats, at temperature 1."""

    tokenizer: object
    logprobs: np.ndarray

    @cached_property
    def order(self):
        """(V,) token ids from the most probable one down."""
        return np.argsort(-self.logprobs, kind="stable")

    def at(self, temperature):
        """(V,) probabilities when the logits are divided by `temperature`."""
        scaled = (self.logprobs - self.logprobs.max()) / temperature
        return np.exp(scaled) / np.exp(scaled).sum()

    def row(self, token):
        rank = int(np.flatnonzero(self.order == token)[0]) + 1
        logprob = float(self.logprobs[token])
        name = visible_token(self.tokenizer, int(token))
        return TokenProbability(rank, int(token), name, logprob, math.exp(logprob))

    def top(self, k):
        return [self.row(token) for token in self.order[:k]]


@dataclass(frozen=True)
class Step:
    """One token that the model writes. distribution: what it was taken from; ends: the turn."""

    distribution: Distribution
    token_id: int
    ends: bool


@dataclass(frozen=True)
class Look:
    """All that is shown of one text.

    top: the most probable next tokens. steps: what the model writes; without --max-new-tokens one
    step, for its probabilities at a temperature. task, explanation, whole_words (labels are scored
    word by word), calibration (`calibration_of`): of a classified text, not of a raw prompt.
    cooled: its prediction at the temperature.
    """

    text: str
    demo: DemoSettings
    top: tuple[TokenProbability, ...]
    steps: tuple[Step, ...] = ()
    task: Task | None = None
    explanation: Explanation | None = None
    whole_words: bool = False
    calibration: dict | None = None
    cooled: Prediction | None = None

    def at_temperature(self, step=0):
        """(temperature, (V,) probabilities there) of a step, or None if none was asked for."""
        temperature = self.demo.temperature
        return temperature and (temperature, self.steps[step].distribution.at(temperature))


def written_steps(classifier, ids, demo):
    """`Step`s after the prompt `ids`, at least one; the last one may end the model's turn.

    Greedy, or drawn where `demo` has a temperature. Raises UserError beyond the model's context.
    """
    import torch

    n = max(1, demo.max_new_tokens)
    config = classifier.model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or math.inf
    if len(ids) + n > context:
        raise UserError(
            f"the prompt has {len(ids)} tokens, and {n} more do not fit into the model's "
            f"{context}; lower --max-new-tokens"
        )
    ends = classifier.model.generation_config.eos_token_id
    ends = {classifier.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    rng = np.random.default_rng(demo.seed)
    steps, past, unread = [], None, ids
    while len(steps) < n and not (steps and steps[-1].ends):
        with torch.inference_mode():
            output = classifier.model(
                input_ids=torch.tensor([unread], device=classifier.device),
                past_key_values=past,
                use_cache=True,
                logits_to_keep=1,
            )
        logprobs = output.logits[0, -1].float().log_softmax(-1).cpu().double().numpy()
        distribution = Distribution(classifier.tokenizer, logprobs)
        token = int(distribution.order[0])
        if demo.temperature is not None:
            token = int(rng.choice(len(logprobs), p=distribution.at(demo.temperature)))
        steps.append(Step(distribution, token, token in ends))
        past, unread = output.past_key_values, [token]
    return tuple(steps)


def look(classifier, text, demo, evaluated):
    """The `Look` at one text. evaluated: as of `evaluated_model`. Raises UserError."""
    if demo.raw_prompt:
        steps = written_steps(classifier, classifier.raw_prompt_ids(text), demo)
        return Look(text, demo, tuple(steps[0].distribution.top(demo.top_k)), steps)
    explanation = classifier.explain(text, demo.top_k)
    steps, cooled = (), None
    if demo.temperature is not None or demo.max_new_tokens:
        ((ids, _),) = classifier.encoder.encode([text.strip()])
        steps = written_steps(classifier, ids, demo)
    if demo.temperature is not None:
        cooled = classifier.classify(text, temperature=demo.temperature)
    return Look(
        text,
        demo,
        explanation.top,
        steps,
        classifier.task,
        explanation,
        classifier.encoder.label_ids is None,
        calibration_of(classifier.task, explanation.answer, evaluated),
        cooled,
    )


def evaluated_model(classifier, cache_dir):
    """(calibrator, its evaluation) of exactly this model, or (None, why there is none).

    Raises UserError for a damaged calibrated_results.json.
    """
    from calibration import NoCalibrator, cached_calibrator

    try:
        return cached_calibrator(cache_dir, classifier.identity)
    except NoCalibrator as reason:
        return None, str(reason)


def calibration_of(task, prediction, evaluated):
    """How often such an answer is right: {"calibrator", "n_rows", "confidence", "n_such",
    "n_right", "best"}, or {"reason"} where no calibrator belongs to this model.

    confidence: the calibrated probability of the predicted label; n_such: test answers whose
    calibrated probability is near it, n_right: those of them that were right; best: the label that
    is most probable once calibrated. Raises UserError for a damaged evaluation.
    """
    from calibration import FIT_AGAIN, calibrated_probabilities

    calibrator, entry = evaluated
    if calibrator is None:
        return {"reason": entry}
    row = {"label_logprobs": np.array([prediction.label_logprobs])}
    calibrated = calibrated_probabilities(calibrator, row)[0]  # (K,)
    mine = float(calibrated[task.label_names.index(prediction.predicted)])
    try:
        test = entry["test"]
        raw, others = (
            np.array(test["methods"][m]["probabilities"]) for m in ("raw", calibrator.name)
        )
        answered = raw.argmax(axis=1)  # (n,) the label that the model gave
        such = np.abs(others[np.arange(len(others)), answered] - mine) <= NEIGHBOURS
        right = answered == np.array(test["label"])
        n_such, n_right = int(such.sum()), int(right[such].sum())
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"calibrated_results.json is damaged ({error!r}); {FIT_AGAIN}") from error
    return {
        "calibrator": calibrator.name,
        "n_rows": calibrator.n_rows,
        "confidence": mine,
        "n_such": n_such,
        "n_right": n_right,
        "best": task.label_names[int(calibrated.argmax())],
    }


# ----------------------------------------------------------------------------------------- layout


def styled(text, *codes):
    """`text` in ANSI colours; `say` takes them out again where nobody wants them."""
    codes = ";".join(filter(None, codes))
    return f"\x1b[{codes}m{text}\x1b[0m" if codes else text


def unstyled(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def wants_colour(stream):
    """Whether the stream is a terminal with colours and NO_COLOR (no-color.org) is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def label_style(task, name):
    return LABEL_COLOURS[task.label_names.index(name) % len(LABEL_COLOURS)]


def column_width(text):
    """Columns of a terminal: East Asian characters take two, combining marks none."""
    return sum(
        0 if category(c) in ("Mn", "Me") else 2 if east_asian_width(c) in "WF" else 1 for c in text
    )


def cut(text, width):
    """`text`, or as much of its beginning as fits into `width` columns with an ellipsis."""
    while column_width(text) > width:
        text = text.removesuffix("…")[:-1] + "…"
    return text


def padded(text, width):
    return text + " " * (width - column_width(text))


def pieces(line, width):
    """`line` in pieces of at most `width` columns, divided before a space or a control token."""
    start = split = used = 0
    for i, c in enumerate(line):
        if c == " " or line.startswith("<|", i):
            split = i
        if used + column_width(c) > width:
            end = split if split > start else i
            yield line[start:end]
            start, used = end, column_width(line[end:i])
        used += column_width(c)
    yield line[start:]


def wrapped(text, indent=0):
    """`text` in lines of at most `WIDTH` columns, all but the first indented."""
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def warning_lines(text):
    return [styled(line, YELLOW) for line in wrapped(f"warning: {text}")]


def decimals(probability):
    """Six decimals, or two significant digits below a millionth."""
    return f"{probability:.6f}" if probability >= 1e-6 else f"{probability:.1e}"


def percent(fraction):
    """Two digits are enough to speak of; 100 % and 0 % are said only where they are meant."""
    if 0 < fraction < 0.001 or 0.999 < fraction < 1:
        return "less than 0.1 %" if fraction < 0.5 else "more than 99.9 %"
    return f"{100 * fraction:.1f} %"


def label_notes(seen):
    """{token id: (the labels it stands for, their style)}; none for a raw prompt."""
    labels_of = {}
    for name, tokens in seen.explanation.words.items() if seen.explanation else ():
        for t in tokens:
            labels_of.setdefault(t.token_id, []).append(name)
    return {
        token: (", ".join(names), label_style(seen.task, names[0]))
        for token, names in labels_of.items()
    }


def table(tokens, notes, at=None):
    """The lines of a next-token table.

    notes: {token id: (what the last column says, its style)}. at: (temperature, (V,) probabilities
    there), which take the place of the percentages.
    """
    names = [cut(t.token, LONGEST_TOKEN) for t in tokens]
    width = max(map(column_width, [*names, "token"]))
    last = f"at T = {at[0]:g}" if at else "percentage"
    size = 11 if at else 10
    header = f"rank  {'token':<{width}}  log-prob, nats  probability  {last:>{size}}"
    lines = [styled(header + "  label" * bool(notes), FAINT)]
    for t, name in zip(tokens, names, strict=True):
        share = f"{100 * t.probability:.2f} %" if t.probability >= 5e-5 else "< 0.01 %"
        last = decimals(at[1][t.token_id]) if at else share
        note, style = notes.get(t.token_id, ("", ""))
        row = (
            f"{t.rank:>4}  {padded(name, width)}  {t.logprob:>14.4f}  "
            f"{decimals(t.probability):>11}  {last:>{size}}  {note}"
        )
        lines.append(styled(cut(row.rstrip(), WIDTH), style))
    return lines


# ------------------------------------------------------------------------------ a classified text


def prompt_lines(explanation):
    """The prompt with a bar before every line and a colon where a long line goes on; control
    characters are written out."""
    shown = "".join(
        c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in explanation.prompt
    )
    lines = [styled("The prompt, as the model reads it:", BOLD)]
    for line in shown.split("\n"):
        first, *others = pieces(line, WIDTH - 4)
        lines += [f"  | {first}".rstrip(), *(f"  : {other}" for other in others)]
    if explanation.prediction.truncated:
        lines += wrapped("Longer than the model can read: it saw this without the text's middle.")
    return lines


def sum_lines(task, explanation, whole_words):
    """From tokens to labels: each label's sum, and the label mass.

    whole_words: labels whose words begin with the same token are scored word by word.
    """
    lines = [styled("p(label): the probabilities of its answer words, added up.", BOLD)]
    if whole_words:
        lines += wrapped(
            "Words of different labels begin with the same token here, so every word is scored "
            "whole: its tokens' probabilities, multiplied."
        )
    totals = np.exp(explanation.prediction.label_logprobs)
    for label, total in zip(task.labels, totals, strict=True):
        start, mine = f"  p({label.name}) = ", []
        if whole_words:
            words = " + ".join(f"p({word!r})" for word in label.words)
            mine += wrapped(f"{start}{words} = {decimals(total)}", len(start))
        else:
            tokens = explanation.words[label.name]
            mine += wrapped(start + " + ".join(f"p({t.token})" for t in tokens), len(start))
            added = " + ".join("≤ " * t.bound + decimals(t.probability) for t in tokens)
            added += f" = {decimals(total)}" if len(tokens) > 1 else ""
            mine += wrapped(" " * (len(start) - 2) + f"= {added}", len(start))
            whole = {repr(space + word) for word in label.words for space in ("", " ")}
            if parts := [t.token for t in tokens if t.token not in whole]:
                mine += wrapped(
                    f"  ({', '.join(parts)}: only the beginning of an answer word; whatever else "
                    "begins like that is counted as well)",
                    3,
                )
        lines += [styled(line, label_style(task, label.name)) for line in mine]
    mass = explanation.prediction.label_mass
    if (slack := explanation.prediction.label_slack) is not None:
        ranges = (
            f"p({name}) lies between {decimals(max(0.0, total - loose))} and {decimals(total)}"
            for name, total, loose in zip(task.label_names, totals, slack, strict=True)
            if loose > 0
        )
        lines += warning_lines(
            "the server names its most probable tokens only. A ≤ stands before the most that "
            f"another one can have: {'; '.join(ranges)}."
        )
    sums = " + ".join(decimals(total) for total in totals)
    start = f"  label mass {'=' if slack is None else '≤'} "
    lines += wrapped(f"{start}{sums} = {decimals(mass)}", len(start))
    if mass < LOW_LABEL_MASS:
        lines += warning_lines(
            f"the label mass is below {LOW_LABEL_MASS}: the model mostly says something that is no "
            "answer, so its prediction means little."
        )
    return lines


def share_lines(task, prediction):
    """Each label's share of the label mass."""
    lines, mass = [styled("P(label): its share of the label mass.", BOLD)], prediction.label_mass
    totals = np.exp(prediction.label_logprobs)
    shares = label_probabilities(prediction.label_logprobs)
    for name, total, share in zip(task.label_names, totals, shares, strict=True):
        line = f"  P({name}) = {decimals(total)} / {decimals(mass)} = {decimals(share)}"
        lines.append(styled(line, label_style(task, name)))
    return lines


def order_lines(task, explanation):
    """Of lettered options: each label's probability at every letter, and the mean; else nothing."""
    if len(explanation.orders) == 1:
        return []
    lines = wrapped(
        f"The options were shown in {len(explanation.orders)} orders, above the first of them. "
        "p(label) at each letter, and the mean, which is the answer:"
    )
    by_order = np.exp([prediction.label_logprobs for prediction in explanation.orders])
    means = np.exp(explanation.answer.label_logprobs)
    for k, name in enumerate(task.label_names):
        at = ", ".join(
            f"{order.labels[k].words[0]} {decimals(p)}"
            for order, p in zip(task.orders, by_order[:, k], strict=True)
        )
        lines += wrapped(f"  p({name}): {at}; mean {decimals(means[k])}", 4)
    return [*lines, ""]


def meaning(prediction):
    """How sure the model is, and what that does and does not say."""
    sure = next((s for low, s in SURENESS if prediction.confidence >= low), "It is undecided")
    if prediction.label_mass < LOW_LABEL_MASS:
        sure = "It hardly answers the question"
    return (
        f"{sure}: of all it could say next, {percent(prediction.confidence)} means "
        f"{prediction.predicted}. That is how sure the model says it is, not how often it is "
        "right: a raw confidence is not yet a calibrated probability."
    )


def calibration_sentence(prediction, calibration):
    """How often such an answer is right, in words; calibration: as of `calibration_of`."""
    if "reason" in calibration:
        return f"How often such an answer is right is not known: {calibration['reason']}."
    n_such, n_right = calibration["n_such"], calibration["n_right"]
    sentence = (
        f"The calibrator {calibration['calibrator']!r}, fitted on {calibration['n_rows']:,} "
        "held-out texts with known answers, gives this answer a chance of "
        f"{percent(calibration['confidence'])} to be right"
    )
    if n_such:
        sentence += (
            f"; of the test answers whose chance is within {100 * NEIGHBOURS:.0f} points of that, "
            f"{n_right:,} of {n_such:,} were ({percent(n_right / n_such)})"
        )
    if calibration["best"] != prediction.predicted:
        sentence += f". Calibrated, {calibration['best']!r} is the better answer"
    return sentence + "."


def report(seen):
    """The lines of the demonstration for one classified text."""
    task, explanation = seen.task, seen.explanation
    first, answer = task.orders[0], explanation.answer
    return [
        *prompt_lines(explanation),
        "",
        styled(f"The {len(seen.top)} most probable next tokens:", BOLD),
        *table(seen.top, label_notes(seen), seen.at_temperature()),
        "",
        *sum_lines(first, explanation, seen.whole_words),
        "",
        *share_lines(first, explanation.prediction),
        "",
        *order_lines(task, explanation),
        styled(f"Prediction: {answer.predicted}", BOLD, label_style(task, answer.predicted))
        + f", confidence p({answer.predicted}) = {decimals(answer.confidence)}",
        "",
        *wrapped(meaning(answer)),
        *wrapped(calibration_sentence(answer, seen.calibration)),
        *temperature_lines(seen),
        *writing_lines(seen),
    ]


# ------------------------------------------------------------- a raw prompt, temperature, writing


def raw_report(seen):
    """The lines that show how the model would continue a text as it stands."""
    total = min(1.0, math.fsum(t.probability for t in seen.top))
    return [
        styled(f"The {len(seen.top)} most probable next tokens:", BOLD),
        *table(seen.top, {}, seen.at_temperature()),
        "",
        *wrapped(
            f"Together these tokens hold {percent(total)} of the probability; all others share the "
            "rest. The text was continued as it stands, without question or chat template, so "
            "these numbers are chances of a next token and not the confidence in a label."
        ),
        *temperature_lines(seen),
        *writing_lines(seen),
    ]


def tokens_holding(probabilities, share):
    """How many of the most probable tokens together hold at least this share."""
    total = np.cumsum(np.sort(probabilities)[::-1])
    return min(int(np.searchsorted(total, share)) + 1, len(total))


def temperature_lines(seen):
    """What the temperature does to the first distribution, and to the labels."""
    if seen.demo.temperature is None:
        return []
    temperature, probabilities = seen.at_temperature()
    effect = "flattens" if temperature > 1 else "sharpens" if temperature < 1 else "stays as it is"
    half, most = (
        [tokens_holding(p, share) for p in (seen.steps[0].distribution.at(1), probabilities)]
        for share in (0.5, 0.9)
    )
    lines = [
        "",
        styled(f"Temperature {temperature:g}: the distribution {effect}.", BOLD),
        *wrapped(
            f"Every log-prob is divided by {temperature:g}, then all probabilities are made to sum "
            f"to 1 again. Tokens that share half of the probability: {half[0]:,} at T = 1, "
            f"{half[1]:,} at T = {temperature:g}; nine tenths: {most[0]:,} and {most[1]:,}. The "
            "order of the tokens stays the same."
        ),
    ]
    if seen.cooled is None:
        return lines
    pair = (seen.explanation.answer, seen.cooled)
    rows = [
        (f"p({name})", *(math.exp(p.label_logprobs[i]) for p in pair), label_style(seen.task, name))
        for i, name in enumerate(seen.task.label_names)
    ]
    rows.append(("label mass", *(p.label_mass for p in pair), ""))
    width = max(column_width(title) for title, *_ in rows)
    lines.append(
        styled(f"  {'':<{width}}  {'at T = 1':>11}  {f'at T = {temperature:g}':>11}", FAINT)
    )
    for title, one, other, style in rows:
        row = f"  {padded(title, width)}  {decimals(one):>11}  {decimals(other):>11}"
        lines.append(styled(row, style))
    return lines


def writing_lines(seen):
    """What the model writes, and the distribution at every token of it."""
    if not seen.demo.max_new_tokens:
        return []
    demo, steps = seen.demo, seen.steps
    how = "greedily: always the most probable token"
    if demo.temperature is not None:
        how = f"drawn at temperature {demo.temperature:g} with seed {demo.seed}"
    lines = ["", styled(f"What the model writes, {how}", BOLD)]
    written = []
    for i, step in enumerate(steps):
        top, chosen = step.distribution.top(demo.top_k), step.distribution.row(step.token_id)
        if chosen.rank > len(top):
            top.append(chosen)
        before = f"after {' '.join(written[-3:])}" if written else "the first token"
        lines += ["", *wrapped(f"Step {i + 1}, {before}:")]
        rows = table(top, {}, seen.at_temperature(i))
        place = 1 + top.index(chosen)
        rows[place] = styled(cut(f"{rows[place]}  ← written", WIDTH), BOLD)
        lines += rows
        written.append(chosen.token)
    text = steps[0].distribution.tokenizer.decode([step.token_id for step in steps])
    end = "It goes on from there with a larger --max-new-tokens."
    if steps[-1].ends:
        end = f"{written[-1]} ends its turn."
    return [*lines, "", *wrapped(f"Written: {text!r}. {end}")]


# ------------------------------------------------------------------------------------- two models


def comparison_table(looks):
    """The most probable tokens of two models side by side, with the labels they stand for."""
    width = (WIDTH - 6) // 2  # columns of a model
    halves = []
    for name, seen in looks.items():
        notes = label_notes(seen)
        longest = width - 12 - 12 * bool(notes)
        half = [(MODEL_TITLES[name], FAINT)]
        for t in seen.top:
            note, style = notes.get(t.token_id, ("", ""))
            token = padded(cut(t.token, longest), longest)
            half.append((f"{token}  {decimals(t.probability):>8}  {cut(note, 10)}", style))
        halves.append(half)
    ranks = ["rank", *range(1, len(halves[0]))]
    return [
        f"{rank:>4}  {styled(padded(left, width), one)}{styled(right.rstrip(), other)}"
        for rank, (left, one), (right, other) in zip(ranks, *halves, strict=True)
    ]


def comparison_report(looks):
    """The lines of one text as two models see it; looks: {"base": `Look`, "finetuned": `Look`}."""
    base = looks["base"]
    lines = [] if base.explanation is None else [*prompt_lines(base.explanation), ""]
    lines.append(styled(f"The {len(base.top)} most probable next tokens:", BOLD))
    lines += comparison_table(looks)
    if base.explanation is None:
        return lines
    task, pair = base.task, [seen.explanation.answer for seen in looks.values()]
    shares = [label_probabilities(p.label_logprobs) for p in pair]
    rows = [
        (f"p({name})", [decimals(math.exp(p.label_logprobs[i])) for p in pair], name)
        for i, name in enumerate(task.label_names)
    ]
    rows.append(("label mass", [decimals(p.label_mass) for p in pair], None))
    for i, name in enumerate(task.label_names):
        rows.append((f"P({name})", [decimals(share[i]) for share in shares], name))
    rows.append(("prediction", [p.predicted for p in pair], None))
    rows.append(("confidence", [decimals(p.confidence) for p in pair], None))
    chances = [seen.calibration.get("confidence") for seen in looks.values()]
    calibrated = ["not known" if chance is None else percent(chance) for chance in chances]
    rows.append(("chance to be right, calibrated", calibrated, None))
    titles = [MODEL_TITLES[name] for name in looks]
    lines += ["", styled(f"{'':<32}" + "  ".join(f"{title:>20}" for title in titles), FAINT)]
    for title, values, name in rows:
        cells = "  ".join(f"{cut(value, 20):>20}" for value in values)
        style = label_style(task, name) if name else ""
        lines.append(styled(padded(cut(title, 30), 32) + cells, style))
    return [*lines, "", *wrapped(verdict(*pair)), *missing_calibrators(looks)]


def verdict(base, tuned):
    """In words, what fine-tuning changed for one text."""
    said = f"The base model says {base.predicted}, the fine-tuned one {tuned.predicted}."
    if base.predicted == tuned.predicted:
        sure = "surer" if tuned.confidence > base.confidence else "less sure"
        said = f"Both say {base.predicted}, the fine-tuned model {sure} than the base model."
    return (
        f"{said} One text does not show which of them is right more often; "
        "compare_base_vs_finetuned.py compares them on all test texts."
    )


def missing_calibrators(looks):
    return [
        line
        for name, seen in looks.items()
        if "reason" in seen.calibration
        for line in wrapped(f"{MODEL_TITLES[name].capitalize()}: {seen.calibration['reason']}.")
    ]


# ------------------------------------------------------------------------------------------- JSON


def look_json(seen):
    """What `report` or `raw_report` show, ready for JSON."""
    demo, explanation = seen.demo, seen.explanation
    data = {"text": seen.text, "tokens": token_rows(seen.top, seen.at_temperature())}
    if explanation is not None:
        p = explanation.answer
        data |= {
            "task": seen.task.name,
            "prompt": explanation.prompt,
            "labels": label_rows(seen.task, p),
            "words": {name: token_rows(tokens) for name, tokens in explanation.words.items()},
            "label_mass": p.label_mass,
            "predicted": p.predicted,
            "confidence": p.confidence,
            "truncated": p.truncated,
            "calibration": seen.calibration,
        }
        if p.label_slack is not None:
            slack = zip(seen.task.label_names, p.label_slack, strict=True)
            data["label_slack"] = dict(slack)  # "p" is at most so much too large
    if demo.temperature is not None:
        data["temperature"] = demo.temperature
    if seen.cooled is not None:
        data["labels_at_temperature"] = label_rows(seen.task, seen.cooled)
    if demo.max_new_tokens:
        data["steps"] = [
            {
                "written": asdict(step.distribution.row(step.token_id)),
                "ends": step.ends,
                "tokens": token_rows(step.distribution.top(demo.top_k), seen.at_temperature(i)),
            }
            for i, step in enumerate(seen.steps)
        ]
    return data


def token_rows(tokens, at=None):
    return [
        asdict(t) | ({"probability_at_temperature": float(at[1][t.token_id])} if at else {})
        for t in tokens
    ]


def label_rows(task, prediction):
    """{label: {"p": of all the model could say, "share": among the labels}}."""
    shares = label_probabilities(prediction.label_logprobs)
    return {
        name: {"p": math.exp(logprob), "share": float(share)}
        for name, logprob, share in zip(
            task.label_names, prediction.label_logprobs, shares, strict=True
        )
    }


# ------------------------------------------------------------------------------------ the command


def parse_arguments(argv):
    defaults = DemoSettings()
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage.",
    )
    parser.add_argument(
        "texts",
        nargs="*",
        metavar="TEXT",
        help="text to classify; - or a pipe: every line of the standard input",
    )
    parser.add_argument("--file", type=Path, help="a text on every line, UTF-8")
    add_classifier_arguments(parser)
    others = [f.name for f in fields(ModelSettings) if f.name not in SERVER_FLAGS]
    add_arguments(parser, ModelSettings, leave_out=others)
    parser.add_argument(
        "--compare", action="store_true", help="the model without and with its adapter side by side"
    )
    parser.add_argument(
        "--raw-prompt",
        action="store_true",
        help="continue TEXT as it stands, without question or chat template",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help=f"next tokens shown (default: {defaults.top_k})",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="also show the probabilities at this temperature: above 1 they flatten, below 1 they "
        "sharpen",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="let the model write up to N tokens, and show the distribution at each; greedy, with "
        "--temperature drawn",
    )
    parser.add_argument(
        "--seed", type=int, help=f"of drawing tokens at a temperature (default: {defaults.seed})"
    )
    parser.add_argument("--quiet", action="store_true", help="one line: answer and confidence")
    parser.add_argument("--json", action="store_true", help="one JSON object for every text")
    arguments = parser.parse_args(argv)
    check_arguments(parser, arguments)
    return arguments


def check_arguments(parser, arguments):
    """Ends with exit code 2 for values out of range and for flags that exclude each other."""
    for flag, least in (("top_k", 1), ("max_new_tokens", 1), ("seed", 0)):
        value = getattr(arguments, flag)
        if value is not None and value < least:
            parser.error(f"--{flag.replace('_', '-')} must be at least {least}, got {value}")
    if (t := arguments.temperature) is not None and not 0.01 <= t <= 100:
        parser.error(f"--temperature must lie between 0.01 and 100, got {t}")
    given = {n for n, v in vars(arguments).items() if v is not None and v is not False and v != []}
    for flag, others in (
        ("quiet", ("json", "compare", "top_k", "temperature", "max_new_tokens")),
        ("compare", ("temperature", "max_new_tokens")),
        ("raw_prompt", ("task",)),
        ("file", ("texts",)),
    ):
        for other in others:
            if {flag, other} <= given:
                names = (name.replace("_", "-") for name in (flag, other))
                one, two = ("TEXT" if name == "texts" else f"--{name}" for name in names)
                parser.error(f"{one} and {two} exclude each other; leave one of them out")
    if arguments.backend != LOCAL:
        for flag in ("adapter", "compare", "raw_prompt", "temperature", "max_new_tokens"):
            if flag in given:
                parser.error(
                    f"--{flag.replace('_', '-')} needs a model that is loaded here; a server gives "
                    "the probabilities of a few tokens after a question, and has an adapter as a "
                    "--model by its own name"
                )
    if "seed" in given and not {"temperature", "max_new_tokens"} <= given:
        parser.error("--seed is for drawing: it needs --max-new-tokens and --temperature")
    if arguments.compare and arguments.model not in (None, "finetuned") and not arguments.adapter:
        parser.error("--compare needs an adapter; leave --model out or give --adapter")
    if not arguments.texts and arguments.file is None and sys.stdin.isatty():
        parser.error("give a TEXT, --file, or texts on the standard input")
    if arguments.texts.count("-") > 1:
        parser.error("the standard input can be read once only; give - once")


def texts_of(arguments):
    """Yields (where it stands, text): arguments, and lines of a file or of the standard input."""
    restore = "give an existing file with --file"
    if arguments.file is not None:
        yield from named_lines(text_lines(arguments.file, restore))
        return
    for number, text in enumerate(arguments.texts or ["-"], 1):
        if text == "-":
            lines = decoded_lines(sys.stdin.buffer, "standard input")
            yield from named_lines(line.rstrip("\r\n") for line in lines)
        else:
            yield f"text {number}", text


def named_lines(lines):
    return ((f"line {n}", line) for n, line in enumerate(lines, 1) if line.strip())


def arms_of(classifier, compare):
    """{name of the model: what to enter before it is asked}."""
    if compare:
        return {"base": classifier.without_adapter, "finetuned": nullcontext}
    return {"": nullcontext}


def say(text):
    print(text if wants_colour(sys.stdout) else unstyled(text))


def shown(classifier, text, demo, arguments, evaluated):
    """What is printed of one text. Raises UserError."""
    if problem := text_problem(text):
        raise UserError(problem)
    if arguments.quiet and demo.raw_prompt:
        first = classifier.next_token_distribution(text, k=1)[0]
        return f"{first.token} {first.probability:.4f}"
    if arguments.quiet:
        prediction = classifier.classify(text)
        return f"{prediction.predicted} {prediction.confidence:.4f}"
    looks = {}
    for name, arm in arms_of(classifier, arguments.compare).items():
        with arm():
            looks[name] = look(classifier, text, demo, evaluated.get(name))
    if arguments.compare:
        if arguments.json:
            return json.dumps({name: look_json(seen) for name, seen in looks.items()})
        return "\n".join(comparison_report(looks))
    (seen,) = looks.values()
    if arguments.json:
        return json.dumps(look_json(seen))
    return "\n".join(raw_report(seen) if demo.raw_prompt else report(seen))


def run(arguments):
    """Show every text; False if one of them could not be shown. Raises UserError."""
    names = ("top_k", "temperature", "max_new_tokens", "seed")
    given = {n: value for n in names if (value := getattr(arguments, n)) is not None}
    demo = DemoSettings(raw_prompt=arguments.raw_prompt, **given)
    texts = list(texts_of(arguments))
    if not texts:
        raise UserError("there is no text; give a line with at least one visible character")
    task = None if arguments.task is None else read_task(arguments.task)
    adapter = arguments.adapter
    model = arguments.model or ("finetuned" if adapter or arguments.compare else "base")
    server = {name: getattr(arguments, name) for name in SERVER_FLAGS}
    classifier = load_classifier(ModelSettings(model=model, **server), adapter, task)
    evaluated = {}
    if not arguments.quiet and not demo.raw_prompt:
        for name, arm in arms_of(classifier, arguments.compare).items():
            with arm():
                evaluated[name] = evaluated_model(classifier, arguments.cache_dir)
    several = len(texts) > 1
    headings = several and not arguments.quiet and not arguments.json
    complete = True
    for number, (where, text) in enumerate(texts):
        try:
            output = shown(classifier, text, demo, arguments, evaluated)
        except UserError as error:
            complete = False
            print(f"error: {where}: {error}" if several else f"error: {error}", file=sys.stderr)
            continue
        if headings:
            say("\n" * (number > 0) + styled(f"=== {where} ===", BOLD) + "\n")
        say(output)
    return complete


def main(argv=None):
    arguments = parse_arguments(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a token can be any character
    try:
        return 0 if run(arguments) else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except BrokenPipeError:  # whoever read the output has enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


if __name__ == "__main__":
    sys.exit(main())
