"""Rewrite the measured numbers of README.md, which stand between markers.

    python update_readme.py            # rewrite
    python update_readme.py --check    # change nothing; exit 1 if a number is out of date

Tables come from evaluation_cache/ and embedded_model/training.json. The two token-by-token examples
are the output of logprob_demo_cli.py and are not part of --check, since their last digits depend on
the machine.
"""

import argparse
import re
import subprocess
import sys
from statistics import mean

from calibration_metrics import wilson_interval
from records import atomic_path, load_results, read_json
from report import (
    category_accuracy,
    metrics_by_model,
    percent,
    summary_rows,
    with_interval,
)
from settings import CACHE_DIR, EMBEDDED_MODEL_DIR, ROOT, UserError

README = ROOT / "README.md"
EXAMPLES = {
    "confident": "An absolutely wonderful film, I loved every minute of it.",
    "unsure": "Best worst thing ever",
}


def results_block():
    (title, models), *rows = summary_rows(CACHE_DIR)
    lines = [f"| {title} | " + " | ".join(models) + " |", "| --- |" + " ---: |" * len(models)]
    lines += [f"| {name} | " + " | ".join(values) + " |" for name, values in rows]
    return "\n".join(lines)


def calibration_block():
    test = load_results(CACHE_DIR / "base_model_results.json").arrays("test")
    sure = test["confidence"] >= 0.9
    low, high = (float(v[0]) for v in wilson_interval([test["correct"][sure].sum()], [sure.sum()]))
    raw = metrics_by_model(CACHE_DIR)["base"]["raw"]
    platt = metrics_by_model(CACHE_DIR)["base"]["platt"]
    return (
        f"The base model says it is {percent(raw['mean_confidence']['estimate'])} sure on average\n"
        f"and is right in {percent(raw['accuracy']['estimate'])} of the cases. Of the "
        f"{int(sure.sum())} test rows on which it claims\nat least 90 %, "
        f"{percent(test['correct'][sure].mean())} are right (95 % Wilson interval "
        f"{100 * low:.1f} to {100 * high:.1f}). Its expected\ncalibration error (ECE, 20 bins) is "
        f"{with_interval(raw['ece'])}, where a perfectly\ncalibrated model would show "
        f"{raw['ece']['null_mean']:.3f}; after Platt scaling it is\n"
        f"{with_interval(platt['ece'])} (perfect: {platt['ece']['null_mean']:.3f})."
    )


def finetuning_block():
    metrics = metrics_by_model(CACHE_DIR)
    base, tuned = metrics["base"], metrics["finetuned"]
    gain = 100 * (tuned["raw"]["accuracy"]["estimate"] - base["raw"]["accuracy"]["estimate"])
    accuracy = category_accuracy(CACHE_DIR, list(metrics))
    kinds = dict.fromkeys(category.partition("_")[0] for category in accuracy["base"])
    lines = ["| kind of text, both labels | base model | fine-tuned |", "| --- | ---: | ---: |"]
    for kind in kinds:
        means = [
            percent(mean(v for c, v in accuracy[m].items() if c.startswith(f"{kind}_")))
            for m in ("base", "finetuned")
        ]
        lines.append(f"| {kind}, accuracy | {' | '.join(means)} |")
    return (
        f"Accuracy on the test rows changes by {gain:+.1f} points; by kind of text:\n\n"
        + "\n".join(lines)
        + f"\n\nLog-loss after Platt scaling: {with_interval(base['platt']['log_loss'])} before,\n"
        f"{with_interval(tuned['platt']['log_loss'])} after."
    )


def cost_block():
    metadata = read_json(CACHE_DIR / "evaluation_metadata.json", "run: make pipeline")
    training = metadata["training"]
    lines = [
        "| what | seconds |",
        "| --- | ---: |",
        f"| LoRA fine-tuning, {training['rows']['train']:,} rows, "
        f"{training['history'][-1]['epoch']:g} epochs, {training['trainable_parameters']:,} "
        f"trained parameters | {training['seconds']:.0f} |",
    ]
    for name, title in (("base", "base"), ("finetuned", "fine-tuned")):
        file = metadata["models"][name]["file"]
        run = load_results(CACHE_DIR / file).run
        rows = metadata["models"][name]["counts"]["requested"]
        lines.append(f"| evaluation of {rows:,} held-out rows, {title} | {run['seconds']:.0f} |")
    return "\n".join(lines)


def embedded_block():
    run = read_json(EMBEDDED_MODEL_DIR / "training.json", "run: python train_embedded_model.py")
    dev, imdb = run["measured"]["sst2_dev"], run["measured"]["imdb_test_slice"]
    return (
        f"{run['parameters']:,} parameters, bfloat16, trained for about {run['seconds'] / 60:.0f} "
        f"minutes on {run['processes']} CPU core(s).\nOn texts it never saw: SST-2 development set "
        f"accuracy {with_interval(dev['accuracy'])}, ECE\n{with_interval(dev['ece'])} (perfect: "
        f"{dev['ece']['null_mean']:.3f}), label mass {dev['label_mass']:.4f}; {imdb['n']:,} IMDB\n"
        f"test reviews: accuracy {with_interval(imdb['accuracy'])}, ECE "
        f"{with_interval(imdb['ece'])}."
    )


def example_block(text):
    command = [sys.executable, str(ROOT / "logprob_demo_cli.py"), text]
    shown = subprocess.run(command, capture_output=True, text=True)
    if shown.returncode != 0:
        raise UserError(f"logprob_demo_cli.py failed: {shown.stderr.strip()}")
    return f"```\n{shown.stdout.strip()}\n```"


BLOCKS = {
    "results": results_block,
    "calibration": calibration_block,
    "finetuning": finetuning_block,
    "cost": cost_block,
    "embedded": embedded_block,
}


def rewritten(text, blocks):
    """`text` with the content of each named marker pair replaced."""
    for name, content in blocks.items():
        pattern = re.compile(rf"(<!-- measured: {name} -->\n).*?(<!-- /measured -->)", re.DOTALL)
        text, n = pattern.subn(lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text)
        if n != 1:
            raise UserError(f"README.md has {n} marker pairs named {name!r}, exactly 1 is needed")
    return text


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if outdated")
    arguments = parser.parse_args(argv)
    try:
        blocks = {name: make() for name, make in BLOCKS.items()}
        if not arguments.check:
            blocks |= {name: example_block(text) for name, text in EXAMPLES.items()}
        text = README.read_text(encoding="utf-8")
        new = rewritten(text, blocks)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.check:
        if new != text:
            print("README.md is out of date; run: make readme", file=sys.stderr)
        return int(new != text)
    with atomic_path(README) as partial:
        partial.write_text(new, encoding="utf-8")
    print(f"{len(blocks)} blocks written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
