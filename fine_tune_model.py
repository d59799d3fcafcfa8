"""Fine-tune a LoRA adapter for the task on the training rows.

    python fine_tune_model.py                                  # embedded model, dataset/
    python fine_tune_model.py --model llama-3.1-8b --quantization 4bit
    python fine_tune_model.py --data my.csv --question "Is this spam? Answer yes or no." \\
        --labels spam=yes,ham=no --output-dir my_run
    python fine_tune_model.py --objective focal                # see docs/OBJECTIVES.md
    accelerate launch --multi_gpu --num_processes 4 fine_tune_model.py --model llama-3.1-8b

The loss covers the answer only: the token that the evaluation sums, after the same prompt.
`--objective` says what is asked of that answer, and whether the model learns to say beside it how
sure it may be. Whichever it is, the checkpoint is chosen on the validation rows by the log-loss
that is left after calibration ("refine, then calibrate", Berta et al. 2025, arXiv 2501.19195); the
test rows choose nothing. An interrupted run continues from its last validation pass. The result,
fine_tuned_sentiment_model/, appears as a whole or not at all; its manifest says what it was made
from, and a run that would make the same again says so and stops.
"""

import argparse
import io
import math
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from records import changed_packages, read_json, versions, write_json
from settings import (
    OBJECTIVES,
    ROOT,
    DataSettings,
    ModelSettings,
    OutputSettings,
    TaskSettings,
    TrainingSettings,
    UserError,
    add_arguments,
    fingerprint,
    from_arguments,
    resolve_model,
)

ACTIVATION_SHARE = 0.5  # of the free memory: more, and the backward pass computes them again
MANIFEST_VERSION = 3  # of how an adapter is made: another one, another adapter
RESULT_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "test_set.json",
    "training_metrics.json",
    "task.json",
    "manifest.json",
)
NEXT_STEP = "run: python fine_tune_model.py --force-retrain"


def training_fingerprint(data_print, task, model_print, training):
    """Identity of a fine-tuning run: the same one on the same machine gives the same adapter."""
    return fingerprint(
        [MANIFEST_VERSION, data_print, task.asked.to_json(), model_print, training.relevant()]
    )


class TrainingRow(NamedTuple):
    """One prompt and its answer.

    prompt: token ids. words: (K,) for each label the token ids that training makes of it: its first
    answer word, of which only the first token counts unless labels are scored whole. label: index
    of the true one. text: what the prompt asks about.
    """

    prompt: list[int]
    words: tuple[tuple[int, ...], ...]
    label: int
    text: str

    @property
    def answer(self):
        """Token ids of the true label."""
        return self.words[self.label]


def trained_words(encoder):
    """(K,) token ids of each label as in `TrainingRow`."""
    if encoder.label_ids is not None:
        return tuple(ids[:1] for ids in encoder.label_ids)
    return tuple(words[0] for words in encoder.label_words)


class AnswerBatches:
    """The prompts and answers of the training rows, in batches of similar length.

    encoders: one, or those of a lettered task, one for each order of its options; each row is asked
    in an order drawn anew every epoch. Batches, and the orders in them, are a pure function of
    (seed, epoch).
    """

    def __init__(self, encoders, examples, batch_size, seed):
        self.batch_size, self.seed = batch_size, seed
        texts = [e.text.strip() for e in examples]
        self.orders = []  # for each order its `TrainingRow`s
        for encoder in encoders:
            words, names = trained_words(encoder), encoder.task.label_names
            self.orders.append(
                [
                    TrainingRow(ids, words, names.index(e.label), text)
                    for (ids, _), e, text in zip(
                        encoder.encode(texts), examples, texts, strict=True
                    )
                ]
            )

    def epoch(self, number):
        """The batches of one epoch: lists of `TrainingRow`."""
        import numpy as np

        n = len(self.orders[0])
        drawn = np.random.default_rng([self.seed, number, 1]).integers(len(self.orders), size=n)
        rows = [self.orders[order][i] for i, order in enumerate(drawn)]
        rng = np.random.default_rng([self.seed, number])
        shuffled = rng.permutation(n)
        pool = 50 * self.batch_size  # sorted by length within a pool: little padding, still random
        batches = []
        for start in range(0, len(shuffled), pool):
            part = sorted(shuffled[start : start + pool], key=lambda i: len(rows[i].prompt))
            batches += [
                [rows[i] for i in part[k : k + self.batch_size]]
                for k in range(0, len(part), self.batch_size)
            ]
        return [batches[i] for i in rng.permutation(len(batches))]


def answer_logits(model, answers, share=True):
    """(logits (T, V), token ids (T,)) of the T answer tokens of [(prompt ids, answer ids)].

    Only the positions that predict answer tokens reach the output head. share: what all prompts
    begin with goes through the model once, and gradients flow back through it, so that the result
    is the same.
    """
    import torch

    from engine import next_token_logits, shared_prefix
    from logprobs_confidence import common_length

    prompts = [ids for ids, _ in answers]
    prefix = None
    if share and len(answers) > 1:
        common = min(common_length(prompts[0], ids) for ids in prompts[1:])
        common = min(common, min(map(len, prompts)) - 1)  # a row needs a token of its own
        prefix = shared_prefix(model, prompts[0][:common]) if common > 0 else None
    sequences = [ids + list(word[:-1]) for ids, word in answers]
    positions = [[len(ids) - 1 + j for j in range(len(word))] for ids, word in answers]
    logits = next_token_logits(model, sequences, positions, prefix)
    targets = torch.tensor([token for _, word in answers for token in word], device=logits.device)
    return logits, targets


def answer_loss(model, batch, share=True):
    """Mean over the rows of the negative log-probability (nats) of the answer tokens."""
    from torch.nn.functional import cross_entropy

    logits, targets = answer_logits(model, [(row.prompt, row.answer) for row in batch], share)
    return cross_entropy(logits, targets, reduction="sum") / len(batch)


def label_logprobs(model, batch, share=True):
    """(B, K) log-probability (nats) of each label's trained word, with gradients.

    Words of one token are read from one distribution a row. Of labels scored whole every word takes
    a sequence of its own, K a row.
    """
    import torch

    if all(len(word) == 1 for row in batch for word in row.words):
        logits, _ = answer_logits(model, [(row.prompt, row.words[0]) for row in batch], share)
        words = torch.tensor([[word[0] for word in row.words] for row in batch])
        return logits.log_softmax(-1).gather(1, words.to(logits.device))
    answers = [(row.prompt, word) for row in batch for word in row.words]
    logits, targets = answer_logits(model, answers, share)
    tokens = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    sums = [part.sum() for part in tokens.split([len(word) for _, word in answers])]
    return torch.stack(sums).view(len(batch), -1)


# What `--objective` makes of the (B, K) log-probabilities and the true labels (B,): a loss in nats
# a row (B,). docs/OBJECTIVES.md says what each is for. p is a label's probability among all tokens,
# P its share of the labels.


def label_smoothing_loss(logprobs, label, smoothing):
    """−Σₖ qₖ log pₖ with q = 1 − smoothing for the true label, and smoothing / K more for each.

    Over the labels and not the vocabulary: smoothed over the vocabulary the model would be taught
    to give that share of its answers to words that are none.
    Source: Szegedy et al. 2016, section 7, https://arxiv.org/abs/1512.00567
    """
    true = logprobs.gather(1, label[:, None])[:, 0]
    return -(1 - smoothing) * true - smoothing * logprobs.mean(1)


def focal_loss(logprobs, label, gamma):
    """−(1 − p)^gamma log p of the true label.

    Source: Lin et al. 2017, eq. 4, https://arxiv.org/abs/1708.02002
    """
    true = logprobs.gather(1, label[:, None])[:, 0]
    # 1 − p as −expm1(log p); its power has no derivative at 0, which a row of p = 1 would reach.
    unsure = (-true.expm1()).clamp(min=1e-12)
    return -(unsure**gamma) * true


def brier_loss(logprobs, label):
    """Σₖ (Pₖ − 1[k is true])² − log Σₖ pₖ.

    The first part does not change when every pₖ is halved: by itself it would let the model stop
    answering. The second, −log of the label mass, keeps the answer an answer; it is the one that
    cross-entropy has as well, since −log p = −log P − log of the mass.
    Source: the score: Brier 1950, https://doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2
    """
    from torch.nn.functional import one_hot

    among_labels = logprobs.softmax(1)
    squares = (among_labels - one_hot(label, logprobs.shape[1])) ** 2
    return squares.sum(1) - logprobs.logsumexp(1)


def confidence_rows(logprobs, batch, siblings, calibrator):
    """(rows that ask whether the model's present answers are right, soft targets (B,)).

    logprobs: (B, K) what the model says of the batch, without gradients. siblings: of
    `p_true_siblings`, one a label in the order of the task. calibrator: fitted on validation rows.
    A target is the probability that it gives the answer: nothing of the row's own label is in it.
    """
    import torch

    from calibration import calibrated_probabilities

    rows, targets = [], []
    given = logprobs.double().cpu().numpy()
    calibrated = calibrated_probabilities(calibrator, {"label_logprobs": given})
    for row, answer, right in zip(batch, given.argmax(1), calibrated, strict=True):
        encoder = siblings[answer].encoder
        ((ids, _),) = encoder.encode([row.text])
        rows.append(TrainingRow(ids, trained_words(encoder), 0, row.text))
        targets.append(right[answer])
    return rows, torch.tensor(targets, dtype=logprobs.dtype, device=logprobs.device)


def multi_task_loss(model, batch, siblings, calibrator, share=True):
    """Cross-entropy of the answer, and of True and False to P(True) against soft targets; a mean.

    The second question is the one of `prompted_confidence`, so that what is learnt here is what the
    signal p_true reads. calibrator: as for `confidence_rows`.
    """
    import torch

    logprobs = label_logprobs(model, batch, share)
    if not logprobs.isfinite().all():
        return logprobs.sum()  # no loss, upon which training stops
    label = torch.tensor([row.label for row in batch], device=logprobs.device)
    rows, right = confidence_rows(logprobs.detach(), batch, siblings, calibrator)
    said = label_logprobs(model, rows, share)  # (B, 2): true, false
    stated = -(right * said[:, 0] + (1 - right) * said[:, 1])
    return (stated - logprobs.gather(1, label[:, None])[:, 0]).mean()


def training_loss(training, classifier, share):
    """(model, batch, calibrator) → the mean loss of a batch under `training.objective`.

    calibrator: the one of the last validation pass, for multi-task; others do not look at it.
    """
    if training.objective == "cross-entropy":
        return lambda model, batch, _: answer_loss(model, batch, share)
    if training.objective == "multi-task":
        from prompted_confidence import p_true_siblings

        siblings = tuple(p_true_siblings(classifier).values())
        return lambda model, batch, calibrator: multi_task_loss(
            model, batch, siblings, calibrator, share
        )
    row_loss, parameters = {
        "label-smoothing": (label_smoothing_loss, (training.label_smoothing,)),
        "focal": (focal_loss, (training.focal_gamma,)),
        "brier": (brier_loss, ()),
    }[training.objective]

    def loss(model, batch, _):
        import torch

        logprobs = label_logprobs(model, batch, share)
        label = torch.tensor([row.label for row in batch], device=logprobs.device)
        return row_loss(logprobs, label, *parameters).mean()

    return loss


def validate(classifier, examples, accelerator, fit_platt=False):
    """Validation numbers of the current adapter; the rows are divided over the processes.

    Processes that go in step score all rows each: what they score must be the same.
    fit_platt: with "validation_platt", Platt scaling fitted on these rows, as JSON.
    """
    import numpy as np
    from accelerate.utils import gather_object

    from calibration import PlattScalingCalibrator, calibrated_log_loss
    from calibration_metrics import expected_calibration_error, log_loss
    from records import label_probabilities

    mine = range(accelerator.process_index, len(examples), accelerator.num_processes)
    if classifier.engine.in_step:
        mine = range(len(examples))
    classifier.model.eval()
    predictions = classifier.classify_batch([examples[i].text for i in mine])
    classifier.model.train()
    rows = dict(
        gather_object([(i, p.label_logprobs) for i, p in zip(mine, predictions, strict=True)])
    )
    scored = [i for i in range(len(examples)) if rows[i] is not None]
    if not scored:
        raise UserError(
            "the model gives no validation row a finite probability; lower --learning-rate"
        )
    logprobs = np.array([rows[i] for i in scored])
    names = classifier.task.label_names
    label = np.array([names.index(examples[i].label) for i in scored])
    probabilities = label_probabilities(logprobs)
    binary = logprobs.shape[1] == 2
    margin = logprobs[:, 0] - logprobs[:, 1] if binary else logprobs
    target = label == 0 if binary else label
    numbers = {
        "validation_loss": log_loss(probabilities, label),
        "validation_accuracy": float((probabilities.argmax(1) == label).mean()),
        "validation_ece": expected_calibration_error(
            probabilities.max(1), probabilities.argmax(1) == label
        ),
        "validation_calibrated_log_loss": calibrated_log_loss(margin, target),
    }
    if fit_platt:
        numbers["validation_platt"] = PlattScalingCalibrator().fit(margin, target).to_json()
    return numbers


def add_adapter(classifier, training):
    """Put a fresh LoRA adapter on the classifier's model."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    from engine import use_feature_dropout

    model = classifier.model
    if classifier.settings.quantization != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # Validation would repack 4-bit weights for a CPU kernel that passes no gradient on.
                module.support_avx512bf16_for_cpu = False
    if classifier.device == "cpu":
        model.set_attn_implementation("eager")  # the CPU's fused attention is slow backwards
    targets = training.target_modules
    if targets == "all-linear+embeddings":
        embedding = model.get_input_embeddings()
        names = [name for name, module in model.named_modules() if module is embedding]
        targets = [*linear_layer_names(model), names[0].rpartition(".")[2]]
    elif targets != "all-linear":
        targets = [name.strip() for name in targets.split(",")]
        modules = [f".{name}" for name, _ in model.named_modules() if name]
        for target in targets:
            if not any(module.endswith(f".{target}") for module in modules):
                raise UserError(
                    f"--target-modules names {target!r}, which this model does not have; its "
                    f"linear layers: {', '.join(linear_layer_names(model))}"
                )
    torch.manual_seed(training.train_seed)
    try:
        adapted = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=training.rank,
                lora_alpha=training.alpha,
                lora_dropout=training.dropout,
                target_modules=targets,
            ),
        )
    except ValueError as error:
        raise UserError(
            f"cannot add the adapter ({str(error).splitlines()[0][:200]}); check --rank, "
            "--dropout and --target-modules"
        ) from error
    use_feature_dropout(adapted)
    return adapted


def spare_memory(model, batches, divided):
    """Have the backward pass compute activations again where memory would not hold them all.

    That of every process does where one of them must, if they divide the layers: each gathers a
    layer's weights when the others do.
    """
    from accelerate.utils import gather_object

    from engine import free_memory, training_bytes

    longest = [(len(b) * len(b[-1].prompt), len(b[-1].prompt)) for b in batches]
    needed = max(training_bytes(model, *sizes) for sizes in longest)
    scarce = needed > ACTIVATION_SHARE * free_memory(model.device.type)
    if divided:
        scarce = any(gather_object([scarce]))
    if scarce:
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()


def linear_layer_names(model):
    """The last part of the name of every linear layer but the output head: q_proj, k_proj, ..."""
    import torch

    head = model.get_output_embeddings()
    linear = (
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linear))


def save_adapter(model, folder):
    """The adapter alone, without a copy of the base model's embedding."""
    model.save_pretrained(folder, save_embedding_layers=False)


def load_adapter(model, folders):
    """Give the model's adapter the weights in a folder, or the mean of those in several.

    The mean of runs from one start is an adapter of the same size, and mostly a better one than
    each of them: Wortsman et al. 2022, "Model soups", https://arxiv.org/abs/2203.05482
    """
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    runs = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    mean = {name: torch.stack([run[name] for run in runs]).mean(0) for name in runs[0]}
    set_peft_model_state_dict(model, mean)


class Checkpoint:
    """The state after the last validation pass, in a folder beside the result.

    A pass writes a new folder and then renames it over the old one, so there is always one whole
    state. `best(run)` holds the adapter with the lowest calibrated validation log-loss of a run so
    far. A step of two processes is not a step of one, so each number of processes has a state of
    its own.
    """

    def __init__(self, result_folder, run_print, processes=1):
        self.folder = result_folder.parent / "checkpoints" / f"{run_print}-{processes}"
        self.last = self.folder / "last"

    def best(self, run):
        return self.folder / f"best-{run}"

    def read(self):
        """The history up to the last pass; [] if there was none."""
        if not (self.last / "state.json").exists():
            return []
        return read_json(self.last / "state.json", f"remove {self.folder} to start again")[
            "history"
        ]

    def load_optimizer(self, optimizer):
        import torch

        optimizer.load_state_dict(
            torch.load(self.last / "optimizer.pt", weights_only=True, map_location="cpu")
        )

    def write(self, model, optimizer, history):
        """Keep the state after the last row of the history."""
        import torch

        run = history[-1]["run"]
        if best_so_far(history, run) is history[-1]:
            replace_folder(self.best(run), lambda folder: save_adapter(model, folder))

        def save(folder):
            save_adapter(model, folder)
            state_dict = io.BytesIO()  # torch.save into a file hides what a full disk says
            torch.save(optimizer.state_dict(), state_dict)
            (folder / "optimizer.pt").write_bytes(state_dict.getbuffer())
            write_json(folder / "state.json", {"history": history})

        replace_folder(self.last, save)

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()


def replace_folder(folder, write):
    """Write a new folder beside `folder` and put it in its place; on any error nothing changes."""
    from safetensors import SafetensorError

    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.partial-"))
        write(partial)
        partial.chmod(0o755)
        old = partial.with_name(partial.name + ".old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {folder}: {reason}; free space or rights?") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def learning_rate_at(step, total, training):
    """Linear warm-up, then cosine decay to zero."""
    warmup = max(1, round(training.warmup_fraction * total))
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    return (
        training.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    )


LOSS_THAT_CHOOSES = "validation_calibrated_log_loss"


def best_so_far(history, run):
    """The validation row of a run's best checkpoint; None before the first one."""
    rows = [h for h in history if h["run"] == run]
    return min(rows, key=lambda h: h[LOSS_THAT_CHOOSES], default=None)


def average_gradients(accelerator, parameters):
    """Replace the gradients by their mean over the processes; none counts as zero."""
    import torch

    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)


class Trainer:
    """Trains an adapter `training.soup` times from one start. Every process has one.

    Steps and epochs are counted on from run to run, so that each run has an order and a dropout of
    its own. divided: whether the processes divide the layers of the model among themselves.
    """

    def __init__(self, accelerator, classifier, splits, training, checkpoint, divided=False):
        from accelerate.utils import gather_object

        self.accelerator, self.classifier, self.training = accelerator, classifier, training
        self.validation = splits["validation"]
        self.checkpoint, self.history = checkpoint, checkpoint.read()
        world = accelerator.num_processes
        model = self.model = classifier.model = add_adapter(classifier, training)
        if divided:
            share = classifier.engine.divide(world, min(gather_object([classifier.engine.budget])))
            accelerator.print(
                f"FSDP: of the layers' weights in this process: {share:.0%}", file=sys.stderr
            )
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in self.trainable]
        self.batches = AnswerBatches(
            classifier.encoders, splits["train"], training.batch_size, training.train_seed
        )
        first_epoch = self.batches.epoch(0)
        spare_memory(model, first_epoch, divided)
        # Activations that are computed again have no cache to share.
        # In step, a batch of one row, which has no prefix to share, would be one pass short.
        share = (
            classifier.engine.shares_prefix
            and not model.is_activation_checkpointing
            and not classifier.engine.in_step
        )
        self.loss_of = training_loss(training, classifier, share)
        self.fits_platt = training.objective == "multi-task"
        self.per_epoch = math.ceil(len(first_epoch) / (world * training.accumulation))
        self.per_run = self.per_epoch * training.epochs
        passes = training.epochs * training.evaluations_per_epoch
        self.validation_steps = {math.ceil((i + 1) * self.per_run / passes) for i in range(passes)}

    def validate(self):
        return validate(self.classifier, self.validation, self.accelerator, self.fits_platt)

    def train(self):
        """The history of all runs: a row before training, then one a validation pass."""
        from tqdm import tqdm

        total, first = self.per_run * self.training.soup, 1
        if self.history:
            first, step = self.history[-1]["run"], self.history[-1]["step"]
            self.accelerator.print(f"continuing after step {step} of {total}", file=sys.stderr)
        else:
            before = {"run": None, "step": 0, "epoch": 0.0, "training_loss": None}
            self.history = [before | self.validate()]
        self.model.train()
        hidden = not self.accelerator.is_main_process
        with tqdm(total=total, unit="step", disable=hidden, file=sys.stderr) as bar:
            for run in range(first, self.training.soup + 1):
                self.train_once(run, bar)
        return self.history

    def train_once(self, run, bar):
        """One run, from the start or from its last validation pass."""
        import torch

        training = self.training
        optimizer = torch.optim.AdamW(
            self.trainable,
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            fused=True,
        )
        before = (run - 1) * self.per_run
        if self.history[-1]["run"] == run:
            step = self.history[-1]["step"]
            load_adapter(self.model, [self.checkpoint.last])
            self.checkpoint.load_optimizer(optimizer)
        else:
            step = before
            with torch.no_grad():
                for p, value in zip(self.trainable, self.start, strict=True):
                    p.copy_(value)
        losses, order, order_of = [], None, None
        while step < before + self.per_run and not self.out_of_patience(run):
            bar.update(step - bar.n)
            epoch, offset = divmod(step, self.per_epoch)
            if order_of != epoch:
                order, order_of = self.batches.epoch(epoch), epoch
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step - before, self.per_run, training)
            losses += self.add_gradients(run, step, order, offset)
            torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}", refresh=False)
            if step - before in self.validation_steps:
                row = {
                    "run": run,
                    "step": step,
                    "epoch": round(step / self.per_epoch, 4),
                    "training_loss": sum(losses) / len(losses),
                }
                row |= self.validate()
                losses = []
                self.history.append(row)
                if self.accelerator.is_main_process:
                    loss = f"training loss {row['training_loss']:.4f}"
                    bar.write(f"step {step}: {loss}, {validation_line(row)}", file=sys.stderr)
                    self.checkpoint.write(self.model, optimizer, self.history)
                self.accelerator.wait_for_everyone()
        bar.update(step - bar.n)

    def add_gradients(self, run, step, order, offset):
        """Gradients of one step, their mean over the processes; returns the losses of this one."""
        import torch

        from calibration import PlattScalingCalibrator

        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        calibrator, losses = None, []
        if self.fits_platt:
            known = self.history[-1] if self.history[-1]["run"] == run else self.history[0]
            calibrator = PlattScalingCalibrator.from_json(known["validation_platt"])
        torch.manual_seed((self.training.train_seed << 32) + (step << 8) + rank)  # dropout
        for k in range(self.training.accumulation):
            position = (offset * self.training.accumulation + k) * world + rank
            loss = self.loss_of(self.model, order[position % len(order)], calibrator)
            (loss / self.training.accumulation).backward()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise UserError(
                    f"the training loss is {losses[-1]} at step {step + 1}; lower --learning-rate"
                )
        if world > 1:
            average_gradients(self.accelerator, self.trainable)
        return losses

    def out_of_patience(self, run):
        best = best_so_far(self.history, run)
        later = [h for h in self.history if h["run"] == run and h["step"] > best["step"]]
        return len(later) >= self.training.patience

    def stopped_early(self):
        """Whether patience ended a run before its last step."""
        last = {row["run"]: row["step"] for row in self.history if row["run"]}
        return any(step < run * self.per_run for run, step in last.items())

    def choose(self):
        """(rows of the history that the adapter is the mean of, validation numbers of the mean).

        The best checkpoint of every run, or that of one run alone where the mean is no better than
        it on the validation rows; the numbers are None of a single run. The model of the main
        process then has these weights.
        """
        best = [best_so_far(self.history, run) for run in range(1, self.training.soup + 1)]
        mean = None
        if len(best) > 1:
            self.load(best)
            mean = self.validate()
            line = f"mean of {len(best)} runs: {validation_line(mean)}"
            self.accelerator.print(line, file=sys.stderr)
            first = min(best, key=lambda row: row[LOSS_THAT_CHOOSES])
            if mean[LOSS_THAT_CHOOSES] >= first[LOSS_THAT_CHOOSES]:
                best = [first]
        if self.accelerator.is_main_process:
            self.load(best)
        return best, mean

    def load(self, rows):
        load_adapter(self.model, [self.checkpoint.best(row["run"]) for row in rows])


def validation_line(row):
    """What is printed of a validation pass."""
    return (
        f"validation loss {row['validation_loss']:.4f} ({row[LOSS_THAT_CHOOSES]:.4f} calibrated), "
        f"accuracy {row['validation_accuracy']:.3f}, ECE {row['validation_ece']:.3f}"
    )


def write_result(folder, classifier, task, held_out, metrics, manifest):
    """fine_tuned_sentiment_model/ as a whole: adapter, tokenizer, task, held-out rows, manifest."""

    def save(partial):
        saved = partial / "adapter"
        save_adapter(classifier.model, saved)
        for path in saved.iterdir():
            shutil.copyfile(path, partial / path.name)  # not its rights: readable like the rest
        shutil.rmtree(saved)
        base = Path(resolve_model(classifier.settings.model))
        config = read_json(partial / "adapter_config.json", NEXT_STEP)
        config["base_model_name_or_path"] = (
            str(base.relative_to(ROOT)) if base.is_relative_to(ROOT) else str(base)
        )
        write_json(partial / "adapter_config.json", config)
        (partial / "README.md").unlink(missing_ok=True)
        classifier.tokenizer.save_pretrained(partial)
        write_json(partial / "task.json", task.to_json())
        write_json(partial / "test_set.json", {"examples": [asdict(e) for e in held_out]})
        write_json(partial / "training_metrics.json", metrics)
        write_json(partial / "manifest.json", manifest)

    replace_folder(folder, save)


def is_up_to_date(folder, run_print):
    """True if the adapter was made from the same things and all its files are there."""
    if not all((folder / name).exists() for name in RESULT_FILES):
        return False
    manifest = read_json(folder / "manifest.json", NEXT_STEP)
    if changed := changed_packages(manifest.get("versions", {})):
        print(f"{folder} was made with other packages: {changed}", file=sys.stderr)
    return manifest.get("fingerprint") == run_print


def training_dtype(dtype, device):
    """The dtype setting of a training: never float16, in which small gradients vanish.

    "auto" stays what `choose_dtype` makes of it, but float16 becomes float32. Raises UserError for
    float16 asked for by name.
    """
    from logprobs_confidence import choose_dtype

    if choose_dtype(dtype, device) != "float16":
        return dtype
    if dtype != "auto":
        raise UserError("float16 loses small gradients; train with --dtype bfloat16 or float32")
    return "float32"


def fine_tune(task, model, data, training, output, force=False):
    """Run the stage. Returns "trained" or "up to date". Raises UserError."""
    from dataset_loader import data_fingerprint, load_splits
    from logprobs_confidence import (
        TransformerLogprobsClassifier,
        choose_device,
        model_fingerprint,
        weights_fingerprint,
    )

    check_training(training)
    divided = divides_the_model(model)
    examples = load_splits(data, task)
    data_print = data_fingerprint(examples)
    run_print = training_fingerprint(data_print, task, model_fingerprint(model), training)
    folder = output.fine_tuned
    if not force and is_up_to_date(folder, run_print):
        return "up to date"
    from accelerate import Accelerator

    from engine import out_of_memory

    started = time.perf_counter()
    device = choose_device(model.device)
    accelerator = Accelerator(cpu=device == "cpu")  # one device a process
    model = replace(model, dtype=training_dtype(model.dtype, device))
    splits = {s: [e for e in examples if e.split == s] for s in ("train", "validation")}
    held_out = [e for e in examples if e.split in ("calibration", "test")]
    classifier = TransformerLogprobsClassifier(model, task=task)
    parameters = classifier.model.num_parameters()
    filled = training.for_model(parameters)
    checkpoint = Checkpoint(folder, run_print, accelerator.num_processes)
    if force and accelerator.is_main_process:
        checkpoint.remove()
    accelerator.wait_for_everyone()
    try:
        trainer = Trainer(accelerator, classifier, splits, filled, checkpoint, divided)
        history = trainer.train()
        chosen, mean = trainer.choose()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            "out of memory in training; lower --batch-size and raise --accumulation, or use "
            "--quantization 4bit"
        ) from error
    if not accelerator.is_main_process:
        return "trained"
    metrics = {
        "history": history,
        "mean_of_runs": mean,
        "chosen_steps": [row["step"] for row in chosen],
        "chosen_by": "lowest calibrated log-loss on the validation rows",
        "stopped_early": trainer.stopped_early(),
        "settings": {"objective": filled.objective, **filled.relevant()},
        "rows": {name: len(rows) for name, rows in splits.items()} | {"held_out": len(held_out)},
        "parameters": parameters,
        "trainable_parameters": sum(p.numel() for p in trainer.trainable),
        "device": classifier.device,
        "dtype": str(classifier.dtype).removeprefix("torch."),
        "seconds": round(time.perf_counter() - started, 1),
    }
    manifest = {
        "version": MANIFEST_VERSION,
        "fingerprint": run_print,
        "base_model": model.model,
        "base_fingerprint": weights_fingerprint(resolve_model(model.model)),
        "data_fingerprint": data_print,
        "versions": versions(),
    }
    write_result(folder, classifier, task, held_out, metrics, manifest)
    checkpoint.remove()
    return "trained"


def divides_the_model(model):
    """Whether `accelerate launch` asks for FSDP: the processes divide the model.

    accelerate itself is kept from it: it would divide the adapter and the optimizer as well. Raises
    UserError for other ways to divide a model, and for weights that cannot be divided.
    """
    asked = {
        name: os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"
        for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM")
    }
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if asked[name]:
            raise UserError(f"{name} is not supported; launch with --use_fsdp or --multi_gpu")
    if asked["FSDP"]:
        if model.quantization != "none":
            raise UserError(
                "FSDP does not divide quantised weights; launch with --multi_gpu or leave out "
                "--quantization"
            )
        del os.environ["ACCELERATE_USE_FSDP"]
    return asked["FSDP"] and int(os.environ.get("WORLD_SIZE", "1")) > 1


def check_training(training):
    """Raises UserError for a setting out of range, or one that the objective does not have."""
    if training.objective not in OBJECTIVES:
        raise UserError(
            f"--objective must be one of {', '.join(OBJECTIVES)}, got {training.objective!r}"
        )
    for objective, names in OBJECTIVES.items():
        for name in names:
            if objective != training.objective and getattr(training, name) != getattr(
                TrainingSettings, name
            ):
                raise UserError(
                    f"--{name.replace('_', '-')} is of --objective {objective}, not of "
                    f"{training.objective}; leave one of them out"
                )
    positive = ("rank", "alpha", "learning_rate", "epochs", "soup", "batch_size", "accumulation")
    for name in (*positive, "evaluations_per_epoch", "patience"):
        value = getattr(training, name)
        if value is not None and not value > 0:  # None: what suits the model
            raise UserError(f"--{name.replace('_', '-')} must be above 0, got {value}")
    for name in ("dropout", "warmup_fraction", "label_smoothing"):
        value = getattr(training, name)
        if value is not None and not 0 <= value < 1:
            raise UserError(
                f"--{name.replace('_', '-')} must be at least 0 and below 1, got {value}"
            )
    for name in ("weight_decay", "focal_gamma"):
        value = getattr(training, name)
        if not 0 <= value < math.inf:
            raise UserError(
                f"--{name.replace('_', '-')} must be at least 0 and finite, got {value}"
            )
    if not 0 <= training.train_seed < 2**31:
        raise UserError(f"--train-seed must lie in [0, 2^31), got {training.train_seed}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(
        parser, TaskSettings, ModelSettings, DataSettings, TrainingSettings, OutputSettings
    )
    parser.add_argument("--force-retrain", action="store_true", help="train even if up to date")
    arguments = parser.parse_args(argv)
    output = from_arguments(OutputSettings, arguments)
    try:
        outcome = fine_tune(
            from_arguments(TaskSettings, arguments).build(),
            from_arguments(ModelSettings, arguments),
            from_arguments(DataSettings, arguments),
            from_arguments(TrainingSettings, arguments),
            output,
            arguments.force_retrain,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues after the last validation", file=sys.stderr)
        return 1
    if not int(os.environ.get("RANK", "0")):
        print(f"{output.fine_tuned}: {outcome}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
