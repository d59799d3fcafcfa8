"""Evaluation caches of simulated models, whose faults are known, for tests that need no model."""

import functools
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from comparison import judge_calibrators
from records import (
    SCHEMA_VERSION,
    Example,
    ModelResults,
    label_probabilities,
    prediction_from_logprobs,
    write_json,
)
from settings import SENTIMENT, EvaluationSettings, Label, Task

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
    run = {"evaluation": {"bins": bins}}
    identity = {"model": "simulated", "fingerprint": f"{name}-{seed}"}
    return ModelResults(name, task, identity, tuple(examples), tuple(predictions), run)


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
                }
                for name, r in models.items()
            },
        },
    )
    steps = np.arange(0, 676, 75)
    history = [
        {
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
    training = {"history": history, "chosen_step": 450} if finetuned else None
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


@functools.cache
def _root():
    return tempfile.TemporaryDirectory(prefix="simulated_caches_")


@functools.cache
def simulated_cache(name):
    """The folder of one of CACHES, written once a test run; copy it before you change it."""
    folder = Path(_root().name) / name
    folder.mkdir()
    return write_cache(folder, **CACHES[name])
