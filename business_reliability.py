"""Which answers may be automated: zones of confidence, certified thresholds, and what they cost.

    python business_reliability.py
    python business_reliability.py --cost-error 50 --cost-review 2
    python business_reliability.py --model base --json --no-images

Everything is fitted, chosen and certified on calibration rows and measured on test rows of
evaluation_cache/. Draws images/calibration/business_reliability.png,
business_reliability_progression.png and certified_thresholds.png. Exit codes: 0 done, 1 failed,
2 bad usage.
"""

import argparse
import json
import sys
from dataclasses import replace

from report import (
    MODEL_TITLES,
    few_groups_warnings,
    percent,
    prose,
    text_table,
    with_interval,
)
from settings import add_report_arguments, exit_code

IMAGES = (
    "calibration/business_reliability.png",
    "calibration/business_reliability_progression.png",
    "calibration/certified_thresholds.png",
)
ZONE_METHOD = "platt"
LARGEST_COST = 1e12


def cost(least_included):
    """Type of a flag that holds a cost: a number above 0, or of at least 0."""

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
        if not (0 < value <= LARGEST_COST or (least_included and value == 0)):
            bound = "at least" if least_included else "above"
            raise argparse.ArgumentTypeError(
                f"must be {bound} 0 and at most {LARGEST_COST:g}, got {text}"
            )
        return value

    return parse


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description="Which answers may be automated, and what that costs.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage.",
    )
    add_report_arguments(parser)
    parser.add_argument(
        "--model",
        choices=("base", "finetuned"),
        help="whose answers (default: the fine-tuned model's where the cache has them)",
    )
    parser.add_argument(
        "--cost-error",
        type=cost(least_included=False),
        default=10.0,
        metavar="COST",
        help="of one wrong automated answer, in any unit (default: 10)",
    )
    parser.add_argument(
        "--cost-review",
        type=cost(least_included=True),
        default=1.0,
        metavar="COST",
        help="of one answer by a person, in the same unit (default: 1)",
    )
    return parser.parse_args(arguments)


def analyse(model, cost_error, cost_review):
    """The numbers of this report, ready for JSON."""
    import decisions

    calibration, test = (model.results.arrays(split) for split in ("calibration", "test"))
    scored = decisions.score_answers(calibration, test)
    automation = decisions.automation(scored)
    return {
        "model": model.name,
        "zones": {
            "calibrator": ZONE_METHOD,
            "table": decisions.zone_table(*model.confidence(ZONE_METHOD), model.group),
        },
        "automation": automation,
        "costs": {
            "cost_error": cost_error,
            "cost_review": cost_review,
            "table": decisions.cost_table(scored, automation, cost_error, cost_review),
        },
        "warnings": few_groups_warnings({"test rows": model.n_groups["test"]}),
    }


def zones_text(zones):
    rows = []
    for zone in zones["table"]:
        measured = ["–", "–"]
        if zone["count"]:
            accuracy = with_interval({"estimate": zone["accuracy"], **zone}, 100, 1)
            measured = [accuracy, percent(zone["mean_confidence"])]
        share = percent(zone["share"])
        rows.append([zone["name"], f"{zone['count']:,}", share, *measured, zone["action"]])
    header = ["confidence", "rows", "share", "accuracy, %", "mean confidence", "action"]
    how = (
        "How to read it: in brackets the 95 % interval of the accuracy, near-duplicates counted "
        "together. A zone keeps its word if its mean confidence lies inside the interval; a wide "
        "interval says that too few independent texts are in the zone to tell."
    )
    title = f"Zones of confidence (test rows, calibrator: {zones['calibrator']})"
    return "\n\n".join([title, text_table(header, rows), prose(how)])


def threshold_text(threshold):
    return "none" if threshold is None else f"{threshold:.4f}"


def promise_text(promise):
    return f"{100 * promise:g} %"


def certified_text(row):
    """One promise in words: what was certified, and what no threshold could avoid."""
    certified = row["certified"]
    if certified["threshold"] is None:
        outcome = (
            f"no threshold can be certified, send everything to a person: {certified['reason']}"
        )
    else:
        outcome = (
            f"certified with {certified['unit_errors']:,} errors in "
            f"{certified['units_automated']:,} units (p = {certified['p_value']:.2g})"
        )
    bound = certified["abstention_bound"]
    return prose(
        f"{promise_text(row['promise'])}: {outcome}. Even if the confidence ranked perfectly, a "
        f"person would answer {percent(bound['estimate'])} (90 % limit: at least "
        f"{percent(bound['low'])})."
    )


def automation_text(table):
    rows = []
    for promise in table["promises"]:
        for way in ("certified", "naive"):
            cut, test = promise[way], promise[way]["test"]
            measured = ["–", "–", "–", "–", "nothing automated"]
            if test["automated"]:
                measured = [f"{test['expected_errors']:,.0f}", f"{test['errors']:,}"]
                measured += [percent(test["risk"])]
                measured += [percent(test["risk_upper"]), "kept" if test["kept"] else "broken"]
            name = f"{promise_text(promise['promise'])} right, {way}"
            automated = percent(test["coverage"])
            rows.append([name, threshold_text(cut["threshold"]), automated, *measured])
    header = ["promise", "threshold", "automated", "expected", "errors", "wrong", "at most"]
    header.append("on test rows")
    title = (
        f"Automation with a promise (calibrator: {table['calibrator']}, chosen and fitted on "
        f"{table['n_fitting']:,} calibration rows; thresholds from "
        f"{table['n_certifying']:,} others in {table['n_certifying_groups']:,} near-duplicate "
        f"groups, one row a group being a unit; measured on {table['n_test']:,} test rows in "
        f"{table['n_test_groups']:,} groups)"
    )
    how = (
        "How to read it: answers with at least the threshold's confidence are automated. A "
        f"certified threshold breaks its promise in at most {percent(table['delta'])} of all "
        "calibrations, a naive one in about every second where the promise is hard to keep. "
        '"expected" is the number of errors that the confidences of the automated test rows '
        'announce, "errors" what it was, "wrong" its share of these rows, "at most" its 95 % upper '
        "limit: where few rows are automated, kept and broken are chance."
    )
    outcomes = "\n".join(map(certified_text, table["promises"]))
    return "\n\n".join([prose(title), text_table(header, rows), outcomes, prose(how)])


def costs_text(costs, warnings):
    rows = []
    for row in costs["table"]:
        name = row["policy"]
        if row["promise"] is not None:
            name += f", {promise_text(row['promise'])} right"
        interval = f"{row['estimate']:,.0f} [{row['low']:,.0f}, {row['high']:,.0f}]"
        rows.append([name, threshold_text(row["threshold"]), percent(row["automated"]), interval])
    header = ["policy", "threshold", "automated", "cost of 1,000 texts"]
    title = (
        f"Costs (test rows; {costs['cost_error']:g} for a wrong automated answer, "
        f"{costs['cost_review']:g} for an answer by a person)"
    )
    how = (
        "How to read it: in brackets the 95 % interval. A person is taken to be always right. "
        '"least expected cost" automates where 1 − confidence is at most review / error: the best '
        "rule if the confidence is right, and no promise. --cost-error and --cost-review set the "
        "costs."
    )
    return "\n\n".join([title, text_table(header, rows), *map(prose, [how, *warnings])])


def draw_images(settings, model_name):
    import charts

    evaluation = charts.load_evaluation(settings.cache_dir)
    if model_name == "base":
        evaluation = replace(evaluation, finetuned=None)
    charts.draw_some(charts.named(IMAGES), evaluation, settings.images_dir)


def report_reliability(settings):
    from comparison import load_model

    model = load_model(settings.cache_dir, settings.model)
    numbers = analyse(model, settings.cost_error, settings.cost_review)
    if settings.json:
        print(json.dumps(numbers, allow_nan=False))
    else:
        parts = [
            f"What may be automated: {MODEL_TITLES[model.name]}, {settings.cache_dir}",
            zones_text(numbers["zones"]),
            automation_text(numbers["automation"]),
            costs_text(numbers["costs"], numbers["warnings"]),
        ]
        print("\n\n\n".join(parts))
    if not settings.no_images:
        draw_images(settings, model.name)


def main(arguments=None):
    return exit_code(report_reliability, parse_arguments(arguments))


if __name__ == "__main__":
    sys.exit(main())
