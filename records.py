"""Contracts: the typed rows that travel between the stages, and their JSON on disk.

`Example` → `Prediction` → `ModelResults` (evaluation_cache/*.json) → metrics and charts. A text
that could not be scored is a `Prediction` with `error` set and nothing else, never a default.
Layer 0: standard library and numpy. docs/CACHE_SCHEMA.md describes the files field by field.
"""

import json
import os
import platform
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import numpy as np

from settings import SPLITS, Task, UserError

SCHEMA_VERSION = 3
# The methods that a cache holds rows of; `signals.METHODS` has those computed from them as well.
TOKEN_PROBABILITY = "token_probability"
CONSISTENCY = "consistency"
PARAPHRASE = "paraphrase"
MC_DROPOUT = "mc_dropout"
P_TRUE = "p_true"
VERBALISED = "verbalised"
# File names in evaluation_cache/, by the name of the model.
MODEL_FILES = {"base": "base_model_results.json", "finetuned": "finetuned_model_results.json"}
LOW_LABEL_MASS = 0.5  # below this the model mostly said something that is no answer
ARRAY_FIELDS = (  # of a prediction, as columns of `ModelResults.arrays`
    "label_logprobs",
    "label_mass",
    "probability",
    "confidence",
    "label_counts",
    "pass_logprobs",
)

TUPLE_FIELDS = ("label_logprobs", "label_slack", "label_counts")  # lists in JSON


@dataclass(frozen=True)
class Example:
    """One labelled text. `group` is its near-duplicate group: a group is never divided."""

    id: str
    text: str
    label: str
    category: str | None = None
    domain: str | None = None
    group: str | None = None
    split: str | None = None

    def __post_init__(self):
        if self.split is not None and self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")


@dataclass(frozen=True)
class Prediction:
    """What one method says of one text; K is the number of labels, in the task's order.

    A method gives a distribution over the labels and predicts its most probable one, or it only
    scores (p_true, verbalised): how sure the model is of what token_probability predicts.

    label_logprobs: (K,) log-probability (nats) of each label: the summed probability of its answer
        words under the model; for consistency the log of its smoothed share of the samples; for
        paraphrase the mean over the wordings, for mc_dropout the log of the mean probability.
        None where a method only scores.
    label_mass: how much of the distribution is an answer at all, 0 to 1; of p_true the probability
        of true and false together.
    probability: P(first label) among the labels: p₀ / Σₖ pₖ. For sentiment P(positive).
    confidence: the probability of the predicted label, not renormalised; for consistency the share
        of the samples that agree with it; for p_true P(true) of true and false, for verbalised the
        stated percentage as a fraction.
    label_counts: (K,) samples per label; consistency only.
    pass_logprobs: (M, K) log-probabilities (nats) of the M passes that were averaged; paraphrase
        (the task's own question first) and mc_dropout only.
    passes: sequences that went through the model for this row, beyond those of token_probability.
    latency_sec: seconds they took, as a share of those of the rows scored together.
    error: why there is no prediction; all other results but the cost are None then.
    label_slack: (K,) how much of the probability of each label was not read but is an upper bound,
        for answer words that a server left out: the true one is at most that much lower. None
        where all were read. What is predicted is certain all the same.
    """

    example_id: str
    method: str
    label_logprobs: tuple[float, ...] | None = None
    label_mass: float | None = None
    predicted: str | None = None
    probability: float | None = None
    confidence: float | None = None
    label_counts: tuple[int, ...] | None = None
    pass_logprobs: tuple[tuple[float, ...], ...] | None = None
    truncated: bool = False
    passes: float | None = None
    latency_sec: float | None = None
    error: str | None = None
    label_slack: tuple[float, ...] | None = None

    @property
    def margin(self):
        """Distance in nats from the most probable label to the second; never negative."""
        top = sorted(self.label_logprobs, reverse=True)
        return top[0] - top[1]


def prediction_from_logprobs(
    example_id, task, label_logprobs, method=TOKEN_PROBABILITY, label_slack=None, **extra
):
    """The prediction that follows from (K,) label log-probabilities (nats).

    An error where they are upper bounds and do not say for sure which label is the most probable.
    """
    logprobs = np.asarray(label_logprobs, dtype=np.float64)
    if logprobs.shape != (len(task.labels),) or not np.isfinite(logprobs).all():
        raise ValueError(f"expected {len(task.labels)} finite log-probabilities, got {logprobs}")
    best = int(logprobs.argmax())
    if label_slack is not None:
        sure = np.exp(logprobs[best]) - label_slack[best]
        if (np.delete(np.exp(logprobs), best) >= sure).any():
            error = (
                "the server returned too few tokens to tell which label is the most probable; use "
                "one that has logprob_token_ids (vLLM) or returns more log-probabilities"
            )
            return Prediction(example_id=example_id, method=method, error=error)
        extra["label_slack"] = tuple(float(v) for v in label_slack)
    return Prediction(
        example_id=example_id,
        method=method,
        label_logprobs=tuple(float(v) for v in logprobs),
        label_mass=float(min(1.0, np.exp(logprobs).sum())),
        predicted=task.label_names[best],
        probability=float(label_probabilities(logprobs)[0]),
        confidence=float(min(1.0, np.exp(logprobs[best]))),
        **extra,
    )


def prediction_to_json(prediction):
    """The fields that are set, ready for JSON."""
    return {k: v for k, v in vars(prediction).items() if v is not None and v is not False}


def prediction_from_json(row):
    """The inverse of `prediction_to_json`. Raises ValueError for a field that does not exist."""
    if unknown := set(row) - {f.name for f in fields(Prediction)}:
        raise ValueError(f"unknown prediction field {min(unknown)!r}")
    tuples = {k: tuple(row[k]) for k in TUPLE_FIELDS if k in row}
    if "pass_logprobs" in row:
        tuples["pass_logprobs"] = tuple(map(tuple, row["pass_logprobs"]))
    return Prediction(**{**row, **tuples})


def label_probabilities(label_logprobs):
    """(..., K) log-probabilities → (..., K) probabilities among the labels; each row sums to 1."""
    shifted = np.asarray(label_logprobs, dtype=np.float64)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


@dataclass(frozen=True)
class ModelResults:
    """One model's predictions for the held-out examples: what a cache file holds.

    identity: what produced them and what a calibrator is tied to: model, adapter, prompt, label
        words, tokenizer, dtype, and the fingerprint over these.
    examples: every held-out example requested, without its text.
    predictions: for every method one prediction an example.
    run: versions, seeds, device, settings, seconds, and what the signals were asked with.
    """

    name: str
    task: Task
    identity: dict
    examples: tuple[Example, ...]
    predictions: tuple[Prediction, ...]
    run: dict

    def counts(self, method=TOKEN_PROBABILITY):
        rows = [p for p in self.predictions if p.method == method]
        return {
            "requested": len(self.examples),
            "scored": sum(p.error is None for p in rows),
            "failed": len(self.examples) - sum(p.error is None for p in rows),
            "truncated": sum(p.truncated for p in rows),
            "low_label_mass": sum(
                p.label_mass is not None and p.label_mass < LOW_LABEL_MASS for p in rows
            ),
        }

    def arrays(self, split, method=TOKEN_PROBABILITY):
        """Arrays over the scored rows of one split, in the order of `examples`.

        id, category, domain, group: (n,) str; label, predicted: (n,) int index into the labels;
        confidence: (n,) float; correct: (n,) bool; split: the split asked for, which calibrators
        and reports check. As far as the method has them: label_logprobs (n, K) and pass_logprobs
        (n, M, K) float, nats; label_counts (n, K) int; probability, label_mass: (n,) float.
        """
        by_id = {p.example_id: p for p in self.predictions if p.method == method}
        rows = [
            (e, by_id[e.id])
            for e in self.examples
            if e.split == split and e.id in by_id and by_id[e.id].error is None
        ]
        if not rows:
            raise UserError(f"{self.name}: no scored {split} rows of {method} in this cache")
        names = {name: i for i, name in enumerate(self.task.label_names)}
        label = np.array([names[e.label] for e, _ in rows])
        predicted = np.array([names[p.predicted] for _, p in rows])
        columns = {
            key: np.array([getattr(p, key) for _, p in rows])
            for key in ARRAY_FIELDS
            if getattr(rows[0][1], key) is not None
        }
        return {
            "split": split,
            "id": np.array([e.id for e, _ in rows]),
            "category": np.array([e.category or "" for e, _ in rows]),
            "domain": np.array([e.domain or "" for e, _ in rows]),
            "group": np.array([e.group or e.id for e, _ in rows]),
            "label": label,
            "predicted": predicted,
            "correct": label == predicted,
            **columns,
        }

    def to_json(self):
        methods = list(dict.fromkeys(p.method for p in self.predictions))
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "task": self.task.to_json(),
            "identity": self.identity,
            "run": self.run,
            "counts": {method: self.counts(method) for method in methods},
            "examples": [
                {k: v for k, v in asdict(e).items() if k != "text" and v is not None}
                for e in self.examples
            ],
            "predictions": [prediction_to_json(p) for p in self.predictions],
        }

    @classmethod
    def from_json(cls, data):
        return cls(
            name=data["name"],
            task=Task.from_json(data["task"]),
            identity=data["identity"],
            examples=tuple(Example(text="", **row) for row in data["examples"]),
            predictions=tuple(prediction_from_json(row) for row in data["predictions"]),
            run=data["run"],
        )


@contextmanager
def atomic_path(path):
    """A temporary path beside `path` that takes its place when the block ends without an error."""
    path, partial = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        os.close(handle)
        partial = Path(name)
        yield partial
        partial.chmod(0o644)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space or rights?") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def write_json(path, data):
    """Write `data` whole or not at all; lists of rows take one line a row. NaN is refused."""
    lines = []
    for key, value in data.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n  ".join(json.dumps(r, ensure_ascii=False, allow_nan=False) for r in value)
            text = f"[\n  {rows}\n ]"
        else:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1)
            text = text.replace("\n", "\n ")
        lines.append(f" {json.dumps(key)}: {text}")
    with atomic_path(path) as partial:
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def read_json(path, next_step):
    """The JSON object in `path`; a missing or damaged file is a UserError naming the next step."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {next_step}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); {next_step}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {next_step}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} is damaged (not a JSON object); {next_step}")
    return data


def load_results(path):
    """The `ModelResults` of a cache file. Raises UserError if it is missing, damaged or too new."""
    next_step = "run: python generate_evaluation_cache.py --force"
    data = read_json(path, next_step)
    if data.get("schema_version") != SCHEMA_VERSION:
        found = data.get("schema_version")
        raise UserError(f"{path} has schema {found}, not {SCHEMA_VERSION}; {next_step}")
    try:
        return ModelResults.from_json(data)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}); {next_step}"
        ) from None


def load_held_out(folder):
    """The held-out `Example` rows (calibration and test) that an adapter was kept away from.

    folder: fine_tuned_sentiment_model/. Raises UserError if test_set.json is missing or damaged.
    """
    path = Path(folder) / "test_set.json"
    next_step = "run: python fine_tune_model.py --force-retrain"
    try:
        return [Example(**row) for row in read_json(path, next_step)["examples"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); {next_step}") from error


def package_versions():
    """Versions of the packages that the numbers depend on."""
    names = ("torch", "transformers", "tokenizers", "peft", "scikit-learn", "scipy", "numpy")
    return {name: version(name) for name in names}


def versions():
    """What a result keeps for the record: `package_versions` and that of Python."""
    return {"python": platform.python_version()} | package_versions()


def changed_packages(saved):
    """`numpy 2.4.5 → 2.4.6`: the packages that differ now from the `versions` of a result."""
    now = package_versions()
    return ", ".join(f"{n} {saved[n]} → {now[n]}" for n in now if saved.get(n, now[n]) != now[n])
