"""The weights that are served: one copy of the base model, and adapters that come and go."""

import copy
import math
import shutil
import traceback
from collections import OrderedDict
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory

import safetensors
import torch

from engine import SharedPrefix, shared_prefix
from logprobs_confidence import (
    FINGERPRINTED_FILES,
    mean_prediction,
    open_classifier,
    weights_fingerprint,
)
from serving.models import ENOUGH_TOKENS, RETRAIN, BaseModel, encoded_text
from settings import UserError


def adapter_holder(model):
    """A `PeftModel` around the model, whose layers can take adapters from then on.

    PEFT cannot be without an active adapter, and loses track of it when that is deleted. So the
    active one is of rank 1 on one layer, is asked by no row and stays.
    """
    from peft import LoraConfig, get_peft_model

    linear = next(n for n, layer in model.named_modules() if isinstance(layer, torch.nn.Linear))
    config = LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=[linear])
    return get_peft_model(model, config, adapter_name="unused")


@contextmanager
def copied(adapter):
    """A folder with the files of an `Adapter`, which nobody writes to meanwhile.

    Weights are mapped into memory, and to shorten a file that is mapped ends the process. Raises
    UserError if the files are no longer those that the adapter was found with.
    """
    with ExitStack() as until_loaded:
        try:
            folder = until_loaded.enter_context(TemporaryDirectory(prefix="howsure_"))
            for path in (
                path for kind in FINGERPRINTED_FILES for path in adapter.folder.glob(kind)
            ):
                shutil.copy(path, folder)
        except OSError as error:
            raise UserError(
                f"its files cannot be read now ({error.strerror}); ask again"
            ) from error
        if weights_fingerprint(folder) != adapter.key:
            raise UserError("its files changed while they were read; ask again")
        yield folder


class Row(list):
    """Token ids of a prompt; `adapter` is the key of the adapter that answers it, or None."""

    def __init__(self, ids, adapter):
        super().__init__(ids)
        self.adapter = adapter


class SharedModel:
    """One copy of the base weights, and the adapters in memory.

    Adapters come and go (`prepare`) while nothing is scored; several threads may score (`classify`,
    `explain`). Rows of different adapters go through the model together (`MixedRows`). What the
    prompts share is computed for each adapter. A key is that of an `Adapter`, or None for the base
    model alone.

    Arguments: `settings.ModelSettings`, the base model's `Task`, and how many adapters memory may
    hold. Warms up and checks itself. Raises UserError for a model that cannot be loaded or fails.
    """

    def __init__(self, settings, task, max_adapters):
        self.classifier, self.max_adapters = open_classifier(settings, task=task), max_adapters

        from serving.mixed_lora import MixedRows  # after the libraries were told to be quiet

        self.engine = self.classifier.engine
        parallel, self.engine.workers = self.engine.workers, 1  # for each thread that scores
        budget = self.engine.budget
        self.failed = {}  # key of an adapter that cannot be loaded: why
        self._holder = None  # PEFT's view of the model, by which adapters come and go
        self._loaded = OrderedDict()  # key of an adapter: its task; the least recently used first
        self._classifiers = {task: self.classifier}
        self._prefixes = {}  # (key of an adapter or None, shared token ids): `SharedPrefix`
        self._rows = MixedRows()
        self.check_itself()
        self.base = BaseModel(
            task,
            self.classifier.identity,
            self.classifier.tokenizer,
            self.classifier.encoder.max_tokens,
            self.engine.shares_prefix,
            self.classifier.device,
            parallel,
            max(math.ceil(budget / parallel), min(budget, ENOUGH_TOKENS)),
        )

    # --------------------------------------------------------------------------------- adapters

    def prepare(self, adapters):
        """Have at most `max_adapters` `Adapter`s in memory.

        Returns (keys of all that are in memory then, {key: why} of all that can never be, {key:
        exception} of those asked that could not be).
        """
        for key in {adapter.key for adapter in adapters} & set(self._loaded):
            self._loaded.move_to_end(key)
        errors = {}
        for adapter in adapters:
            try:
                self._require(adapter)
                self._classifier(adapter.task)
            except UserError as error:
                errors[adapter.key] = UserError(str(error))
            except Exception:  # whatever it is, the others go on
                errors[adapter.key] = RuntimeError(traceback.format_exc())
        return tuple(self._loaded), self.failed, errors

    def _require(self, adapter):
        if adapter.key in self._loaded:
            return
        if adapter.key in self.failed:
            raise UserError(self.failed[adapter.key])
        while len(self._loaded) >= self.max_adapters:
            self._drop(next(iter(self._loaded)))
        self._load(adapter)
        self._loaded[adapter.key] = adapter.task

    def _drop(self, key):
        self._loaded.pop(key, None)
        self._prefixes = {k: prefix for k, prefix in self._prefixes.items() if k[0] != key}
        if key in self._holder.peft_config:
            self._holder.delete_adapter(key)

    def _load(self, adapter):
        if self._holder is None:
            self._holder = adapter_holder(self.engine.model)
        try:
            with copied(adapter) as folder:
                self._holder.load_adapter(folder, adapter.key)
            self.engine.model.eval()
            self._rows.tell(self.engine.model)
            (probe,) = self._score(
                adapter.task, [(adapter.key, self._encoded(adapter.task, "Good."))]
            )
            if probe.error is not None:
                raise UserError(probe.error)
        except UserError:
            self._drop(adapter.key)
            raise
        except (
            safetensors.SafetensorError,
            ValueError,
            KeyError,
            RuntimeError,
            OSError,
            TypeError,
        ) as error:
            self._drop(adapter.key)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            problem = f"its weights do not fit the base model or are damaged ({reason}); {RETRAIN}"
            self.failed[adapter.key] = problem  # other files have another key
            raise UserError(problem) from error

    def _prefix(self, adapters, ids):
        """`SharedPrefix` of token ids for a batch whose rows ask these adapters, or None."""
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
        """A `Prediction` for each (key, `EncodedText`). Raises UserError."""
        results, by_task = [None] * len(rows), {}
        for position, (key, _) in enumerate(rows):
            by_task.setdefault(self._task(key), []).append(position)
        for task, positions in by_task.items():
            answers = self._score(task, [rows[i] for i in positions])
            for position, answer in zip(positions, answers, strict=True):
                results[position] = answer
        return results

    def explain(self, key, text, k):
        """The `Explanation` of one `EncodedText`. Raises UserError."""
        classifier, asked = self._classifier(self._task(key)), [(key, text)]
        if self.base.identity["model_fingerprint"] is None:  # it is on a server
            return classifier.explain(text.text, k)
        orders = tuple(self._pass(order, i, asked)[0] for i, order in enumerate(classifier.orders))
        if failed := [p.error for p in orders if p.error is not None]:
            raise UserError(failed[0])
        prefix = self._prefix([key], classifier.encoder.prefix)
        with self._rows.asking([key]):
            logits = self.engine.logits([text.prompts[0][0]], prefix=prefix)
        return classifier.explanation(text.text, orders, logits[0].log_softmax(-1), k)

    def _task(self, key):
        """The task of the model; it counts as used."""
        if key is None:
            return self.classifier.task
        self._loaded.move_to_end(key)
        return self._loaded[key]

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
