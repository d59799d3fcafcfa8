"""The models that are served: the base model, and adapters in folders beside it.

`Catalogue` finds them: it reads folders and calibrators, tokenises texts, and never touches the
weights. `SharedModel` holds one copy of the base weights, loads and drops adapters, and scores.
Each belongs to one thread and has a tokenizer of its own, because a tokenizer is not thread-safe.

A folder is served if it is as fine_tune_model.py writes it (adapter_config.json,
adapter_model.safetensors, task.json, manifest.json). `calibrator.json` in it, written by
`calibration.save_calibrator`, is its calibrator; without that file the evaluation cache is asked.
"""

import copy
import logging
import re
import shutil
import threading
import time
from collections import OrderedDict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

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
BASE_ROWS = "__base__"  # PEFT's name of no adapter in a mixed batch
LEAST_TOKENS = 512  # of a batch: with fewer a text takes longer on a CPU
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
        """[number of tokens to compute, or why the text cannot be scored] for this model."""
        results = []
        for text in texts:
            problem = text_problem(text) or length_problem(text, self.settings.max_text_chars)
            if problem is None:
                try:
                    results.append(sum(self._tokens(e, text) for e in model.encoders))
                    continue
                except UserError as error:  # a control token that this tokenizer cannot tell apart
                    problem = str(error)
            results.append(problem)
        return results

    def _tokens(self, encoder, text):
        ((ids, _),) = encoder.encode([text.strip()])
        return max(1, len(ids) - (encoder.prefix_length if self.shares_prefix else 0))


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
    """One copy of the base weights, and the adapters in memory. For one thread.

    Rows of different adapters go through the model together: each of PEFT's layers is told which
    adapter each row of its batch asks. That is said for every thread of the engine by itself, so
    several batches can be under way at once. What the prompts share is computed for each adapter.

    classifier: `TransformerLogprobsClassifier` of the base model.
    """

    def __init__(self, classifier, max_adapters):
        self.classifier, self.engine, self.max_adapters = (
            classifier,
            classifier.engine,
            max_adapters,
        )
        self.failed = {}  # key of an adapter that cannot be loaded: why
        self._holder = None  # PEFT's view of the model, by which adapters come and go
        self._loaded = OrderedDict()  # key of an adapter: its task; the least recently used first
        self._classifiers = {classifier.task: classifier}
        self._prefixes = {}  # (key of an adapter or None, shared token ids): `SharedPrefix`
        self._rows = threading.local()  # .adapters: PEFT's names of those asked by the batch's rows
        self._layers = set()  # layers that are told

    @property
    def loaded(self):
        """Keys of the adapters in memory."""
        return tuple(self._loaded)

    @property
    def go_tokens(self):
        """Tokens that are scored at once: what a batch may have, and enough for every worker of the
        engine. More would be no faster, only waited for longer."""
        budget = self.engine.budget
        return max(budget, min(budget, LEAST_TOKENS) * self.engine.workers)

    # --------------------------------------------------------------------------------- adapters

    def _require(self, model):
        """Have the adapter of this model in memory. Raises UserError if that cannot be."""
        if model.key is None:
            return
        if model.key in self.failed:
            raise UserError(self.failed[model.key])
        if model.key not in self._loaded:
            while len(self._loaded) >= self.max_adapters:
                self._drop(next(iter(self._loaded)))
            self._load(model)
            self._loaded[model.key] = model.task
        self._loaded.move_to_end(model.key)

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
            self._tell_layers()
            (probe,) = self._score(model.task, [(model.key, "Good.")])
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

    def _tell_layers(self):
        from peft.tuners.lora.layer import LoraLayer

        def tell(layer, arguments, named):
            return arguments, named | {"adapter_names": self._rows.adapters}

        for layer in self.engine.model.modules():
            if isinstance(layer, LoraLayer) and layer not in self._layers:
                layer.register_forward_pre_hook(tell, with_kwargs=True)
                self._layers.add(layer)

    @contextmanager
    def _asking(self, adapters):
        """Inside the block the rows of this thread's batch ask these adapters, None: the base."""
        self._rows.adapters = [BASE_ROWS if key is None else key for key in adapters]
        try:
            yield
        finally:
            del self._rows.adapters

    def _prefix(self, adapters, ids):
        """`SharedPrefix` of token ids for a batch whose rows ask these adapters, or None."""
        import torch

        from engine import SharedPrefix, shared_prefix

        if not self.engine.shares_prefix or not ids:
            return None
        names = list(dict.fromkeys(adapters))
        for key in names:
            if (key, tuple(ids)) not in self._prefixes:
                with torch.inference_mode(), self._asking([key]):
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

    def _score(self, task, asked):
        """A `Prediction` for each (key of an adapter or None, text) of one task."""
        passes = [self._pass(order, asked) for order in self._classifier(task).orders]
        return [mean_prediction(task, rows) for rows in zip(*passes, strict=True)]

    def _pass(self, classifier, asked):
        """`_score` in the one order of the options that the classifier asks in."""
        encoded = classifier.encoder.encode([text.strip() for _, text in asked])
        rows = [Row(ids, key) for (ids, _), (key, _) in zip(encoded, asked, strict=True)]
        shared = classifier.encoder.prefix
        for key in {row.adapter for row in rows}:
            self._prefix([key], shared)  # computed here, not by several workers at once

        def score(sequences, prefix):
            adapters = [row.adapter for row in sequences]
            if prefix is not None:
                prefix = self._prefix(adapters, shared)
            with self._asking(adapters):
                return classifier.label_logprobs(sequences, prefix=prefix)

        results = [None] * len(rows)
        prefix = self._prefix([rows[0].adapter], shared)  # says which rows begin so
        for batch, scored, seconds in self.engine.run(rows, prefix, score):
            for row, logprobs in zip(batch, scored, strict=True):
                results[row] = classifier.prediction(
                    str(row), logprobs, encoded[row][1], seconds / len(batch)
                )
        return results

    def classify(self, rows):
        """A `Prediction`, or the UserError why there is none, for each (ServedModel, text)."""
        results = [None] * len(rows)
        portion, keys = [], set()
        for position in sorted(range(len(rows)), key=lambda i: rows[i][0].key or ""):
            model = rows[position][0]
            if model.key is not None and model.key not in keys:
                if len(keys) == self.max_adapters:  # more than fit into memory at once
                    self._classify(rows, portion, results)
                    portion, keys = [], set()
                try:
                    self._require(model)
                except UserError as error:
                    results[position] = error
                    continue
                keys.add(model.key)
            portion.append(position)
        self._classify(rows, portion, results)
        return results

    def _classify(self, rows, portion, results):
        by_task = {}
        for position in portion:
            by_task.setdefault(rows[position][0].task, []).append(position)
        for task, positions in by_task.items():
            asked = [(rows[i][0].key, rows[i][1]) for i in positions]
            try:
                answers = self._score(task, asked)
            except UserError as error:
                answers = [error] * len(positions)
            for position, answer in zip(positions, answers, strict=True):
                results[position] = answer

    def explain(self, model, text, k):
        """The `Explanation` of one text. Raises UserError."""
        self._require(model)
        classifier = self._classifier(model.task)
        orders = tuple(self._pass(order, [(model.key, text)])[0] for order in classifier.orders)
        if failed := [p.error for p in orders if p.error is not None]:
            raise UserError(failed[0])
        ((ids, _),) = classifier.encoder.encode([text.strip()])
        prefix = self._prefix([model.key], classifier.encoder.prefix)
        with self._asking([model.key]):
            logits = self.engine.logits([ids], prefix=prefix)
        return classifier.explanation(text, orders, logits[0].log_softmax(-1), k)

    def check_itself(self):
        """Warm up, and compare answers that are known to agree. Raises UserError if they do not.

        Two texts of different length, alone and together: what padding and batching must not move.
        """
        texts = ["Good.", "It was neither good nor bad, and I would not go there again. " * 4]
        task = self.classifier.task
        together = self._score(task, [(None, text) for text in texts])
        alone = [self._score(task, [(None, text)])[0] for text in texts]
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
