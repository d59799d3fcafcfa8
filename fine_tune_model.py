"""Fine-tune a LoRA adapter for the task on the training rows.

    python fine_tune_model.py                                  # embedded model, dataset/
    python fine_tune_model.py --model llama-3.1-8b --quantization 4bit
    python fine_tune_model.py --data my.csv --question "Is this spam? Answer yes or no." \\
        --labels spam=yes,ham=no --output-dir my_run
    accelerate launch --multi_gpu --num_processes 4 fine_tune_model.py --model llama-3.1-8b

The loss covers the answer only: the token that the evaluation sums, after the same prompt. The
checkpoint is chosen on the validation rows by the log-loss that is left after calibration ("refine,
then calibrate", Berta et al. 2025, arXiv 2501.19195); the test rows choose nothing. An interrupted
run continues from its last validation pass. The result, fine_tuned_sentiment_model/, appears as a
whole or not at all; its manifest says what it was made from, and a run that would make the same
again says so and stops.
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

from records import read_json, versions, write_json
from settings import (
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

MANIFEST_VERSION = 2  # of how an adapter is made: another one, another adapter
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
        [MANIFEST_VERSION, data_print, task.asked.to_json(), model_print, asdict(training)]
    )


class AnswerBatches:
    """The prompts and answers of the training rows, in batches of similar length.

    encoders: one, or those of a lettered task, one for each order of its options; each row is asked
    in an order drawn anew every epoch. A target is the first answer word of the row's label (its
    first token, or all of its tokens where labels are scored whole). Batches, and the orders in
    them, are a pure function of (seed, epoch).
    """

    def __init__(self, encoders, examples, batch_size, seed):
        self.batch_size, self.seed = batch_size, seed
        texts = [e.text.strip() for e in examples]
        self.orders = []  # for each order its rows: (prompt ids, answer ids)
        for encoder in encoders:
            if encoder.label_ids is not None:
                words = [ids[:1] for ids in encoder.label_ids]
            else:
                words = [answers[0] for answers in encoder.label_words]
            names = encoder.task.label_names
            self.orders.append(
                [
                    (ids, words[names.index(e.label)])
                    for (ids, _), e in zip(encoder.encode(texts), examples, strict=True)
                ]
            )

    def epoch(self, number):
        """The batches of one epoch: lists of (prompt ids, answer ids)."""
        import numpy as np

        n = len(self.orders[0])
        drawn = np.random.default_rng([self.seed, number, 1]).integers(len(self.orders), size=n)
        rows = [self.orders[order][i] for i, order in enumerate(drawn)]
        rng = np.random.default_rng([self.seed, number])
        shuffled = rng.permutation(n)
        pool = 50 * self.batch_size  # sorted by length within a pool: little padding, still random
        batches = []
        for start in range(0, len(shuffled), pool):
            part = sorted(shuffled[start : start + pool], key=lambda i: len(rows[i][0]))
            batches += [
                [rows[i] for i in part[k : k + self.batch_size]]
                for k in range(0, len(part), self.batch_size)
            ]
        return [batches[i] for i in rng.permutation(len(batches))]


def answer_loss(model, batch, share=True):
    """Mean over the rows of the negative log-probability (nats) of the answer tokens.

    Only the positions that predict answer tokens reach the output head. share: what all prompts of
    the batch begin with goes through the model once, and gradients flow back through it, so that
    the result is the same.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from engine import next_token_logits, shared_prefix
    from logprobs_confidence import common_length

    prompts = [ids for ids, _ in batch]
    prefix = None
    if share and len(batch) > 1:
        common = min(common_length(prompts[0], ids) for ids in prompts[1:])
        common = min(common, min(map(len, prompts)) - 1)  # a row needs a token of its own
        prefix = shared_prefix(model, prompts[0][:common]) if common > 0 else None
    sequences = [ids + list(word[:-1]) for ids, word in batch]
    positions = [[len(ids) - 1 + j for j in range(len(word))] for ids, word in batch]
    logits = next_token_logits(model, sequences, positions, prefix)  # (answer tokens, V)
    targets = torch.tensor([token for _, word in batch for token in word], device=logits.device)
    return cross_entropy(logits, targets, reduction="sum") / len(batch)


def validate(classifier, examples, accelerator):
    """Validation numbers of the current adapter; the rows are divided over the processes."""
    import numpy as np
    from accelerate.utils import gather_object

    from calibration import calibrated_log_loss
    from calibration_metrics import expected_calibration_error, log_loss
    from records import label_probabilities

    mine = list(range(accelerator.process_index, len(examples), accelerator.num_processes))
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
    return {
        "validation_loss": log_loss(probabilities, label),
        "validation_accuracy": float((probabilities.argmax(1) == label).mean()),
        "validation_ece": expected_calibration_error(
            probabilities.max(1), probabilities.argmax(1) == label
        ),
        "validation_calibrated_log_loss": calibrated_log_loss(
            margin, label == 0 if binary else label
        ),
    }


def add_adapter(classifier, training, resume_from=None):
    """Put a fresh LoRA adapter, or the one in a folder, on the classifier's model."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    model = classifier.model
    large = model.num_parameters() >= 1e9
    if classifier.settings.quantization != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=large)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # Validation would repack 4-bit weights for a CPU kernel that passes no gradient on.
                module.support_avx512bf16_for_cpu = False
    elif large:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    if classifier.device == "cpu":
        model.set_attn_implementation("eager")  # the CPU's fused attention is slow backwards
    if resume_from is not None:
        return PeftModel.from_pretrained(model, resume_from, is_trainable=True)
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
        return get_peft_model(
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


class Checkpoint:
    """The state after the last validation pass, in a folder beside the result.

    A pass writes a new folder and then renames it over the old one, so there is always one whole
    state. `best` holds the adapter with the lowest calibrated validation log-loss so far. A step of
    two processes is not a step of one, so each number of processes has a state of its own.
    """

    def __init__(self, result_folder, run_print, processes=1):
        self.folder = result_folder.parent / "checkpoints" / f"{run_print}-{processes}"
        self.last, self.best = self.folder / "last", self.folder / "best"

    def read(self):
        """{"step", "history", ...} of the last pass, or None."""
        if not (self.last / "state.json").exists():
            return None
        return read_json(self.last / "state.json", f"remove {self.folder} to start again")

    def load_optimizer(self, optimizer):
        import torch

        optimizer.load_state_dict(
            torch.load(self.last / "optimizer.pt", weights_only=True, map_location="cpu")
        )

    def write(self, model, optimizer, state, is_best):
        import torch

        if is_best:
            replace_folder(self.best, lambda folder: save_adapter(model, folder))

        def save(folder):
            save_adapter(model, folder)
            state_dict = io.BytesIO()  # torch.save into a file hides what a full disk says
            torch.save(optimizer.state_dict(), state_dict)
            (folder / "optimizer.pt").write_bytes(state_dict.getbuffer())
            write_json(folder / "state.json", state)

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


def best_so_far(history):
    """The validation row of the chosen checkpoint; None before the first one."""
    return min(
        (h for h in history if h["step"] > 0), key=lambda h: h[LOSS_THAT_CHOOSES], default=None
    )


def patience_is_over(history, patience):
    best = best_so_far(history)
    return best is not None and sum(h["step"] > best["step"] for h in history) >= patience


def train(accelerator, classifier, splits, training, checkpoint):
    """Train the adapter; returns (history, stopped early). Every process calls this."""
    import torch
    from tqdm import tqdm

    from engine import OneForward

    state = checkpoint.read()
    model = add_adapter(classifier, training, checkpoint.last if state else None)
    classifier.model = model
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
    )
    # Gradient checkpointing computes layers again at the backward pass and has no cache to share.
    share = classifier.engine.shares_prefix and not model.is_activation_checkpointing
    loss_of = OneForward(model, lambda model, batch: answer_loss(model, batch, share))
    wrapped = accelerator.prepare(loss_of) if accelerator.num_processes > 1 else loss_of
    batches = AnswerBatches(
        classifier.encoders, splits["train"], training.batch_size, training.train_seed
    )
    world, rank = accelerator.num_processes, accelerator.process_index
    per_epoch = math.ceil(len(batches.epoch(0)) / (world * training.accumulation))
    total = per_epoch * training.epochs
    passes = training.epochs * training.evaluations_per_epoch
    validation_steps = {math.ceil((i + 1) * total / passes) for i in range(passes)}
    step, history = (state["step"], state["history"]) if state else (0, [])
    if state:
        checkpoint.load_optimizer(optimizer)
        accelerator.print(f"continuing after step {step} of {total}", file=sys.stderr)
    else:
        start = {"step": 0, "epoch": 0.0, "training_loss": None}
        history.append(start | validate(classifier, splits["validation"], accelerator))
    losses, stopped = [], patience_is_over(history, training.patience)
    bar = tqdm(
        total=total,
        initial=step,
        unit="step",
        disable=not accelerator.is_main_process,
        file=sys.stderr,
    )
    model.train()
    order, order_of = None, None
    while step < total and not stopped:
        epoch, offset = divmod(step, per_epoch)
        if order_of != epoch:
            order, order_of = batches.epoch(epoch), epoch
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, total, training)
        torch.manual_seed((training.train_seed << 32) + (step << 8) + rank)  # dropout
        for k in range(training.accumulation):
            position = (offset * training.accumulation + k) * world + rank
            batch = order[position % len(order)]
            last = k == training.accumulation - 1
            with accelerator.no_sync(wrapped) if not last and world > 1 else torch.enable_grad():
                loss = wrapped(batch)
                (loss / training.accumulation).backward()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise UserError(
                    f"the training loss is {losses[-1]} at step {step + 1}; lower --learning-rate"
                )
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}", refresh=False)
        if step in validation_steps:
            row = {
                "step": step,
                "epoch": round(step / per_epoch, 4),
                "training_loss": sum(losses) / len(losses),
            }
            row |= validate(classifier, splits["validation"], accelerator)
            losses = []
            history.append(row)
            if accelerator.is_main_process:
                bar.write(
                    f"step {step}: training loss {row['training_loss']:.4f}, validation loss "
                    f"{row['validation_loss']:.4f} ({row[LOSS_THAT_CHOOSES]:.4f} calibrated), "
                    f"accuracy {row['validation_accuracy']:.3f}, ECE {row['validation_ece']:.3f}",
                    file=sys.stderr,
                )
                is_best = best_so_far(history) is row
                checkpoint.write(model, optimizer, {"step": step, "history": history}, is_best)
            accelerator.wait_for_everyone()
            stopped = patience_is_over(history, training.patience)
    bar.close()
    return history, step < total


def write_result(folder, classifier, task, checkpoint, held_out, metrics, manifest):
    """fine_tuned_sentiment_model/ as a whole: adapter, tokenizer, task, held-out rows, manifest."""

    def save(partial):
        for path in checkpoint.best.iterdir():
            shutil.copyfile(path, partial / path.name)  # not its rights: readable like the rest
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
    return read_json(folder / "manifest.json", NEXT_STEP).get("fingerprint") == run_print


def training_dtype(dtype, device):
    """The dtype setting of a training: never float16, in which small gradients vanish.

    "auto" stays what `choose_dtype` makes of it, but float16 becomes float32. Raises UserError for
    float16 asked for by name.
    """
    import torch

    from logprobs_confidence import choose_dtype

    if choose_dtype(dtype, device) != torch.float16:
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
        history, stopped = train(accelerator, classifier, splits, filled, checkpoint)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            "out of memory in training; lower --batch-size and raise --accumulation, or use "
            "--quantization 4bit"
        ) from error
    if not accelerator.is_main_process:
        return "trained"
    trainable = sum(p.numel() for p in classifier.model.parameters() if p.requires_grad)
    metrics = {
        "history": history,
        "chosen_step": best_so_far(history)["step"],
        "chosen_by": "lowest calibrated log-loss on the validation rows",
        "stopped_early": stopped,
        "settings": asdict(filled),
        "rows": {name: len(rows) for name, rows in splits.items()} | {"held_out": len(held_out)},
        "parameters": parameters,
        "trainable_parameters": trainable,
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
    write_result(folder, classifier, task, checkpoint, held_out, metrics, manifest)
    checkpoint.remove()
    return "trained"


def check_training(training):
    """Raises UserError for a setting out of range."""
    positive = ("rank", "alpha", "epochs", "evaluations_per_epoch", "patience")
    optional = ("learning_rate", "batch_size", "accumulation")
    for name in positive + optional:
        value = getattr(training, name)
        if not (value is None and name in optional) and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, got {value}")
    for name in ("dropout", "warmup_fraction"):
        if not 0 <= getattr(training, name) < 1:
            value = getattr(training, name)
            raise UserError(
                f"--{name.replace('_', '-')} must be at least 0 and below 1, got {value}"
            )
    if not training.weight_decay >= 0:
        raise UserError(f"--weight-decay must be at least 0, got {training.weight_decay}")
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
