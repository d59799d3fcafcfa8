"""The models that are served: the base model, and adapters in folders beside it.

`Catalogue` finds them: it reads folders and calibrators, tokenises texts, and never touches the
weights. `SharedModel` holds one copy of the base weights, loads and drops adapters, and scores.
The catalogue belongs to one thread and has a tokenizer of its own, because a tokenizer is not
thread-safe.

A folder is served if it is as fine_tune_model.py writes it (adapter_config.json,
adapter_model.safetensors, task.json, manifest.json). `calibrator.json` in it, written by
`calibration.save_calibrator`, is its calibrator; without that file the evaluation cache is asked.
"""

import copy
import logging
import math
import re
import shutil
import time
from collections import OrderedDict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
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
    FINGERPRINTED_FILES,
    PromptEncoder,
    mean_prediction,
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

    @cached_property
    def calibrator_fingerprint(self):
        return None if self.calibrator is None else fingerprint(self.calibrator.to_json())


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
    """Names → `ServedModel`. For one thread."""

    def __init__(self, classifier, settings):
        self.settings = settings
        self.tokenizer = copy.deepcopy(classifier.tokenizer)
        self.max_tokens = classifier.encoder.max_tokens
        self.base_identity = classifier.identity
        self.base_task = classifier.task
        self.shares_prefix = classifier.engine.shares_prefix
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
            task, key, identity = self.base_task, None, self.base_identity
            encoders = self._encoders(task)
        else:
            if not NAME.fullmatch(name):
                raise UserError(
                    "the name of an adapter's folder may have letters, digits, dots, hyphens and "
                    f"underscores, at most 64; rename {name!r}"
                )
            if self.base_identity["model_fingerprint"] is None:
                raise UserError(
                    "the base model is on another server; give the adapter to that server, and its "
                    "name there as --model to a classify_api.py of its own"
                )
            task = read_adapter_task(folder, self.base_identity["model_fingerprint"])
            encoders = self._encoders(task)
            key = weights_fingerprint(folder)
            identity = adapter_identity(self.base_identity, key, encoders)
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
        return tuple(PromptEncoder(self.tokenizer, order, self.max_tokens) for order in orders)

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
                    results.append(encoded_text(model.encoders, text, self.shares_prefix))
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


# ----------------------------------------------------------------------------------- the weights


def adapter_holder(model):
    """A `PeftModel` around the model, whose layers can take adapters from then on.

    PEFT cannot be without an active adapter, and loses track of it when that is deleted. So the
    active one is of rank 1 on one layer, is asked by no row and stays.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    linear = next(n for n, layer in model.named_modules() if isinstance(layer, torch.nn.Linear))
    config = LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=[linear])
    return get_peft_model(model, config, adapter_name="unused")


@contextmanager
def copied_adapter(model):
    """A folder with the files of a `ServedModel`'s adapter, which nobody writes to meanwhile.

    Weights are mapped into memory, and to shorten a file that is mapped ends the process. Raises
    UserError if the files are no longer those that the model was found with.
    """
    with ExitStack() as until_loaded:
        try:
            folder = until_loaded.enter_context(TemporaryDirectory(prefix="howsure_"))
            for path in (path for kind in FINGERPRINTED_FILES for path in model.folder.glob(kind)):
                shutil.copy(path, folder)
        except OSError as error:
            raise UserError(
                f"its files cannot be read now ({error.strerror}); ask again"
            ) from error
        if weights_fingerprint(folder) != model.key:
            raise UserError("its files changed while they were read; ask again")
        yield folder


class Row(list):
    """Token ids of a prompt; `adapter` is the key of the adapter that answers it, or None."""

    def __init__(self, ids, adapter):
        super().__init__(ids)
        self.adapter = adapter


class SharedModel:
    """One copy of the base weights, and the adapters in memory.

    One thread has adapters come and go (`prepare`), while nothing is scored; several may score
    (`classify`, `explain`). Rows of different adapters go through the model together (`MixedRows`).
    What the prompts share is computed for each adapter.

    classifier: `TransformerLogprobsClassifier` of the base model. Its engine scores one batch at a
    time from now on, for each of `parallel` threads. batch_tokens: most tokens of a batch.
    """

    def __init__(self, classifier, max_adapters):
        from serving.mixed_lora import MixedRows

        self.classifier, self.engine, self.max_adapters = (
            classifier,
            classifier.engine,
            max_adapters,
        )
        self.parallel, self.engine.workers = self.engine.workers, 1
        budget = self.engine.budget
        self.batch_tokens = max(math.ceil(budget / self.parallel), min(budget, ENOUGH_TOKENS))
        self.failed = {}  # key of an adapter that cannot be loaded: why
        self._holder = None  # PEFT's view of the model, by which adapters come and go
        self._loaded = OrderedDict()  # key of an adapter: its task; the least recently used first
        self._classifiers = {classifier.task: classifier}
        self._prefixes = {}  # (key of an adapter or None, shared token ids): `SharedPrefix`
        self._rows = MixedRows()

    @property
    def loaded(self):
        """Keys of the adapters in memory."""
        return tuple(self._loaded)

    # --------------------------------------------------------------------------------- adapters

    def prepare(self, models, wait_until_idle):
        """Have the adapters of at most `max_adapters` models in memory; {model: exception} of those
        that cannot be.

        wait_until_idle(): called before an adapter comes or goes; returns when nothing is scored.
        """
        asked = [model for model in models if model.key is not None]
        for key in {model.key for model in asked} & set(self._loaded):
            self._loaded.move_to_end(key)
        if any(model.key not in self._loaded for model in asked):
            wait_until_idle()
        failed = {}
        for model in models:
            try:
                self._require(model)
                self._classifier(model.task)
            except Exception as error:  # whatever it is, the others go on
                failed[model] = error
        return failed

    def _require(self, model):
        if model.key is None or model.key in self._loaded:
            return
        if model.key in self.failed:
            raise UserError(self.failed[model.key])
        while len(self._loaded) >= self.max_adapters:
            self._drop(next(iter(self._loaded)))
        self._load(model)
        self._loaded[model.key] = model.task

    def _drop(self, key):
        self._loaded.pop(key, None)
        self._prefixes = {k: prefix for k, prefix in self._prefixes.items() if k[0] != key}
        if key in self._holder.peft_config:
            self._holder.delete_adapter(key)

    def _load(self, model):
        import safetensors

        if self._holder is None:
            self._holder = adapter_holder(self.engine.model)
        try:
            with copied_adapter(model) as folder:
                self._holder.load_adapter(folder, model.key)
            self.engine.model.eval()
            self._rows.tell(self.engine.model)
            (probe,) = self._score(model.task, [(model.key, self._encoded(model.task, "Good."))])
            if probe.error is not None:
                raise UserError(probe.error)
        except UserError:
            self._drop(model.key)
            raise
        except (
            safetensors.SafetensorError,
            ValueError,
            KeyError,
            RuntimeError,
            OSError,
            TypeError,
        ) as error:
            self._drop(model.key)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            problem = f"its weights do not fit the base model or are damaged ({reason}); {RETRAIN}"
            self.failed[model.key] = problem  # other files have another key
            raise UserError(problem) from error

    def _prefix(self, adapters, ids):
        """`SharedPrefix` of token ids for a batch whose rows ask these adapters, or None."""
        import torch

        from engine import SharedPrefix, shared_prefix

        if not self.engine.shares_prefix or not ids:
            return None
        names = list(dict.fromkeys(adapters))
        for key in names:
            if (key, tuple(ids)) not in self._prefixes:
                with torch.inference_mode(), self._rows.asking([key]):
                    self._prefixes[key, tuple(ids)] = shared_prefix(self.engine.model, ids)
        prefixes = [self._prefixes[key, tuple(ids)] for key in names]
        if len(prefixes) == 1:
            return prefixes[0]
        row = torch.tensor([names.index(key) for key in adapters])
        layers = []
        for same in zip(*(prefix.layers for prefix in prefixes), strict=True):
            layer = copy.copy(same[0])  # keys and values of every row's own adapter, (B, ...)
            layer.keys = torch.cat([one.keys for one in same])[row]
            layer.values = torch.cat([one.values for one in same])[row]
            layers.append(layer)
        return SharedPrefix(ids, layers)

    # ---------------------------------------------------------------------------------- scoring

    def _classifier(self, task):
        if task not in self._classifiers:
            used = {self.classifier.task, task, *self._loaded.values()}
            kept = {t: c for t, c in self._classifiers.items() if t in used}
            self._classifiers = kept | {task: self.classifier.for_task(task)}
        return self._classifiers[task]

    def _encoded(self, task, text):
        encoders = [order.encoder for order in self._classifier(task).orders]
        return encoded_text(encoders, text, self.engine.shares_prefix)

    def _score(self, task, asked):
        """A `Prediction` for each (key of an adapter or None, `EncodedText`) of one task."""
        orders = self._classifier(task).orders
        passes = [self._pass(order, i, asked) for i, order in enumerate(orders)]
        return [mean_prediction(task, rows) for rows in zip(*passes, strict=True)]

    def _pass(self, classifier, order, asked):
        """`_score` in one order of the options, that in which the classifier asks."""
        rows = [Row(text.prompts[order][0], key) for key, text in asked]

        def score(sequences, prefix):
            adapters = [row.adapter for row in sequences]
            if prefix is not None:
                prefix = self._prefix(adapters, prefix.ids)
            with self._rows.asking(adapters):
                return classifier.label_logprobs(sequences, prefix=prefix)

        results = [None] * len(rows)
        # says which rows begin so
        prefix = self._prefix([rows[0].adapter], classifier.encoder.prefix)
        for batch, scored, seconds in self.engine.run(rows, prefix, score):
            for row, logprobs in zip(batch, scored, strict=True):
                truncated = asked[row][1].prompts[order][1]
                results[row] = classifier.prediction(
                    str(row), logprobs, truncated, seconds / len(batch)
                )
        return results

    def classify(self, rows):
        """A `Prediction` for each (ServedModel, `EncodedText`). Raises UserError."""
        results, by_task = [None] * len(rows), {}
        for position, (model, _) in enumerate(rows):
            by_task.setdefault(model.task, []).append(position)
        for task, positions in by_task.items():
            answers = self._score(task, [(rows[i][0].key, rows[i][1]) for i in positions])
            for position, answer in zip(positions, answers, strict=True):
                results[position] = answer
        return results

    def explain(self, model, text, k):
        """The `Explanation` of one `EncodedText`. Raises UserError."""
        classifier, asked = self._classifier(model.task), [(model.key, text)]
        orders = tuple(self._pass(order, i, asked)[0] for i, order in enumerate(classifier.orders))
        if failed := [p.error for p in orders if p.error is not None]:
            raise UserError(failed[0])
        prefix = self._prefix([model.key], classifier.encoder.prefix)
        with self._rows.asking([model.key]):
            logits = self.engine.logits([text.prompts[0][0]], prefix=prefix)
        return classifier.explanation(text.text, orders, logits[0].log_softmax(-1), k)

    def check_itself(self):
        """Warm up, and compare answers that are known to agree. Raises UserError if they do not.

        Two texts of different length, alone and together: what padding and batching must not move.
        """
        texts = ["Good.", "It was neither good nor bad, and I would not go there again. " * 4]
        task = self.classifier.task
        asked = [(None, self._encoded(task, text)) for text in texts]
        together = self._score(task, asked)
        alone = [self._score(task, [row])[0] for row in asked]
        for one, other in zip(together, alone, strict=True):
            if one.error is not None:
                raise UserError(f"the self-check failed: {one.error}")
            difference = abs(one.probability - other.probability)
            if not difference <= self.classifier.tolerance:
                raise UserError(
                    f"the self-check failed: batched and alone, P differs by {difference:.2g}, "
                    f"more than {self.classifier.tolerance:g}; try --dtype float32 or another "
                    "--device"
                )
