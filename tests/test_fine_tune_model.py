"""Fine-tuning: what is learnt, what is written, and what is left after an interruption."""

import csv
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fine_tune_model
from calibration import PlattScalingCalibrator
from conftest import ARCHITECTURES
from dataset_loader import load_splits
from engine import FeatureDropout, divide_layers, training_bytes
from fine_tune_model import (
    AnswerBatches,
    Checkpoint,
    Trainer,
    TrainingRow,
    answer_loss,
    brier_loss,
    confidence_rows,
    divides_the_model,
    fine_tune,
    focal_loss,
    label_logprobs,
    label_smoothing_loss,
    learning_rate_at,
    spare_memory,
    training_dtype,
    training_loss,
)
from forked_scripts import start_script
from generate_evaluation_cache import check_adapter
from logprobs_confidence import PromptEncoder, TransformerLogprobsClassifier
from prompted_confidence import p_true_predictions, p_true_siblings
from records import Example, label_probabilities, load_held_out, write_json
from settings import (
    OBJECTIVES,
    ROOT,
    SENTIMENT,
    DataSettings,
    Label,
    ModelSettings,
    OutputSettings,
    Task,
    TaskSettings,
    TrainingSettings,
    UserError,
)

QUESTION = "Does this text name an animal? Answer yes or no."
LABELS = "animal=yes,plant=no"
TASK = TaskSettings(question=QUESTION, labels=LABELS).build()
KEYWORDS = {"animal": ("dog", "cat"), "plant": ("tree", "grass"), "metal": ("iron", "gold")}
FILLER = ["the", "a", "with", "under", "near", "some", "every", "old", "new", "our", "their"]
FILLER += ["again", "today", "slowly", "quickly", "behind", "before", "after", "while", "two"]
FILLER += ["many", "few", "warm", "cold", "early", "late", "small", "tall", "river", "street"]
MODEL = ModelSettings(device="cpu")
SMALL = {"epochs": 1, "soup": 1, "batch_size": 8, "rank": 8, "evaluations_per_epoch": 2}  # seconds
ADAPTER = "adapter_model.safetensors"
RESULT_FILES = {
    "adapter_config.json",
    ADAPTER,
    "chat_template.jinja",
    "manifest.json",
    "task.json",
    "test_set.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_metrics.json",
}


def small_rows(n, labels=("animal", "plant"), seed=0):
    """[(text, label)]: filler, then two words that tell the label; every sixth a near-duplicate."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        label = labels[i % len(labels)]
        if i % 6 == 5:
            text = rows[i - len(labels)][0] + " Really"
        else:
            words = rng.choices(FILLER, k=rng.randint(5, 8)) + rng.choices(KEYWORDS[label], k=2)
            text = " ".join(words).capitalize() + "."
        rows.append((text, label))
    return rows


def write_csv(path, rows, columns=("text", "label")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def train(folder, data, force=False, model=MODEL, **training):
    """`fine_tune` on a small file; returns its outcome."""
    settings = TrainingSettings(**{**SMALL, **training})
    output = OutputSettings(output_dir=str(folder))
    return fine_tune(TASK, model, DataSettings(data=str(data)), settings, output, force)


def command_flags(folder, data, **training):
    values = {**SMALL, **training, "data": data, "question": QUESTION, "labels": LABELS}
    values |= {"device": "cpu", "output_dir": folder}
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def result(folder, file):
    return json.loads((folder / "fine_tuned_sentiment_model" / file).read_text(encoding="utf-8"))


def adapter_weights(folder):
    return load_file(folder / "fine_tuned_sentiment_model" / ADAPTER)


def all_files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def easy_csv(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "easy.csv", small_rows(300))


@pytest.fixture(scope="module")
def tiny_csv(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "tiny.csv", small_rows(72))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, easy_csv):
    """The folder of a finished run on 300 rows, long enough to learn them."""
    folder = tmp_path_factory.mktemp("trained")
    assert train(folder, easy_csv, epochs=2, rank=16) == "trained"
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tiny_csv):
    """The folder of an uninterrupted run on 72 rows with four validation passes."""
    folder = tmp_path_factory.mktemp("reference")
    assert train(folder, tiny_csv, evaluations_per_epoch=4) == "trained"
    return folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory, tiny_csv):
    """The folder of a short run on 72 rows, to be copied before it is changed."""
    folder = tmp_path_factory.mktemp("quick")
    assert train(folder, tiny_csv, batch_size=32) == "trained"
    return folder


@pytest.fixture
def finished(quick, tmp_path):
    """A copy of `quick`."""
    return shutil.copytree(quick, tmp_path, dirs_exist_ok=True)


# What a run leaves.


def test_training_never_runs_in_float16():
    assert training_dtype("auto", "mps") == "float32"
    assert training_dtype("auto", "cpu") == "auto"
    assert training_dtype("bfloat16", "mps") == "bfloat16"
    with pytest.raises(UserError, match="--dtype bfloat16"):
        training_dtype("float16", "cpu")


@pytest.mark.parametrize(
    ("name", "quantization", "message"),
    [("DEEPSPEED", "none", "--use_fsdp"), ("FSDP", "4bit", "does not divide quantised")],
)
def test_a_launch_that_cannot_be_served_is_refused(monkeypatch, name, quantization, message):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=message):
        divides_the_model(replace(MODEL, quantization=quantization))


def test_fsdp_is_taken_over_from_accelerate(monkeypatch):
    assert not divides_the_model(MODEL)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not divides_the_model(MODEL)  # one process
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert divides_the_model(MODEL)
    assert "ACCELERATE_USE_FSDP" not in os.environ


def test_result_folder_holds_exactly_the_named_files_and_nothing_is_left_beside_it(trained):
    assert {p.name for p in trained.iterdir()} == {"fine_tuned_sentiment_model"}
    files = list((trained / "fine_tuned_sentiment_model").iterdir())
    assert {p.name for p in files} == RESULT_FILES
    (trained / "probe").touch()
    rights = (trained / "probe").stat().st_mode
    (trained / "probe").unlink()
    assert (trained / "fine_tuned_sentiment_model/adapter_model.safetensors").stat().st_mode == (
        rights
    )


def test_adapter_learns_the_held_out_rows_and_leaves_the_base_model_as_it_was(trained, easy_csv):
    folder = trained / "fine_tuned_sentiment_model"
    rows = [e for e in load_splits(DataSettings(data=str(easy_csv)), TASK) if e.split == "test"]
    texts = [e.text for e in rows]
    classifier = TransformerLogprobsClassifier(MODEL, folder, TASK)
    tuned = classifier.classify_batch(texts)
    with classifier.without_adapter():
        switched_off = classifier.classify_batch(texts)
    base = TransformerLogprobsClassifier(MODEL, task=TASK).classify_batch(texts)

    def accuracy(predictions):
        return sum(p.predicted == e.label for p, e in zip(predictions, rows, strict=True)) / len(
            rows
        )

    assert accuracy(tuned) > 0.7
    assert accuracy(tuned) > accuracy(base)
    assert [p.probability for p in switched_off] == pytest.approx(
        [p.probability for p in base], abs=1e-6
    )
    change = [abs(t.probability - b.probability) for t, b in zip(tuned, base, strict=True)]
    assert max(change) > 0.1


def test_metrics_tell_the_run(trained):
    metrics = result(trained, "training_metrics.json")
    history = metrics["history"]
    n_batches = math.ceil(metrics["rows"]["train"] / SMALL["batch_size"])
    passes = (0, 0.5, 1, 1.5, 2)
    assert [h["step"] for h in history] == [math.ceil(epochs * n_batches) for epochs in passes]
    assert history[-1]["epoch"] == 2.0
    best = min(history[1:], key=lambda h: h["validation_calibrated_log_loss"])
    assert metrics["chosen_steps"] == [best["step"]] and metrics["mean_of_runs"] is None
    assert history[-1]["training_loss"] < history[1]["training_loss"]
    weights = adapter_weights(trained)
    assert metrics["trainable_parameters"] == sum(w.numel() for w in weights.values())
    assert metrics["settings"]["accumulation"] == 1  # filled in for a small model
    assert Task.from_json(result(trained, "task.json")) == TASK


def test_held_out_rows_are_the_split_and_no_group_of_theirs_is_trained_on(
    tmp_path, tiny_csv, monkeypatch
):
    seen = []

    class Recording(AnswerBatches):
        def __init__(self, encoder, examples, *rest):
            seen.extend(examples)
            super().__init__(encoder, examples, *rest)

    monkeypatch.setattr(fine_tune_model, "AnswerBatches", Recording)
    train(tmp_path, tiny_csv, batch_size=32)
    examples = load_splits(DataSettings(data=str(tiny_csv)), TASK)
    held_out = load_held_out(tmp_path / "fine_tuned_sentiment_model")
    assert held_out == [e for e in examples if e.split in ("calibration", "test")]
    assert seen == [e for e in examples if e.split == "train"]
    groups = Counter(e.group for e in examples)
    assert max(groups.values()) > 1  # there are near-duplicates to be kept apart
    assert not {e.group for e in seen} & {e.group for e in held_out}


def test_second_run_is_up_to_date_and_a_changed_setting_trains_again(finished, tiny_csv, capsys):
    tmp_path, before = finished, all_files(finished)
    assert train(tmp_path, tiny_csv, batch_size=32) == "up to date"
    assert all_files(tmp_path) == before
    manifest = tmp_path / "fine_tuned_sentiment_model/manifest.json"
    kept = json.loads(manifest.read_text())
    write_json(manifest, kept | {"versions": kept["versions"] | {"peft": "0.1"}})
    assert "other packages" not in capsys.readouterr().err
    assert train(tmp_path, tiny_csv, batch_size=32, train_seed=7) == "trained"
    assert f"made with other packages: peft 0.1 → {kept['versions']['peft']}" in (
        capsys.readouterr().err
    )
    after = all_files(tmp_path)
    assert set(after) == set(before)
    name = "fine_tuned_sentiment_model/adapter_model.safetensors"
    assert after[name] != before[name]
    assert train(tmp_path, tiny_csv, force=True, batch_size=32, train_seed=7) == "trained"
    assert all_files(tmp_path)[name] == after[name]  # the same settings give the same adapter


# The loss and the order.


EXAMPLES = [
    Example(str(i), text, label)
    for i, (text, label) in enumerate(
        [
            ("Good.", "positive"),
            ("A long and winding tale of two brothers that never quite finds its end", "negative"),
            ("I would not send my worst enemy there", "negative"),
            ("Sunny", "positive"),
            ("We came for an hour and stayed for the whole of a wonderful week", "positive"),
        ]
    )
]
COLLIDING = Task(
    "colliding",
    "Is this good?",
    (Label("positive", ("Yes it is",)), Label("negative", ("Yes but no", "Yes no"))),
)


def plain_loss(model, encoder, examples):
    """The definition: one unpadded text at a time, the whole softmax, the first answer word."""
    names = encoder.task.label_names
    losses = []
    for e in examples:
        word = encoder.task.labels[names.index(e.label)].words[0]
        prompt = encoder.prompt(e.text)
        ids = encoder.tokenizer(prompt, add_special_tokens=False).input_ids
        answer = encoder.tokenizer(prompt + word, add_special_tokens=False).input_ids[len(ids) :]
        if encoder.label_ids is not None:
            answer = answer[:1]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + answer], device=model.device)).logits[0]
        logprobs = logits.float().log_softmax(-1)
        losses.append(-sum(float(logprobs[len(ids) - 1 + j, t]) for j, t in enumerate(answer)))
    return losses


@pytest.mark.parametrize("task", [SENTIMENT, COLLIDING], ids=["one token", "whole words"])
def test_answer_loss_is_the_mean_of_plain_forward_passes_whatever_the_padding(classifier, task):
    encoder = PromptEncoder(classifier.tokenizer, task, max_tokens=256)
    assert (encoder.label_ids is None) == (task is COLLIDING)
    rows = AnswerBatches((encoder,), EXAMPLES, batch_size=8, seed=0).orders[0]
    assert len({len(row.prompt) for row in rows}) > 2  # so that there is padding
    expected = plain_loss(classifier.model, encoder, EXAMPLES)
    together = float(answer_loss(classifier.model, rows).detach())
    assert together == pytest.approx(sum(expected) / len(expected), abs=1e-3)
    for row, loss in zip(rows, expected, strict=True):
        alone = float(answer_loss(classifier.model, [row]).detach())
        assert alone == pytest.approx(loss, abs=1e-3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sharing_the_prompt_leaves_the_gradients_as_they_are(tiny_model_folder, name):
    model = ModelSettings(str(tiny_model_folder(name)), device="cpu")
    classifier = TransformerLogprobsClassifier(model)
    training = TrainingSettings(rank=4, dropout=0.0, target_modules="all-linear").for_model(1e6)
    classifier.model = fine_tune_model.add_adapter(classifier, training)
    torch.manual_seed(0)
    trainable = [p for p in classifier.model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trainable:  # a fresh adapter's second half is zero, and so are some gradients
            p.add_(0.1 * torch.randn_like(p))
    rows = AnswerBatches(classifier.encoders, EXAMPLES, batch_size=8, seed=0).orders[0]
    classifier.model.train()
    for module in classifier.model.modules():
        if isinstance(module, torch.nn.Dropout):  # of GPT-2 itself
            module.p = 0.0

    def loss_and_gradient(share):
        classifier.model.zero_grad()
        loss = answer_loss(classifier.model, rows, share)
        loss.backward()
        return float(loss.detach()), torch.cat([p.grad.flatten() for p in trainable])

    calls = []
    hook = classifier.model.register_forward_pre_hook(lambda *_: calls.append(1))
    plain_loss, plain = loss_and_gradient(False)
    loss, gradient = loss_and_gradient(True)
    hook.remove()
    assert len(calls) == 3  # whole prompts, then the prefix and the tails or whole prompts again
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert float((gradient - plain).norm() / plain.norm()) < 1e-5
    assert float(plain.norm()) > 1e-3


def test_prompts_with_nothing_in_common_or_all_alike_are_trained_on_too(classifier):
    (first, _), (second, _) = classifier.encoder.encode(["Good.", "Bad."])
    words = fine_tune_model.trained_words(classifier.encoder)
    good, bad = (TrainingRow(ids, words, 0, "") for ids in (first, second[1:]))
    for batch in ([good], [good] * 3, [good, bad]):
        expected = float(answer_loss(classifier.model, batch, share=False).detach())
        assert float(answer_loss(classifier.model, batch).detach()) == pytest.approx(
            expected, abs=1e-5
        )


def test_batches_are_a_pure_function_of_seed_and_epoch_and_cover_every_row_once(classifier):
    rows = [Example(str(i), f"{'very ' * (i % 17)}good {i}", "positive") for i in range(103)]
    batches = AnswerBatches(classifier.encoders, rows, batch_size=8, seed=3)
    first = batches.epoch(0)
    batches.epoch(5)
    assert batches.epoch(0) == first
    assert AnswerBatches(classifier.encoders, rows, batch_size=8, seed=3).epoch(0) == first
    assert batches.epoch(1) != first
    assert AnswerBatches(classifier.encoders, rows, batch_size=8, seed=4).epoch(0) != first
    every = Counter(map(str, batches.orders[0]))
    assert max(every.values()) == 1
    for epoch in range(3):
        assert Counter(str(row) for batch in batches.epoch(epoch) for row in batch) == every
        assert sorted(map(len, batches.epoch(epoch)))[1:] == [8] * 12


def test_a_lettered_row_is_asked_in_an_order_drawn_anew_every_epoch(classifier):
    names = ("world", "sports", "business", "tech")
    task = Task("news", "What is it about?", tuple(Label(n, (n.upper(),)) for n in names))
    lettered = classifier.for_task(replace(task, lettered=True))
    rows = [Example(str(i), f"item {i} of the day", names[i % 4]) for i in range(400)]
    batches = AnswerBatches(lettered.encoders, rows, batch_size=16, seed=5)
    again = AnswerBatches(lettered.encoders, rows, batch_size=16, seed=5)
    letters = []  # (epochs, rows)
    for epoch in range(3):
        assert batches.epoch(epoch) == again.epoch(epoch)
        letter_of = {}
        for row in (row for batch in batches.epoch(epoch) for row in batch):
            prompt, letter = map(classifier.tokenizer.decode, (row.prompt, row.answer))
            i = int(re.search(r"item (\d+) of", prompt)[1])
            # The answer is the letter at which the prompt itself offers the label of the row.
            assert f"\n{letter}. {rows[i].label.upper()}\n" in prompt
            assert i not in letter_of
            letter_of[i] = letter
        letters.append([letter_of[i] for i in range(len(rows))])
    for label in range(4):  # chi-square with 3 degrees of freedom: above 16.3 in one of 1,000 runs
        counts = Counter(letters[0][label::4])
        assert sum((counts[c] - 25) ** 2 / 25 for c in "ABCD") < 16.3
    same = sum(a == b for a, b in zip(*letters[:2], strict=True))
    assert 60 < same < 140  # a quarter by chance
    other = AnswerBatches(lettered.encoders, rows, batch_size=16, seed=6)
    assert other.epoch(0) != batches.epoch(0)


def test_what_an_adapter_depends_on_is_its_own_objective_and_nothing_for_the_default():
    def run_print(**training):
        settings = TrainingSettings(**training)
        return fine_tune_model.training_fingerprint("data", SENTIMENT, "model", settings)

    assert run_print() == "95a04137812be906"  # without a word of the objective
    assert run_print(focal_gamma=3, label_smoothing=0.2) == run_print()
    own = {o: run_print(objective=o) for o in OBJECTIVES}
    assert len(set(own.values())) == len(OBJECTIVES)
    assert run_print(objective="focal", focal_gamma=3) != own["focal"]
    assert run_print(objective="focal", label_smoothing=0.2) == own["focal"]
    assert run_print(objective="label-smoothing", label_smoothing=0.2) != own["label-smoothing"]
    assert run_print(objective="brier", train_seed=1) != own["brier"]


def test_other_wordings_need_no_new_training_and_any_other_change_does(tmp_path):
    task = replace(TASK, wordings=("An animal? Answer yes or no.",))
    changed = replace(TASK, question=task.wordings[0])
    adapter = tmp_path / "adapter"
    write_json(adapter / "manifest.json", {"base_fingerprint": "base"})
    write_json(adapter / "task.json", TASK.to_json())
    prints = [
        fine_tune_model.training_fingerprint("data", t, "model", TrainingSettings())
        for t in (TASK, task, changed)
    ]
    assert prints[0] == prints[1] != prints[2]
    check_adapter(adapter, task, MODEL, "base")
    with pytest.raises(UserError, match="trained for the question"):
        check_adapter(adapter, changed, MODEL, "base")


def test_the_loss_of_rows_in_several_orders_is_the_mean_of_each_alone(classifier):
    labels = (Label("a", ("good news",)), Label("b", ("bad",)), Label("c", ("none of it",)))
    lettered = classifier.for_task(Task("t", "What is it?", labels, lettered=True))
    rows = [Example(str(i), f"{'very ' * i}odd", "abc"[i % 3]) for i in range(9)]
    batches = AnswerBatches(lettered.encoders, rows, batch_size=9, seed=0)
    (batch,) = batches.epoch(0)
    assert all(0 < sum(row in order for row in batch) < 9 for order in batches.orders)  # mixed

    def loss(rows):
        return float(answer_loss(classifier.model, rows, classifier.device).detach())

    assert loss(batch) == pytest.approx(sum(loss([row]) for row in batch) / 9, abs=1e-4)


# Objectives.


def softmax(z):
    return label_probabilities(z)  # float64, numpy


def formula(objective, z, labels, true, truth=None):
    """(loss, gradient to the logits z (V,)) of one row, worked out by hand, in float64.

    labels: (K,) ids of the labels' tokens; true: index of the right one among them; truth: (K,)
    soft targets in place of it.
    """
    p, k = softmax(z), len(labels)
    wanted = np.zeros(len(z))  # the target distribution over the vocabulary
    wanted[labels[true]] = 1.0
    if objective == "label-smoothing":
        wanted *= 0.9
        wanted[labels] += 0.1 / k
    if truth is not None:
        wanted = np.zeros(len(z))
        wanted[labels] = truth
    if objective in ("label-smoothing", "soft"):
        return -(wanted * np.log(p)).sum(), p - wanted
    right = p[labels[true]]
    if objective == "focal":  # dL/dp · dp/dz, gamma = 2
        slope = 2 * (1 - right) * np.log(right) - (1 - right) ** 2 / right
        return -((1 - right) ** 2) * np.log(right), slope * right * (wanted - p)
    among = p[labels] / p[labels].sum()
    gap = among - wanted[labels]
    gradient = p.copy()  # of −log of the label mass: p − P
    gradient[labels] += -among + 2 * among * (gap - (gap * among).sum())
    return (gap**2).sum() - np.log(p[labels].sum()), gradient


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("objective", ["label-smoothing", "focal", "brier"])
def test_losses_and_their_gradients_are_those_worked_out_by_hand(objective, k):
    rng = np.random.default_rng(k)
    row_loss, parameters = {
        "label-smoothing": (label_smoothing_loss, (0.1,)),
        "focal": (focal_loss, (2.0,)),
        "brier": (brier_loss, ()),
    }[objective]
    given = rng.normal(scale=3, size=(6, 9))
    labels = rng.permutation(9)[:k]
    true = rng.integers(k, size=6)
    z = torch.tensor(given, requires_grad=True)
    losses = row_loss(z.log_softmax(-1)[:, labels.tolist()], torch.tensor(true), *parameters)
    losses.sum().backward()
    losses = losses.detach()
    for row in range(6):
        loss, gradient = formula(objective, given[row], labels, true[row])
        assert float(losses[row]) == pytest.approx(loss, rel=1e-10)
        assert z.grad[row].numpy() == pytest.approx(gradient, rel=1e-8, abs=1e-12)


def test_without_their_parameter_smoothing_and_focal_are_cross_entropy(classifier):
    rows = AnswerBatches(classifier.encoders, EXAMPLES, batch_size=8, seed=0).orders[0]
    plain = float(answer_loss(classifier.model, rows).detach())
    settings = (
        TrainingSettings(),
        TrainingSettings(objective="label-smoothing", label_smoothing=0.0),
        TrainingSettings(objective="focal", focal_gamma=0.0),
    )
    losses = [
        float(training_loss(s, classifier, True)(classifier.model, rows, None).detach())
        for s in settings
    ]
    assert losses[0] == plain
    assert losses[1:] == pytest.approx([plain, plain], rel=1e-5)


LETTERED = Task(
    "lettered",
    "How is it?",
    (Label("positive", ("good",)), Label("neutral", ("so so",)), Label("negative", ("bad",))),
    lettered=True,
)
ASKED = pytest.mark.parametrize(
    "task", [SENTIMENT, COLLIDING, LETTERED], ids=["one token", "whole words", "lettered"]
)
PLATT = PlattScalingCalibrator().fit(
    np.array([-3.0, -1.0, 0.5, 2.0, 4.0]), np.array([0, 1, 0, 1, 1]) > 0
)
PLATT_3 = PlattScalingCalibrator().fit(
    np.random.default_rng(0).normal(size=(60, 3)), np.arange(60) % 3
)


def drawn_batch(classifier):
    (batch,) = AnswerBatches(classifier.encoders, EXAMPLES, batch_size=8, seed=0).epoch(0)
    return batch


def plain_label_logprobs(model, batch):
    """(B, K) by the definition: every word of every row by itself, unpadded, float64 sums."""
    table = []
    for row in batch:
        table.append([])
        for word in row.words:
            ids = torch.tensor([row.prompt + list(word)], device=model.device)
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0].double().log_softmax(-1)
            places = range(len(row.prompt) - 1, len(row.prompt) - 1 + len(word))
            table[-1].append(sum(float(logprobs[i, t]) for i, t in zip(places, word, strict=True)))
    return np.array(table)


@ASKED
@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o != "cross-entropy"])
def test_every_objective_is_the_mean_of_what_single_rows_give(classifier, task, objective):
    asked = classifier.for_task(task)
    batch, platt = drawn_batch(asked), PLATT_3 if task is LETTERED else PLATT
    loss_of = training_loss(TrainingSettings(objective=objective), asked, True)
    with_gradient = loss_of(classifier.model, batch, platt)
    logprobs = plain_label_logprobs(classifier.model, batch)
    among = softmax(logprobs)
    rows = range(len(batch))
    true = [row.label for row in batch]
    log_p = logprobs[rows, true]
    if objective == "label-smoothing":
        losses = -0.9 * log_p - 0.1 * logprobs.mean(1)
    if objective == "focal":
        losses = -((1 - np.exp(log_p)) ** 2) * log_p
    if objective == "brier":
        hard = np.eye(len(task.labels))[true]
        losses = ((among - hard) ** 2).sum(1) - np.log(np.exp(logprobs).sum(1))
    if objective == "multi-task":
        margin = logprobs[:, 0] - logprobs[:, 1] if logprobs.shape[1] == 2 else logprobs
        right = platt.predict_proba(margin)
        right = np.column_stack([right, 1 - right]) if right.ndim == 1 else right
        losses = []
        siblings = p_true_siblings(asked)
        for i, row in enumerate(batch):
            answer = int(logprobs[i].argmax())
            encoder = siblings[task.label_names[answer]].encoder
            ids = encoder.tokenizer(encoder.prompt(row.text), add_special_tokens=False).input_ids
            question = TrainingRow(ids, fine_tune_model.trained_words(encoder), 0, row.text)
            ((yes, no),) = plain_label_logprobs(classifier.model, [question])
            losses.append(-log_p[i] - right[i][answer] * yes - (1 - right[i][answer]) * no)
    assert float(with_gradient.detach()) == pytest.approx(np.mean(losses), abs=2e-3, rel=1e-4)


def test_soft_targets_are_those_of_platt_scaling_and_know_nothing_of_the_label(classifier):
    siblings = tuple(p_true_siblings(classifier).values())
    batch = drawn_batch(classifier)
    logprobs = label_logprobs(classifier.model, batch).detach()
    rows, targets = confidence_rows(logprobs, batch, siblings, PLATT)
    slope, intercept = (PLATT.parameters["maps"][0][key] for key in ("slope", "intercept"))
    for row, question, target, said in zip(batch, rows, targets, logprobs, strict=True):
        first = 1 / (1 + math.exp(-slope * float(said[0] - said[1]) - intercept))
        answer = int(said.argmax())
        assert float(target) == pytest.approx(first if answer == 0 else 1 - first, abs=1e-6)
        prompt = classifier.tokenizer.decode(question.prompt)
        assert f"Text: {row.text}" in prompt
        assert f"Proposed answer: {classifier.task.labels[answer].words[0]}\n" in prompt
        first_tokens = map(classifier.tokenizer.decode, question.words)
        assert all(map(str.startswith, ("True", "False"), first_tokens))
    assert {int(said.argmax()) for said in logprobs} == {0, 1}
    swapped = [row._replace(label=1 - row.label) for row in batch]
    again, same = confidence_rows(logprobs, swapped, siblings, PLATT)
    assert again == rows
    assert torch.equal(same, targets)


@ASKED
@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o != "cross-entropy"])
def test_sharing_the_prompt_leaves_the_gradients_of_every_objective_as_they_are(
    tiny_model_folder, task, objective
):
    model = ModelSettings(str(tiny_model_folder("llama")), device="cpu")
    classifier = TransformerLogprobsClassifier(model, task=task)
    training = TrainingSettings(
        rank=4, dropout=0.0, target_modules="all-linear", objective=objective
    ).for_model(1e6)
    classifier.model = fine_tune_model.add_adapter(classifier, training)
    torch.manual_seed(0)
    trainable = [p for p in classifier.model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trainable:
            p.add_(0.1 * torch.randn_like(p))
    batch, platt = drawn_batch(classifier), PLATT_3 if task is LETTERED else PLATT
    classifier.model.train()
    calls = []
    classifier.model.register_forward_pre_hook(lambda *_: calls.append(1))

    def loss_and_gradient(share):
        classifier.model.zero_grad()
        calls.clear()
        loss = training_loss(training, classifier, share)(classifier.model, batch, platt)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in trainable])
        return float(loss.detach()), gradient, len(calls)

    plain_loss, plain, n_plain = loss_and_gradient(False)
    loss, gradient, n_shared = loss_and_gradient(True)
    assert n_shared == 2 * n_plain == (4 if objective == "multi-task" else 2)
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert float((gradient - plain).norm() / plain.norm()) < 1e-4
    assert float(plain.norm()) > 1e-4


@pytest.mark.slow
def test_multi_task_teaches_the_model_to_say_how_often_it_is_right(tmp_path, easy_csv, trained):
    train(tmp_path, easy_csv, epochs=2, rank=16, objective="multi-task")
    rows = [e for e in load_splits(DataSettings(data=str(easy_csv)), TASK) if e.split == "test"]
    gaps, mass = {}, {}
    for name, folder in (("untaught", trained), ("taught", tmp_path)):
        adapter = folder / "fine_tuned_sentiment_model"
        classifier = TransformerLogprobsClassifier(MODEL, adapter, TASK)
        own = classifier.classify_batch([e.text for e in rows])
        said = p_true_predictions(p_true_siblings(classifier), [e.text for e in rows], own)
        right = [p.predicted == e.label for p, e in zip(own, rows, strict=True)]
        gaps[name] = abs(np.mean([p.confidence for p in said]) - np.mean(right))
        mass[name] = np.mean([p.label_mass for p in said])
    assert mass["taught"] > max(0.9, mass["untaught"])
    assert gaps["taught"] < min(0.25, gaps["untaught"])


def test_an_interrupted_multi_task_run_continues_with_the_targets_it_had(
    tmp_path, tiny_csv, monkeypatch
):
    flags = {"objective": "multi-task", "evaluations_per_epoch": 2, "batch_size": 16}
    train(tmp_path / "whole", tiny_csv, **flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after_checkpoint(patch)
        train(tmp_path / "parts", tiny_csv, **flags)
    assert train(tmp_path / "parts", tiny_csv, **flags) == "trained"
    expected, got = (adapter_weights(tmp_path / name) for name in ("whole", "parts"))
    assert all((expected[name] == got[name]).all() for name in expected)
    metrics = result(tmp_path / "parts", "training_metrics.json")
    assert metrics["settings"]["objective"] == "multi-task"
    assert all("validation_platt" in h for h in metrics["history"])


@pytest.mark.parametrize("objective", ["label-smoothing", "focal", "brier"])
def test_every_objective_gives_an_adapter_of_its_own(tmp_path, tiny_csv, reference, objective):
    assert train(tmp_path, tiny_csv, evaluations_per_epoch=1, objective=objective) == "trained"
    metrics = result(tmp_path, "training_metrics.json")
    own = set(OBJECTIVES[objective])
    others = {name for names in OBJECTIVES.values() for name in names} - own
    assert metrics["settings"]["objective"] == objective
    assert own <= set(metrics["settings"]) and not others & set(metrics["settings"])
    weights, plain = adapter_weights(tmp_path), adapter_weights(reference)
    assert any((weights[name] != plain[name]).any() for name in plain)


def test_dropout_drops_features_of_a_whole_row():
    dropout = FeatureDropout(0.25)
    torch.manual_seed(0)
    kept = dropout(torch.ones(40, 7, 50))
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (kept == kept[:, :1]).all()  # at all positions alike
    assert (kept[0] != kept[1]).any()  # another mask for another row
    assert kept.mean() == pytest.approx(1, abs=0.05)
    tokens = dropout(torch.ones(40, 50))
    assert tokens.shape == (40, 50) and (tokens[0] != tokens[1]).any()
    dropout.eval()
    assert (dropout(torch.ones(2, 3, 4)) == 1).all()


def test_training_drops_features_and_the_adapter_on_disk_is_a_plain_one(tmp_path):
    classifier = TransformerLogprobsClassifier(MODEL)
    training = TrainingSettings(rank=4, dropout=0.2).for_model(7e6)
    model = fine_tune_model.add_adapter(classifier, training)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
    assert layers and all(type(m) is FeatureDropout and m.p == 0.2 for m in layers)
    fine_tune_model.save_adapter(model, tmp_path)
    loaded = TransformerLogprobsClassifier(MODEL, tmp_path)
    layers = [m for m in loaded.model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
    assert layers and all(type(m) is torch.nn.Dropout and m.p == 0.2 for m in layers)


def test_only_the_adapter_gets_gradients():
    classifier = TransformerLogprobsClassifier(MODEL)
    model = fine_tune_model.add_adapter(classifier, TrainingSettings(rank=4).for_model(7e6))
    model.train()
    rows = AnswerBatches(classifier.encoders, EXAMPLES, batch_size=8, seed=0).orders[0]
    answer_loss(model, rows).backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == {name for name, p in model.named_parameters() if "lora_" in name}
    assert all(
        float(p.grad.abs().max()) > 0 for name, p in model.named_parameters() if "lora_B" in name
    )


@pytest.mark.parametrize("total", [1, 2, 10, 675])
def test_learning_rate_rises_to_its_peak_and_falls_to_nothing(total):
    training = TrainingSettings(learning_rate=2e-3, warmup_fraction=0.1)
    rates = [learning_rate_at(step, total, training) for step in range(total)]
    warmup = max(1, round(0.1 * total))
    assert rates[0] == pytest.approx(2e-3 / warmup)
    assert rates[warmup - 1] == pytest.approx(2e-3)
    assert rates == sorted(rates[:warmup]) + sorted(rates[warmup:], reverse=True)
    assert all(0 < rate <= 2e-3 for rate in rates)
    if total > warmup:
        assert rates[warmup] == pytest.approx(2e-3)
        assert learning_rate_at(total, total, training) == pytest.approx(0, abs=1e-12)


def test_training_stops_when_validation_no_longer_improves(tmp_path):
    rng = random.Random(1)
    rows = []
    for i, (text, label) in enumerate(small_rows(120)):
        split = ("train", "train", "validation", "calibration", "test")[i // 2 % 5]
        if split == "validation":  # labels drawn by lot: nothing learnt can help there
            label = rng.choice(("animal", "plant"))
        rows.append((text.replace(" Really", f" really {i}"), label, split))
    data = write_csv(tmp_path / "noise.csv", rows, ("text", "label", "split"))
    with pytest.warns(UserWarning, match="near-duplicate groups lie in more than one split"):
        train(tmp_path, data, epochs=4, evaluations_per_epoch=3, patience=2)
    metrics = result(tmp_path, "training_metrics.json")
    steps = [h["step"] for h in metrics["history"]]
    assert metrics["stopped_early"]
    assert steps[-1] < 4 * math.ceil(48 / 8)
    assert sum(step > metrics["chosen_steps"][0] for step in steps) == 2


# Interruptions.


def interrupt_after_checkpoint(monkeypatch, number=1):
    write, written = Checkpoint.write, []

    def write_and_stop(self, *arguments):
        write(self, *arguments)
        written.append(1)
        if len(written) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "write", write_and_stop)


def test_continued_run_gives_the_same_adapter_as_an_uninterrupted_one(
    tmp_path, tiny_csv, reference, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after_checkpoint(patch)
        train(tmp_path, tiny_csv, evaluations_per_epoch=4)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]  # no half-written result
    steps = []
    monkeypatch.setattr(
        fine_tune_model,
        "answer_loss",
        lambda *arguments: steps.append(1) or answer_loss(*arguments),
    )
    assert train(tmp_path, tiny_csv, evaluations_per_epoch=4) == "trained"
    history = result(reference, "training_metrics.json")["history"]
    assert len(steps) == history[-1]["step"] - history[1]["step"]
    assert result(tmp_path, "training_metrics.json")["history"] == history
    expected, got = adapter_weights(reference), adapter_weights(tmp_path)
    assert expected.keys() == got.keys()
    assert all((expected[name] == got[name]).all() for name in expected)
    assert {p.name for p in tmp_path.iterdir()} == {"fine_tuned_sentiment_model"}


def test_mean_of_two_runs_and_the_same_after_an_interruption_in_the_second(
    tmp_path, tiny_csv, monkeypatch
):
    """`run_weights`: those of the best checkpoint of each run, which are gone at the end."""
    run_weights, choose = [], Trainer.choose

    def keep_and_choose(self):
        run_weights.append([load_file(f / ADAPTER) for f in map(self.checkpoint.best, (1, 2))])
        return choose(self)

    monkeypatch.setattr(Trainer, "choose", keep_and_choose)
    assert train(tmp_path / "whole", tiny_csv, soup=2) == "trained"
    metrics = result(tmp_path / "whole", "training_metrics.json")
    history, mean = metrics["history"], metrics["mean_of_runs"]
    assert [row["run"] for row in history] == [None, 1, 1, 2, 2]
    steps = [row["step"] for row in history]
    assert steps == sorted(set(steps)) and steps[-1] == 2 * steps[2]
    best = [
        min(history[k : k + 2], key=lambda h: h["validation_calibrated_log_loss"]) for k in (1, 3)
    ]
    first, second = run_weights[0]
    assert any((first[name] != second[name]).any() for name in first)  # another order
    lowest = min(row["validation_calibrated_log_loss"] for row in best)
    if mean["validation_calibrated_log_loss"] < lowest:
        assert metrics["chosen_steps"] == [row["step"] for row in best]
        expected = {name: (first[name] + second[name]) / 2 for name in first}
    else:
        k = [row["validation_calibrated_log_loss"] for row in best].index(lowest)
        assert metrics["chosen_steps"] == [best[k]["step"]]
        expected = run_weights[0][k]
    got = adapter_weights(tmp_path / "whole")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after_checkpoint(patch, 3)
        train(tmp_path / "parts", tiny_csv, soup=2)
    assert train(tmp_path / "parts", tiny_csv, soup=2) == "trained"
    assert result(tmp_path / "parts", "training_metrics.json")["history"] == history
    again = adapter_weights(tmp_path / "parts")
    assert all(torch.equal(again[name], got[name]) for name in got)


def test_a_mean_that_is_no_better_than_a_run_is_not_taken(tmp_path, tiny_csv, monkeypatch):
    validate = fine_tune_model.validate
    losses = iter((0.7, 0.5, 0.4, 0.3, 0.2, 0.25))  # before, two passes of each run, the mean

    def validate_as_told(*arguments):
        return validate(*arguments) | {"validation_calibrated_log_loss": next(losses)}

    monkeypatch.setattr(fine_tune_model, "validate", validate_as_told)
    assert train(tmp_path, tiny_csv, soup=2) == "trained"
    metrics = result(tmp_path, "training_metrics.json")
    assert metrics["chosen_steps"] == [metrics["history"][-1]["step"]]
    assert metrics["mean_of_runs"]["validation_calibrated_log_loss"] == 0.25


def test_killed_process_leaves_no_result_and_the_same_command_continues(tmp_path, tiny_csv, capsys):
    flags = command_flags(tmp_path, tiny_csv, batch_size=4, evaluations_per_epoch=6)
    process = start_script("fine_tune_model.py", *flags)
    limit = time.monotonic() + 120
    while not list(tmp_path.glob("checkpoints/*/last/state.json")):
        assert process.is_alive() and time.monotonic() < limit
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "fine_tuned_sentiment_model").exists()
    assert fine_tune_model.main(flags) == 0
    shown = capsys.readouterr()
    assert "continuing after step" in shown.err
    assert shown.out == f"{tmp_path / 'fine_tuned_sentiment_model'}: trained\n"
    assert {p.name for p in (tmp_path / "fine_tuned_sentiment_model").iterdir()} == RESULT_FILES


def launch_two(folder, data, **environment):
    """Train with two processes as torchrun starts them; their two standard errors in one."""
    environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    flags = command_flags(folder, data, dropout=0.0)
    out, errors = (
        [folder.parent / f"{folder.name}.{n}.{name}" for n in "01"] for name in ("out", "err")
    )
    processes = [
        start_script(
            *("fine_tune_model.py", *flags),
            stdout=out[rank],
            stderr=errors[rank],
            **environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    for process in processes:
        process.join(180)
    said = errors[0].read_text() + errors[1].read_text()
    assert [process.exitcode for process in processes] == [0, 0], said
    assert out[0].read_text() == f"{folder / 'fine_tuned_sentiment_model'}: trained\n"
    assert out[1].read_text() == ""
    return said


def largest_difference(one, two):
    one, two = adapter_weights(one), adapter_weights(two)
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory, tiny_csv):
    """The folder of a run of one process that takes two batches a step, without dropout."""
    folder = tmp_path_factory.mktemp("accumulated")
    train(folder, tiny_csv, dropout=0.0, accumulation=2)
    return folder


def test_two_processes_train_as_one_that_accumulates_two_batches(
    tmp_path, tiny_csv, accumulated, monkeypatch
):
    # A checkpoint of one process, whose steps are other steps, lies where the two will run.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after_checkpoint(patch)
        train(tmp_path, tiny_csv, dropout=0.0)
    errors = launch_two(tmp_path, tiny_csv)
    assert "continuing" not in errors
    expected = result(accumulated, "training_metrics.json")["history"]
    history = result(tmp_path, "training_metrics.json")["history"]
    rows = result(tmp_path, "training_metrics.json")["rows"]["train"]
    assert history[-1]["step"] == math.ceil(math.ceil(rows / 8) / 2)  # two batches a step
    assert [h["step"] for h in history] == [h["step"] for h in expected]
    for row in history[1:]:
        assert errors.count(f"step {row['step']}: training loss") == 1
    assert largest_difference(tmp_path, accumulated) < 1e-3


def test_two_processes_that_divide_the_model_train_the_same_adapter(
    tmp_path, tiny_csv, accumulated
):
    errors = launch_two(tmp_path, tiny_csv, ACCELERATE_USE_FSDP="true")
    assert "of the layers' weights in this process: 50%" in errors
    history = result(tmp_path, "training_metrics.json")["history"]
    for row, expected in zip(
        history, result(accumulated, "training_metrics.json")["history"], strict=True
    ):
        assert row["validation_loss"] == pytest.approx(expected["validation_loss"], abs=1e-3)
    assert largest_difference(tmp_path, accumulated) < 1e-3
    # The result is an ordinary adapter for one process.
    classifier = TransformerLogprobsClassifier(
        MODEL, adapter=tmp_path / "fine_tuned_sentiment_model"
    )
    assert classifier.classify("dog").label_mass > 0


@pytest.fixture(scope="module")
def process_group():
    """The processes among which a model is divided: this one alone."""
    address = f"tcp://127.0.0.1:{free_port()}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_divided_model_has_the_gradients_of_the_whole_one(
    tiny_model_folder, process_group, name, checkpointing
):
    """For every architecture, in a group of one process; scoring comes first, as in training."""
    classifier = TransformerLogprobsClassifier(replace(MODEL, model=str(tiny_model_folder(name))))
    model = classifier.model = fine_tune_model.add_adapter(
        classifier, TrainingSettings(dropout=0.0).for_model(1)
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.add_(0.1 * torch.randn_like(p))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # of GPT-2 itself
            module.p = 0.0
    if checkpointing:
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
    rows = AnswerBatches(classifier.encoders, EXAMPLES, batch_size=8, seed=0).orders[0]

    def probability_and_gradient():
        model.eval()
        probability = classifier.classify(EXAMPLES[0].text).label_logprobs
        model.train()
        model.zero_grad()
        answer_loss(model, rows, share=False).backward()
        return probability, torch.cat([p.grad.flatten() for p in trained])

    probability, gradient = probability_and_gradient()
    assert classifier.engine.divide(1, classifier.engine.budget) == 1.0
    assert any(type(p).__name__ == "DTensor" for p in model.parameters())
    assert not any(type(p).__name__ == "DTensor" for p in trained)
    divided_probability, divided_gradient = probability_and_gradient()
    assert divided_probability == pytest.approx(probability, abs=1e-5)
    assert float((divided_gradient - gradient).norm() / gradient.norm()) < 1e-5
    assert float(gradient.norm()) > 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_activations_are_computed_again_where_memory_would_not_hold_them(
    tiny_model_folder, monkeypatch, name
):
    """More memory is reckoned with than a batch keeps; the gradients are the same."""
    classifier = TransformerLogprobsClassifier(replace(MODEL, model=str(tiny_model_folder(name))))
    model = classifier.model = fine_tune_model.add_adapter(
        classifier, TrainingSettings(dropout=0.0).for_model(1e9)
    )
    (batch,) = AnswerBatches(classifier.encoders, EXAMPLES, batch_size=64, seed=0).epoch(0)
    longest = max(len(row.prompt) for row in batch)
    needed = training_bytes(model, len(batch) * longest, longest)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def kept_and_gradient(share):
        """Bytes of the forward pass's activations that live until the backward pass."""
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        model.eval()  # GPT-2 has dropout of its own
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = answer_loss(model, batch, share)
        total = sum(kept.values())
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return total, torch.cat(gradients)

    monkeypatch.setattr("engine.free_memory", lambda device: 2 * needed)
    spare_memory(model, [batch], divided=False)
    assert not model.is_activation_checkpointing
    kept, plain = kept_and_gradient(share=False)
    assert kept < needed < 10 * kept
    monkeypatch.setattr("engine.free_memory", lambda device: 2 * needed - 2)
    spare_memory(model, [batch], divided=False)
    assert model.is_activation_checkpointing
    model.train()
    _, again = kept_and_gradient(share=False)
    assert float((again - plain).norm() / plain.norm()) < 1e-5


def test_a_model_that_does_not_name_its_layers_is_not_divided():
    with pytest.raises(UserError, match="--multi_gpu"):
        divide_layers(torch.nn.Linear(2, 2), 1)


def test_in_step_a_batch_too_large_is_an_error_and_not_halved(classifier, monkeypatch):
    """The other processes would wait for batches that never come."""
    monkeypatch.setattr(classifier.engine, "in_step", True)

    def out_of_memory(sequences, prefix):
        raise torch.OutOfMemoryError("none left")

    with pytest.raises(UserError, match="--batch-tokens"):
        list(classifier.engine.run([[1, 2], [1, 3]], None, out_of_memory))


# Mistakes and full disks.


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank": 0}, "--rank must be above 0, got 0"),
        ({"dropout": 1}, "--dropout must be at least 0 and below 1, got 1.0"),
        ({"learning_rate": "nan"}, "--learning-rate must be above 0, got nan"),
        ({"weight_decay": -1}, "--weight-decay must be at least 0 and finite, got -1.0"),
        ({"objective": "mse"}, "--objective must be one of cross-entropy, label-smoothing, focal"),
        ({"focal_gamma": 3}, "--focal-gamma is of --objective focal, not of cross-entropy"),
        ({"objective": "brier", "label_smoothing": 0.2}, "is of --objective label-smoothing, not"),
        ({"objective": "focal", "focal_gamma": -1}, "--focal-gamma must be at least 0 and finite"),
        ({"objective": "label-smoothing", "label_smoothing": 1}, "at least 0 and below 1, got 1.0"),
        ({"objective": "multi-task", "learning_rate": 1e30}, "lower --learning-rate"),
        ({"objective": "focal", "learning_rate": 1e30}, "lower --learning-rate"),
        ({"train_seed": -1}, "--train-seed must lie in [0, 2^31), got -1"),
        ({"train_seed": 2**40}, "--train-seed must lie in [0, 2^31)"),
        ({"target_modules": "q_proj,v_porj"}, "'v_porj', which this model does not have"),
        ({"target_modules": ""}, "'', which this model does not have"),
        ({"target_modules": "q_proj,"}, "'', which this model does not have"),
        ({"learning_rate": 1e30}, "lower --learning-rate"),
        ({"learning_rate": 1e30, "evaluations_per_epoch": 99}, "lower --learning-rate"),
        ({"device": "tpu"}, "device must be auto, cuda, mps or cpu, got 'tpu'"),
    ],
    ids=str,
)
def test_bad_setting_is_one_clear_error(tmp_path, tiny_csv, capsys, setting, message):
    assert fine_tune_model.main(command_flags(tmp_path, tiny_csv) + command_line(setting)) == 1
    errors = [s for s in capsys.readouterr().err.splitlines() if "error:" in s]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "fine_tuned_sentiment_model").exists()


def command_line(setting):
    return [f"--{name.replace('_', '-')}={value}" for name, value in setting.items()]


def test_names_of_modules_may_be_separated_by_comma_and_space(tmp_path, tiny_csv):
    train(tmp_path, tiny_csv, batch_size=32, target_modules="q_proj, v_proj")
    assert {name.split(".")[-3] for name in adapter_weights(tmp_path)} == {"q_proj", "v_proj"}


def test_output_folder_that_cannot_be_made_is_a_clear_error(tmp_path, tiny_csv, capsys):
    (tmp_path / "file").touch()
    flags = command_flags(tmp_path / "file" / "below", tiny_csv, batch_size=32)
    assert fine_tune_model.main(flags) == 1
    assert f"error: cannot write {tmp_path / 'file' / 'below'}" in capsys.readouterr().err


def test_command_exits_with_1_for_a_bad_setting_and_2_for_bad_usage(tmp_path, tiny_csv):
    command = [sys.executable, str(ROOT / "fine_tune_model.py")]
    flags = command_flags(tmp_path, tiny_csv, rank=0)
    bad = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr == "error: --rank must be above 0, got 0\n"
    assert subprocess.run([*command, "--rank=many"], capture_output=True).returncode == 2


@pytest.mark.parametrize("share", [0.5, 1.5], ids=["adapter", "optimizer"])
def test_disk_full_at_a_checkpoint_keeps_the_old_result(finished, tiny_csv, capsys, share):
    """The limit on a file's size makes the real writers fail: below the adapter's, then above it
    and below the optimizer's, which holds two numbers a weight."""
    tmp_path, before = finished, all_files(finished)
    size = len(before["fine_tuned_sentiment_model/adapter_model.safetensors"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), hard))
    try:
        code = fine_tune_model.main(command_flags(tmp_path, tiny_csv, batch_size=32, train_seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    error = capsys.readouterr().err
    assert f"error: cannot write {tmp_path / 'checkpoints'}" in error
    assert "free space or rights?" in error
    left = all_files(tmp_path)
    assert {name: left[name] for name in before} == before
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name]


def test_disk_full_at_the_result_keeps_the_old_one_and_the_training(
    finished, tiny_csv, capsys, monkeypatch
):
    tmp_path, before = finished, all_files(finished)
    flags = command_flags(tmp_path, tiny_csv, batch_size=32, train_seed=1)

    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(fine_tune_model.shutil, "copyfile", full)
        assert fine_tune_model.main(flags) == 1
    result_folder = tmp_path / "fine_tuned_sentiment_model"
    assert f"error: cannot write {result_folder}: No space left" in capsys.readouterr().err
    left = all_files(tmp_path)
    assert {name: left[name] for name in before} == before
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name]
    assert fine_tune_model.main(flags) == 0
    assert "continuing after step" in capsys.readouterr().err
    assert result(tmp_path, "manifest.json") != json.loads(
        before["fine_tuned_sentiment_model/manifest.json"]
    )


def test_validation_does_not_change_the_gradients_of_four_bit_training():
    """bitsandbytes repacks 4-bit weights on a CPU for inference, where gradients then stop."""
    pytest.importorskip("bitsandbytes")
    classifier = TransformerLogprobsClassifier(replace(MODEL, quantization="4bit"))
    training = TrainingSettings(rank=4, dropout=0.0).for_model(7e6)
    classifier.model = fine_tune_model.add_adapter(classifier, training)
    rows = AnswerBatches(classifier.encoders, EXAMPLES, batch_size=8, seed=0).orders[0]

    def gradients():
        classifier.model.train()
        classifier.model.zero_grad()
        answer_loss(classifier.model, rows).backward()
        named = classifier.model.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.requires_grad}

    before = gradients()
    classifier.model.eval()
    classifier.classify_batch([e.text for e in EXAMPLES])
    after = gradients()
    for name, gradient in before.items():
        assert (after[name] - gradient).abs().max() <= 1e-6 + 1e-3 * gradient.abs().max(), name
        assert "lora_B" not in name or gradient.abs().max() > 0, name


def test_four_bit_training_runs_on_a_cpu(tmp_path, tiny_csv):
    pytest.importorskip("bitsandbytes")
    model = replace(MODEL, quantization="4bit")
    assert train(tmp_path, tiny_csv, model=model, batch_size=16) == "trained"
    history = result(tmp_path, "training_metrics.json")["history"]
    assert all(math.isfinite(h["validation_loss"]) for h in history)
    assert any(float(w.abs().max()) > 0 for n, w in adapter_weights(tmp_path).items() if "_B" in n)
