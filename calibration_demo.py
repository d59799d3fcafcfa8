"""Which calibrator makes the confidence believable: each one against the model's own output.

    python calibration_demo.py
    python calibration_demo.py --model finetuned --json --no-images
    python calibration_demo.py --pitfalls

Calibrators are fitted, and one of them chosen, on calibration rows; all numbers are of test rows of
evaluation_cache/. --pitfalls shows on the same rows how numbers like these go wrong. Draws
images/calibration/calibrator_comparison.png and the reliability_*.png beside it. Exit codes:
0 done, 1 failed, 2 bad usage.
"""

import argparse
import json
import sys

from report import (
    MODEL_TITLES,
    few_groups_warnings,
    percent,
    prose,
    text_table,
    with_interval,
)
from settings import add_report_arguments, exit_code

CALIBRATION_ERRORS = ("ece", "smooth_ece", "miscalibration")
IMAGES = (
    "calibration/calibrator_comparison.png",
    "calibration/reliability_raw_model_output.png",
    "calibration/reliability_platt_scaling.png",
    "calibration/reliability_isotonic_regression.png",
)


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description="Compare every calibrator with the model's own probabilities.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage.",
    )
    add_report_arguments(parser)
    parser.add_argument(
        "--model", choices=("base", "finetuned"), help="one model (default: all of the cache)"
    )
    parser.add_argument(
        "--pitfalls", action="store_true", help="show how such numbers go wrong; draws nothing"
    )
    return parser.parse_args(arguments)


def scores_text(table, score, title):
    rows = []
    for row in table["calibrators"]:
        cells = [row["name"], with_interval(row["metrics"][score]), "", ""]
        if row["difference"] is not None:
            difference = row["difference"][score]
            cells[2:] = [with_interval(difference), f"{difference['p_value_holm']:.2g}"]
        rows.append(cells)
    return text_table(["calibrator", title, "minus that of raw", "p (Holm)"], rows)


def differences_text(table):
    lines = [
        "How to read it: lower is better, in brackets the 95 % interval, with near-duplicates "
        "drawn together. The difference to raw is taken row by row; p is the probability of one at "
        "least as large if there were none, corrected for the number of calibrators.",
    ]
    for key in ("better", "worse"):
        names = ", ".join(table[key]) or "none"
        lines.append(f"Log-loss {key} than raw by more than chance (p < 0.05): {names}.")
    return "\n".join(prose(line) for line in lines)


def errors_text(table):
    rows = []
    for row in table["calibrators"]:
        cells = [row["name"]]
        for name in CALIBRATION_ERRORS:
            error = row["metrics"][name]
            cells += [with_interval(error), f"{error['null_p95']:.3f}"]
        rows.append(cells)
    header = ["calibrator", "ECE", "null", "smooth ECE", "null", "miscalibration", "null"]
    how = (
        "How to read it: lower is better. null is what a perfectly calibrated model with the same "
        "confidences stays below in 95 % of samples like this one, near-duplicates being as alike "
        "as here: an error below it is no evidence of one. Chance adds to these errors, and their "
        "95 % intervals include it. Miscalibration is the part of the Brier score that calibration "
        "could remove."
    )
    return f"{text_table(header, rows)}\n\n{prose(how)}"


def selection_text(table):
    selection = table["selection"]
    rows = [
        [
            name,
            f"{row['log_loss']:.4f}",
            f"{row['difference']:.4f}",
            f"{row['difference_standard_error']:.4f}",
            "chosen" if name == selection["chosen"] else "",
        ]
        for name, row in selection["calibrators"].items()
    ]
    header = ["calibrator", "cross-fitted log-loss", "above lowest", "standard error", ""]
    return (
        f"{text_table(header, rows)}\n\n"
        f"Chosen: {selection['chosen']}. Each calibrator predicted calibration rows that it was\n"
        "not fitted on. Of those within one standard error of the lowest log-loss the first in\n"
        "this list, which runs from simple to flexible, is taken. Test rows and ECE choose nothing."
    )


def model_text(table):
    width, clipped = table["venn_abers_width"], table["isotonic_clipped"]
    others = (
        "Venn-Abers gives an interval of the probability instead of one number: its width is "
        f"{width['mean']:.3f} on average, {width['median']:.3f} in the median, "
        f"{width['largest']:.3f} at most. Of the values of isotonic regression "
        f"{percent(clipped['calibration'])} on calibration rows and {percent(clipped['test'])} on "
        "test rows would have been exactly 0 or 1; they were clipped."
    )
    return "\n\n".join(
        [
            f"{MODEL_TITLES[table['model']]}: {table['n']:,} test rows in {table['n_groups']:,} "
            f"near-duplicate groups, calibrators fitted on {table['n_calibration']:,} others",
            *map(prose, table["warnings"]),
            scores_text(table, "log_loss", "log-loss, nats"),
            scores_text(table, "brier", "Brier score"),
            differences_text(table),
            errors_text(table),
            selection_text(table),
            prose(others),
        ]
    )


def pitfalls_text(table):
    title = f"How numbers like these go wrong: {MODEL_TITLES[table['model']]}"
    parts = ["\n\n".join([title, *map(prose, table["warnings"])])]
    for i, (key, text) in enumerate(PITFALLS.items(), start=1):
        parts.append(f"{i}. {text(table[key])}")
    return "\n\n\n".join(parts)


def same_rows_text(table):
    rows = []
    for split, title in (
        ("calibration", "wrong: rows it was fitted on"),
        ("test", "right: test rows"),
    ):
        of = table[split]
        numbers = (of["ece"], of["ece_null_mean"], of["log_loss"])
        rows.append([title, f"{of['n']:,}", *(f"{number:.3f}" for number in numbers)])
    header = ["isotonic regression judged on", "rows", "ECE", "if perfect", "log-loss"]
    return (
        "Fitted and judged on the same rows\n\n"
        f"{text_table(header, rows)}\n\n"
        "Isotonic regression gives a row the share of right answers around it. Judged on its own\n"
        "rows it has seen the answers: with two labels its ECE is 0 there by construction."
    )


def platt_text(table):
    rows = [
        ["raw, not calibrated", f"{table['raw']:.4f}"],
        ["right: on the margin", f"{table['margin']:.4f}"],
        ["wrong: on the probabilities", f"{table['probabilities']:.4f}"],
    ]
    difference = table["difference"]
    return (
        "Platt scaling of probabilities instead of margins\n\n"
        f"{text_table(['Platt scaling', 'log-loss'], rows)}\n\n"
        f"wrong minus right: {with_interval(difference, digits=4)}, "
        f"p = {difference['p_value']:.2g}\n\n"
        "No sigmoid of a probability is the identity: it bends even a perfectly calibrated model\n"
        "out of shape, while a sigmoid of the margin can leave it as it is."
    )


def empty_bins_text(table):
    rows = [
        [
            str(row["n_bins"]),
            f"{row['mce']:.3f}",
            f"{row['count']:,}",
            f"{row['null_mean']:.3f}",
            f"{row['ece']:.3f}",
            f"{row['ece_null_mean']:.3f}",
        ]
        for row in table
    ]
    header = ["bins", "wrong: MCE", "rows in its bin", "if perfect", "right: ECE", "if perfect"]
    return (
        "A maximum calibration error that one bin decides (after Platt scaling)\n\n"
        f"{text_table(header, rows)}\n\n"
        "A bin of few rows can decide the largest gap, which moves with the number of bins; the\n"
        "ECE weighs each bin by its rows. Neither means anything without its value for a\n"
        "perfectly calibrated model."
    )


def cutoffs_text(table):
    rows = [
        [
            percent(row["alpha"]),
            *(
                percent(row[way][key])
                for key in ("broken", "automated")
                for way in ("naive", "certified")
            ),
        ]
        for row in table
    ]
    header = [
        "promised error",
        "wrong: naive broken",
        "right: certified broken",
        "naive automates",
        "certified automates",
    ]
    return (
        "Cut-offs that look good on the rows that chose them\n\n"
        f"{text_table(header, rows)}\n\n"
        "Cut-offs chosen on random draws from the calibration rows, judged on all of them. The\n"
        "lowest one that kept the promise on its draw (naive) was often lucky; a certified one\n"
        "may break it in 10 % of the draws, and automates less, or nothing, where it is not sure."
    )


PITFALLS = {
    "same_rows": same_rows_text,
    "platt_on_probabilities": platt_text,
    "empty_bins": empty_bins_text,
    "naive_cutoffs": cutoffs_text,
}


def warnings_of(model):
    return few_groups_warnings({f"{split} rows": n for split, n in model.n_groups.items()})


def report_calibration(settings):
    from comparison import calibrator_comparison, load_model, load_models, pitfalls

    if settings.model is None:
        models = list(load_models(settings.cache_dir).values())
    else:
        models = [load_model(settings.cache_dir, settings.model)]
    make, text = (
        (pitfalls, pitfalls_text) if settings.pitfalls else (calibrator_comparison, model_text)
    )
    tables = {model.name: {**make(model), "warnings": warnings_of(model)} for model in models}
    if settings.json:
        print(json.dumps(tables, allow_nan=False))
    else:
        print("\n\n\n".join(map(text, tables.values())))
    if not settings.no_images and not settings.pitfalls:
        import charts

        charts.draw_some(
            charts.named(IMAGES), charts.load_evaluation(settings.cache_dir), settings.images_dir
        )


def main(arguments=None):
    return exit_code(report_calibration, parse_arguments(arguments))


if __name__ == "__main__":
    sys.exit(main())
