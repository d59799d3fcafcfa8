"""Every objective of fine-tuning beside plain cross-entropy: the same rows, settings and seeds.

    python compare_objectives.py
    python compare_objectives.py --objectives focal brier --seeds 42 43 44
    python compare_objectives.py --update-docs                # rewrite docs/OBJECTIVES.md as well

Each objective is trained, evaluated on the held-out rows and Platt-scaled on the calibration rows
by the pipeline, with each seed in a folder of its own below --output-dir. What is compared is the
token probability of the test rows, before and after Platt scaling, paired row by row with
cross-entropy of the same seed; beside it stands what the models say when asked for P(True), which
multi-task teaches. What is finished is not done twice, so the same command continues an interrupted
run. objectives.json, written last, holds the numbers. Exit codes: 0 done, 1 failed, 2 bad usage.
"""

import argparse
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from records import P_TRUE, TOKEN_PROBABILITY, versions, write_json
from report import few_groups_warnings, markdown_table, prose, rewrite_document, with_interval
from settings import (
    OBJECTIVES,
    ROOT,
    DataSettings,
    EvaluationSettings,
    ModelSettings,
    OutputSettings,
    TaskSettings,
    TrainingSettings,
    UserError,
    add_arguments,
    changed_flags,
    exit_code,
    from_arguments,
)

DOCUMENT = ROOT / "docs" / "OBJECTIVES.md"
DOCUMENT_NUMBERS = ROOT / "docs" / "objectives.json"
REFERENCE = TrainingSettings.objective
ASKED_P_TRUE = (REFERENCE, "multi-task")  # one that was never taught to answer it, and one that was
METHODS = {"raw": "before calibration", "platt": "after Platt scaling"}
SCORES = {  # name: title, factor and digits shown, whether lower is better
    "accuracy": ("accuracy, %", 100, 1, False),
    "log_loss": ("log-loss", 1, 3, True),
    "brier": ("Brier score", 1, 3, True),
    "ece": ("ECE (perfect)", 1, 3, True),
    "aurc": ("AURC", 1, 3, True),
}
CHOSEN_HERE = {  # settings that the comparison itself decides, by their class
    TrainingSettings: ("objective", "train_seed"),
    EvaluationSettings: ("signals", "samples", "temperature", "dropout_passes"),
}
PASSED_ON = (TaskSettings, ModelSettings, DataSettings)


# ------------------------------------------------------------------------------------- the runs


def run_settings(training, evaluation, objective, seed):
    """(`TrainingSettings`, `EvaluationSettings`) of one run; another objective's are left out."""
    others = [name for o, names in OBJECTIVES.items() if o != objective for name in names]
    unused = {name: getattr(TrainingSettings, name) for name in others}
    signals = P_TRUE if objective in ASKED_P_TRUE else "none"
    return (
        replace(training, objective=objective, train_seed=seed, **unused),
        replace(evaluation, signals=signals),
    )


def run_pipeline(title, folder, settings):
    """The pipeline without charts for one run, its output streaming. Raises UserError."""
    flags = [flag for of in (*settings, OutputSettings(str(folder))) for flag in changed_flags(of)]
    command = ["run_complete_pipeline.py", "--skip-images", *flags]
    print(f"{title}: {shlex.join(['python', *command])}", flush=True)
    if subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]]).returncode != 0:
        raise UserError(
            f"the run {title!r} failed; mend what it says above and run the same command again "
            "(what is finished is not done twice)"
        )
    print(flush=True)


# ---------------------------------------------------------------------------------- the numbers


def pooled_rows(models):
    """What the models of several seeds, one each, say of the test rows that `ids` names.

    models: {objective: [`ModelEvaluation`]}. Returns (answers, label, group): answers as
    `comparison.against_reference` takes them, the rows of all seeds one after the other. A row
    keeps its near-duplicate group, so the seeds of one row do not count as independent rows.
    """
    import numpy as np

    every = [model for of in models.values() for model in of]
    common = set.intersection(*(set(model.entry["test"]["ids"]) for model in every))

    def kept(model):
        return np.isin(model.entry["test"]["ids"], sorted(common))

    def pooled(of, column):
        return np.concatenate([column(model)[kept(model)] for model in of])

    answers = {
        name: {method: pooled(of, lambda m, by=method: m.probabilities[by]) for method in METHODS}
        for name, of in models.items()
    }
    reference = models[REFERENCE]
    label, group = (pooled(reference, lambda m, key=k: getattr(m, key)) for k in ("label", "group"))
    return answers, label, group


def p_true_numbers(models, seed):
    """How two ways of one model to say how sure it is rank its answers and are believed.

    models: [`ModelEvaluation`], one a seed, whose rows are pooled as in `pooled_rows`.
    Returns {"token_probability": scores, "p_true": scores, "difference": P(True) − token
    probability}; scores: auroc, aurc of answer and confidence; raw_ece and raw_log_loss of the
    confidence as the probability that the answer is right; ece and log_loss after Platt scaling.
    Where P(True) could not be asked, {"left_out": why}.
    """
    import numpy as np

    from blend import SignalBlend, signal_rows
    from calibration_metrics import compare, measure
    from records import label_probabilities
    from signals import method_arrays, usable_methods

    for model in models:
        if reason := usable_methods(model.results)[1].get(P_TRUE):
            return {"left_out": reason}

    def pooled(columns):
        return {key: np.concatenate([of[key] for of in columns]) for key in columns[0]}

    def rows_of(results, method):
        rows = method_arrays(results, "test", method)
        platt = SignalBlend().fit(signal_rows(results, "calibration", [method]), method)
        confidence = results.arrays("test", method)["confidence"]
        if method == TOKEN_PROBABILITY:
            confidence = label_probabilities(rows["label_logprobs"]).max(axis=1)
        keys = ("id", "group", "label", "correct", "score")
        return {key: rows[key] for key in keys} | {
            "confidence": confidence,
            "probabilities": platt.predict_proba(signal_rows(results, "test", [method])),
        }

    both = {}
    for method in (TOKEN_PROBABILITY, P_TRUE):
        asked = [model.results.arrays("test", P_TRUE)["id"] for model in models]
        columns = [rows_of(model.results, method) for model in models]
        both[method] = pooled(
            [
                {key: of[key][np.isin(of["id"], ids)] for key in of}
                for of, ids in zip(columns, asked, strict=True)
            ]
        )
    table = {}
    for method, rows in both.items():
        options = {"group": rows["group"], "seed": seed}
        confidence, correct = rows["confidence"], rows["correct"]
        right = np.column_stack([confidence, 1 - confidence]), np.where(correct, 0, 1)
        after = rows["probabilities"], rows["label"]
        table[method] = {
            "auroc": measure("auroc", rows["score"], correct, **options),
            "aurc": measure("aurc", rows["score"], correct, **options),
            "raw_ece": measure("ece", confidence, correct, **options),
            "raw_log_loss": measure("log_loss", *right, **options),
            "ece": measure("ece", *after, **options),
            "log_loss": measure("log_loss", *after, **options),
        }
    own, asked = both[TOKEN_PROBABILITY], both[P_TRUE]
    table["difference"] = {
        "auroc": measure(
            "auroc",
            *(asked["score"], asked["correct"]),
            reference=(own["score"], own["correct"]),
            group=own["group"],
            seed=seed,
        ),
        "log_loss": compare(
            {method: rows["probabilities"] for method, rows in both.items()},
            own["label"],
            TOKEN_PROBABILITY,
            own["group"],
            seed=seed,
        )[P_TRUE]["log_loss"],
    }
    return table


def run_numbers(model, metadata):
    """What is said of one run by itself: its scores by method, its training, its label mass."""
    training = metadata["training"]
    return {
        "scores": {
            method: {score: round(model.metrics[method][score]["estimate"], 6) for score in SCORES}
            for method in METHODS
        },
        "label_mass": round(float(model.results.arrays("test")["label_mass"].mean()), 6),
        "chosen_steps": training["chosen_steps"],
        "training_seconds": training["seconds"],
        "settings": training["settings"],
    }


def comparison_numbers(folders, command, evaluation):
    """What objectives.json says of finished runs. folders: {objective: {seed: folder}}."""
    import numpy as np

    from comparison import against_reference, load_model
    from records import read_json

    models, runs = {}, {}
    for name, of in folders.items():
        caches = {seed: OutputSettings(str(folder)).cache for seed, folder in of.items()}
        models[name] = [load_model(cache, "finetuned") for cache in caches.values()]
        runs[name] = {
            str(seed): run_numbers(
                model, read_json(cache / "evaluation_metadata.json", "run the same command again")
            )
            for (seed, cache), model in zip(caches.items(), models[name], strict=True)
        }
    answers, label, group = pooled_rows(models)
    seed = evaluation.evaluation_seed
    n_seeds = len(models[REFERENCE])
    return {
        "command": command,
        "model_fingerprint": models[REFERENCE][0].results.identity["model_fingerprint"],
        "versions": versions(),
        "n": len(label) // n_seeds,
        "n_groups": len(np.unique(group)),
        "n_calibration": len(models[REFERENCE][0].results.arrays("calibration")["label"]),
        "runs": runs,
        "comparison": against_reference(answers, label, group, evaluation.bins, seed),
        "p_true": {
            name: p_true_numbers(models[name], seed) for name in ASKED_P_TRUE if name in models
        },
    }


# ----------------------------------------------------------------------------------- the tables


def score_cell(name, score, scores):
    """`0.520; −0.004 [−0.009, 0.001], p = 0.2` of one model; ", better" where that is decided."""
    _, factor, digits, lower_is_better = SCORES[score]
    row = scores[score]
    value = f"{factor * row[name]:.{digits}f}"
    if score == "ece":
        value += f" ({row['null_mean'][name]:.3f})"
    if name == REFERENCE:
        return value
    cell = f"{value}; {with_interval(row, factor, digits)}"
    if "p_value_holm" not in row:
        return cell
    from comparison import is_significant

    cell += f", p = {row['p_value_holm']:.2g}"
    if is_significant(row):
        cell += ", better" if (row["estimate"] < 0) == lower_is_better else ", worse"
    return cell


def method_table(method, numbers):
    others = numbers["comparison"][method]
    of_reference = next(iter(others.values()))
    header = [METHODS[method], *(title for title, *_ in SCORES.values())]
    rows = [
        [name, *(score_cell(name, score, scores) for score in SCORES)]
        for name, scores in {REFERENCE: of_reference, **others}.items()
    ]
    return markdown_table(header, rows)


def runs_table(numbers):
    """Each run by itself: what the mean over seeds hides."""
    rows = [
        [
            f"{name}, seed {seed}",
            *(f"{run['scores'][method]['log_loss']:.3f}" for method in METHODS),
            *(f"{run['scores'][method]['ece']:.3f}" for method in METHODS),
            f"{run['label_mass']:.4f}",
            " + ".join(f"{step:,}" for step in run["chosen_steps"]),
            f"{run['training_seconds']:.0f}",
        ]
        for name, of in numbers["runs"].items()
        for seed, run in of.items()
    ]
    header = ["run", "log-loss, raw", "Platt", "ECE, raw", "Platt", "label mass", "steps chosen"]
    return markdown_table([*header, "seconds of training"], rows)


def p_true_table(numbers):
    """What P(True) is worth, untaught and taught, beside the token probability."""
    titles = {TOKEN_PROBABILITY: "token probability", P_TRUE: "P(True)"}
    rows, sentences = [], []
    for name, table in numbers["p_true"].items():
        if "left_out" in table:
            sentences.append(f"After {name} P(True) cannot be judged: {table['left_out']}.")
            continue
        for method, title in titles.items():
            of = table[method]

            def error(score, of=of):
                return f"{with_interval(of[score])} ({of[score]['null_mean']:.3f})"

            rows.append(
                [
                    f"{name}, {title}",
                    *(with_interval(of[score]) for score in ("auroc", "aurc")),
                    error("raw_ece"),
                    with_interval(of["raw_log_loss"]),
                    error("ece"),
                    with_interval(of["log_loss"]),
                ]
            )
        gap = table["difference"]
        sentences.append(
            f"After {name}, P(True) minus token probability: AUROC {with_interval(gap['auroc'])}, "
            f"log-loss after Platt {with_interval(gap['log_loss'])} "
            f"(p = {gap['log_loss']['p_value']:.2g})."
        )
    header = ["how sure the model is", "AUROC", "AURC", "ECE, raw (perfect)"]
    header += ["log-loss of being right, raw", "ECE, Platt (perfect)", "log-loss, Platt"]
    return f"{markdown_table(header, rows)}\n\n{prose(' '.join(sentences), 100)}"


def tables(numbers):
    """The Markdown of objectives.json that stands in docs/OBJECTIVES.md."""
    seeds = list(next(iter(numbers["runs"].values())))
    note = (
        f"(`{numbers['command']}`: {numbers['n']:,} test rows in {numbers['n_groups']:,} "
        f"near-duplicate groups, {numbers['n_calibration']:,} calibration rows; training "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}.)"
    )
    warnings = few_groups_warnings({"test rows": numbers["n_groups"]})
    parts = [
        *(method_table(method, numbers) for method in METHODS),
        *([p_true_table(numbers)] if numbers["p_true"] else []),
        runs_table(numbers),
        *(prose(text, 100) for text in warnings),
        note,
    ]
    return "\n\n".join(parts)


def update_document(numbers):
    """Rewrite the measured block of docs/OBJECTIVES.md, and docs/objectives.json beside it."""
    rewrite_document(DOCUMENT, {"objectives": tables(numbers)})
    write_json(DOCUMENT_NUMBERS, numbers)


# -------------------------------------------------------------------------------- the command


def compare_objectives(arguments):
    output = Path(arguments.output_dir).resolve()
    training = from_arguments(TrainingSettings, arguments)
    evaluation = from_arguments(EvaluationSettings, arguments)
    passed_on = [from_arguments(cls, arguments) for cls in PASSED_ON]
    folders = {}
    for name in arguments.objectives:
        for seed in arguments.seeds:
            folder = folders.setdefault(name, {})[seed] = output / f"{name}-{seed}"
            own = run_settings(training, evaluation, name, seed)
            run_pipeline(f"{name}, seed {seed}", folder, [*passed_on, *own])
    numbers = comparison_numbers(folders, shown_command(arguments), evaluation)
    write_json(output / "objectives.json", numbers)
    print(tables(numbers))
    print(f"\nresults: {output}")
    if arguments.update_docs:
        update_document(numbers)


def shown_command(arguments):
    """The command that gives the same numbers, without where the results go."""
    command = ["python", "compare_objectives.py"]
    if arguments.objectives != list(OBJECTIVES):
        command += ["--objectives", *(o for o in arguments.objectives if o != REFERENCE)]
    if arguments.seeds != [TrainingSettings.train_seed]:
        command += ["--seeds", *map(str, arguments.seeds)]
    for cls in (*PASSED_ON, *CHOSEN_HERE):
        command += changed_flags(from_arguments(cls, arguments))
    return shlex.join(command)


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description="Compare the objectives of fine-tuning with plain cross-entropy.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage.",
        allow_abbrev=False,  # --objective is of fine_tune_model.py
    )
    others = [name for name in OBJECTIVES if name != REFERENCE]
    parser.add_argument(
        "--objectives",
        nargs="+",
        choices=others,
        default=others,
        metavar="OBJECTIVE",
        help=f"what to compare with {REFERENCE} (default: all, {', '.join(others)})",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[TrainingSettings.train_seed],
        metavar="SEED",
        help=f"training seeds, each a run of every objective (default: "
        f"{TrainingSettings.train_seed})",
    )
    parser.add_argument(
        "--output-dir",
        default=str(ROOT / "objective_runs"),
        metavar="FOLDER",
        help="folder of the results, one folder a run (default: objective_runs/ beside this "
        "script)",
    )
    parser.add_argument(
        "--update-docs",
        action="store_true",
        help="rewrite docs/OBJECTIVES.md and docs/objectives.json",
    )
    add_arguments(parser, *PASSED_ON)
    for cls, names in CHOSEN_HERE.items():
        add_arguments(parser, cls, leave_out=names)
        parser.set_defaults(**{name: getattr(cls, name) for name in names})
    settings = parser.parse_args(arguments)
    if repeated := {seed for seed in settings.seeds if settings.seeds.count(seed) > 1}:
        parser.error(f"--seeds has {min(repeated)} twice; give each once")
    settings.objectives = [o for o in OBJECTIVES if o in (REFERENCE, *settings.objectives)]
    if settings.update_docs and settings.objectives != list(OBJECTIVES):
        parser.error("--update-docs needs all objectives; leave --objectives out")
    if settings.update_docs and settings.data is not None:
        parser.error("--update-docs is for the texts of dataset/; leave --data out")
    return settings


def main(arguments=None):
    settings = parse_arguments(arguments)
    again = "the same command continues where it stopped"
    return exit_code(compare_objectives, settings, interrupted=again)


if __name__ == "__main__":
    sys.exit(main())
