"""How many labelled rows: calibration error, log-loss and certified coverage as these grow.

    python sample_size_thresholds.py
    python sample_size_thresholds.py --promise 0.95
    python sample_size_thresholds.py --model base --json --no-images

Draws 50, 100, 200, 500, ... up to all calibration rows of evaluation_cache/ again and again, fits
and certifies on them, measures on the test rows, and projects how many labels a promise needs.
Draws images/calibration/sample_size.png. Exit codes: 0 done, 1 failed, 2 bad usage.
"""

import argparse
import json
import sys
from dataclasses import replace

from report import MODEL_TITLES, few_groups_warnings, percent, prose, text_table
from settings import add_report_arguments, exit_code

IMAGE = "calibration/sample_size.png"

SMALLEST_SHARE = 1e-9


def share(text):
    """Type of a flag that holds a share strictly between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not SMALLEST_SHARE <= value <= 1 - SMALLEST_SHARE:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return value


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description="What more labelled rows buy, and how many a promise needs.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage.",
    )
    add_report_arguments(parser)
    parser.add_argument(
        "--model",
        choices=("base", "finetuned"),
        help="whose answers (default: the fine-tuned model's where the cache has them)",
    )
    parser.add_argument(
        "--promise",
        type=share,
        default=0.9,
        metavar="ACCURACY",
        help="accuracy promised for automated answers, between 0 and 1 (default: 0.9)",
    )
    return parser.parse_args(arguments)


def analyse(model, promise):
    """The numbers of this report, ready for JSON."""
    import decisions

    calibration, test = (model.results.arrays(split) for split in ("calibration", "test"))
    promises = sorted({*decisions.PROMISES, promise})
    return {
        "model": model.name,
        "curves": decisions.sample_size_curves(calibration, test, promise, n_bins=model.bins),
        "labels_needed": decisions.labels_needed(calibration, promises),
        "warnings": few_groups_warnings({"calibration rows": model.n_groups["calibration"]}),
    }


def band_text(band, scale=1.0, digits=3):
    mean, low, high = (f"{scale * band[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def table_text(title, header, rows, how):
    return "\n\n".join([prose(title), text_table(header, rows), prose(f"How to read it: {how}")])


def score_rows(curves, score):
    return [
        [f"{size['n']:,}", *(band_text(size[method][score]) for method in ("platt", "isotonic"))]
        for size in curves["sizes"]
    ]


def log_loss_text(curves):
    return table_text(
        "Log-loss (nats) of calibrators fitted on n rows",
        ["calibration rows", "Platt scaling", "isotonic regression"],
        score_rows(curves, "log_loss"),
        f"mean and 5 to 95 % range over {curves['n_draws']} draws of whole near-duplicate groups, "
        f"measured on {curves['n_test']:,} test rows; lower is better. Uncalibrated it is "
        f"{curves['raw']['log_loss']:.3f}. A wide range says that the calibrator depends on which "
        "rows happened to be labelled. The draws are taken from the same rows without replacement, "
        "so the range narrows to nothing at the last line by construction.",
    )


def ece_text(curves):
    null = curves["test_null"]
    return table_text(
        f"Calibration error (ECE, {curves['n_bins']} bins) of the same calibrators",
        ["calibration rows", "Platt scaling", "isotonic regression"],
        score_rows(curves, "ece"),
        f"uncalibrated it is {curves['raw']['ece']:.3f}. A perfectly calibrated model shows "
        f"{null['mean']:.3f} on these test rows, near-duplicates being as alike as here, and up to "
        f"{null['p95']:.3f} by chance: less than that cannot be told from perfect.",
    )


def null_text(curves):
    return table_text(
        "Calibration error by chance: what a perfectly calibrated model shows on n rows",
        ["rows measured", "mean", "95 % stay below"],
        [
            [f"{size['n']:,}", *(f"{size['null_ece'][key]:.3f}" for key in ("mean", "p95"))]
            for size in curves["sizes"]
        ],
        "an ECE measured on n rows says nothing unless it is above the last column. Rows are taken "
        "as independent; near-duplicates make chance larger.",
    )


def certified_text(curves):
    return table_text(
        f"Certified automation, promise: {100 * curves['promise']:g} % of the automated answers "
        "are right",
        ["calibration rows", "draws certified", "test rows automated, %", "promise broken"],
        [
            [
                f"{size['n']:,}",
                percent(size["certified"]["share"]),
                band_text(size["certified"]["coverage"], 100, 1),
                percent(size["certified"]["broken"]),
            ]
            for size in curves["sizes"]
        ],
        "one half of the rows fits Platt scaling, the other certifies a threshold; where none can "
        "be certified nothing is automated. The promise counts as broken in a draw if more than "
        f"{100 * (1 - curves['promise']):g} % of the automated test rows are wrong. That happens "
        f"in at most {percent(curves['delta'])} of all sets of calibration rows; these draws come "
        "from one such set, and only illustrate it.",
    )


def needed_text(needed):
    def labels(entry):
        return "–" if entry["rows"] is None else f"{entry['rows']:,}"

    rows = [["all, were none wrong", "100.0", *map(labels, needed["minimum"])]]
    for entry in needed["shares"]:
        name = "all" if entry["share"] == 1 else f"the surest {100 * entry['share']:g} %"
        accuracy, low, high = (f"{100 * entry[key]:.1f}" for key in ("accuracy", "low", "high"))
        rows.append([name, f"{accuracy} [{low}, {high}]", *map(labels, entry["needed"])])
    promises = [f"{100 * entry['promise']:g} % right" for entry in needed["minimum"]]
    return table_text(
        "Labelled rows needed to certify a promise, by what is to be automated",
        ["automated", "accuracy there, %", *promises],
        rows,
        "with fewer labels than in the first line nothing can be certified. The other lines "
        "project the accuracy of the most confident calibration rows (Platt scaling, cross-fitted "
        "by group; 95 % interval); – : it is not above the promise, and labels alone do not help. "
        "Assumed: that accuracy stays as measured, the threshold is known beforehand, half of the "
        f"labels fit the calibrator, one row of each group counts ({needed['rows_per_group']:.1f} "
        f"rows a group here), and a chance of {percent(needed['power'])} to succeed is enough.",
    )


def draw_image(numbers, images_dir):
    import charts

    (chart,) = charts.named([IMAGE])
    drawn = {"model": numbers["model"], **numbers["curves"]}
    charts.draw_some([replace(chart, prepare=lambda _: drawn)], None, images_dir)


def report_sizes(settings):
    from comparison import load_model

    model = load_model(settings.cache_dir, settings.model)
    numbers = analyse(model, settings.promise)
    if settings.json:
        print(json.dumps(numbers, allow_nan=False))
    else:
        curves = numbers["curves"]
        title = f"How many labelled rows: {MODEL_TITLES[model.name]}, {settings.cache_dir}"
        parts = [
            "\n\n".join([title, *map(prose, numbers["warnings"])]),
            *(text(curves) for text in (log_loss_text, ece_text, null_text, certified_text)),
            needed_text(numbers["labels_needed"]),
        ]
        print("\n\n\n".join(parts))
    if not settings.no_images:
        draw_image(numbers, settings.images_dir)


def main(arguments=None):
    return exit_code(report_sizes, parse_arguments(arguments))


if __name__ == "__main__":
    sys.exit(main())
