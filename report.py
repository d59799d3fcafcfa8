"""The numbers of a cache in words: one source for the pipeline's summary and the documents' tables.

Layer 1: reads evaluation_cache/, loads no model and draws nothing. Everything is of test rows.
"""

import re
import textwrap
from pathlib import Path

from records import MODEL_FILES, atomic_path, load_results, read_json
from settings import UserError

METHODS = ("raw", "platt", "isotonic")
MODEL_TITLES = {"base": "base model", "finetuned": "fine-tuned"}
NEXT_STEP = "run: python generate_evaluation_cache.py --force"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def with_interval(metric: dict, scale: float = 1.0, digits: int = 3) -> str:
    """`0.812 [0.790, 0.835]` from {"estimate", "low", "high"}."""
    value, low, high = (f"{scale * metric[k]:.{digits}f}" for k in ("estimate", "low", "high"))
    return f"{value} [{low}, {high}]"


def prose(text: str, width: int = 92) -> str:
    """Lines of at most `width` characters; a number and its % stay together."""
    lines = textwrap.fill(text.replace(" %", "\N{NO-BREAK SPACE}%"), width, break_on_hyphens=False)
    return lines.replace("\N{NO-BREAK SPACE}", " ")


def few_groups_warnings(n_groups: dict[str, int]) -> list[str]:
    """A sentence about the intervals of rows in too few groups, or nothing.

    n_groups: near-duplicate groups by what the rows are: "test rows", "books". One group or none
    has no interval.
    """
    from calibration_metrics import FEW_GROUPS  # scipy, which --help need not wait for

    few = [f"{rows} ({count})" for rows, count in n_groups.items() if 1 < count < FEW_GROUPS]
    if not few:
        return []
    return [
        f"Fewer than {FEW_GROUPS} near-duplicate groups: {', '.join(few)}. Bootstrap intervals and "
        "standard errors of so few are too narrow: said to hold in 95 % of the cases, with 10 "
        "groups they hold in about 87 %, with 5 in 77 %."
    ]


def text_table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right, under a rule."""
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]

    def line(row):
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rewritten(text: str, blocks: dict[str, str], file: str) -> str:
    """`text` with the content of each pair of markers `<!-- measured: NAME -->` replaced.

    blocks: {NAME: content}. file: what the text is called in an error.
    Raises UserError unless there is exactly one pair of each name.
    """
    for name, content in blocks.items():
        begin, end = f"<!-- measured: {name} -->\n", "<!-- /measured -->"
        pairs = re.findall(f"{re.escape(begin)}.*?{re.escape(end)}", text, re.DOTALL)
        if len(pairs) != 1:
            raise UserError(
                f"{file} has {len(pairs)} marker pairs named {name!r}, exactly 1 is needed"
            )
        text = text.replace(pairs[0], f"{begin}{content}\n{end}")
    return text


def rewrite_document(path: Path, blocks: dict[str, str]) -> None:
    """`rewritten` of a file, whole or not at all. Raises UserError."""
    new = rewritten(path.read_text(encoding="utf-8"), blocks, path.name)
    with atomic_path(path) as partial:
        partial.write_text(new, encoding="utf-8")


def metrics_by_model(cache_dir: Path) -> dict:
    """{model: {method: metrics}} of calibrated_results.json. Raises UserError if it is damaged."""
    models = read_json(Path(cache_dir) / "calibrated_results.json", NEXT_STEP)["models"]
    return {
        name: {method: m["metrics"] for method, m in models[name]["test"]["methods"].items()}
        for name in MODEL_FILES
        if name in models
    }


def category_accuracy(cache_dir: Path, models: list[str]) -> dict:
    """{model: {category: accuracy}}; empty where the data has no categories."""
    table = {}
    for name in models:
        test = load_results(Path(cache_dir) / MODEL_FILES[name]).arrays("test")
        known = sorted(set(test["category"]) - {""})
        table[name] = {c: float(test["correct"][test["category"] == c].mean()) for c in known}
    return table


def label_accuracy(cache_dir: Path, models: list[str]) -> dict:
    """{model: {true label: accuracy}} in the order of the task, without labels of no test row."""
    table = {}
    for name in models:
        results = load_results(Path(cache_dir) / MODEL_FILES[name])
        test = results.arrays("test")
        of_label = [test["correct"][test["label"] == k] for k in range(len(results.task.labels))]
        table[name] = {
            label: float(correct.mean())
            for label, correct in zip(results.task.label_names, of_label, strict=True)
            if len(correct)
        }
    return table


def summary_rows(cache_dir: Path) -> list[tuple[str, list[str]]]:
    """[(title, one value a model)], the first row naming the models."""
    metrics = metrics_by_model(cache_dir)
    models = list(metrics)
    n = metrics["base"]["raw"]["n"]
    rows = [(f"test rows: {n:,}", [MODEL_TITLES[m] for m in models])]

    def add(title, value):
        rows.append((title, [value(metrics[m]) for m in models]))

    def confident(of):
        high = of["platt"]["high_confidence"]
        right = "none" if high["accuracy"] is None else f"{percent(high['accuracy'])} right"
        return f"{percent(high['share'])}, {right}"

    for method in METHODS:
        add(f"accuracy, {method}, %", lambda of, m=method: with_interval(of[m]["accuracy"], 100, 1))
    add(
        "mean confidence, raw, %",
        lambda of: f"{100 * of['raw']['mean_confidence']['estimate']:.1f}",
    )
    for measure, title in (("ece", "ECE"), ("log_loss", "log-loss"), ("brier", "Brier score")):
        for method in METHODS:
            add(f"{title}, {method}", lambda of, m=method, k=measure: with_interval(of[m][k]))
            if measure == "ece":
                add(
                    f"ECE, {method}, if perfectly calibrated",
                    lambda of, m=method: f"{of[m]['ece']['null_mean']:.3f}",
                )
    add("Platt confidence ≥ 90 %", confident)
    for what, accuracy in (
        ("true label ", label_accuracy(cache_dir, models)),
        ("", category_accuracy(cache_dir, models)),
    ):
        for part in accuracy["base"]:
            right = [accuracy[m].get(part) for m in models]
            values = ["none scored" if r is None else f"{100 * r:.1f}" for r in right]
            rows.append((f"accuracy, {what}{part}, %", values))
    return rows
