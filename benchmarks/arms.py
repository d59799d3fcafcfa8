"""The contestants of speed.py: each a function that loads its model and returns what is timed.

They run in processes of their own (`workers.Worker`), so whatever they import and set is theirs.
Those that classify are given the same token ids and return the (N, K) probabilities of the labels,
not divided by the label mass.
"""

import shutil
from dataclasses import replace

from settings import EMBEDDED_MODEL_DIR, SENTIMENT, DataSettings, ModelSettings, TrainingSettings

BATCH = 32
SHAPES = {  # Llama configurations of random weights; the vocabulary of the last is SmolLM2's
    "29M": {
        "hidden_size": 384,
        "num_hidden_layers": 14,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 1024,
        "vocab_size": 16384,
    },
    "135M": {  # HuggingFaceTB/SmolLM2-135M
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
    },
}


# ------------------------------------------------------------------------- what everybody is given


def prompts():
    """→ (texts, token ids, ids that they all begin with, first-token ids of each label).

    The held-out texts of dataset/ in the question of the default task, and a model folder's
    tokenizer is always the embedded model's.
    """
    from transformers import AutoTokenizer

    from dataset_loader import load_splits
    from logprobs_confidence import PromptEncoder

    encoder = PromptEncoder(AutoTokenizer.from_pretrained(EMBEDDED_MODEL_DIR), SENTIMENT, 504)
    examples = load_splits(DataSettings(), SENTIMENT)
    texts = [e.text.strip() for e in examples if e.split in ("calibration", "test")]
    sequences = [ids for ids, _ in encoder.encode(texts)]
    return lambda: (texts, sequences, encoder.prefix, encoder.label_ids)


def random_model(folder, shape):
    """→ number of parameters of the random model that now lies in `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=512, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    for path in EMBEDDED_MODEL_DIR.glob("*token*"):
        shutil.copy(path, folder)
    shutil.copy(EMBEDDED_MODEL_DIR / "chat_template.jinja", folder)
    return lambda: model.num_parameters()


# ------------------------------------------------------------------------------- others' ways


def plain_model(folder):
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def label_probabilities(logits, label_ids):
    """(N, K) from the logits (N, V) of the next token."""
    import torch

    probabilities = logits.float().softmax(-1)
    return torch.stack([probabilities[:, list(ids)].sum(-1) for ids in label_ids], dim=1)


def generate(folder, sequences, prefix, label_ids):
    """`generate(max_new_tokens=1)`, one prompt after the other."""
    import torch

    model = plain_model(folder)

    def one(ids):
        ids = torch.tensor([ids])
        step = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        return label_probabilities(step.scores[0], label_ids)

    def run():
        with torch.inference_mode():
            return torch.cat([one(ids) for ids in sequences]).numpy()

    return run


def lm_eval(folder, sequences, prefix, label_ids):
    """lm-evaluation-harness: every answer token is a choice, one forward pass a prompt."""
    import numpy as np
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=BATCH)
    choices = [token for ids in label_ids for token in ids]
    ends = np.cumsum([len(ids) for ids in label_ids])[:-1]
    requests = [(("", ""), ids, [token]) for ids in sequences for token in choices]

    def run():
        scored = model._loglikelihood_tokens(requests, disable_tqdm=True)
        logprobs = np.array([logprob for logprob, _ in scored]).reshape(len(sequences), -1)
        return np.stack([p.sum(1) for p in np.split(np.exp(logprobs), ends, axis=1)], axis=1)

    return run


def in_batches(sequences, label_ids, forward):
    """Whole prompts, longest first, `BATCH` at a time and padded on the right.

    forward((B, T) ids, (B,) place of the last token) → its logits (B, V).
    """
    import torch

    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))

    def run():
        answers = torch.empty(len(sequences), len(label_ids))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            padded = torch.zeros(len(rows), len(sequences[rows[0]]), dtype=torch.long)
            for row, i in enumerate(rows):
                padded[row, : len(sequences[i])] = torch.tensor(sequences[i])
            last = torch.tensor([len(sequences[i]) - 1 for i in rows])
            with torch.inference_mode():
                answers[rows] = label_probabilities(forward(padded, last), label_ids)
        return answers.numpy()

    return run


def batched(folder, sequences, prefix, label_ids):
    """Batches of 32 whole prompts, logits of the whole vocabulary at every position."""
    import torch

    model = plain_model(folder)

    def forward(ids, last):
        return model(input_ids=ids, use_cache=False).logits[torch.arange(len(ids)), last]

    return in_batches(sequences, label_ids, forward)


def export(folder, path, every_position):
    """Write a model as an ONNX graph: (B, T) ids, (B,) places → logits.

    every_position: (B, T, V), as exported models have them; otherwise the graph is cut so that only
    the wanted place of a prompt reaches the output head, (B, V).
    """
    import warnings

    import torch

    warnings.simplefilter("ignore")
    model = plain_model(folder)

    class Graph(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, last):
            if every_position:
                return self.model(input_ids=ids, use_cache=False).logits
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
            return self.model.lm_head(hidden[torch.arange(hidden.shape[0]), last])

    rows = torch.export.Dim("rows", min=2, max=4096)
    tokens = torch.export.Dim("tokens", min=2, max=511)

    def run():
        torch.onnx.export(
            Graph(),
            (torch.zeros(3, 7, dtype=torch.long), torch.tensor([3, 4, 6])),
            path,
            dynamo=True,
            dynamic_shapes=({0: rows, 1: tokens}, {0: rows}),
            verbose=False,
        )

    return run


def onnxruntime(path, sequences, prefix, label_ids):
    """Batches of 32 whole prompts in onnxruntime, with a graph that `export` wrote."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}

    def forward(ids, last):
        inputs = {"ids": ids.numpy(), "last": last.numpy()}
        (logits,) = session.run(None, {name: inputs[name] for name in names})
        logits = torch.from_numpy(logits)
        return logits[torch.arange(len(ids)), last] if logits.ndim == 3 else logits

    return in_batches(sequences, label_ids, forward)


# --------------------------------------------------------------------------------- this project


def classifier_of(folder, dtype="float32"):
    from logprobs_confidence import TransformerLogprobsClassifier

    return TransformerLogprobsClassifier(ModelSettings(str(folder), device="cpu", dtype=dtype))


def engine(folder, sequences, prefix, label_ids, dtype="float32", compiled=False):
    """This project's engine, from token ids to probabilities.

    compiled: its forward pass through torch.compile, which the first run waits for.
    """
    import numpy as np

    classifier = classifier_of(folder, dtype)
    if compiled:
        import torch

        _ = classifier.engine.shares_prefix  # checked on the model as it is
        classifier.model.forward = torch.compile(classifier.model.forward, dynamic=True)

    def score(batch, shared):
        return classifier.label_logprobs(batch, prefix=shared)

    def run():
        answers = np.empty((len(sequences), len(label_ids)))
        shared = classifier.engine.prefix(prefix, adapter_active=False)
        for rows, scored, _ in classifier.engine.run(sequences, shared, score):
            answers[rows] = scored
        return np.exp(answers)

    return run


def whole(folder, texts, dtype="float32"):
    """`classify_batch`: from texts to predictions, with all that surrounds the engine."""
    import numpy as np

    classifier = classifier_of(folder, dtype)
    return lambda: np.exp([p.label_logprobs for p in classifier.classify_batch(texts)])


def multiplied(model):
    """Weights of the model's linear layers: ([for every token], [at a wanted position alone])."""
    import torch

    from engine import position_wise

    def weights(module):
        return [x.weight for x in module.modules() if isinstance(x, torch.nn.Linear)]

    once = [*weights(model.get_output_embeddings())]
    once += [w for part in position_wise(model) for w in weights(part)]
    apart = set(map(id, once))
    return [w for w in weights(model) if id(w) not in apart], once


def operations(model, tokens, positions):
    """Of the matrix products that so many tokens, and so many wanted positions, need."""
    often, once = multiplied(model)
    return 2 * (tokens * sum(w.numel() for w in often) + positions * sum(w.numel() for w in once))


def matrix_rate(folder, sequences, prefix):
    """→ run() → what share of the machine's matrix-product rate the engine reaches.

    The rate is that of the products of the model's own linear layers and nothing else: its
    weights, one after the other, with as many rows as a batch has tokens, as many at a time as the
    engine has batches under way. What is needed of a text counts: the tokens that it does not
    share in every layer, and one position at the output head and in what the last layer computes
    after its keys and values. Padding, attention, norms, activations, everything in Python is what
    is missing to 1.
    """
    import time
    from concurrent.futures import ThreadPoolExecutor

    import torch
    from torch.nn.functional import linear

    from engine import intra_op_threads

    classifier = classifier_of(folder)
    own, (often, once) = classifier.engine, multiplied(classifier.model)
    tails = [len(ids) - len(prefix) for ids in sequences]
    tokens, rows = own.budget, max(1, own.budget * len(tails) // sum(tails))
    inputs = {n: torch.randn(tokens, n) for n in {w.shape[1] for w in once + often}}

    def products(_):
        with torch.inference_mode(), intra_op_threads(own.threads):
            for weight in often:
                linear(inputs[weight.shape[1]], weight)
            for weight in once:
                linear(inputs[weight.shape[1]][:rows], weight)

    one_batch = operations(classifier.model, tokens, rows)
    needed = operations(classifier.model, sum(tails), len(tails))
    batches = own.workers * max(1, round(needed / one_batch / own.workers))
    classify = engine(folder, sequences, prefix, classifier.encoder.label_ids)

    def run():
        started = time.perf_counter()
        with ThreadPoolExecutor(own.workers) as pool:
            list(pool.map(products, range(batches)))
        rate = batches * one_batch / (time.perf_counter() - started)
        started = time.perf_counter()
        classify()
        reached = needed / (time.perf_counter() - started)
        return {"gflop_per_sec": rate / 1e9, "reached_fraction": reached / rate}

    return run


# -------------------------------------------------------------------------------- consistency


def consistency(folder, texts, samples):
    """Classification of texts, and N sampled answers of each if `samples` is not 0."""
    from consistency_confidence import consistency_predictions
    from settings import EvaluationSettings

    classifier = classifier_of(folder)

    def run():
        predictions = classifier.classify_batch(texts)
        if samples:
            settings = replace(EvaluationSettings(), samples=samples)
            consistency_predictions(classifier.task, predictions, settings)

    return run


def generations(folder, sequences, samples):
    """N calls of `generate` that sample one token, for every prompt."""
    import torch

    model = plain_model(folder)

    def run():
        with torch.inference_mode():
            for ids in sequences:
                ids = torch.tensor([ids])
                for _ in range(samples):
                    model.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=1,
                        do_sample=True,
                        pad_token_id=0,
                    )

    return run


# -------------------------------------------------------------------------------- fine-tuning


def lora(classifier):
    """The adapter of fine_tune_model.py, put on the model in the same way."""
    from fine_tune_model import add_adapter

    training = TrainingSettings().for_model(classifier.model.num_parameters())
    classifier.model = add_adapter(classifier, training)
    return training


def optimizer_of(model, training):
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=training.learning_rate, fused=True), trained


def training_rows(n):
    from dataset_loader import load_splits

    rows = [e for e in load_splits(DataSettings(), SENTIMENT) if e.split == "train"]
    return rows[:: len(rows) // n][:n]


def fine_tuning(folder, n_rows):
    """One epoch over n rows as fine_tune_model.py trains."""
    classifier = classifier_of(folder)
    return epoch(classifier, lora(classifier), n_rows)


def epoch(classifier, training, n_rows):
    """→ run() → one epoch over n rows; classifier: with the adapter to train."""
    import torch

    from fine_tune_model import AnswerBatches, answer_loss

    share = classifier.engine.shares_prefix
    model = classifier.model.train()
    optimizer, trained = optimizer_of(model, training)
    batches = AnswerBatches(
        classifier.encoders, training_rows(n_rows), training.batch_size, training.train_seed
    ).epoch(0)

    def run():
        for number, batch in enumerate(batches, 1):
            (answer_loss(model, batch, share) / training.accumulation).backward()
            if number % training.accumulation == 0 or number == len(batches):
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()

    return run


def reference_fine_tuning(folder, n_rows, accumulation=16):
    """The common setting: one row at a time, the loss of every position, gradients of 16 rows
    added up, activations computed again at the backward pass."""
    import torch

    from engine import FeatureDropout
    from fine_tune_model import AnswerBatches

    classifier = classifier_of(folder)
    attention = classifier.model.config._attn_implementation
    training = lora(classifier)
    model = classifier.model.train()
    model.set_attn_implementation(attention)  # what transformers chooses
    for module in model.modules():
        if isinstance(module, FeatureDropout):
            module.__class__ = torch.nn.Dropout  # what PEFT chooses
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    optimizer, trained = optimizer_of(model, training)
    rows = AnswerBatches(classifier.encoders, training_rows(n_rows), 1, 0).epoch(0)

    def run():
        for number, (row,) in enumerate(rows, 1):
            whole = torch.tensor([[*row.prompt, *row.answer]])
            (model(input_ids=whole, labels=whole).loss / accumulation).backward()
            if number % accumulation == 0:
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()

    return run


def gradient_difference(folder, n_rows):
    """→ ‖Δ gradient‖ / ‖gradient‖ of a batch with a shared prefix against its rows one by one."""
    import torch
    from torch.nn.functional import cross_entropy

    from fine_tune_model import AnswerBatches, answer_loss

    classifier = classifier_of(folder)
    lora(classifier)
    _ = classifier.engine.shares_prefix
    model = classifier.model.eval()  # no dropout
    torch.manual_seed(0)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for weight in trained:  # a fresh adapter has zeros, to which half of the gradients belong
            weight.normal_(std=0.02)
    (batch,) = AnswerBatches(classifier.encoders, training_rows(n_rows), n_rows, 0).epoch(0)

    def gradient(losses):
        for loss in losses:
            loss.backward()
        found = torch.cat([weight.grad.flatten() for weight in trained])
        model.zero_grad()
        return found

    def alone(row):
        whole = torch.tensor([[*row.prompt, *row.answer[:-1]]])
        logits = model(input_ids=whole).logits[0, len(row.prompt) - 1 :]
        return cross_entropy(logits, torch.tensor(row.answer), reduction="sum") / len(batch)

    def run():
        one_by_one = gradient(alone(row) for row in batch)
        shared = gradient([answer_loss(model, batch)])
        return float((shared - one_by_one).norm() / one_by_one.norm())

    return run
