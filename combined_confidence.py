"""Every way to ask how sure the model is, side by side, and one confidence combined from them.

    python combined_confidence.py
    python combined_confidence.py --model finetuned --json --no-images

Each method gives every answer a score. How well it ranks right above wrong answers (AUROC, AURC)
needs no calibration; its log-loss and calibration error are those after Platt scaling, fitted on
calibration rows. The combined confidence is a logistic blend of the signals, fitted and chosen on
calibration rows. All numbers are of test rows of evaluation_cache/. Draws
images/calibration/agreement.png and signal_quality.png. Exit codes: 0 done, 1 failed, 2 bad usage.
"""

import argparse
import json
import sys

from report import MODEL_TITLES, percent, prose, text_table, with_interval
from settings import add_report_arguments, exit_code

IMAGES = ("calibration/agreement.png", "calibration/signal_quality.png")
LOW_MASS = 0.5


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description="Compare every way to ask the model how sure it is, and their blend.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage.",
    )
    add_report_arguments(parser)
    parser.add_argument(
        "--model", choices=("base", "finetuned"), help="one model (default: all of the cache)"
    )
    return parser.parse_args(arguments)


def interval(metric, scale=1.0):
    return "–" if metric["low"] is None else with_interval(metric, scale, 1 if scale > 1 else 3)


def title_of(name):
    from signal_comparison import TITLES

    return TITLES[name]


def ranking_text(table):
    rows = [
        [
            title_of(name),
            f"{row['n']:,}",
            interval(row["metrics"]["accuracy"], 100),
            interval(row["metrics"]["auroc"]),
            interval(row["metrics"]["aurc"]),
            f"{row['cost']['passes']:.1f}",
            f"{row['cost']['milliseconds']:.1f}",
        ]
        for name, row in table["methods"].items()
    ]
    header = ["method", "rows", "accuracy, %", "AUROC", "AURC", "passes", "ms"]
    note = (
        "How to read it: AUROC, higher is better, is the chance that a right answer has a higher "
        "score than a wrong one; AURC, lower is better, is the mean share of errors among the "
        "surest answers. Methods that only score rate the answer of token probability, so their "
        "accuracy is its. Passes and milliseconds are what one text takes, all included."
    )
    return f"{text_table(header, rows)}\n\n{prose(note)}"


def calibration_text(table):
    rows = []
    for name, row in table["methods"].items():
        cells, difference = ["", ""], row["difference"]
        if difference:
            loss = difference["log_loss"]
            cells = [interval(loss), f"{loss['p_value_holm']:.2g}"]
        ece = row["metrics"]["ece"]
        cells = [interval(row["metrics"]["log_loss"]), *cells]
        rows.append([title_of(name), *cells, interval(ece), f"{ece['null_p95']:.3f}"])
    header = ["after Platt scaling", "log-loss", "minus token pr.", "p", "ECE", "null"]
    note = (
        "How to read it: lower is better. The difference to token probability is taken row by row, "
        "near-duplicates drawn together; p is the probability of one at least as large if there "
        "were none, corrected for the number of methods (Holm). An ECE below null is no evidence "
        "of an error."
    )
    return f"{text_table(header, rows)}\n\n{prose(note)}"


def differences_text(table):
    rows = [
        [
            title_of(name),
            interval(row["difference"]["accuracy"], 100),
            f"{row['difference']['accuracy']['p_value_holm']:.2g}",
            interval(row["difference"]["auroc"]),
            interval(row["difference"]["aurc"]),
        ]
        for name, row in table["methods"].items()
        if row["difference"]
    ]
    header = ["minus token probability", "accuracy, points", "p", "AUROC", "AURC"]
    return text_table(header, rows)


def combined_text(table):
    combined = table["combined"]
    selection = combined["selection"]
    parameters = combined["blend"]["parameters"]
    anchor = title_of(selection["anchor"])
    rows = [
        [
            title_of(part["name"]),
            f"{selection['parts'][part['name']]['log_loss']:.4f}",
            f"{part['weight']:+.3f}",
        ]
        for part in parameters["parts"]
    ]
    used = {part["name"] for part in parameters["parts"]}
    rows += [
        [title_of(name), f"{of['log_loss']:.4f}", ""]
        for name, of in selection["parts"].items()
        if name not in used
    ]
    shown = text_table(["part", "cross-fitted log-loss alone", "weight"], rows)
    if selection["penalty"] is None:
        verdict = (
            f"The blend is {anchor} alone: on calibration rows nothing that costs more predicted "
            "unseen rows better by more than one standard error."
        )
    else:
        verdict = (
            f"The blend starts from {anchor}, the cheapest good part, and pays for every other "
            f"(penalty {selection['penalty']:g}). Weights are per standardised signal, nats."
        )
    best = combined["difference"][combined["best_part"]]
    against = (
        f"On test rows the best part is {title_of(combined['best_part'])}; the log-loss of "
        f"combined minus its own is {interval(best)}, p = {best['p_value_holm']:.2g} (Holm over "
        f"the parts). Worse than a part by more than chance: {titles(combined['worse_than'])}; "
        f"better: {titles(combined['better_than'])}."
    )
    return f"Combined\n\n{shown}\n\n{prose(verdict)}\n{prose(against)}"


def mass(fraction):
    return percent(fraction) if fraction >= 0.001 else "less than 0.1 %"


def titles(names):
    return ", ".join(map(title_of, names)) or "none"


def notes_text(table):
    mumbled = [
        name
        for name, row in table["methods"].items()
        if row["label_mass"] is not None and row["label_mass"] < LOW_MASS
    ]
    by_mass = grouped({name: mass(table["methods"][name]["label_mass"]) for name in mumbled})
    lines = [
        f"{titles(names)}: the words that are read hold {share} of the probability on average; the "
        "model mostly says something else, and their ratio says little."
        for share, names in by_mass.items()
    ]
    lines += [
        f"Left out: {titles(names)}: {reason}."
        for reason, names in grouped(table["left_out"]).items()
    ]
    unblended = {n: r for n, r in table["combined"]["left_out"].items() if n in table["methods"]}
    lines += [
        f"No part of the blend: {titles(names)}: {reason}."
        for reason, names in grouped(unblended).items()
    ]
    return "\n".join(map(prose, lines))


def grouped(texts):
    """{text: [name]} of {name: text}."""
    groups = {}
    for name, text in texts.items():
        groups.setdefault(text, []).append(name)
    return groups


def model_text(name, table):
    head = (
        f"{MODEL_TITLES[name]}: {table['n']:,} test rows in {table['n_groups']:,} near-duplicate "
        f"groups; Platt scaling and blend fitted on {table['n_calibration']:,} calibration rows"
    )
    parts = [prose(head), ranking_text(table), calibration_text(table), differences_text(table)]
    parts += [combined_text(table), notes_text(table)]
    return "\n\n".join(part for part in parts if part)


def report_signals(settings):
    from comparison import load_model, load_models

    if settings.model is None:
        models = list(load_models(settings.cache_dir).values())
    else:
        models = [load_model(settings.cache_dir, settings.model)]
    tables = {model.name: model.entry["signals"] for model in models}
    if settings.json:
        print(json.dumps(tables, allow_nan=False))
    else:
        print("\n\n\n".join(model_text(name, table) for name, table in tables.items()))
    if not settings.no_images:
        import charts

        evaluation = charts.load_evaluation(settings.cache_dir)
        possible, _ = charts.drawable(evaluation)
        chosen = [chart for chart in charts.named(IMAGES) if chart in possible]
        charts.draw_some(chosen, evaluation, settings.images_dir)


def main(arguments=None):
    return exit_code(report_signals, parse_arguments(arguments))


if __name__ == "__main__":
    sys.exit(main())
