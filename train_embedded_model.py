"""Train the embedded model from scratch: tokenizer, a small Llama, and its measured model card.

    python train_embedded_model.py --data-root DIR    # local copies, one folder a data set
    python train_embedded_model.py                    # the same sets by hub name, `datasets`
    torchrun --nproc_per_node 2 train_embedded_model.py --data-root DIR      # two processes
    python train_embedded_model.py --data-root DIR --card-only   # measure, rewrite the card

Every step of a process adds the gradients of one batch of plain text (next-token loss) and one
batch of questions about labelled reviews (loss on the answer token after the chat prompt).
Questions come in several wordings, negated ones among them. Labelled texts are few for a model that
starts from nothing, so a linear model of their word n-grams, the teacher, says how probably each of
some 500,000 unlabelled sentences is positive, and the answers to those are learned as probabilities
(distillation, Hinton et al. 2015, arXiv 1503.02531). Sentences of news, which hold no opinion, are
answered half yes and half no, so that the model does not take sides on plain facts. Batches are a
pure function of (seed, step, rank), so a run that was interrupted continues from its last
checkpoint as if nothing had happened. The texts of `dataset/` are never read, and neither are the
SST-2 development set and the IMDB test reviews but for the card. Needs a C++ compiler for
torch.compile.
"""

import argparse
import gzip
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from records import read_json, write_json
from settings import EMBEDDED_MODEL_DIR, ROOT, SENTIMENT, Label, Task, UserError, case_variants

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|pad|>",
)
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
# The pre-tokenisation rule of Llama 3: contractions, words with their leading space, numbers in
# groups of three digits, punctuation runs, line breaks.
PRETOKENIZER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class EmbeddedTraining:
    """Shape of the model and of its training; token counts are per process and step."""

    vocab_size: int = 8192
    hidden_size: int = 256
    layers: int = 6
    heads: int = 4
    feed_forward: int = 704
    context: int = 512
    steps: int = 3000
    learning_rate: float = 4e-3  # AdamW: embedding and norms
    matrix_learning_rate: float = 4e-3  # Muon: the matrices of the layers
    warmup_steps: int = 150
    weight_decay: float = 0.05
    plain_text_tokens: int = 256  # length of a plain-text sequence
    plain_text_rows: int = 10
    word_dropout: float = 0.2  # of the words, in half of the short texts
    answer_weight: float = 3.0  # of the answer loss beside the plain-text loss
    # Share of the steps before negated questions join: from the start they cancel the signal of
    # the others, and nothing is learned for a long time.
    negated_from: float = 0.3
    seed: int = 7
    checkpoint_every: int = 200


@dataclass(frozen=True)
class Source:
    """One data set of texts to ask about: where it is, how often it is drawn, how it is written.

    kind: "labelled"; "facts", no opinion, sentence by sentence; or "unlabelled", plain text whose
    sentences the teacher judges.
    """

    folder_file: str  # below --data-root
    hub: tuple[str, str, str]  # repository, split, text column(s) joined by "+"
    weight: float  # share of the draws
    tokenised_lowercase: bool = False  # written as "it 's fine ." in the source
    max_rows: int = 200_000
    kind: str = "labelled"


PLAIN_TEXT_HUB = ("stanfordnlp/imdb", "unsupervised", "text")
SOURCES = (
    Source("sst2/train_phrases.jsonl.gz", ("stanfordnlp/sst2", "train", "sentence"), 0.22, True),
    Source(
        "yelp_sentences/sentences.jsonl.gz", ("fancyzhx/yelp_polarity", "train", "text"), 0.18, True
    ),
    Source(
        "rotten_tomatoes/all.jsonl.gz",
        ("cornell-movie-review-data/rotten_tomatoes", "train", "text"),
        0.05,
        True,
    ),
    Source("imdb/train.jsonl.gz", ("stanfordnlp/imdb", "train", "text"), 0.08),
    Source(
        "yelp_polarity/part_a.jsonl.gz",
        ("fancyzhx/yelp_polarity", "test", "text"),
        0.04,
        max_rows=5_000,
    ),
    Source(
        "amazon_polarity/part_a.jsonl.gz",
        ("fancyzhx/amazon_polarity", "test", "title+content"),
        0.04,
        max_rows=5_000,
    ),
    Source(
        "ag_news/part_a.jsonl.gz",
        ("fancyzhx/ag_news", "test", "text"),
        0.05,
        max_rows=2_000,
        kind="facts",
    ),
    Source("lm_text/imdb_unsup.txt.gz", PLAIN_TEXT_HUB, 0.34, kind="unlabelled"),
)
PLAIN_TEXT = (  # below --data-root: file, share of the plain-text tokens
    ("lm_text/imdb_unsup.txt.gz", 0.62),
    ("lm_text/gutenberg_novels.txt.gz", 0.06),
    ("labelled", 0.32),  # the labelled texts themselves, without a question
)
TEACHER_NGRAM, TEACHER_ALPHA = 2, 3e-7
DEV = ("sst2/dev.jsonl", ("stanfordnlp/sst2", "validation", "sentence"))
IMDB_TEST = ("imdb/test_slice.jsonl.gz", ("stanfordnlp/imdb", "test", "text"))
ANSWER_CASE_WEIGHTS = (0.8, 0.12, 0.08)  # Yes, yes, YES
LENGTH_BUCKETS = (  # (longest text in tokens, rows of a batch, share of the steps)
    (12, 160, 0.26),
    (24, 128, 0.28),
    (44, 80, 0.22),
    (110, 40, 0.14),
    (430, 10, 0.10),
)


def question_tasks():
    """[(task, weight, negated)]: every wording learned; the first label is always `positive`."""
    yes, no = case_variants("yes"), case_variants("no")

    def asks(question, positive, negative):
        return Task(
            "sentiment", question, (Label("positive", positive), Label("negative", negative))
        )

    tasks = [(SENTIMENT, 10.0, False)]
    for question in (
        "Is the sentiment of this text positive? Answer yes or no.",
        "Does this text express a positive opinion? Answer yes or no.",
        "Did the writer like it? Answer yes or no.",
        "Is this a favourable comment? Answer yes or no.",
        "Is the writer satisfied? Reply with yes or no.",
    ):
        tasks.append((asks(question, yes, no), 1.6, False))
    for question in (
        "Is this text negative in sentiment? Answer yes or no.",
        "Is the sentiment of this text negative? Answer yes or no.",
        "Does this text express a negative opinion? Answer yes or no.",
        "Did the writer dislike it? Answer yes or no.",
        "Is the writer disappointed? Reply with yes or no.",
    ):
        tasks.append((asks(question, no, yes), 1.4, True))
    for question in (
        "What is the sentiment of this text? Answer positive or negative.",
        "Is this text positive or negative?",
    ):
        words = case_variants("positive"), case_variants("negative")
        tasks.append((asks(question, *words), 1.5, False))
    return tasks


# ---------------------------------------------------------------------------------------- data


def normalised(text):
    """Letters and digits only, lower case: equality of this is equality of the text."""
    return re.sub(r"[\W_]+", "", text.lower())


def rejoin(text):
    """'it 's fine , really .' → "It's fine, really." for texts tokenised in their source."""
    text = re.sub(r"\s+(n't|'(?:s|re|ve|m|ll|d)\b)", r"\1", text)
    text = re.sub(r"\s+([.,!?;:%)\]])", r"\1", text.replace("-lrb-", "(").replace("-rrb-", ")"))
    text = re.sub(r"([(\[$])\s+", r"\1", text).replace("`` ", '"').replace(" ''", '"')
    text = re.sub(r"\bi\b", "I", text)
    return re.sub(r"(^|[.!?] )([a-z])", lambda m: m[1] + m[2].upper(), text)


def read_rows(data_root, name, hub, max_rows=200_000):
    """[(text, is_positive)] of a local file below data_root, or of a hub data set."""
    if data_root is not None:
        path = Path(data_root) / name
        if not path.exists():
            raise UserError(f"{path} is missing; run without --data-root to read {hub[0]}")
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        return [(row["text"], row["label"] == "positive") for row in rows[:max_rows]]
    from datasets import load_dataset

    repository, split, columns = hub
    table = load_dataset(repository, split=split).shuffle(seed=0)
    table = table.select(range(min(max_rows, len(table))))
    texts = [
        ". ".join(parts) for parts in zip(*(table[c] for c in columns.split("+")), strict=True)
    ]
    return [(text, label == 1) for text, label in zip(texts, table["label"], strict=True)]


def read_plain_text(data_root, name):
    if data_root is not None:
        with gzip.open(Path(data_root) / name, "rt", encoding="utf-8") as lines:
            return [line.strip() for line in lines if line.strip()]
    if name != PLAIN_TEXT[0][0]:
        return []
    return [text for text, _ in read_rows(None, name, PLAIN_TEXT_HUB)]


def sentences_of(text):
    return re.split(r"(?<=[.!?])\s+", text.strip())


def closing_sentences(text, rng):
    """The last one to three sentences of a review: where its verdict usually stands."""
    sentences = sentences_of(text)
    return " ".join(sentences[-int(rng.integers(1, 4)) :])


def tokenised(text):
    """The inverse of `rejoin`: "It's fine, really." → "it 's fine , really ." """
    text = re.sub(r"(n't|'(?:s|re|ve|m|ll|d)\b|[.,!?;:%()\[\]]+)", r" \1 ", text.lower())
    return " ".join(text.split())


def fit_teacher(labelled):
    """A function from texts to P(positive): logistic regression on word n-grams.

    labelled: [(text, 0.0 or 1.0)]. `alpha` was chosen by the log-loss on 700 SST-2 training
    sentences whose phrases were left out of the fit.
    """
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import SGDClassifier

    texts, targets = zip(*labelled, strict=True)
    words = TfidfVectorizer(
        preprocessor=lambda text: rejoin(text).lower(),
        ngram_range=(1, TEACHER_NGRAM),
        min_df=2,
        sublinear_tf=True,
        token_pattern=r"[\w']+|[!?]",
        dtype=np.float32,
    )
    model = SGDClassifier(loss="log_loss", alpha=TEACHER_ALPHA, max_iter=20, random_state=0)
    model.fit(words.fit_transform(texts), np.array(targets) == 1.0)
    return lambda texts: model.predict_proba(words.transform(texts))[:, 1]


def load_corpus(data_root, seed):
    """Texts per source, plain texts per file, and how good the teacher is.

    Nothing of the first two is in a held-out set. A text to ask about is (text, P(positive)): 0 or
    1 where it has a label, ½ where it holds no opinion, and what the teacher says where it has no
    label.
    """
    import numpy as np

    held_out = set()
    for name, hub in (DEV, IMDB_TEST):
        held_out |= {normalised(text) for text, _ in read_rows(data_root, name, hub)}
    plain = {
        name: [t for t in read_plain_text(data_root, name) if normalised(t) not in held_out]
        for name, _ in PLAIN_TEXT
        if name != "labelled"
    }
    rng = np.random.default_rng(seed)
    asked = []
    for source in SOURCES:
        if source.kind == "unlabelled":
            sentences = {s for t in plain[source.folder_file] for s in sentences_of(t)}
            texts = sorted(s for s in sentences if 3 < len(s.split()) <= 40)
            asked.append([(t, None) for t in texts if normalised(t) not in held_out])
            continue
        rows = read_rows(data_root, source.folder_file, source.hub, source.max_rows)
        rows = [(t, float(p)) for t, p in rows if normalised(t) and normalised(t) not in held_out]
        if source.kind == "facts":
            rows = [(s, 0.5) for t, _ in rows for s in sentences_of(t) if len(s.split()) > 3]
        elif source.tokenised_lowercase:  # half of them as a person would write them
            rows = [(rejoin(t) if rng.random() < 0.5 else t, p) for t, p in rows]
        else:  # whole reviews and, as texts of their own, their last sentences
            rows += [(closing_sentences(t, rng), p) for t, p in rows]
        asked.append(rows)
    plain["labelled"] = [
        rejoin(t)
        for source, rows in zip(SOURCES, asked, strict=True)
        if source.kind != "unlabelled"
        for t, _ in rows
    ]
    teacher = fit_teacher(
        [
            row
            for source, rows in zip(SOURCES, asked, strict=True)
            if source.kind == "labelled"
            for row in rows
        ]
    )
    for i, source in enumerate(SOURCES):
        if source.kind == "unlabelled":
            texts = [text for text, _ in asked[i]]
            probability = teacher(texts).tolist()
            styled = [tokenised(t) if rng.random() < 1 / 3 else t for t in texts]
            asked[i] = list(zip(styled, probability, strict=True))
    dev_texts, dev_positive = zip(*read_rows(data_root, *DEV), strict=True)
    right = (teacher(dev_texts) > 0.5) == np.array(dev_positive)
    return asked, plain, {"sst2_dev_accuracy": float(right.mean())}


def train_tokenizer(plain, vocab_size, context):
    """Byte-level BPE in which every answer word is one token at the start of an answer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZER_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = {w for task, *_ in question_tasks() for label in task.labels for w in label.words}
    turns = ["user", "assistant", "system", "\n\n", *sorted(words)]
    texts = plain["labelled"] + plain[PLAIN_TEXT[0][0]][:15_000]
    texts += [task.user_message("") for task, *_ in question_tasks()] * 200
    texts += [turn for turn in turns for _ in range(3000)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    for word in words:
        ids = fast(word, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise UserError(f"the tokenizer splits the answer word {word!r}: {fast.tokenize(word)}")
    return fast


def encode(tokenizer, texts):
    """[(n,) uint16 array] of token ids, one array a text."""
    import numpy as np

    ids = []
    for start in range(0, len(texts), 20_000):
        chunk = tokenizer(
            texts[start : start + 20_000], add_special_tokens=False, split_special_tokens=True
        ).input_ids
        ids += [np.array(row, dtype=np.uint16) for row in chunk]
    return ids


class TrainingBatches:
    """Batches as a pure function of (seed, step, rank)."""

    def __init__(self, tokenizer, asked, plain, config):
        import numpy as np

        self.config = config
        self.pad = tokenizer.pad_token_id
        self.eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
        suffix = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        self.suffix = tokenizer(suffix, add_special_tokens=False).input_ids
        self.tasks, weights, negated = zip(*question_tasks(), strict=True)
        plain_only = np.array(weights) * ~np.array(negated)
        self.task_weights = {
            True: np.array(weights) / sum(weights),
            False: plain_only / plain_only.sum(),
        }
        self.prefixes, self.answers = [], []
        for task in self.tasks:
            rendered = tokenizer.apply_chat_template(
                [{"role": "user", "content": task.user_message("@")}], tokenize=False
            )
            prefix = rendered[: rendered.rindex(" @")]
            self.prefixes.append(tokenizer(prefix, add_special_tokens=False).input_ids)
            words = [word for label in task.labels for word in label.words]
            self.answers.append(tokenizer.convert_tokens_to_ids(words))
        self.texts, self.positive, self.short, weight = [], [], [], []
        for source, rows in zip(SOURCES, asked, strict=True):
            self.texts += encode(tokenizer, [f" {text.strip()}" for text, _ in rows])
            self.positive += [positive for _, positive in rows]
            self.short += [source.tokenised_lowercase or source.kind == "unlabelled"] * len(rows)
            weight += [source.weight / len(rows)] * len(rows)
        lengths = np.array([len(ids) for ids in self.texts])
        weight = np.array(weight)
        self.bounds, lowest = [], 0
        for longest, _, _ in LENGTH_BUCKETS:
            members = np.flatnonzero((lengths > lowest) & (lengths <= longest))
            self.bounds.append((members, np.cumsum(weight[members]) / weight[members].sum()))
            lowest = longest
        bos, end = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<|end_of_text|>")
        self.streams = []
        for name, share in PLAIN_TEXT:
            texts = plain[name]
            order = np.random.default_rng(config.seed).permutation(len(texts))
            encoded = encode(tokenizer, [texts[i] for i in order])
            framed = [np.concatenate([[bos], ids, [end]]).astype(np.uint16) for ids in encoded]
            if framed:
                self.streams.append((np.concatenate(framed), share))

    def questions(self, step, rank):
        """One wording and length: (prefix (1, P), tails (B, T), last (B,), answers (A,), targets).

        tails: text, end of the turn and a drawn answer. answers: the ids of the answer words, those
        for positive first. targets: (B, A) their probabilities.
        """
        import numpy as np
        import torch

        rng = np.random.default_rng([self.config.seed, step, rank, 0])
        shares = [share for _, _, share in LENGTH_BUCKETS]
        bucket = int(rng.choice(len(shares), p=np.array(shares) / sum(shares)))
        members, cumulative = self.bounds[bucket]
        negated = step >= self.config.negated_from * self.config.steps
        task = int(rng.choice(len(self.tasks), p=self.task_weights[negated]))
        answers, case = self.answers[task], np.array(ANSWER_CASE_WEIGHTS)
        rows, targets = [], []
        for draw in rng.random(LENGTH_BUCKETS[bucket][1]):
            i = members[min(int(np.searchsorted(cumulative, draw)), len(members) - 1)]
            ids = self.texts[i]
            if self.short[i] and rng.random() < 0.5:
                kept = ids[rng.random(len(ids)) >= self.config.word_dropout]
                ids = kept if len(kept) else ids
            targets.append(np.concatenate([self.positive[i] * case, (1 - self.positive[i]) * case]))
            rows.append([*ids.tolist(), *self.suffix, answers[rng.choice(6, p=targets[-1])]])
        width = math.ceil(max(map(len, rows)) / 8) * 8
        tails = torch.full((len(rows), width), self.pad)
        for row, ids in enumerate(rows):
            tails[row, : len(ids)] = torch.tensor(ids)
        last = torch.tensor([len(ids) - 2 for ids in rows])
        prefix = torch.tensor([self.prefixes[task]])
        targets = torch.tensor(np.array(targets), dtype=torch.float32)
        return prefix, tails, last, torch.tensor(answers), targets

    def plain_text(self, step, rank):
        """(B, T) token ids cut from the plain-text streams at random places."""
        import numpy as np
        import torch

        rng = np.random.default_rng([self.config.seed, step, rank, 1])
        shares = np.array([share for _, share in self.streams])
        length, rows = self.config.plain_text_tokens, []
        for _ in range(self.config.plain_text_rows):
            stream = self.streams[int(rng.choice(len(shares), p=shares / shares.sum()))][0]
            start = int(rng.integers(0, len(stream) - length - 1))
            rows.append(stream[start : start + length + 1].astype(np.int64))
        return torch.from_numpy(np.stack(rows))


# ------------------------------------------------------------------------------------ training


def build_model(tokenizer, config):
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            intermediate_size=config.feed_forward,
            max_position_embeddings=config.context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    end_of_text = tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, end_of_text],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    return model


def learning_rate_share(step, config):
    """Of the peak learning rate: linear warm-up, then a cosine down to 2 %."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def build_optimizers(model, config):
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    import torch

    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.model.layers.parameters() if p.ndim != 2]
    others += list(model.model.norm.parameters())
    embedding = list(model.model.embed_tokens.parameters())
    muon = torch.optim.Muon(
        matrices,
        lr=config.matrix_learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [
            {"params": embedding, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return muon, adamw


def losses(model):
    """The two loss functions, compiled: about twice as fast on a CPU, needs a C++ compiler."""
    import torch
    from torch.nn.functional import cross_entropy

    def answer_loss(prefix, tails, last, answers, targets, eot):
        rows = torch.arange(len(tails))
        cache = model.model(prefix, use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(tails))
        reach = last[:, None] + 1 >= torch.arange(tails.shape[1])[None, :]  # (B, T)
        mask = torch.cat([torch.ones(len(tails), prefix.shape[1], dtype=torch.bool), reach], dim=1)
        hidden = model.model(tails, past_key_values=cache, attention_mask=mask).last_hidden_state
        answer_logits = model.lm_head(hidden[rows, last]).float()  # (B, V)
        end_logits = model.lm_head(hidden[rows, last + 1]).float()
        loss = -(targets * answer_logits.log_softmax(-1)[:, answers]).sum(1).mean()
        return loss, cross_entropy(end_logits, torch.full_like(last, eot))

    def text_loss(ids):
        hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
        return cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), ids[:, 1:].flatten())

    return torch.compile(answer_loss, dynamic=True), torch.compile(text_loss)


def train(accelerator, model, batches, config, checkpoint):
    """Run the steps that are left; the seconds of all. Every process calls this."""
    import torch

    rank, world = accelerator.process_index, accelerator.num_processes
    model.set_attn_implementation("eager")  # the CPU's fused attention is slow backwards
    optimizers = build_optimizers(model, config)
    step, earlier = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["config"] != asdict(config):
            raise UserError(f"{checkpoint} belongs to other settings; remove it to start again")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, earlier = state["step"], state["seconds"]
        accelerator.print(f"resuming at step {step}", file=sys.stderr)
    answer_loss, text_loss = losses(model)
    parameters = list(model.parameters())
    started, first, averages = time.perf_counter(), step, [0.0, 0.0]

    def seconds():
        return earlier + time.perf_counter() - started

    while step < config.steps:
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = group["peak_lr"] * learning_rate_share(step, config)
        with torch.autocast("cpu", torch.bfloat16):
            answer, end = answer_loss(*batches.questions(step, rank), batches.eot)
        (config.answer_weight * (answer + 0.1 * end)).backward()
        with torch.autocast("cpu", torch.bfloat16):
            text = text_loss(batches.plain_text(step, rank))
        text.backward()
        if world > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            flat = accelerator.reduce(flat, reduction="mean")
            for p, part in zip(
                parameters, flat.split([p.numel() for p in parameters]), strict=True
            ):
                p.grad.copy_(part.view_as(p))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        for i, value in enumerate((answer, text)):
            averages[i] += (value.item() - averages[i]) / min(50, step - first)
        if step % 25 == 0 and accelerator.is_main_process:
            per_step = (time.perf_counter() - started) / (step - first)
            minutes = per_step * (config.steps - step) / 60
            print(
                f"step {step}/{config.steps} answer loss {averages[0]:.4f} text loss "
                f"{averages[1]:.3f} {per_step:.2f} s/step, {minutes:.0f} min left",
                file=sys.stderr,
                flush=True,
            )
        if (step % config.checkpoint_every == 0 or step == config.steps) and (
            accelerator.is_main_process
        ):
            partial = checkpoint.with_suffix(".partial")
            state = {"config": asdict(config), "step": step, "seconds": seconds()}
            state["model"] = model.state_dict()
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            torch.save(state, partial)
            os.replace(partial, checkpoint)
    accelerator.wait_for_everyone()
    return seconds()


# ------------------------------------------------------------------------------------ the card


def score_rows(classifier, rows):
    """`calibration_metrics` of labelled (text, is_positive) rows, and their mean label mass."""
    import numpy as np

    from calibration_metrics import calibration_metrics
    from records import label_probabilities

    predictions = classifier.classify_batch([text for text, _ in rows], progress=True)
    logprobs = np.array([p.label_logprobs for p in predictions])
    label = np.array([0 if positive else 1 for _, positive in rows])
    metrics = calibration_metrics(label_probabilities(logprobs), label)
    return metrics | {"label_mass": float(np.mean([p.label_mass for p in predictions]))}


def continuation(classifier, prompt, new_tokens=24):
    """Greedy continuation of a raw prompt, without question or template."""
    import torch

    ids = [classifier.tokenizer.bos_token_id]
    ids += classifier.tokenizer(prompt, add_special_tokens=False).input_ids
    with torch.inference_mode():
        out = classifier.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=new_tokens,
            repetition_penalty=1.2,
        )
    return classifier.tokenizer.decode(out[0][1:], skip_special_tokens=True)


def measure(folder, data_root):
    """What the card reports: measured on texts that training never saw."""
    from logprobs_confidence import TransformerLogprobsClassifier

    dev = read_rows(data_root, *DEV)
    imdb = read_rows(data_root, *IMDB_TEST)[:2000]
    classifier = TransformerLogprobsClassifier(str(folder))
    measured = {
        "sst2_dev": score_rows(classifier, dev),
        "imdb_test_slice": score_rows(classifier, imdb),
        "continuations": [
            continuation(classifier, prompt)
            for prompt in ("The food was", "I watched this film because", "The staff at the hotel")
        ],
        "wordings": {},
    }
    for task, *_ in question_tasks():
        asked = TransformerLogprobsClassifier(str(folder), task=task)
        names = [p.predicted for p in asked.classify_batch([text for text, _ in dev])]
        right = sum((n == "positive") == p for n, (_, p) in zip(names, dev, strict=True))
        measured["wordings"][task.question] = right / len(dev)
    return measured


def write_card(folder, run, measured):
    """README.md of the model from its own measurements."""

    def row(title, m):
        ece = m["ece"]
        return (
            f"| {title} | {m['n']} | {m['accuracy']['estimate']:.3f} "
            f"[{m['accuracy']['low']:.3f}, {m['accuracy']['high']:.3f}] "
            f"| {m['mean_confidence']['estimate']:.3f} | {ece['estimate']:.3f} "
            f"[{ece['low']:.3f}, {ece['high']:.3f}] | {ece['null_mean']:.3f} "
            f"| {m['log_loss']['estimate']:.3f} | {m['label_mass']:.4f} |"
        )

    config = run["config"]
    answered = {
        "labelled": "its label",
        "facts": "half yes, half no",
        "unlabelled": "the teacher's probability",
    }
    sources = "\n".join(
        f"| {s.hub[0]}, {s.hub[1]} | {answered[s.kind]} | {s.weight:.2f} | {n:,} |"
        for s, n in zip(SOURCES, run["texts"], strict=True)
    )
    wordings = "\n".join(f"| {q} | {a:.3f} |" for q, a in measured["wordings"].items())
    continuations = "\n".join(f"> {text}\n" for text in measured["continuations"])
    card = f"""---
language: en
pipeline_tag: text-generation
---
# The embedded model

A Llama-architecture chat model of {run["parameters"]:,} parameters (hidden {config["hidden_size"]},
{config["layers"]} layers, {config["heads"]} heads, feed-forward {config["feed_forward"]},
vocabulary {config["vocab_size"]:,}, context {config["context"]} tokens, tied embeddings, bfloat16).
It was trained from scratch for this project, so that the whole pipeline runs for real on two CPU
cores without a download. It answers yes/no questions about the sentiment of English reviews.

Made by `train_embedded_model.py`: {config["steps"]:,} steps, seed {config["seed"]}, about
{run["seconds"] / 60:.0f} minutes on {run["processes"]} CPU core(s). Every number below was
measured by `python train_embedded_model.py --data-root DIR --card-only` on texts that training
never saw.

## Measured

Question: "{SENTIMENT.question}" Intervals: 95 %, bootstrap. "Perfect" is the ECE that a perfectly
calibrated model with the same confidences shows at this number of rows.

| texts | rows | accuracy | mean confidence | ECE, 20 bins | perfect | log-loss | label mass |
| --- | ---: | --- | ---: | --- | ---: | ---: | ---: |
{row("SST-2 development set", measured["sst2_dev"])}
{row("IMDB test reviews (first 2,000 of a shuffled slice)", measured["imdb_test_slice"])}

Decisions about the recipe that were made while looking at the SST-2 development set: that negated
questions join late, and that a teacher is learned from (an earlier model without one, of the same
size, had an accuracy of 0.808 there). Nothing was chosen on the IMDB reviews; the last checkpoint
was kept. The teacher alone, logistic regression on word n-grams, has an accuracy of
{run["teacher"]["sst2_dev_accuracy"]:.3f} on the SST-2 development set.

| question (SST-2 development set) | accuracy |
| --- | ---: |
{wordings}

Raw continuations (greedy, repetition penalty 1.2):

{continuations}
## Training data

Reviews with a positive or negative label, asked about in {len(question_tasks())} wordings, negated
ones among them (those join after {config["negated_from"]:.0%} of the steps; present from the start
they cancel the others' signal), plus plain review text and 19th-century novels with a next-token
loss. Sentences of unlabelled reviews are answered with the probability that the teacher gives
them, sentences of news (ag_news, without their topics), which hold no opinion, half with yes and
half with no. Rows of the SST-2 development set and of the IMDB test slice were removed first.
`dataset/` was never read.

| source | answered with | share of the draws | texts |
| --- | --- | ---: | ---: |
{sources}

The sources are public research data sets; some allow non-commercial use only. Cite them, and check
their terms, before using these weights for anything but research and demonstration.

## What it cannot do

It knows sentiment and nothing else: no facts, no arithmetic, no other task without fine-tuning, no
language but English. It follows no instruction but the kinds of question above, cannot say in words
how sure it is, and its continuations imitate reviews without meaning. It is weak on irony, faint
praise and mixed opinions, and on short factual texts it guesses, often with confidence.
"""
    (folder / "README.md").write_text(card, encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", help="folder with local copies (default: the hub)")
    parser.add_argument("--output", type=Path, default=EMBEDDED_MODEL_DIR, help="model folder")
    parser.add_argument("--steps", type=int, default=EmbeddedTraining.steps, help="training steps")
    parser.add_argument("--seed", type=int, default=EmbeddedTraining.seed)
    parser.add_argument("--card-only", action="store_true", help="measure and rewrite the card")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.card_only and not train_and_save(arguments):
            return 0  # a helper process of `accelerate launch`
        run = read_json(arguments.output / "training.json", "train the model first")
        measured = measure(arguments.output, arguments.data_root)
        write_json(arguments.output / "training.json", run | {"measured": measured})
        write_card(arguments.output, run, measured)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {(arguments.output / 'README.md').stat().st_size} bytes of card")
    return 0


def train_and_save(arguments):
    """Train (or continue) and write the model folder; False in a helper process."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    config = EmbeddedTraining(steps=arguments.steps, seed=arguments.seed)
    asked, plain, teacher = load_corpus(arguments.data_root, config.seed)
    tokenizer = train_tokenizer(plain, config.vocab_size, config.context)
    torch.manual_seed(config.seed)
    model = build_model(tokenizer, config)
    checkpoint = ROOT / "checkpoints" / "embedded_model.pt"
    checkpoint.parent.mkdir(exist_ok=True)
    batches = TrainingBatches(tokenizer, asked, plain, config)
    seconds = train(accelerator, model, batches, config, checkpoint)
    if not accelerator.is_main_process:
        return False
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    model.set_attn_implementation("sdpa")
    model.to(torch.bfloat16).save_pretrained(output)
    run = {
        "config": asdict(config),
        "parameters": model.num_parameters(),
        "texts": [len(rows) for rows in asked],
        "teacher": teacher,
        "seconds": round(seconds),
        "processes": accelerator.num_processes,
    }
    write_json(output / "training.json", run)
    checkpoint.unlink()
    return True


if __name__ == "__main__":
    sys.exit(main())
