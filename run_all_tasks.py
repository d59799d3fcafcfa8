"""Every shipped task on real data: the whole pipeline for each, and one table of what came out.

    python run_all_tasks.py --data-root DIR
    python run_all_tasks.py --data-root DIR --tasks spam irony --rows 300
    python run_all_tasks.py --data-root DIR --update-docs        # rewrite docs/TASKS.md as well

Below DIR every public set has a folder of its own (see SOURCES), with one JSON object a line: id,
text, label. At most --rows texts of each are drawn and divided by near-duplicate group, 40 % for
training, 10 % validation, 25 % calibration, 25 % test: more test rows than the pipeline takes by
itself, because these sets are small. Training is as there, but for six passes with one validation
each. Every task has its own folder below --output-dir. What is finished is not done twice, so the
same command continues an interrupted run. tasks.json, written last, holds the numbers and no text.
Exit codes: 0 done, 1 failed, 2 bad usage.
"""

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from records import LOW_LABEL_MASS, atomic_path, read_json, versions, write_json
from report import MODEL_TITLES, markdown_table, percent, prose, rewrite_document, with_interval
from settings import (
    ROOT,
    DataSettings,
    EvaluationSettings,
    Label,
    ModelSettings,
    OutputSettings,
    TaskSettings,
    TrainingSettings,
    UserError,
    add_arguments,
    changed_flags,
    exit_code,
    from_arguments,
    read_task,
)

DOCUMENT = ROOT / "docs" / "TASKS.md"
DOCUMENT_NUMBERS = ROOT / "docs" / "tasks.json"
HELD_OUT_PER_MILLE = {"test": 250, "calibration": 250, "validation": 100}
MOST_ROWS = 3000
SEED = 42  # of the draw and of the division
PASSED_ON = (ModelSettings, EvaluationSettings)
# Few rows want more passes.
TRAINING = TrainingSettings(epochs=6, soup=1, evaluations_per_epoch=1)


@dataclass(frozen=True)
class Source:
    """Where the rows of a task come from.

    file: below --data-root. skip: rows at its beginning that the embedded model was trained on.
    left_out: labels that the task does not ask for.
    """

    file: str
    skip: int = 0
    left_out: tuple[str, ...] = ()


SOURCES = {
    "sentiment": Source("tweeteval_sentiment/test_part_a.jsonl", left_out=("neutral",)),
    "spam": Source("sms_spam/part_a.jsonl"),
    "toxicity": Source("jigsaw_toxicity/part_a.jsonl.gz"),
    "irony": Source("tweeteval_irony/train_val.jsonl"),
    "news_topic": Source("ag_news/part_a.jsonl.gz", skip=2000),
    "financial_sentiment": Source("financial_phrasebank/part_a.jsonl"),
}


def prepare_rows(task, source, data_root, path, n_rows):
    """Write at most `n_rows` rows of a source to `path` as JSON lines, with their split."""
    import numpy as np

    from dataset_loader import group_examples, load_examples, split_examples

    others = tuple(Label(name, (f"not asked for: {name}",)) for name in source.left_out)
    in_file = replace(task.asked, labels=task.labels + others)
    examples = load_examples(DataSettings(data=str(Path(data_root) / source.file)), in_file)
    examples = [e for e in examples[source.skip :] if e.label not in source.left_out]
    order = np.random.default_rng(SEED).permutation(len(examples))[:n_rows]
    drawn = group_examples([examples[i] for i in sorted(order)])
    rows = split_examples(drawn, SEED, HELD_OUT_PER_MILLE)
    keys = ("id", "text", "label", "split")
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            line = {key: getattr(row, key) for key in keys}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def run_pipeline(name, path, folder, flags):
    """The pipeline for one task, its output streaming. Raises UserError when it fails."""
    own = [
        *changed_flags(TaskSettings(task=name)),
        *changed_flags(DataSettings(data=str(path))),
        *changed_flags(TRAINING),
        *changed_flags(OutputSettings(output_dir=str(folder))),
    ]
    command = ["run_complete_pipeline.py", *own, *flags]
    print(f"{name}: {shlex.join(['python', *command])}", flush=True)
    if subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]]).returncode != 0:
        raise UserError(
            f"the task {name!r} failed; mend what it says above and run the same command again "
            "(what is finished is not done twice)"
        )


def measured(model):
    """The numbers of one `ModelEvaluation`, on its test rows."""

    def score(method, name):
        keys = ("estimate", "low", "high", "null_mean", "null_p95")
        metric = model.metrics[method][name]
        return {key: round(metric[key], 6) for key in keys if key in metric}

    mass = model.results.arrays("test")["label_mass"]
    combined = model.entry["signals"]["combined"]
    return {
        "calibrator": model.selected,
        "accuracy": score("raw", "accuracy"),
        "aurc": score("raw", "aurc"),
        "log_loss": {
            "raw": score("raw", "log_loss"),
            "calibrated": score(model.selected, "log_loss"),
        },
        "ece": {"raw": score("raw", "ece"), "calibrated": score(model.selected, "ece")},
        "label_mass": {
            "mean": round(float(mass.mean()), 6),
            "low": round(float((mass < LOW_LABEL_MASS).mean()), 6),
        },
        "combined": {
            "parts": [part["name"] for part in combined["blend"]["parameters"]["parts"]],
            "best_part": combined["best_part"],
            "difference": combined["difference"][combined["best_part"]],
            "worse_than": combined["worse_than"],
        },
        "not_scored": model.results.counts()["failed"],
        "evaluation_seconds": model.results.run["seconds"],
    }


def task_numbers(name, source, folder):
    """What tasks.json says of one finished task."""
    import numpy as np

    from comparison import load_models

    cache = OutputSettings(str(folder)).cache
    models = load_models(cache)
    metadata = read_json(cache / "evaluation_metadata.json", "run the same command again")
    base = models["base"]
    names = base.results.task.label_names
    shares = np.bincount(base.label, minlength=len(names)) / len(base.label)
    return {
        "source": asdict(source),
        "model_fingerprint": base.results.identity["model_fingerprint"],
        "labels": dict(zip(names, shares.round(6).tolist(), strict=True)),
        "rows": {s: metadata["training"]["rows"][s] for s in ("train", "validation")}
        | metadata["rows"],
        "test_groups": len(np.unique(base.group)),
        "training_seconds": metadata["training"]["seconds"],
        "models": {model.name: measured(model) for model in models.values()},
    }


def rows_table(tasks):
    lines = [
        "| task | source | labels (share of the test rows) | training | validation | calibration "
        "| test (groups) |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, task in tasks.items():
        labels = ", ".join(f"{label} {percent(share)}" for label, share in task["labels"].items())
        rows = task["rows"]
        lines.append(
            f"| {name} | `{task['source']['file']}` | {labels} | {rows['train']:,} | "
            f"{rows['validation']:,} | {rows['calibration']:,} | {rows['test']:,} "
            f"({task['test_groups']:,}) |"
        )
    return "\n".join(lines)


def results_table(tasks):
    lines = [
        "| task | model | accuracy, % | AURC | log-loss, raw | log-loss, calibrated | ECE, raw "
        "| ECE, calibrated | label mass |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]

    def error(ece):
        return f"{with_interval(ece)}; perfect {ece['null_mean']:.3f}"

    for name, task in tasks.items():
        for model, of in task["models"].items():
            lines.append(
                f"| {name} | {MODEL_TITLES[model]} | {with_interval(of['accuracy'], 100, 1)} | "
                f"{with_interval(of['aurc'])} | {with_interval(of['log_loss']['raw'])} | "
                f"{with_interval(of['log_loss']['calibrated'])} ({of['calibrator']}) | "
                f"{error(of['ece']['raw'])} | {error(of['ece']['calibrated'])} | "
                f"{of['label_mass']['mean']:.3f} |"
            )
    return "\n".join(lines)


def combined_table(tasks):
    """Log-loss of the combined score on test rows against its best part there."""
    from signal_comparison import TITLES

    header = ["task", "model", "combined of", "best part", "combined minus it", "p", "worse than"]

    def titles(names):
        return ", ".join(TITLES[name] for name in names) or "none"

    rows = [
        [
            name,
            MODEL_TITLES[model],
            titles(of["combined"]["parts"]),
            TITLES[of["combined"]["best_part"]],
            with_interval(of["combined"]["difference"]),
            f"{of['combined']['difference']['p_value_holm']:.2g}",
            titles(of["combined"]["worse_than"]),
        ]
        for name, task in tasks.items()
        for model, of in task["models"].items()
    ]
    return markdown_table(header, rows)


def tables(numbers):
    """The Markdown of tasks.json that stands in docs/TASKS.md."""
    tasks = numbers["tasks"]
    training = sum(task["training_seconds"] for task in tasks.values())
    evaluation = sum(
        model["evaluation_seconds"] for task in tasks.values() for model in task["models"].values()
    )
    note = (
        f"(`{numbers['command']}`: at most {numbers['max_rows']:,} rows a task, "
        f"{training:.0f} s of training and {evaluation:.0f} s of evaluation in all.)"
    )
    combined = prose(
        "Log-loss of the combined confidence minus that of its best part after Platt scaling, on "
        "the test rows; p is corrected for the number of parts (Holm). The last column names the "
        "parts than which it is worse by more than chance."
    )
    return "\n\n".join(
        [rows_table(tasks), results_table(tasks), combined, combined_table(tasks), note]
    )


def update_document(numbers):
    """Rewrite the measured block of docs/TASKS.md, and docs/tasks.json beside it."""
    rewrite_document(DOCUMENT, {"tasks": tables(numbers)})
    write_json(DOCUMENT_NUMBERS, numbers)


def run_tasks(arguments):
    output = Path(arguments.output_dir).resolve()
    flags = [flag for cls in PASSED_ON for flag in changed_flags(from_arguments(cls, arguments))]
    for name in arguments.tasks:
        folder = output / name
        path = folder / "rows.jsonl"
        prepare_rows(read_task(name), SOURCES[name], arguments.data_root, path, arguments.rows)
        run_pipeline(name, path, folder, flags)
        print()
    shown = [] if arguments.rows == MOST_ROWS else [f"--rows={arguments.rows}"]
    numbers = {
        "command": shlex.join(["python", "run_all_tasks.py", "--data-root=DIR", *shown, *flags]),
        "max_rows": arguments.rows,
        "versions": versions(),
        "tasks": {
            name: task_numbers(name, SOURCES[name], output / name) for name in arguments.tasks
        },
    }
    write_json(output / "tasks.json", numbers)
    print(tables(numbers))
    print(f"\nresults: {output}")
    if arguments.update_docs:
        update_document(numbers)


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description="Run the pipeline for every shipped task on real data.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage.",
    )
    parser.add_argument(
        "--data-root", required=True, metavar="DIR", help="folder of the data sets, one folder each"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=tuple(SOURCES),
        default=tuple(SOURCES),
        metavar="TASK",
        help=f"tasks to run (default: all, {', '.join(SOURCES)})",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=MOST_ROWS,
        help=f"rows drawn for a task, at most (default: {MOST_ROWS})",
    )
    parser.add_argument(
        "--output-dir",
        default=str(ROOT / "task_runs"),
        metavar="FOLDER",
        help="folder of the results, one folder a task (default: task_runs/ beside this script)",
    )
    parser.add_argument(
        "--update-docs", action="store_true", help="rewrite docs/TASKS.md and docs/tasks.json"
    )
    add_arguments(parser, *PASSED_ON)
    settings = parser.parse_args(arguments)
    if settings.rows < 1:
        parser.error(f"--rows must be at least 1, got {settings.rows}")
    if settings.update_docs and set(settings.tasks) != set(SOURCES):
        parser.error("--update-docs needs all tasks; leave --tasks out")
    return settings


def main(arguments=None):
    settings = parse_arguments(arguments)
    again = "the same command continues where it stopped"
    return exit_code(run_tasks, settings, interrupted=again)


if __name__ == "__main__":
    sys.exit(main())
