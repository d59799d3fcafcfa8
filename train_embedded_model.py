"""Train the embedded model from scratch: tokenizer, a small Llama, and its measured model card.

    python train_embedded_model.py --data-root DIR    # local copies, one folder a data set
    python train_embedded_model.py                    # the same sets by hub name, `datasets`

or stage by stage, the second one on two processes here or, with what the first wrote to
checkpoints/embedded_model, on a machine with a GPU:

    python train_embedded_model.py --stage prepare --data-root DIR
    torchrun --nproc_per_node 2 train_embedded_model.py --stage train
    python train_embedded_model.py --stage card --data-root DIR

Every step of a process adds the gradients of one batch of plain text (next-token loss) and one
batch of questions about labelled reviews (loss on the answer token after the chat prompt).
Questions come in several wordings, negated ones among them. Labelled texts are few for a model that
starts from nothing, so a sentence encoder, the teacher (`sentence_teacher.py`), first learns from
them and then says of every text, labelled or not, how probably it is positive and what it is about:
the answers are learned as probabilities, and at the end of a text the model learns to predict the
teacher's embedding of it, by its principal components. Sentences of news, which hold no opinion,
are answered half yes and half no, so that the model does not take sides on plain facts. Batches are
a pure function of (seed, step, rank), so a run that was interrupted continues from its last
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from records import atomic_path, read_json, write_json
from settings import (
    EMBEDDED_MODEL_DIR,
    ROOT,
    SENTIMENT,
    Label,
    Task,
    UserError,
    case_variants,
    fingerprint,
)

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
    steps: int = 1500
    learning_rate: float = 2e-3  # AdamW: embedding and norms
    matrix_learning_rate: float = 4e-3  # Muon: the matrices of the layers
    warmup_steps: int = 150
    weight_decay: float = 0.05
    plain_text_tokens: int = 256  # length of a plain-text sequence
    plain_text_rows: int = 10
    batch_scale: int = 1  # times the rows of `LENGTH_BUCKETS` and of plain text
    word_dropout: float = 0.2  # of the words, in half of the short texts
    answer_weight: float = 3.0  # of the answer loss beside the plain-text loss
    meaning_size: int = 64  # principal components of the teacher's embedding to predict
    meaning_weight: float = 1.0  # of their squared error
    label_share: float = 0.5  # of the label, the rest of the teacher, in an answer to learn
    embedding_scale: float = 0.08  # standard deviation of the first word vectors
    # Share of the steps before negated questions join: from the start they cancel the signal of
    # the others, and nothing is learned for a long time.
    negated_from: float = 0.3
    seed: int = 7
    checkpoint_every: int = 200


@dataclass(frozen=True)
class Source:
    """One data set of texts to ask about: where it is, how often it is drawn, how it is written.

    kind: "labelled"; "facts", no opinion, sentence by sentence; or "unlabelled", texts whose
    sentences the teacher judges. From `taught` of its texts the teacher learns.
    """

    folder_file: str  # below --data-root
    hub: tuple[str, str, str]  # repository, split, text column(s) joined by "+"
    weight: float  # share of the draws
    tokenised_lowercase: bool = False  # written as "it 's fine ." in the source
    max_rows: int = 200_000
    kind: str = "labelled"
    taught: int = 0


PLAIN_TEXT_HUB = ("stanfordnlp/imdb", "unsupervised", "text")
SOURCES = (
    Source(
        "sst2/train_phrases.jsonl.gz",
        ("stanfordnlp/sst2", "train", "sentence"),
        0.16,
        tokenised_lowercase=True,
        taught=70_000,
    ),
    Source(
        "yelp_sentences/sentences.jsonl.gz",
        ("fancyzhx/yelp_polarity", "train", "text"),
        0.18,
        tokenised_lowercase=True,
        taught=60_000,
    ),
    Source(
        "rotten_tomatoes/all.jsonl.gz",
        ("cornell-movie-review-data/rotten_tomatoes", "train", "text"),
        0.04,
        tokenised_lowercase=True,
        taught=10_000,
    ),
    Source("imdb/train.jsonl.gz", ("stanfordnlp/imdb", "train", "text"), 0.08, taught=25_000),
    Source(
        "yelp_polarity/part_a.jsonl.gz",
        ("fancyzhx/yelp_polarity", "test", "text"),
        0.04,
        max_rows=5_000,
        taught=5_000,
    ),
    Source(
        "amazon_polarity/part_a.jsonl.gz",
        ("fancyzhx/amazon_polarity", "test", "title+content"),
        0.04,
        max_rows=5_000,
        taught=5_000,
    ),
    Source(
        "ag_news/part_a.jsonl.gz",
        ("fancyzhx/ag_news", "test", "text"),
        0.05,
        max_rows=2_000,
        kind="facts",
        taught=2_000,
    ),
    Source("lm_text/imdb_unsup.txt.gz", PLAIN_TEXT_HUB, 0.29, max_rows=240_000, kind="unlabelled"),
    Source(
        "yelp_polarity/part_a.jsonl.gz",
        ("fancyzhx/yelp_polarity", "test", "text"),
        0.06,
        max_rows=30_000,
        kind="unlabelled",
    ),
    Source(
        "amazon_polarity/part_a.jsonl.gz",
        ("fancyzhx/amazon_polarity", "test", "title+content"),
        0.06,
        max_rows=30_000,
        kind="unlabelled",
    ),
)
PLAIN_TEXT = (  # below --data-root: file, share of the plain-text tokens
    ("lm_text/imdb_unsup.txt.gz", 0.62),
    ("lm_text/gutenberg_novels.txt.gz", 0.06),
    ("labelled", 0.32),  # the labelled texts themselves, without a question
)
STAGES = ("prepare", "train", "card")
TEACHER = "sentence-transformers/all-MiniLM-L6-v2"
TEACHER_WORDS = 60  # of the longest text that it learns from or judges
MEANING_STEP = 0.5  # standard deviations: whole numbers of it, in a byte, are exact enough
DEV = ("sst2/dev.jsonl", ("stanfordnlp/sst2", "validation", "sentence"))
IMDB_TEST = ("imdb/test_slice.jsonl.gz", ("stanfordnlp/imdb", "test", "text"))
ANSWER_CASE_WEIGHTS = (0.8, 0.12, 0.08)  # Yes, yes, YES
GPU_BATCH_SCALE = 16
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


def load_corpus(data_root, seed):
    """Texts to ask about per source and plain texts per file; none of them is in a held-out set.

    A text to ask about is (text, P(positive)): 0 or 1 where it has a label, ½ where it holds no
    opinion, None where the teacher alone will say.
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
            whole = plain.get(source.folder_file) or [
                t for t, _ in read_rows(data_root, source.folder_file, source.hub, source.max_rows)
            ]
            sentences = {s for t in whole for s in sentences_of(t)}
            texts = sorted(s for s in sentences if 3 < len(s.split()) <= 40)
            texts = [t for t in texts if normalised(t) not in held_out]
            chosen = [texts[i] for i in rng.permutation(len(texts))[: source.max_rows]]
            asked.append([(tokenised(t) if rng.random() < 1 / 3 else t, None) for t in chosen])
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
    return asked, plain


def is_short(text):
    """Whether the teacher can learn from a text and judge it."""
    return len(text.split()) <= TEACHER_WORDS


def teach(asked, name, data_root, folder, seed):
    """Fit the teacher, let it judge every short text of `asked`, keep what it says in `folder`."""
    import numpy as np
    import torch

    from sentence_teacher import SentenceTeacher

    encoder = folder / "encoder"
    if (encoder / "head.npy").exists():
        teacher = SentenceTeacher.load(encoder)
    else:
        rng = np.random.default_rng(seed)
        rows = []
        for source, texts in zip(SOURCES, asked, strict=True):
            if source.taught:
                short = [row for row in texts if is_short(row[0])]
                rows += [short[i] for i in rng.permutation(len(short))[: source.taught]]
        torch.manual_seed(seed)
        teacher = SentenceTeacher(name)
        teacher.fit(rows, seed)
        folder.mkdir(parents=True, exist_ok=True)
        teacher.save(encoder)
    positive, embeddings = teacher.judge([t for rows in asked for t, _ in rows if is_short(t)])
    dev_texts, dev_positive = zip(*read_rows(data_root, *DEV), strict=True)
    right = (teacher.judge([rejoin(t) for t in dev_texts])[0] > 0.5) == np.array(dev_positive)
    partial = folder / "judgements.partial.npz"
    np.savez(
        partial,
        texts=corpus_print(asked),
        positive=positive,
        embeddings=embeddings,
        sst2_dev_accuracy=right.mean(),
    )
    os.replace(partial, folder / "judgements.npz")


def corpus_print(asked):
    return fingerprint([[text for text, _ in rows] for rows in asked])


def read_judgements(asked, folder, config):
    """What the teacher says: `asked` with P(positive) filled in, and what the texts are about.

    Returns ([[(text, P(positive))]], meanings (N, D) int8 of all texts in order, known (N,) bool,
    SST-2 accuracy). Meanings are principal components of the embeddings, each with mean 0 and
    variance 1, so that no single one, the opinion for one, outweighs the others, in units of
    `MEANING_STEP`. Where a text is too long for the teacher, `known` is False and P(positive) that
    of the label.
    """
    import numpy as np

    path = folder / "judgements.npz"
    if not path.exists():
        raise UserError(f"{path} is missing; run: python train_embedded_model.py --stage prepare")
    saved = np.load(path)
    if saved["texts"] != corpus_print(asked):
        raise UserError(f"{path} belongs to other texts; remove {folder} to make it again")
    known = np.array([is_short(t) for rows in asked for t, _ in rows])
    values = saved["embeddings"].astype(np.float32)
    values -= values.mean(0)
    variances, directions = np.linalg.eigh(values.T @ values / len(values))  # rising
    kept = np.flatnonzero(variances > 1e-6 * variances[-1])[-config.meaning_size :]
    meanings = np.zeros((len(known), len(kept)), dtype=np.int8)
    values = values @ (directions[:, kept] / np.sqrt(variances[kept]))
    meanings[known] = np.clip(np.rint(values / MEANING_STEP), -127, 127)
    judged, positive = [], iter(saved["positive"].tolist())
    for rows in asked:
        judged.append([])
        for text, label in rows:
            share = next(positive) if is_short(text) else label
            if label is not None:
                share = config.label_share * label + (1 - config.label_share) * share
            judged[-1].append((text, share))
    return judged, meanings, known, float(saved["sst2_dev_accuracy"])


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


def corpus_arrays(tokenizer, asked, plain, meanings, known, config):
    """{name: array}: all that training needs of the texts, in token ids.

    text: those to ask about, one after the other; length, positive, short, meaning and known: of
    each. source: of how many each source has. stream_N: the plain text, as in `PLAIN_TEXT`.
    """
    import numpy as np

    ids, positive, short = [], [], []
    for source, rows in zip(SOURCES, asked, strict=True):
        ids += encode(tokenizer, [f" {text.strip()}" for text, _ in rows])
        positive += [p for _, p in rows]
        short += [source.tokenised_lowercase or source.kind == "unlabelled"] * len(rows)
    arrays = {
        "text": np.concatenate(ids),
        "length": np.array([len(row) for row in ids]),
        "positive": np.array(positive),
        "short": np.array(short),
        "meaning": meanings,
        "known": known,
        "source": np.array([len(rows) for rows in asked]),
    }
    bos, end = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    for number, (name, _) in enumerate(PLAIN_TEXT):
        texts = plain[name]
        order = np.random.default_rng(config.seed).permutation(len(texts))
        encoded = encode(tokenizer, [texts[i] for i in order])
        framed = [np.array([], dtype=np.uint16)]
        framed += [np.concatenate([[bos], row, [end]]).astype(np.uint16) for row in encoded]
        arrays[f"stream_{number}"] = np.concatenate(framed)
    return arrays


class Questions(NamedTuple):
    """A batch of questions in one wording about texts of like length."""

    prefix: Any  # (1, P) token ids before the texts
    tails: Any  # (B, T) texts, end of the turn and a drawn answer
    last: Any  # (B,) position in the tail from which the answer is predicted
    answers: Any  # (A,) ids of the answer words, those for positive first
    targets: Any  # (B, A) their probabilities
    meanings: Any  # (B, D) what the texts are about, by the teacher
    known: Any  # (B,) 1 where the teacher gave one


class TrainingBatches:
    """Batches as a pure function of (seed, step, rank); `batches[step]` are those of one step.

    corpus: of `corpus_arrays`.
    """

    def __init__(self, tokenizer, corpus, config, rank=0):
        import numpy as np

        self.config, self.rank = config, rank
        self.pad = tokenizer.pad_token_id
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
        lengths = corpus["length"]
        self.texts = np.split(corpus["text"], np.cumsum(lengths)[:-1])
        self.positive, self.short = corpus["positive"], corpus["short"]
        self.meanings, self.known = corpus["meaning"], corpus["known"]
        shares = [source.weight / n for source, n in zip(SOURCES, corpus["source"], strict=True)]
        weight = np.repeat(shares, corpus["source"])
        self.bounds, lowest = [], 0
        for longest, _, _ in LENGTH_BUCKETS:
            members = np.flatnonzero((lengths > lowest) & (lengths <= longest))
            self.bounds.append((members, np.cumsum(weight[members]) / weight[members].sum()))
            lowest = longest
        streams = [corpus[f"stream_{number}"] for number in range(len(PLAIN_TEXT))]
        self.streams = [
            (stream, share)
            for stream, (_, share) in zip(streams, PLAIN_TEXT, strict=True)
            if len(stream)
        ]

    def __len__(self):
        return self.config.steps

    def __getitem__(self, step):
        return self.questions(step, self.rank), self.plain_text(step, self.rank)

    def questions(self, step, rank):
        """One wording and length, as `Questions`."""
        import numpy as np
        import torch

        rng = np.random.default_rng([self.config.seed, step, rank, 0])
        shares = [share for _, _, share in LENGTH_BUCKETS]
        bucket = int(rng.choice(len(shares), p=np.array(shares) / sum(shares)))
        members, cumulative = self.bounds[bucket]
        negated = step >= self.config.negated_from * self.config.steps
        task = int(rng.choice(len(self.tasks), p=self.task_weights[negated]))
        answers, case = self.answers[task], np.array(ANSWER_CASE_WEIGHTS)
        rows, targets, drawn = [], [], []
        for draw in rng.random(LENGTH_BUCKETS[bucket][1] * self.config.batch_scale):
            i = members[min(int(np.searchsorted(cumulative, draw)), len(members) - 1)]
            drawn.append(i)
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
        return Questions(
            prefix=torch.tensor([self.prefixes[task]]),
            tails=tails,
            last=last,
            answers=torch.tensor(answers),
            targets=torch.tensor(np.array(targets), dtype=torch.float32),
            meanings=torch.from_numpy(self.meanings[drawn] * MEANING_STEP).float(),
            known=torch.from_numpy(self.known[drawn]).float(),
        )

    def plain_text(self, step, rank):
        """(B, T) token ids cut from the plain-text streams at random places."""
        import numpy as np
        import torch

        rng = np.random.default_rng([self.config.seed, step, rank, 1])
        shares = np.array([share for _, share in self.streams])
        length, rows = self.config.plain_text_tokens, []
        for _ in range(self.config.plain_text_rows * self.config.batch_scale):
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


def build_optimizers(model, meaning, config):
    """Muon for the matrices of the layers, AdamW for the rest."""
    import torch

    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.model.layers.parameters() if p.ndim != 2]
    others += [*model.model.norm.parameters(), *meaning.parameters()]
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


def losses(model, meaning, suffix_length):
    """The two loss functions; compiled on a CPU: about twice as fast, needs a C++ compiler.

    meaning: linear layer from the hidden state at the end of a text to what the text is about.
    """
    import torch
    from torch.nn.functional import cross_entropy

    def answer_loss(prefix, tails, last, answers, targets, meanings, known, eot):
        rows = torch.arange(len(tails), device=tails.device)
        cache = model.model(prefix, use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(tails))
        place = torch.arange(prefix.shape[1] + tails.shape[1], device=tails.device)
        mask = last[:, None] + 1 >= place[None, :] - prefix.shape[1]  # (B, P + T)
        hidden = model.model(tails, past_key_values=cache, attention_mask=mask).last_hidden_state
        answer_logits = model.lm_head(hidden[rows, last]).float()  # (B, V)
        end_logits = model.lm_head(hidden[rows, last + 1]).float()
        loss = -(targets * answer_logits.log_softmax(-1)[:, answers]).sum(1).mean()
        error = (meaning(hidden[rows, last - suffix_length]).float() - meanings).square().mean(1)
        end = cross_entropy(end_logits, torch.full_like(last, eot))
        return loss, end, (error * known).sum() / known.sum().clamp(min=1)

    def text_loss(ids):
        hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
        return cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), ids[:, 1:].flatten())

    if model.device.type != "cpu":  # compiling takes longer than it saves
        return answer_loss, text_loss
    return torch.compile(answer_loss, dynamic=True), torch.compile(text_loss)


def first_embedding(tokenizer, teacher, config):
    """Where the input embedding begins, (V, H): the teacher's vector of every token that is a word,
    the others at random."""
    import numpy as np

    words = [tokenizer.decode([i]).strip() for i in range(config.vocab_size)]
    vectors = teacher.word_vectors(words)
    known = np.flatnonzero(vectors.any(1))
    centred = vectors[known] - vectors[known].mean(0)
    _, directions = np.linalg.eigh(centred.T @ centred)  # the largest variance last
    reduced = centred @ directions[:, -config.hidden_size :]  # (K, H) principal components
    reduced *= config.embedding_scale / reduced.std()
    rng = np.random.default_rng(config.seed)
    square = rng.normal(size=(config.hidden_size,) * 2)
    rotation = np.linalg.qr(square)[0]  # spreads the variance evenly over the dimensions
    table = config.embedding_scale * rng.normal(size=(config.vocab_size, config.hidden_size))
    table[known] = reduced @ rotation
    return table.astype(np.float32)


def train(accelerator, model, batches, suffix_length, meaning_size, config, checkpoint):
    """Run the steps that are left; the seconds of all. Every process calls this.

    batches: `TrainingBatches` of this process.
    """
    import torch
    from torch.utils.data import DataLoader

    world, device = accelerator.num_processes, accelerator.device
    if device.type == "cpu":
        model.set_attn_implementation("eager")  # its fused attention is slow backwards
    torch.set_float32_matmul_precision("high")
    model.to(device)
    meaning = torch.nn.Linear(config.hidden_size, meaning_size, device=device)
    optimizers = build_optimizers(model, meaning, config)
    step, earlier = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        if state["config"] != asdict(config):
            raise UserError(f"{checkpoint} belongs to other settings; remove it to start again")
        model.load_state_dict(state["model"])
        meaning.load_state_dict(state["meaning"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, earlier = state["step"], state["seconds"]
        accelerator.print(f"resuming at step {step}", file=sys.stderr)
    end_of_turn = model.config.eos_token_id
    answer_loss, text_loss = losses(model, meaning, suffix_length)
    parameters = [*model.parameters(), *meaning.parameters()]
    averages = torch.zeros(3, device=device)
    started, first = time.perf_counter(), step

    def seconds():
        return earlier + time.perf_counter() - started

    # A CPU makes its batches between the steps; an accelerator would wait for them.
    workers = 0 if device.type == "cpu" else max(1, len(os.sched_getaffinity(0)) - 2)
    loader = DataLoader(
        batches, batch_size=None, sampler=range(step, config.steps), num_workers=workers
    )
    for questions, plain_text in loader:
        questions = [part.to(device, non_blocking=True) for part in questions]
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = group["peak_lr"] * learning_rate_share(step, config)
        with torch.autocast(device.type, torch.bfloat16):
            answer, end, error = answer_loss(*questions, end_of_turn)
        loss = config.answer_weight * (answer + 0.1 * end) + config.meaning_weight * error
        loss.backward()
        with torch.autocast(device.type, torch.bfloat16):
            text = text_loss(plain_text.to(device, non_blocking=True))
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
        present = torch.stack([answer, error, text]).detach().float()
        averages += (present - averages) / min(50, step - first)
        if step % 25 == 0 and accelerator.is_main_process:
            per_step = (time.perf_counter() - started) / (step - first)
            answer, error, text = averages.tolist()
            print(
                f"step {step}/{config.steps} answer loss {answer:.4f} meaning {error:.3f} "
                f"text {text:.3f} {per_step:.3f} s/step, "
                f"{per_step * (config.steps - step) / 60:.0f} min left",
                file=sys.stderr,
                flush=True,
            )
        if (step % config.checkpoint_every == 0 or step == config.steps) and (
            accelerator.is_main_process
        ):
            partial = checkpoint.with_suffix(".partial")
            state = {"config": asdict(config), "step": step, "seconds": seconds()}
            state["model"] = model.state_dict()
            state["meaning"] = meaning.state_dict()
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
    label = config["label_share"]
    answered = {
        "labelled": f"{label:.0%} its label, {1 - label:.0%} the teacher",
        "facts": f"{label:.0%} half yes, half no, {1 - label:.0%} the teacher",
        "unlabelled": "the teacher",
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
It was trained for this project, so that the whole pipeline runs for real on two CPU cores without a
download. It answers yes/no questions about the sentiment of English reviews.

Made by `train_embedded_model.py`: {run["step"]:,} of {config["steps"]:,} steps of batch scale
{config["batch_scale"]}, seed {config["seed"]}, about {run["seconds"] / 60:.0f} minutes on
{run["device"]} after those of the teacher.
Every number below was measured by `python train_embedded_model.py --data-root DIR --stage card` on
texts that training never saw.

## Measured

Question: "{SENTIMENT.question}" Intervals: 95 %, bootstrap. "Perfect" is the ECE that a perfectly
calibrated model with the same confidences shows at this number of rows.

| texts | rows | accuracy | mean confidence | ECE, 20 bins | perfect | log-loss | label mass |
| --- | ---: | --- | ---: | --- | ---: | ---: | ---: |
{row("SST-2 development set", measured["sst2_dev"])}
{row("IMDB test reviews (first 2,000 of a shuffled slice)", measured["imdb_test_slice"])}

Decisions about the recipe that were made while looking at the SST-2 development set: that negated
questions join late, and that a teacher is learned from (models of this size had an accuracy of
0.808 there without one, and 0.841 with logistic regression on word n-grams as the teacher).
Nothing was chosen on the IMDB reviews; the last checkpoint was kept. The teacher alone has an
accuracy of {run["teacher"]["sst2_dev_accuracy"]:.3f} on the SST-2 development set.

| question (SST-2 development set) | accuracy |
| --- | ---: |
{wordings}

Raw continuations (greedy, repetition penalty 1.2):

{continuations}
## Training data

Reviews with a positive or negative label, asked about in {len(question_tasks())} wordings, negated
ones among them (those join after {config["negated_from"]:.0%} of the steps; present from the start
they cancel the others' signal), plus plain review text and 19th-century novels with a next-token
loss. Rows of the SST-2 development set and of the IMDB test slice were removed first. `dataset/`
was never read.

The teacher is {TEACHER} (Apache 2.0), fine-tuned on the labelled texts for one
epoch. Its probabilities are part of the answers, the model learns to predict its embedding of a
text at the text's end, and its word vectors are where the model's own began. Sentences of news
(ag_news, without their topics) hold no opinion.

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


def prepare(folder, data_root, teacher_name, config):
    """Write what training needs into `folder`, once: texts in token ids, what the teacher says of
    them, the tokenizer. With this folder alone a model can be trained elsewhere."""
    import numpy as np

    from sentence_teacher import SentenceTeacher

    asked, plain = load_corpus(data_root, config.seed)
    taught = folder / "teacher"
    if not (taught / "judgements.npz").exists():
        teach(asked, teacher_name, data_root, taught, config.seed)
    asked, meanings, known, teacher_accuracy = read_judgements(asked, taught, config)
    tokenizer = train_tokenizer(plain, config.vocab_size, config.context)
    tokenizer.save_pretrained(folder / "tokenizer")
    corpus = corpus_arrays(tokenizer, asked, plain, meanings, known, config)
    teacher = SentenceTeacher.load(taught / "encoder")
    with atomic_path(folder / "corpus.npz") as partial, partial.open("wb") as file:
        np.savez_compressed(
            file,
            **corpus,
            embedding=first_embedding(tokenizer, teacher, config).astype(np.float16),
            teacher_accuracy=teacher_accuracy,
            settings=prepared_for(config),
        )


def prepared_for(config):
    """Identity of the settings on which `prepare` depends."""
    names = ("vocab_size", "hidden_size", "context", "meaning_size", "label_share", "seed")
    sources = [asdict(source) for source in SOURCES]
    return fingerprint(
        [sources, PLAIN_TEXT, MEANING_STEP, *(getattr(config, name) for name in names)]
    )


def train_and_save(folder, output, config, batch_scale=None):
    """Train (or continue) with what `prepare` wrote; write the model folder.

    batch_scale: by default what the device is for.
    """
    import numpy as np
    import torch
    from accelerate import Accelerator
    from transformers import AutoTokenizer

    gpu = torch.cuda.is_available()
    config = replace(config, batch_scale=batch_scale or (GPU_BATCH_SCALE if gpu else 1))
    accelerator = Accelerator(cpu=not gpu)
    path = folder / "corpus.npz"
    if not path.exists():
        raise UserError(f"{path} is missing; run: python train_embedded_model.py --stage prepare")
    corpus = dict(np.load(path))
    if corpus["settings"] != prepared_for(config):
        raise UserError(f"{path} belongs to other settings; remove it to make it again")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(config.seed)
    model = build_model(tokenizer, config)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.from_numpy(corpus["embedding"]))
    batches = TrainingBatches(tokenizer, corpus, config, accelerator.process_index)
    checkpoint, meaning_size = folder / "training.pt", corpus["meaning"].shape[1]
    seconds = train(
        accelerator, model, batches, len(batches.suffix), meaning_size, config, checkpoint
    )
    if not accelerator.is_main_process:
        return
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    model.set_attn_implementation("sdpa")
    model.to(torch.bfloat16).save_pretrained(output)
    device = f"{accelerator.num_processes} CPU core(s)"
    if gpu:
        device = f"{accelerator.num_processes} {torch.cuda.get_device_name()}"
    run = {
        "config": asdict(config),
        "step": config.steps,
        "parameters": model.num_parameters(),
        "texts": corpus["source"].tolist(),
        "teacher": {"sst2_dev_accuracy": float(corpus["teacher_accuracy"])},
        "seconds": round(seconds),
        "device": device,
    }
    write_json(output / "training.json", run)
    checkpoint.unlink()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", help="folder with local copies (default: the hub)")
    parser.add_argument("--output", type=Path, default=EMBEDDED_MODEL_DIR, help="model folder")
    parser.add_argument("--steps", type=int, default=EmbeddedTraining.steps, help="training steps")
    parser.add_argument(
        "--batch-scale",
        type=int,
        help=f"rows of a step, as a multiple (default: {GPU_BATCH_SCALE} on a GPU, else 1)",
    )
    parser.add_argument("--seed", type=int, default=EmbeddedTraining.seed)
    parser.add_argument("--teacher", default=TEACHER, help="hub id or folder of its encoder")
    parser.add_argument(
        "--stage",
        choices=STAGES,
        help="this one alone: prepare needs the data, train what it wrote to "
        "checkpoints/embedded_model, card the data and the trained model (default: all)",
    )
    arguments = parser.parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and arguments.stage != "train":
        parser.error("several processes can share --stage train alone")
    config = EmbeddedTraining(steps=arguments.steps, seed=arguments.seed)
    folder = ROOT / "checkpoints" / "embedded_model"
    stages = STAGES if arguments.stage is None else (arguments.stage,)
    try:
        if "prepare" in stages and not (folder / "corpus.npz").exists():
            prepare(folder, arguments.data_root, arguments.teacher, config)
        if "train" in stages:
            train_and_save(folder, arguments.output, config, arguments.batch_scale)
        if "card" in stages:
            run = read_json(arguments.output / "training.json", "train the model first")
            measured = measure(arguments.output, arguments.data_root)
            write_json(arguments.output / "training.json", run | {"measured": measured})
            write_card(arguments.output, run, measured)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
