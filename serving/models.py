"""The models that are served: the base model, and adapters in folders beside it.

`Catalogue` finds them: it reads folders and calibrators, tokenises texts, and never touches the
weights, which are in the process of the model (`serving.model_process`). It belongs to one thread,
because a tokenizer is not thread-safe.

A folder is served if it is as fine_tune_model.py writes it (adapter_config.json,
adapter_model.safetensors, task.json, manifest.json). `calibrator.json` in it, written by
`calibration.save_calibrator`, is its calibrator; without that file the evaluation cache is asked.
"""

import logging
import re
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from calibration import (
    CALIBRATORS,
    Calibrator,
    NoCalibrator,
    cached_calibrator,
    load_calibrator,
)
from comparison import load_models
from decisions import automation, enough_groups, score_answers, zone_table
from logprobs_confidence import (
    PromptEncoder,
    text_problem,
    weights_fingerprint,
)
from records import MODEL_FILES, read_json
from serving.problems import Problem
from serving.settings import length_problem
from settings import Task, UserError, fingerprint

log = logging.getLogger("howsure")

BASE, FINETUNED = "base", "finetuned"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "task.json", "manifest.json")
CALIBRATOR_FILE = "calibrator.json"
ENOUGH_TOKENS = 512  # of a batch on a CPU: with more a text takes as long
LOOK_AGAIN_SEC = 1.0  # between two looks at the folders
RETRAIN = "run: python fine_tune_model.py --force-retrain"
# What reading a folder may raise that is damaged, or that is being written or removed meanwhile.
UNREADABLE = (UserError, OSError, ValueError, TypeError, LookupError, AttributeError)


@dataclass(frozen=True)
class Decisions:
    """What a model's evaluation says of acting on its answers.

    zones: `decisions.zone_table` of the test rows, calibrated by the calibrator of the fingerprint
    `zone_calibrator`. automation: `decisions.automation`, whose thresholds hold for the confidences
    of `calibrator`, another one; or None and `reason` says why.
    """

    zones: list
    zone_calibrator: str
    calibrator: Calibrator | None = None
    automation: dict | None = None
    reason: str | None = None


@dataclass(frozen=True)
class BaseModel:
    """What the process of the model says of the base model.

    identity: `LogprobsClassifier.identity`. max_tokens: of a prompt. parallel: batches scored at
    the same time, each of at most batch_tokens tokens.
    """

    task: Task
    identity: dict
    tokenizer: object
    max_tokens: int
    shares_prefix: bool
    device: str
    parallel: int
    batch_tokens: int


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model that answers. key: fingerprint of its adapter's files, None for the base model.

    encoders: one for each order of the options of a lettered task, one for a plain task.
    calibrator: for exactly this model, or None and `calibrator_reason` says why. decisions: of its
    evaluation, or None and `decisions_reason`.
    """

    name: str
    folder: Path | None
    key: str | None
    task: Task
    encoders: tuple[PromptEncoder, ...]
    identity: dict
    calibrator: Calibrator | None
    calibrator_reason: str | None
    decisions: Decisions | None
    decisions_reason: str | None

    @property
    def adapter(self):
        """The `Adapter`, None of the base model."""
        return None if self.key is None else Adapter(self.key, self.folder, self.task)

    @cached_property
    def calibrator_fingerprint(self):
        return None if self.calibrator is None else fingerprint(self.calibrator.to_json())


class Adapter(NamedTuple):
    """Files of an adapter. key: their fingerprint; task: that which they were trained on."""

    key: str
    folder: Path
    task: Task


class EncodedText(NamedTuple):
    """A text as a model is asked about it.

    prompts: for each order of the options (token ids, whether the text lost its middle). tokens: to
    compute, those of the prompts without what is shared.
    """

    text: str
    prompts: tuple[tuple[list[int], bool], ...]
    tokens: int


def encoded_text(encoders, text, shares_prefix):
    """`EncodedText` of a text. Raises UserError."""
    prompts = tuple(encoder.encode([text.strip()])[0] for encoder in encoders)
    shared = (encoder.prefix_length if shares_prefix else 0 for encoder in encoders)
    tokens = sum(max(1, len(ids) - n) for (ids, _), n in zip(prompts, shared, strict=True))
    return EncodedText(text, prompts, tokens)


@dataclass(frozen=True)
class BrokenModel:
    """A folder that cannot be served, and why."""

    name: str
    reason: str


@dataclass
class _Folder:
    signature: tuple = ()
    model: ServedModel | BrokenModel | None = None


def adapter_identity(base, adapter_fingerprint, encoders):
    """`TransformerLogprobsClassifier.identity` of an adapter, from that of its base model."""
    first = encoders[0]
    parts = {key: value for key, value in base.items() if key != "fingerprint"} | {
        "adapter_fingerprint": adapter_fingerprint,
        "prompt": first.prompt("{text}"),
        "label_words": {label.name: list(label.words) for label in first.task.labels},
        "orders": len(encoders),
    }
    return parts | {"fingerprint": fingerprint(parts)}


def file_signature(paths):
    """What changes when one of the files is written, made or removed."""
    found = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            found.append(None)
        else:
            found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return tuple(found)


class Catalogue:
    """Names → `ServedModel`. For one thread. base: `BaseModel`."""

    def __init__(self, base, settings):
        self.base, self.settings = base, settings
        self._folders = {}
        self._looked = -float("inf")
        self._evaluated = None

    # ---------------------------------------------------------------------------------- folders

    def refresh(self, force=False):
        """Look at the folders again, if that was not done just now."""
        now = time.monotonic()
        if not force and now - self._looked < LOOK_AGAIN_SEC:
            return
        self._looked = now
        folders = {BASE: None}
        if self.settings.fine_tuned.is_dir():
            folders[FINETUNED] = self.settings.fine_tuned
        try:
            listed = sorted(self.settings.adapters.iterdir())
        except OSError:
            listed = []
        for path in listed:
            if path.is_dir() and not path.name.startswith(".") and path.name not in folders:
                folders[path.name] = path
        self._evaluated = Evaluated.read(self.settings.cache_dir, self._evaluated)
        self._folders = {
            name: self._read(name, folder, self._folders.get(name, _Folder()))
            for name, folder in folders.items()
        }

    def _read(self, name, folder, known):
        own = [] if folder is None else [folder / f for f in (*ADAPTER_FILES, CALIBRATOR_FILE)]
        signature = (self._evaluated.signature, *file_signature(own))
        if known.model is not None and known.signature == signature:
            return known
        try:
            model = self._open(name, folder)
        except UNREADABLE as error:
            log.warning("%s cannot be served: %s", name, error)
            model = BrokenModel(name, str(error) or type(error).__name__)
        return _Folder(signature, model)

    def _open(self, name, folder):
        if folder is None:
            task, key, identity = self.base.task, None, self.base.identity
            encoders = self._encoders(task)
        else:
            if not NAME.fullmatch(name):
                raise UserError(
                    "the name of an adapter's folder may have letters, digits, dots, hyphens and "
                    f"underscores, at most 64; rename {name!r}"
                )
            if self.base.identity["model_fingerprint"] is None:
                raise UserError(
                    "the base model is on another server; give the adapter to that server, and its "
                    "name there as --model to a classify_api.py of its own"
                )
            task = read_adapter_task(folder, self.base.identity["model_fingerprint"])
            encoders = self._encoders(task)
            key = weights_fingerprint(folder)
            identity = adapter_identity(self.base.identity, key, encoders)
        return ServedModel(
            name,
            folder,
            key,
            task,
            encoders,
            identity,
            **find_calibrator(folder, self.settings.cache_dir, identity),
            **self._evaluated.decisions_of(identity),
        )

    def _encoders(self, task):
        orders = task.orders
        return tuple(
            PromptEncoder(self.base.tokenizer, order, self.base.max_tokens) for order in orders
        )

    # ----------------------------------------------------------------------------------- lookup

    def all(self):
        """Every `ServedModel` and `BrokenModel`, the base model first."""
        self.refresh()
        return [folder.model for folder in self._folders.values()]

    def find(self, name):
        """The `ServedModel` of this name. Raises Problem for one unknown or broken."""
        self.refresh()
        if name not in self._folders:
            self.refresh(force=NAME.fullmatch(name) is not None)
        if name not in self._folders:
            known = ", ".join(list(self._folders)[:20])
            raise Problem("unknown-model", f"GET /models lists them; among them: {known}")
        model = self._folders[name].model
        if isinstance(model, BrokenModel):
            raise Problem("model-unavailable", f"{name}: {model.reason}", retry_after_sec=60)
        return model

    def encode(self, model, texts):
        """[`EncodedText`, or why the text cannot be scored] for this model."""
        results = []
        for text in texts:
            problem = text_problem(text) or length_problem(text, self.settings.max_text_chars)
            if problem is None:
                try:
                    results.append(encoded_text(model.encoders, text, self.base.shares_prefix))
                    continue
                except UserError as error:  # a control token that this tokenizer cannot tell apart
                    problem = str(error)
            results.append(problem)
        return results


def read_adapter_task(folder, base_fingerprint):
    """The `Task` of an adapter in `folder`, if it is whole and was trained on these base weights.

    Raises UserError otherwise.
    """
    for file in ADAPTER_FILES:
        if not (folder / file).is_file():
            raise UserError(f"{folder.name}/ has no {file}; copy the whole folder again")
    trained_on = read_json(folder / "manifest.json", RETRAIN).get("base_fingerprint")
    if trained_on != base_fingerprint:
        raise UserError(
            f"{folder.name}/ was trained on the base weights {trained_on}, the server has "
            f"{base_fingerprint}; start it with the --model it was trained on"
        )
    config = read_json(folder / "adapter_config.json", RETRAIN)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder.name}/ is of type {config.get('peft_type')!r}; LORA is served")
    try:
        return Task.from_json(read_json(folder / "task.json", RETRAIN))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder.name}/task.json is damaged ({error!r}); {RETRAIN}") from error


def find_calibrator(folder, cache_dir, identity):
    """{"calibrator", "calibrator_reason"} for exactly this identity; see the module's docstring."""
    try:
        if folder is not None and (folder / CALIBRATOR_FILE).exists():
            calibrator = load_calibrator(folder / CALIBRATOR_FILE, identity)
        else:
            calibrator, _ = cached_calibrator(cache_dir, identity)
    except UserError as error:
        if not isinstance(error, NoCalibrator):
            log.warning("no calibrator: %s", error)
        reason = str(error)
        for path in filter(None, (folder, Path(cache_dir))):  # where they lie is not for clients
            reason = reason.replace(str(path), path.name)
        return {"calibrator": None, "calibrator_reason": reason}
    return {"calibrator": calibrator, "calibrator_reason": None}


@dataclass(frozen=True)
class Evaluated:
    """The evaluation cache: `Decisions` by the fingerprint of the model they were measured for."""

    signature: tuple
    decisions: dict
    reason: str | None = None

    @classmethod
    def read(cls, cache_dir, known=None):
        """What the folder holds now; `known` again where no file has changed."""
        files = ("calibrated_results.json", *MODEL_FILES.values())
        signature = file_signature([Path(cache_dir) / file for file in files])
        if known is not None and known.signature == signature:
            return known
        try:
            models = load_models(cache_dir).values()
            measured = {m.results.identity["fingerprint"]: measured_decisions(m) for m in models}
        except UNREADABLE as error:
            log.warning("no evaluation: %s", error)
            return cls(signature, {}, str(error) or type(error).__name__)
        return cls(signature, measured)

    def decisions_of(self, identity):
        """{"decisions", "decisions_reason"} for exactly this identity."""
        found = self.decisions.get(identity["fingerprint"])
        reason = self.reason or "the evaluation cache holds no evaluation of exactly this model"
        return {"decisions": found, "decisions_reason": None if found is not None else reason}


def measured_decisions(model):
    """The `Decisions` of a `ModelEvaluation`."""
    zones = zone_table(*model.confidence(model.selected), model.group)
    selected = model.entry["calibrators"][model.selected]
    selected = fingerprint(CALIBRATORS[model.selected].from_json(selected).to_json())
    calibration, test = (model.results.arrays(split) for split in ("calibration", "test"))
    if not enough_groups(calibration):
        reason = "too few groups of calibration rows to certify a threshold"
        return Decisions(zones, selected, reason=reason)
    scored = score_answers(calibration, test)
    return Decisions(zones, selected, scored.fitted, automation(scored))
