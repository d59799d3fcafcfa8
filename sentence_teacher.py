"""The teacher of the embedded model: a sentence encoder that learns how positive a text is.

    teacher = SentenceTeacher("sentence-transformers/all-MiniLM-L6-v2")
    teacher.fit(rows, seed=7)                       # rows: [(text, P(positive))]
    positive, embeddings = teacher.judge(texts)     # (N,) and (N, D)

The encoder has read a billion pairs of sentences, the embedded model some tens of millions of
tokens. What it passes on: how probably a text is positive (distillation, Hinton et al. 2015,
arXiv 1503.02531), what the text is about (its embedding), and what words mean (its word vectors).
"""

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModel, AutoTokenizer

from settings import UserError

MAX_TOKENS = 96  # of a text; the rest is cut off
BATCH_SIZE = 64
SORTED_BATCHES = 50  # batches that share one sorting by length
ENCODER_RATE, HEAD_RATE = 1e-4, 1e-3
WARMUP_STEPS = 150
PROGRESS_STEPS = 100


class SentenceTeacher:
    """A BERT-like encoder, its outputs averaged over the text, and a logistic unit on top.

    name: hub id or local folder of the encoder. Raises UserError if it cannot be loaded.
    """

    def __init__(self, name: str) -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            # The CPU's fused attention is slow backwards.
            self.encoder = AutoModel.from_pretrained(name, attn_implementation="eager")
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot load the teacher {name}: {str(error).splitlines()[0]}; "
                "give a local copy with --teacher FOLDER"
            ) from error
        self.size = self.encoder.config.hidden_size
        self.head = torch.nn.Linear(self.size, 1)

    def fit(self, rows: list[tuple[str, float]], seed: int) -> None:
        """One epoch of cross-entropy with P(positive), learning rate down to nearly zero."""
        rng = np.random.default_rng(seed)
        ids = self._ids([text for text, _ in rows])
        target = torch.tensor([positive for _, positive in rows], dtype=torch.float32)
        steps, order = [], rng.permutation(len(rows))
        for start in range(0, len(order), BATCH_SIZE * SORTED_BATCHES):
            chunk = order[start : start + BATCH_SIZE * SORTED_BATCHES]
            chunk = chunk[np.argsort([len(ids[i]) for i in chunk], kind="stable")]
            batches = [chunk[i : i + BATCH_SIZE] for i in range(0, len(chunk), BATCH_SIZE)]
            steps += [batches[i] for i in rng.permutation(len(batches))]
        parameters = [*self.encoder.parameters(), *self.head.parameters()]
        optimizer = torch.optim.AdamW(
            [
                {"params": self.encoder.parameters(), "lr": ENCODER_RATE},
                {"params": self.head.parameters(), "lr": HEAD_RATE},
            ],
            weight_decay=0.01,
            fused=True,
        )
        peaks = [group["lr"] for group in optimizer.param_groups]
        self.encoder.train()
        started, average = time.perf_counter(), math.log(2)
        for number, members in enumerate(steps):
            share = min(1, (number + 1) / WARMUP_STEPS) * max(0.02, 1 - number / len(steps))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share
            logits, _ = self._forward([ids[i] for i in members])
            loss = binary_cross_entropy_with_logits(logits, target[torch.from_numpy(members)])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average += (loss.item() - average) / 50
            if number % PROGRESS_STEPS == 0:
                minutes = (time.perf_counter() - started) / (number + 1) * (len(steps) - number)
                print(
                    f"teacher: step {number}/{len(steps)} loss {average:.4f}, "
                    f"{minutes / 60:.0f} min left",
                    file=sys.stderr,
                    flush=True,
                )
        self.encoder.eval()

    def judge(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """P(positive) (N,) float32 and embeddings (N, D) float16 of the texts, in their order."""
        self.encoder.eval()
        ids = self._ids(texts)
        order = np.argsort([len(row) for row in ids], kind="stable")
        positive = np.zeros(len(texts), dtype=np.float32)
        embeddings = np.zeros((len(texts), self.size), dtype=np.float16)
        for start in range(0, len(order), 2 * BATCH_SIZE):
            members = order[start : start + 2 * BATCH_SIZE]
            with torch.inference_mode():
                logits, mean = self._forward([ids[i] for i in members])
            positive[members] = logits.sigmoid().numpy()
            embeddings[members] = mean.half().numpy()
            if start % (200 * BATCH_SIZE) == 0:
                print(f"teacher: {start}/{len(texts)} texts", file=sys.stderr, flush=True)
        return positive, embeddings

    def word_vectors(self, words: list[str]) -> np.ndarray:
        """(N, D) float32: of each word the mean of its pieces' input vectors; no piece, zeros."""
        table = self.encoder.get_input_embeddings().weight.detach().numpy()
        pieces = self.tokenizer(words, add_special_tokens=False).input_ids
        unknown = self.tokenizer.unk_token_id
        vectors = np.zeros((len(words), table.shape[1]), dtype=np.float32)
        for row, ids in enumerate(pieces):
            if ids and unknown not in ids:
                vectors[row] = table[ids].mean(0)
        return vectors

    def save(self, folder: Path) -> None:
        self.encoder.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        np.save(folder / "head.npy", torch.cat([self.head.weight[0], self.head.bias]).detach())

    @classmethod
    def load(cls, folder: Path) -> "SentenceTeacher":
        """The fitted teacher that `save` wrote."""
        teacher = cls(str(folder))
        head = torch.from_numpy(np.load(folder / "head.npy"))
        with torch.no_grad():
            teacher.head.weight.copy_(head[None, :-1])
            teacher.head.bias.copy_(head[-1:])
        return teacher

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=MAX_TOKENS).input_ids

    def _forward(self, ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B,) and mean outputs (B, D), float32, of token ids of any lengths."""
        width = math.ceil(max(map(len, ids)) / 8) * 8
        padded = torch.full((len(ids), width), self.tokenizer.pad_token_id)
        mask = torch.zeros(len(ids), width, dtype=torch.long)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.encoder(input_ids=padded, attention_mask=mask).last_hidden_state
            inside = mask[..., None].float()
            mean = (hidden * inside).sum(1) / inside.sum(1)
            logits = self.head(mean)[:, 0]
        return logits.float(), mean.float()
