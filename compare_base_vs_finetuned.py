"""What fine-tuning changed: both models on the same test rows, with the chance of each difference.

    python compare_base_vs_finetuned.py
    python compare_base_vs_finetuned.py --json --no-images
    python compare_base_vs_finetuned.py --cache-dir my_cache --images-dir my_images

Reads evaluation_cache/; all numbers are of test rows. Draws
images/fine_tuning/accuracy_comparison.png and calibration_error_comparison.png, and
images/calibration/risk_coverage.png. Exit codes: 0 done, 1 failed, 2 bad usage.
"""

import argparse
import json
import sys

from report import percent, prose, text_table, with_interval
from settings import add_report_arguments, exit_code

IMAGES = (
    "calibration/risk_coverage.png",
    "fine_tuning/accuracy_comparison.png",
    "fine_tuning/calibration_error_comparison.png",
)
MEASURES = {  # name: title, factor and digits shown, whether lower is better
    "accuracy": ("accuracy, %", 100, 1, False),
    "log_loss": ("log-loss, nats", 1, 3, True),
    "brier": ("Brier score", 1, 3, True),
    "ece": ("ECE", 1, 3, True),
    "aurc": ("AURC", 1, 3, True),
}


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description="Compare the base and the fine-tuned model on the same test rows.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage.",
    )
    add_report_arguments(parser)
    return parser.parse_args(arguments)


def p_text(difference):
    """The p-value after Holm's correction; a dash where there is none."""
    p_value = difference.get("p_value_holm")
    return "–" if p_value is None else f"{p_value:.2g}"


def winner(difference, lower_is_better):
    """Which model is better by more than chance, in words."""
    from comparison import is_significant

    if "p_value_holm" not in difference:
        return ""
    if not is_significant(difference):
        return "undecided"
    return "fine-tuned" if (difference["estimate"] < 0) == lower_is_better else "base"


def difference_cells(difference, measure):
    """Value of either model, the difference with its interval, p, and who wins."""
    _, factor, digits, lower_is_better = MEASURES[measure]
    values = [f"{factor * difference[name]:.{digits}f}" for name in ("base", "finetuned")]
    if difference["low"] is None:
        gap = f"{factor * difference['estimate']:.{digits}f}"
    else:
        gap = with_interval(difference, factor, digits)
    return [*values, gap, p_text(difference), winner(difference, lower_is_better)]


HEADER = ["base", "fine-tuned", "difference", "p (Holm)", "better"]


def method_text(method):
    rows = [[MEASURES[name][0], *difference_cells(method[name], name)] for name in MEASURES]
    used = method["calibrator"]
    title = f"Confidence of the base model: {used['base']}; of the fine-tuned: {used['finetuned']}"
    mcnemar = method["mcnemar"]
    exact = (
        f"Right on only one side: base {mcnemar['only_first']:,} rows, fine-tuned "
        f"{mcnemar['only_second']:,}. McNemar's exact test gives p = {mcnemar['p_value']:.2g}, but "
        "counts every row as independent, near-duplicates included: trust the p above."
    )
    return (
        f"{title}\n\n{text_table(['test rows', *HEADER], rows)}\n\n"
        f"{prose(exact)}\n{confident_text(method['high_confidence'])}"
    )


def confident_text(high_confidence):
    lines = []
    for name, title in (("base", "base"), ("finetuned", "fine-tuned")):
        high = high_confidence[name]
        line = (
            f"Confidence of {percent(high['threshold'])} or more, {title}: {high['count']:,} rows"
        )
        if high["count"]:
            line += f", {with_interval(high['accuracy'], 100, 1)} % of them right"
        lines.append(line + ".")
    return "\n".join(lines)


def overall_text(table):
    note = (
        "How to read it: in brackets the 95 % interval of the difference fine-tuned minus base, "
        "taken on the same rows, near-duplicates drawn together. Accuracy is better when higher, "
        "the others when lower. p is the probability of a difference at least as large if there "
        "were none, corrected for the six of them (Holm); ECE and AURC are no means over rows "
        "and have an interval only; what a perfectly calibrated model shows is in "
        "calibration_demo.py. The second table uses for either model the calibrator that "
        "its calibration rows chose."
    )
    parts = [method_text(method) for method in table["methods"].values()]
    return "\n\n\n".join([*parts, prose(note)])


def breakdown_text(parts, what):
    """Accuracy by label, category or domain; what: its plural."""
    if not parts:
        return f"The rows of this cache have no {what}."
    rows = [
        [
            part["name"],
            f"{part['n']:,}",
            f"{part['n_groups']:,}",
            *difference_cells(part["accuracy"], "accuracy"),
            f"{part['log_loss']['estimate']:+.3f}",
            p_text(part["log_loss"]),
        ]
        for part in parts
    ]
    header = [what, "rows", "groups", *HEADER, "log-loss", "p (Holm)"]
    return (
        f"{text_table(header, rows)}\n\n"
        "How to read it: accuracy in %, under the calibrators chosen, from the largest gain to\n"
        f"the least; p is corrected for the {len(parts)} {what}. log-loss: fine-tuned minus base,\n"
        "better below 0. A dash: one group of near-duplicates, which says nothing about chance."
    )


def ranking_text(ranking):
    def name(entry):
        title = {"base": "base", "finetuned": "fine-tuned"}[entry["model"]]
        return f"{title}, {entry['calibrator']}"

    rows = [
        [name(entry), f"{entry['log_loss']:.3f}", "; ".join(map(name, entry["better_than"])) or "–"]
        for entry in ranking
    ]
    return (
        f"{text_table(['ranking', 'log-loss', 'better by more than chance than'], rows)}\n\n"
        "How to read it: all pairs are tested on the same rows and corrected together (Holm). A\n"
        "higher place without an entry in the last column may be luck."
    )


def comparison_text(table):
    title = (
        f"Base against fine-tuned model: the same {table['n']:,} test rows in "
        f"{table['n_groups']:,} near-duplicate groups"
    )
    if table["left_out"]:
        title += f"; {table['left_out']:,} rows that only one of them scored are left out"
    return "\n\n\n".join(
        [
            prose(title),
            overall_text(table),
            breakdown_text(table["labels"], "labels"),
            breakdown_text(table["categories"], "categories"),
            breakdown_text(table["domains"], "domains"),
            ranking_text(table["ranking"]),
        ]
    )


def report_comparison(settings):
    from comparison import load_model, model_comparison

    pair = (load_model(settings.cache_dir, name) for name in ("base", "finetuned"))
    table = model_comparison(*pair)
    print(json.dumps(table, allow_nan=False) if settings.json else comparison_text(table))
    if not settings.no_images:
        import charts

        charts.draw_some(
            charts.named(IMAGES), charts.load_evaluation(settings.cache_dir), settings.images_dir
        )


def main(arguments=None):
    return exit_code(report_comparison, parse_arguments(arguments))


if __name__ == "__main__":
    sys.exit(main())
