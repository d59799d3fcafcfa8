"""Rewrite the measured numbers of README.md, which stand between markers.

    python update_readme.py            # rewrite
    python update_readme.py --check    # change nothing; exit 1 if a number is out of date

Tables come from evaluation_cache/ and embedded_model/training.json. The examples are the output of
logprob_demo_cli.py and classify_cli.py and are not part of --check, since their last digits depend
on the machine.
"""

import argparse
import subprocess
import sys
from statistics import mean

from records import atomic_path, load_results, read_json
from report import (
    MODEL_TITLES,
    category_accuracy,
    markdown_table,
    metrics_by_model,
    percent,
    prose,
    rewritten,
    summary_rows,
    with_interval,
)
from settings import CACHE_DIR, EMBEDDED_MODEL_DIR, ROOT, UserError

README = ROOT / "README.md"
ACCELERATORS = ROOT / "benchmarks" / "accelerator.json"
EXAMPLES = {  # block: the command whose output it is
    "confident": [
        "logprob_demo_cli.py",
        "An absolutely wonderful film, I loved every minute of it.",
    ],
    "unsure": ["logprob_demo_cli.py", "The plot makes no sense and I loved it."],
    "temperature": [
        *("logprob_demo_cli.py", "The film was", "--raw-prompt", "--top-k", "4"),
        *("--temperature", "0.5", "--max-new-tokens", "2"),
    ],
    "onetext": ["classify_cli.py", "Best worst thing ever"],
}


def results_block():
    (title, models), *rows = summary_rows(CACHE_DIR)
    lines = [f"| {title} | " + " | ".join(models) + " |", "| --- |" + " ---: |" * len(models)]
    lines += [f"| {name} | " + " | ".join(values) + " |" for name, values in rows]
    return "\n".join(lines)


def calibration_block():
    from calibration_metrics import HIGH_CONFIDENCE, clustered_wilson_interval
    from comparison import load_model

    model = load_model(CACHE_DIR, "base")
    confidence, correct = model.confidence("raw")
    sure = confidence >= HIGH_CONFIDENCE
    low, high = clustered_wilson_interval(correct[sure], model.group[sure])
    raw, platt = model.metrics["raw"], model.metrics["platt"]
    return (
        f"The base model says it is {percent(raw['mean_confidence']['estimate'])} sure on average\n"
        f"and is right in {percent(raw['accuracy']['estimate'])} of the cases. Of the "
        f"{int(sure.sum())} test rows on which it claims\nat least 90 %, "
        f"{percent(correct[sure].mean())} are right (95 % interval "
        f"{100 * low:.1f} to {100 * high:.1f}). Its expected\ncalibration error (ECE, 20 bins) is "
        f"{with_interval(raw['ece'])}, where a perfectly\ncalibrated model would show "
        f"{raw['ece']['null_mean']:.3f}; after Platt scaling it is\n"
        f"{with_interval(platt['ece'])} (perfect: {platt['ece']['null_mean']:.3f}).\n"
        + after_platt(load_model(CACHE_DIR, "finetuned"))
    )


def after_platt(model):
    """Whether the calibrated model can still be told from a perfectly calibrated one."""
    ece = model.metrics["platt"]["ece"]
    verdict = "below" if ece["estimate"] <= ece["null_p95"] else "above"
    return (
        f"The fine-tuned model goes from {model.metrics['raw']['ece']['estimate']:.3f} to "
        f"{with_interval(ece)}, {verdict} the\n{ece['null_p95']:.3f} that 95 % of perfectly "
        "calibrated models stay under."
    )


def calibrators_block():
    from comparison import calibrator_comparison, load_models

    tables = [calibrator_comparison(model) for model in load_models(CACHE_DIR).values()]
    header, rows = ["calibrator"], [[row["name"]] for row in tables[0]["calibrators"]]
    for table in tables:
        title = MODEL_TITLES[table["model"]]
        header += [f"log-loss, {title}", "minus raw", "p (Holm)"]
        for cells, row in zip(rows, table["calibrators"], strict=True):
            difference = row["difference"] and row["difference"]["log_loss"]
            chosen = " (chosen)" if row["name"] == table["selection"]["chosen"] else ""
            cells += [f"{row['metrics']['log_loss']['estimate']:.3f}{chosen}"]
            if difference:
                cells += [with_interval(difference), f"{difference['p_value_holm']:.2g}"]
            else:
                cells += ["", ""]
    return markdown_table(header, rows)


def pitfalls_block():
    from comparison import load_models, pitfalls

    tables = [pitfalls(model) for model in load_models(CACHE_DIR).values()]
    table = tables[0]
    same, platt = table["same_rows"], tables[-1]["platt_on_probabilities"]
    bins = {row["n_bins"]: row for row in table["empty_bins"]}
    few, many = bins[min(bins)], min(table["empty_bins"], key=lambda row: row["count"])
    cuts = [row for row in table["naive_cutoffs"] if row["naive"]["automated"] > 0]
    worst = max(cuts, key=lambda row: row["naive"]["broken"])
    rows = [
        [
            "isotonic regression judged on the rows it was fitted on",
            f"ECE {same['calibration']['ece']:.3f}, log-loss {same['calibration']['log_loss']:.3f}",
            f"ECE {same['test']['ece']:.3f}, log-loss {same['test']['log_loss']:.3f} on test rows",
        ],
        [
            f"Platt scaling of probabilities ({MODEL_TITLES[tables[-1]['model']]})",
            f"log-loss {platt['probabilities']:.4f}",
            f"log-loss {platt['margin']:.4f} on the margin "
            f"(difference {with_interval(platt['difference'], digits=4)})",
        ],
        [
            "maximum calibration error",
            f"{few['mce']:.3f} with {few['n_bins']} bins, {many['mce']:.3f} with "
            f"{many['n_bins']} (decided by {many['count']} rows)",
            f"ECE {few['ece']:.3f} and {many['ece']:.3f}; a perfectly calibrated model shows an "
            f"MCE of {many['null_mean']:.3f} with {many['n_bins']} bins",
        ],
        [
            f"cut-off for at most {percent(worst['alpha'])} errors, picked where it looks good",
            f"breaks its promise in {percent(worst['naive']['broken'])} of the draws",
            f"certified: in {percent(worst['certified']['broken'])} "
            f"(allowed: 10 %), automating {percent(worst['certified']['automated'])} instead of "
            f"{percent(worst['naive']['automated'])}",
        ],
    ]
    return markdown_table(["what is done", "wrong", "right"], rows)


def automation_block():
    from comparison import load_models
    from decisions import automation, score_answers

    model = list(load_models(CACHE_DIR).values())[-1]
    calibration, test = (model.results.arrays(split) for split in ("calibration", "test"))
    table = automation(score_answers(calibration, test))
    rows = []
    for promise in table["promises"]:
        for way in ("certified", "naive"):
            cut, on_test = promise[way], promise[way]["test"]
            measured = ["nothing automated", ""]
            if on_test["automated"]:
                measured = [
                    f"{percent(on_test['coverage'])}, {percent(on_test['risk'])} wrong "
                    f"(at most {percent(on_test['risk_upper'])})",
                    "yes" if on_test["kept"] else "no",
                ]
            threshold = "none" if cut["threshold"] is None else f"{cut['threshold']:.3f}"
            rows.append([f"{100 * promise['promise']:g} % right, {way}", threshold, *measured])
    shown = markdown_table(["promise", "threshold", "automated on test rows", "kept"], rows)
    return (
        f"{shown}\n\n"
        f"({MODEL_TITLES[model.name].capitalize()} model, calibrator: {table['calibrator']}, "
        f"chosen on {table['n_fitting']:,} calibration rows; thresholds from\n"
        f"{table['n_certifying']:,} others in {table['n_certifying_groups']} groups. Another "
        "division may certify another threshold, or none; trying\n"
        "divisions until one certifies voids the promise.)"
    )


def sample_size_block():
    from comparison import load_models
    from decisions import labels_needed, sample_size_curves

    model = list(load_models(CACHE_DIR).values())[-1]
    calibration, test = (model.results.arrays(split) for split in ("calibration", "test"))
    curves = sample_size_curves(calibration, test)
    rows = [
        [
            f"{size['n']:,}",
            *(f"{size[method]['log_loss']['mean']:.3f}" for method in ("platt", "isotonic")),
            *(f"{size[method]['ece']['mean']:.3f}" for method in ("platt", "isotonic")),
            f"{size['null_ece']['mean']:.3f}",
            percent(size["certified"]["share"]),
        ]
        for size in curves["sizes"]
    ]
    header = [
        "calibration rows",
        "log-loss, Platt",
        "isotonic",
        "ECE, Platt",
        "isotonic",
        "ECE of a perfect model measured on so many rows",
        f"draws in which {percent(curves['promise'])} right could be certified",
    ]
    least = labels_needed(calibration)["minimum"]
    needed = ", ".join(f"{row['rows']:,} for {100 * row['promise']:g} %" for row in least)
    return (
        f"{markdown_table(header, rows)}\n\n"
        "With fewer labelled rows than these not even answers without a single error can be\n"
        f"certified: {needed}."
    )


def finetuning_block():
    from comparison import load_models, model_comparison

    paired = model_comparison(*load_models(CACHE_DIR).values())["methods"]["selected"]
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
        f"{with_interval(tuned['platt']['log_loss'])} after. Paired on the same rows, each model\n"
        f"with its chosen calibrator: accuracy {with_interval(paired['accuracy'], 100, 1)} points\n"
        f"(p = {paired['accuracy']['p_value_holm']:.2g}), log-loss "
        f"{with_interval(paired['log_loss'])} (p = {paired['log_loss']['p_value_holm']:.2g})."
    )


def signals_block():
    from comparison import load_models

    models = load_models(CACHE_DIR)
    return "\n\n".join(signals_of(name, m.entry["signals"]) for name, m in models.items())


def signals_of(name, table):
    """A table of every method of one model, and sentences about the blend and what is missing."""
    from comparison import is_significant
    from signal_comparison import TITLES

    header = [
        f"{MODEL_TITLES[name]}, {table['n']:,} test rows",
        *("accuracy, %", "AUROC", "AURC", "log-loss, Platt", "ECE, Platt (perfect)"),
        *("passes a text", "ms a text"),
    ]
    rows = []
    for method, row in table["methods"].items():
        of, verdict = row["metrics"], ""
        difference = row["difference"] and row["difference"]["log_loss"]
        if difference and is_significant(difference):
            verdict = ", better" if difference["estimate"] < 0 else ", worse"
        rows.append(
            [
                TITLES[method],
                f"{100 * of['accuracy']['estimate']:.1f}",
                "–" if of["auroc"]["low"] is None else with_interval(of["auroc"]),
                f"{of['aurc']['estimate']:.3f}",
                f"{of['log_loss']['estimate']:.3f}{verdict}",
                f"{of['ece']['estimate']:.3f} ({of['ece']['null_mean']:.3f})",
                f"{row['cost']['passes']:.1f}",
                f"{row['cost']['milliseconds']:.1f}",
            ]
        )
    combined = table["combined"]
    best = combined["difference"][combined["best_part"]]
    anchor = TITLES[combined["selection"]["anchor"]]
    parts = [TITLES[part["name"]] for part in combined["blend"]["parameters"]["parts"]]
    worse = ", ".join(TITLES[part] for part in combined["worse_than"]) or "none"
    what = f"blends {', '.join(parts)}, starting from {anchor}"
    if combined["selection"]["penalty"] is None:
        what = (
            f"is {anchor} alone: nothing that costs more predicted unseen calibration rows clearly "
            "better"
        )
    sentences = [
        f"Combined {what}. Its log-loss minus that of the best part on test rows, "
        f"{TITLES[combined['best_part']]}, is {with_interval(best)} (p = "
        f"{best['p_value_holm']:.2g}); parts that it is significantly worse than: {worse}."
    ]
    if mass := table["methods"].get("p_true", {}).get("label_mass"):
        sentences.append(f"Asked for P(True), true and false together hold {mass:.2g}.")
    reasons = {}
    for method, reason in table["left_out"].items():
        reasons.setdefault(reason, []).append(TITLES[method])
    sentences += [f"Without {', '.join(titles)}: {why}." for why, titles in reasons.items()]
    return f"{markdown_table(header, rows)}\n\n{prose(' '.join(sentences), 100)}"


def cost_block():
    metadata = read_json(CACHE_DIR / "evaluation_metadata.json", "run: make pipeline")
    training = metadata["training"]
    lines = [
        "| what | seconds |",
        "| --- | ---: |",
        f"| LoRA fine-tuning, {training['rows']['train']:,} rows, "
        f"{training['history'][-1]['epoch']:.3g} epochs, {training['trainable_parameters']:,} "
        f"trained parameters | {training['seconds']:.0f} |",
    ]
    for name, title in (("base", "base"), ("finetuned", "fine-tuned")):
        file = metadata["models"][name]["file"]
        run = load_results(CACHE_DIR / file).run
        rows = metadata["models"][name]["counts"]["requested"]
        lines.append(f"| evaluation of {rows:,} held-out rows, {title} | {run['seconds']:.0f} |")
    return "\n".join(lines)


def accelerator_block():
    """One sentence for every accelerator of benchmarks/accelerator.json."""
    results = read_json(ACCELERATORS, "run: python benchmarks/accelerator.py")
    sentences = []
    for found in results["accelerators"]:
        classified, (trained, *larger) = found["classification"][0], found["training"]
        more = "".join(f" and {row['per_sec']:.0f} in {row['arm']}" for row in larger)
        sentences.append(
            f"Measured on one {found['accelerator']}, Llama-3.1-8B's shape with random weights in "
            f"bfloat16:\n{classified['per_sec']:.0f} texts/s classified, "
            f"{classified['share_of_limit']:.0%} of what its matrix products allow; LoRA training "
            f"{trained['per_sec']:.0f}\nexamples/s in batches as they are by default{more}."
        )
    return "\n".join(sentences)


def embedded_block():
    run = read_json(EMBEDDED_MODEL_DIR / "training.json", "run: python train_embedded_model.py")
    dev, imdb = run["measured"]["sst2_dev"], run["measured"]["imdb_test_slice"]
    return (
        f"{run['parameters']:,} parameters, bfloat16, trained for about {run['seconds'] / 60:.0f} "
        f"minutes on {run['device']}.\nOn texts it never saw: SST-2 development set "
        f"accuracy {with_interval(dev['accuracy'])}, ECE\n{with_interval(dev['ece'])} (perfect: "
        f"{dev['ece']['null_mean']:.3f}), label mass {dev['label_mass']:.4f}; {imdb['n']:,} IMDB\n"
        f"test reviews: accuracy {with_interval(imdb['accuracy'])}, ECE "
        f"{with_interval(imdb['ece'])}."
    )


def example_block(command):
    script, *arguments = command
    shown = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], capture_output=True, text=True
    )
    if shown.returncode != 0:
        raise UserError(f"{script} failed: {shown.stderr.strip()}")
    return f"```\n{shown.stdout.strip()}\n```"


BLOCKS = {
    "results": results_block,
    "calibration": calibration_block,
    "calibrators": calibrators_block,
    "pitfalls": pitfalls_block,
    "automation": automation_block,
    "samplesize": sample_size_block,
    "finetuning": finetuning_block,
    "signals": signals_block,
    "cost": cost_block,
    "accelerator": accelerator_block,
    "embedded": embedded_block,
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if outdated")
    arguments = parser.parse_args(argv)
    try:
        blocks = {name: make() for name, make in BLOCKS.items()}
        if not arguments.check:
            blocks |= {name: example_block(command) for name, command in EXAMPLES.items()}
        text = README.read_text(encoding="utf-8")
        new = rewritten(text, blocks, README.name)
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
