"""What a language model computes for one text, step by step: from token probabilities to an answer.

    python logprob_demo_cli.py "Best worst thing ever"
    python logprob_demo_cli.py "Best worst thing ever" --model finetuned --top-k 12
    python logprob_demo_cli.py "Best worst thing ever" --quiet      # positive 0.8147
    python logprob_demo_cli.py "The film was" --raw-prompt          # which word comes next?

Shows the prompt as the model reads it, the most probable next tokens, how their probabilities add
up to those of the labels, and what the resulting confidence means. If evaluation_cache/ holds a
calibrator of exactly this model, it also says how often such an answer is right.
Exit codes: 0 done, 1 failed, 2 bad usage.
"""

import argparse
import math
import sys
import textwrap
from unicodedata import category, east_asian_width

import numpy as np

from logprobs_confidence import TransformerLogprobsClassifier, text_problem
from records import LOW_LABEL_MASS, SCHEMA_VERSION, label_probabilities, read_json
from settings import CACHE_DIR, FINE_TUNED_DIR, ModelSettings, Task, UserError

WIDTH = 80  # columns of a terminal
LONGEST_TOKEN = 21  # columns; what is longer is cut
NEIGHBOURS = 0.05  # answers whose calibrated probability differs by at most this are "such answers"
SURENESS = ((0.95, "It is almost certain"), (0.8, "It is fairly sure"), (0.6, "It leans that way"))


def load_classifier(name, fine_tuned_dir):
    """`base`: the embedded model; `finetuned`: the adapter in `fine_tuned_dir` on its base model,
    with its task; any other name: that model. Raises UserError."""
    if name != "finetuned":
        return TransformerLogprobsClassifier(ModelSettings() if name == "base" else name)
    next_step = "run: python fine_tune_model.py"
    manifest = read_json(fine_tuned_dir / "manifest.json", next_step)
    task = read_json(fine_tuned_dir / "task.json", next_step)
    try:
        base_model, task = manifest["base_model"], Task.from_json(task)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{fine_tuned_dir} is damaged ({error!r}); {next_step}") from error
    return TransformerLogprobsClassifier(base_model, fine_tuned_dir, task)


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


def decimals(probability):
    """Six decimals, or two significant digits below a millionth."""
    return f"{probability:.6f}" if probability >= 1e-6 else f"{probability:.1e}"


def percent(fraction):
    """Two digits are enough to speak of; 100 % and 0 % are said only where they are meant."""
    if 0 < fraction < 0.001 or 0.999 < fraction < 1:
        return "less than 0.1 %" if fraction < 0.5 else "more than 99.9 %"
    return f"{100 * fraction:.1f} %"


def table(tokens, labels_of):
    """The lines of the next-token table; labels_of: {token id: the labels it stands for}."""
    names = [cut(t.token, LONGEST_TOKEN) for t in tokens]
    width = max(map(column_width, [*names, "token"]))
    header = f"rank  {'token':<{width}}  log-prob, nats  probability  percentage"
    lines = [header + "  label" * bool(labels_of)]
    for t, name in zip(tokens, names, strict=True):
        padding = " " * (width - column_width(name))
        share = f"{100 * t.probability:.2f} %" if t.probability >= 5e-5 else "< 0.01 %"
        row = (
            f"{t.rank:>4}  {name}{padding}  {t.logprob:>14.4f}  {decimals(t.probability):>11}  "
            f"{share:>10}  {', '.join(labels_of.get(t.token_id, []))}"
        )
        lines.append(cut(row.rstrip(), WIDTH))
    return lines


def wrapped(text, indent=0):
    """`text` in lines of at most `WIDTH` columns, all but the first indented."""
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def prompt_lines(explanation):
    """The prompt with a bar before every line; control characters are written out."""
    shown = "".join(
        c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in explanation.prompt
    )
    lines = [f"  | {line}".rstrip() for line in shown.split("\n")]
    if explanation.prediction.truncated:
        lines += wrapped("Longer than the model can read: it saw this without the text's middle.")
    return ["The prompt, as the model reads it:", *lines]


def sum_lines(task, explanation, whole_words):
    """From tokens to labels: each label's sum, and the label mass.

    whole_words: labels whose words begin with the same token are scored word by word.
    """
    lines = ["p(label): the probabilities of its answer words, added up."]
    if whole_words:
        lines += wrapped(
            "Words of different labels begin with the same token here, so every word is scored "
            "whole: its tokens' probabilities, multiplied."
        )
    totals = np.exp(explanation.prediction.label_logprobs)
    for label, total in zip(task.labels, totals, strict=True):
        start = f"  p({label.name}) = "
        if whole_words:
            words = " + ".join(f"p({word!r})" for word in label.words)
            lines += wrapped(f"{start}{words} = {decimals(total)}", len(start))
            continue
        tokens = explanation.words[label.name]
        lines += wrapped(start + " + ".join(f"p({t.token})" for t in tokens), len(start))
        added = " + ".join(decimals(t.probability) for t in tokens)
        added += f" = {decimals(total)}" if len(tokens) > 1 else ""
        lines += wrapped(" " * (len(start) - 2) + f"= {added}", len(start))
        whole = {repr(space + word) for word in label.words for space in ("", " ")}
        if parts := [t.token for t in tokens if t.token not in whole]:
            lines += wrapped(
                f"  ({', '.join(parts)}: only the beginning of an answer word; whatever else "
                "begins like that is counted as well)",
                3,
            )
    mass = explanation.prediction.label_mass
    sums = " + ".join(decimals(total) for total in totals)
    lines += wrapped(f"  label mass = {sums} = {decimals(mass)}", len("  label mass = "))
    if mass < LOW_LABEL_MASS:
        lines += wrapped(
            f"warning: the label mass is below {LOW_LABEL_MASS}: the model mostly says something "
            "that is no answer, so its prediction means little."
        )
    return lines


def share_lines(task, prediction):
    """Each label's share of the label mass."""
    mass = decimals(prediction.label_mass)
    totals = np.exp(prediction.label_logprobs)
    shares = label_probabilities(prediction.label_logprobs)
    return ["P(label): its share of the label mass."] + [
        f"  P({label.name}) = {decimals(total)} / {mass} = {decimals(share)}"
        for label, total, share in zip(task.labels, totals, shares, strict=True)
    ]


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


def calibration_sentence(classifier, prediction, cache_dir):
    """How often such an answer is right, if `cache_dir` has a calibrator of exactly this model.

    Raises UserError for a damaged calibrated_results.json.
    """
    path = cache_dir / "calibrated_results.json"
    missing = (
        f"No calibrator in {cache_dir.name}/ belongs to this model, so how often such an answer is "
        "right is not known; generate_evaluation_cache.py measures it."
    )
    if not path.exists():
        return missing
    from calibration import CALIBRATORS, calibrated_probabilities

    next_step = "run: python generate_evaluation_cache.py --force"
    cache = read_json(path, next_step)
    if cache.get("schema_version") != SCHEMA_VERSION:
        found = cache.get("schema_version")
        raise UserError(f"{path} has schema {found}, not {SCHEMA_VERSION}; {next_step}")
    fingerprint = classifier.identity["fingerprint"]
    try:
        by_fingerprint = {m["identity"]["fingerprint"]: m for m in cache["models"].values()}
        if fingerprint not in by_fingerprint:
            return missing
        model = by_fingerprint[fingerprint]
        calibrator = CALIBRATORS["platt"].from_json(model["calibrators"]["platt"])
        row = {"label_logprobs": np.array([prediction.label_logprobs])}
        calibrated = calibrated_probabilities(calibrator, row)[0]  # (K,)
        test = model["test"]
        raw, platt = (np.array(test["methods"][m]["probabilities"]) for m in ("raw", "platt"))
        answered = raw.argmax(axis=1)  # (n,) the label that the model gave
        chance = platt[np.arange(len(platt)), answered]
        right = answered == np.array(test["label"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is damaged ({error!r}); {next_step}") from error
    names = classifier.task.label_names
    mine = float(calibrated[names.index(prediction.predicted)])
    such = np.abs(chance - mine) <= NEIGHBOURS
    sentence = (
        f"Platt scaling, fitted on {calibrator.n_rows:,} held-out texts with known answers, gives "
        f"this answer a chance of {percent(mine)} to be right"
    )
    if such.any():
        sentence += (
            f"; of the test answers whose chance is within {100 * NEIGHBOURS:.0f} points of that, "
            f"{right[such].sum():,} of {such.sum():,} were ({percent(right[such].mean())})"
        )
    better = names[int(calibrated.argmax())]
    if better != prediction.predicted:
        sentence += f". Calibrated, {better!r} is the better answer"
    return sentence + "."


def report(classifier, text, k, cache_dir):
    """The lines of the demonstration for one text. Raises UserError."""
    explanation = classifier.explain(text, k)
    first, answer = classifier.orders[0], explanation.answer
    labels_of = {}
    for name, tokens in explanation.words.items():
        for t in tokens:
            labels_of.setdefault(t.token_id, []).append(name)
    return [
        *prompt_lines(explanation),
        "",
        f"The {len(explanation.top)} most probable next tokens:",
        *table(explanation.top, labels_of),
        "",
        *sum_lines(first.task, explanation, first.encoder.label_ids is None),
        "",
        *share_lines(first.task, explanation.prediction),
        "",
        *order_lines(classifier.task, explanation),
        f"Prediction: {answer.predicted}, confidence p({answer.predicted}) = "
        f"{decimals(answer.confidence)}",
        "",
        *wrapped(meaning(answer)),
        *wrapped(calibration_sentence(classifier, answer, cache_dir)),
    ]


def raw_report(classifier, text, k):
    """The lines that show how the model would continue `text` as it stands. Raises UserError."""
    tokens = classifier.next_token_distribution(text, k)
    total = min(1.0, math.fsum(t.probability for t in tokens))
    return [
        f"The {len(tokens)} most probable next tokens:",
        *table(tokens, {}),
        "",
        *wrapped(
            f"Together these tokens hold {percent(total)} of the probability; all others share the "
            "rest. The text was continued as it stands, without question or chat template, so "
            "these numbers are chances of a next token and not the confidence in a label."
        ),
    ]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage.",
    )
    parser.add_argument("text", metavar="TEXT", help="text to classify")
    parser.add_argument(
        "--model",
        default="base",
        help="base (the embedded model), finetuned (the same with the adapter of "
        "fine_tune_model.py), or a preset, hub id or folder (default: base)",
    )
    parser.add_argument(
        "--top-k", type=int, default=8, metavar="K", help="next tokens shown (default: 8)"
    )
    parser.add_argument("--quiet", action="store_true", help="one line: answer and confidence")
    parser.add_argument(
        "--raw-prompt",
        action="store_true",
        help="continue TEXT as it stands, without question or chat template",
    )
    arguments = parser.parse_args(argv)
    if arguments.top_k < 1:
        parser.error(f"--top-k must be at least 1, got {arguments.top_k}")
    text = arguments.text
    try:
        if problem := text_problem(text):
            raise UserError(problem)
        classifier = load_classifier(arguments.model, FINE_TUNED_DIR)
        if arguments.raw_prompt and arguments.quiet:
            first = classifier.next_token_distribution(text, k=1)[0]
            lines = [f"{first.token} {first.probability:.4f}"]
        elif arguments.raw_prompt:
            lines = raw_report(classifier, text, arguments.top_k)
        elif arguments.quiet:
            prediction = classifier.classify(text)
            lines = [f"{prediction.predicted} {prediction.confidence:.4f}"]
        else:
            lines = report(classifier, text, arguments.top_k, CACHE_DIR)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    sys.stdout.reconfigure(errors="backslashreplace")  # a token can be any character
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
