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

from report import few_groups_warnings, percent, prose, text_table, with_interval
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
NULL = {"null_mean": "ECE if perfect", "null_p95": "95 % stay below"}


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
    rows = []
    for name, (title, *_) in MEASURES.items():
        rows.append([title, *difference_cells(method[name], name)])
        for key, of_perfect in NULL.items() if name == "ece" else ():
            null = [f"{method['ece'][key][model]:.3f}" for model in ("base", "finetuned")]
            rows.append([of_perfect, *null, "", "", ""])
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
        "and have an interval only. Below the ECE stands what either model would show by chance "
        "if it were perfectly calibrated, near-duplicates being as alike as here: its mean, and "
        "what 95 % of such samples stay below. The second table uses for either model the "
        "calibrator that its calibration rows chose."
    )
    parts = [method_text(method) for method in table["methods"].values()]
    return "\n\n\n".join([*parts, prose(note)])


def part_warnings(parts):
    return few_groups_warnings({part["name"]: part["n_groups"] for part in parts})


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
    how = (
        "How to read it: accuracy in %, under the calibrators chosen, from the largest gain to "
        f"the least; p is corrected for the {len(parts)} {what}. log-loss: fine-tuned minus base, "
        "better below 0. A dash: one group of near-duplicates, which says nothing about chance."
    )
    return "\n\n".join([text_table(header, rows), *map(prose, [how, *part_warnings(parts)])])


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


def test_warnings(table):
    return few_groups_warnings({"test rows": table["n_groups"]})


def comparison_text(table):
    title = (
        f"Base against fine-tuned model: the same {table['n']:,} test rows in "
        f"{table['n_groups']:,} near-duplicate groups"
    )
    if table["left_out"]:
        title += f"; {table['left_out']:,} rows that only one of them scored are left out"
    return "\n\n\n".join(
        [
            "\n\n".join(map(prose, [title, *test_warnings(table)])),
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
    if settings.json:
        warnings = test_warnings(table)
        for parts in (table["categories"], table["domains"]):
            warnings += part_warnings(parts)
        print(json.dumps({**table, "warnings": warnings}, allow_nan=False))
    else:
        print(comparison_text(table))
    if not settings.no_images:
        import charts

        charts.draw_some(
            charts.named(IMAGES), charts.load_evaluation(settings.cache_dir), settings.images_dir
        )


def main(arguments=None):
    return exit_code(report_comparison, parse_arguments(arguments))


if __name__ == "__main__":
    sys.exit(main())
