"""Evaluation caches of simulated models, whose faults are known, for tests that need no model."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from filelock import FileLock

from comparison import judge_calibrators
from consistency_confidence import consistency_predictions
from records import (
    MC_DROPOUT,
    P_TRUE,
    PARAPHRASE,
    SCHEMA_VERSION,
    VERBALISED,
    Example,
    ModelResults,
    Prediction,
    label_probabilities,
    prediction_from_logprobs,
    write_json,
)
from settings import SENTIMENT, EvaluationSettings, Label, Task
from signal_comparison import judge_signals

CATEGORIES = (
    "strong_positive",
    "strong_negative",
    "medium_positive",
    "medium_negative",
    "weak_positive",
    "weak_negative",
    "neutral_sport",
    "neutral_workplace",
)
DOMAINS = ("films", "food", "sport")
TOPIC = Task(
    "topic",
    "What is this text about? Answer sport, work, home or travel.",
    tuple(Label(name, (name,)) for name in ("sport", "work", "home", "travel")),
)

SHARED = Path()  # the folder for CACHES of all processes of a test run, set by conftest.py
CACHES = {
    "two": {"task": SENTIMENT, "n": 2000},
    "four": {"task": TOPIC, "n": 600, "bins": 12},
    "alone": {"task": SENTIMENT, "n": 120, "finetuned": False},
}


def simulate(name, task, n, seed, skill, sharpness, bins=20):
    """A model of known faults: its scores are the truth's, blurred and stretched by `sharpness`.

    Half of the n rows calibrate, half test; three rows in a row are one near-duplicate group.
    Returns the model's `ModelResults`.
    """
    examples_rng, model_rng = np.random.default_rng(7), np.random.default_rng(seed)
    k = len(task.labels)
    truth = examples_rng.normal(0, 2.5, (n, k))  # nats
    labels = (label_probabilities(truth).cumsum(axis=1) < examples_rng.random((n, 1))).sum(axis=1)
    category = examples_rng.integers(len(CATEGORIES), size=n)
    blur = model_rng.normal(0, 2.5, (n, k))
    weight = skill * np.where(category >= 6, 0.3 * skill, 1.0)[:, None]
    scores = sharpness * (weight * truth + (1 - weight) * blur)
    domain = examples_rng.integers(len(DOMAINS), size=n)
    mass = model_rng.uniform(0.9, 1.0, (n, 1))
    logprobs = np.log(label_probabilities(scores)) + np.log(mass)
    examples, predictions = [], []
    for i in range(n):
        split = "calibration" if i < n // 2 else "test"
        examples.append(
            Example(
                f"e{i}",
                "",
                task.label_names[labels[i]],
                CATEGORIES[category[i]],
                DOMAINS[domain[i]],
                f"{split}{i // 3}",
                split,
            )
        )
        predictions.append(prediction_from_logprobs(f"e{i}", task, logprobs[i]))
    evaluation = EvaluationSettings(bins=bins)
    predictions = [replace(p, passes=1.0, latency_sec=0.004) for p in predictions]
    predictions += [
        *(
            replace(p, passes=0.0, latency_sec=1e-5)
            for p in consistency_predictions(task, predictions, evaluation)
        ),
        *simulate_signals(task, predictions, labels, name, np.random.default_rng(seed + 100)),
    ]
    free = [{"text": "N/A", "label_logprobs": np.log(label_probabilities(np.arange(k))).tolist()}]
    signals = {"wordings": [], "content_free": free, "left_out": {}}
    if name == "base":
        signals["left_out"][MC_DROPOUT] = "the base model has no LoRA layers to drop out"
    run = {"evaluation": asdict(evaluation), "signals": signals}
    identity = {"model": "simulated", "fingerprint": f"{name}-{seed}"}
    return ModelResults(name, task, identity, tuple(examples), tuple(predictions), run)


def simulate_signals(task, own, labels, name, rng):
    """Rows of every other signal: wordings and dropout blur the answer, P(True) knows a little more
    than chance, and two replies in three are a number; a base model has no dropout."""
    rows = []
    for row, label in zip(own, labels, strict=True):
        right = row.predicted == task.label_names[label]
        base = np.array(row.label_logprobs)
        for method, n_passes, blur in ((PARAPHRASE, 4, 0.8), (MC_DROPOUT, 5, 0.4)):
            if method == MC_DROPOUT and name == "base":
                continue
            scores = base + rng.normal(0, blur, (n_passes, len(base)))
            passes = np.log(label_probabilities(scores)) - 0.01
            averaged = prediction_from_logprobs(
                row.example_id,
                task,
                np.log(np.exp(passes).mean(axis=0)),
                method=method,
                pass_logprobs=tuple(map(tuple, passes.tolist())),
            )
            rows.append(replace(averaged, passes=float(n_passes), latency_sec=0.004 * n_passes))
        sure = 1 / (1 + np.exp(-rng.normal(1.0 if right else -0.5, 1.5)))
        asked = Prediction(
            row.example_id,
            P_TRUE,
            label_mass=0.9,
            predicted=row.predicted,
            confidence=float(sure),
            passes=1.0,
            latency_sec=0.005,
        )
        stated = replace(
            asked, method=VERBALISED, label_mass=None, confidence=round(float(sure), 1), passes=3.0
        )
        if rng.random() > 2 / 3:
            error = "the reply 'Yes' is no whole number from 0 to 100"
            stated = Prediction(
                row.example_id, VERBALISED, error=error, passes=3.0, latency_sec=0.01
            )
        rows += [asked, stated]
    return rows


def write_cache(folder, task=SENTIMENT, n=2000, finetuned=True, bins=20):
    """An evaluation cache of simulated models, with the real calibrators and measurements."""
    evaluation = EvaluationSettings(bins=bins, resamples=50)
    models = {"base": simulate("base", task, n, 1, 0.5, 2.0, bins)}
    if finetuned:
        models["finetuned"] = simulate("finetuned", task, n, 2, 0.8, 1.6, bins)
    for name, results in models.items():
        write_json(folder / f"{name}_model_results.json", results.to_json())
    write_json(
        folder / "calibrated_results.json",
        {
            "schema_version": SCHEMA_VERSION,
            "task": task.to_json(),
            "models": {
                name: {
                    "identity": r.identity,
                    **judge_calibrators(r, bins, evaluation.resamples, evaluation.evaluation_seed),
                    "signals": judge_signals(r, bins, evaluation.resamples),
                }
                for name, r in models.items()
            },
        },
    )
    steps = np.arange(0, 676, 75)
    history = [
        {
            "run": 1 if step else None,
            "step": int(step),
            "epoch": step / 225,
            "training_loss": 0.25 + 0.5 * np.exp(-step / 90) if step else None,
            "validation_loss": 0.3 + 0.45 * np.exp(-step / 100) + (step / 2000) ** 2,
            "validation_accuracy": 0.9 - 0.2 * np.exp(-step / 120),
            "validation_ece": 0.04 + 0.15 * np.exp(-step / 80) + 5e-5 * step,
            "validation_calibrated_log_loss": 0.28 + 0.35 * np.exp(-step / 100),
        }
        for step in steps
    ]
    kept = {"chosen_steps": [450], "mean_of_runs": None}
    training = {"history": history, **kept} if finetuned else None
    write_json(
        folder / "evaluation_metadata.json",
        {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": f"{task.name}-{n}-{finetuned}",
            "settings": {"evaluation": asdict(evaluation)},
            "training": training,
        },
    )
    return folder


def simulated_cache(name):
    """The folder of one of CACHES, written once a test run; copy it before you change it."""
    folder = SHARED / name
    with FileLock(SHARED / f".{name}.lock"):
        if not folder.exists():
            write_cache(SHARED / f".{name}", **CACHES[name]).rename(folder)
    return folder
