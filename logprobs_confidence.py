"""Token-probability confidence: `TransformerLogprobsClassifier`, shared by every script.

    python logprobs_confidence.py                            # confident and unsure examples
    python logprobs_confidence.py "Best worst thing ever"    # texts of your own
    python logprobs_confidence.py --task spam "You have won!"

A text is put into the task's question and the model's chat template. One deterministic forward pass
gives the probability of every possible next token; the probabilities of each label's answer words
are summed over the full vocabulary (softmax in float32). Nothing is sampled and nothing generated.
How the passes are made fast is the matter of `engine.py`.
"""

import argparse
import copy
import ctypes
import functools
import hashlib
import logging
import math
import os
import re
import runpy
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from records import (
    TOKEN_PROBABILITY,
    Prediction,
    package_versions,
    prediction_from_logprobs,
    read_json,
)
from settings import (
    FINE_TUNED_DIR,
    LOCAL,
    SENTIMENT,
    ModelSettings,
    Task,
    TaskSettings,
    UserError,
    add_arguments,
    fingerprint,
    from_arguments,
    resolve_model,
)

# OpenMP reads these when torch is first imported: threads that wait for each other soon sleep. To
# spin for long, the default, makes two threads many times slower than one where other programs use
# the cores; to sleep at once costs a training step half of its time again.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # some tens of microseconds; libgomp alone

# Llama 3.x chat templates print today's date; a fixed one keeps the prompt the same every day.
TEMPLATE_DATE = "26 Jul 2024"
DATE_MACRO = f"{{%- macro strftime_now(format) -%}}{TEMPLATE_DATE}{{%- endmacro -%}}"
RETRAIN = "run: python fine_tune_model.py"
FULL_PRECISION_TOLERANCE = 1e-4  # largest |Δ probability|, batched against one at a time, float32
HALF_PRECISION_TOLERANCE = 3e-2  # the same for bfloat16 and float16
DEVICE_MAPS = ("none", "auto", "balanced", "sequential")
ATTENTION = ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3")
ENGINE_VERSION = 5  # of how probabilities are computed; another one, other last digits
CHUNK = 4096  # texts tokenised at a time, so that memory does not grow with their number
CHECK_TEXTS = (  # on which a loaded model's engine is compared with its plain forward pass
    "Fine.",
    "«Ça va» — the second half starts at four o'clock.",
    "A dull, lifeless and far too long evening that I would not wish on anybody; we left early and "
    "were glad of the rain outside, the bus that came at once and the 2 of us still talking.",
)


@dataclass(frozen=True)
class TokenProbability:
    """One row of a next-token distribution; `token` is quoted so that spaces and bytes show.

    Of a model on a server the rank is not known beyond the tokens that it returns, nor the id of a
    token that reads like another one. bound: the probability is the most that the token can have.
    """

    rank: int | None
    token_id: int | None
    token: str
    logprob: float  # nats
    probability: float
    bound: bool = False


@dataclass(frozen=True)
class Explanation:
    """All that one forward pass says of one text.

    prompt: the string the model reads (of a text beyond the context all but its middle).
    prediction: what this pass says. top: the most probable next tokens. words: for every label its
    answer tokens with their probabilities, which add up to the label's, except where labels collide
    on a first token and are scored whole. orders: of a lettered task the prediction in every order
    of the options, the prompt being that of the first; answer: their mean. Otherwise both are
    `prediction` alone.
    """

    prompt: str
    prediction: Prediction
    top: tuple[TokenProbability, ...]
    words: dict[str, tuple[TokenProbability, ...]]
    orders: tuple[Prediction, ...]
    answer: Prediction


class PromptEncoder:
    """Token ids of a plain task's prompt for any text; the text stays text, whatever it contains.

    The chat template is rendered once. What stands between its special tokens is tokenised with
    special-token parsing off, so "<|eot_id|>" inside a text is six harmless characters and not the
    end of a turn. Where a tokenizer cannot be taken apart like that (the pieces then differ from
    the whole, which is checked here), the whole prompt is tokenised and such a text is refused.

    max_tokens: longest prompt; a longer text loses its middle.
    Raises UserError when label words collide or the template drops the text.
    """

    def __init__(self, tokenizer, task, max_tokens):
        self.tokenizer, self.task, self.max_tokens = tokenizer, task, max_tokens
        slot = "\ue000"  # a private-use character: in no template and no question
        template, self.joint = self._render(slot)
        if template.count(slot) != 1:
            raise UserError("the chat template of this model does not repeat the text exactly once")
        before, after = template.split(slot)
        specials = {str(t) for t in tokenizer.all_special_tokens}
        specials |= {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        self.special = re.compile("|".join(re.escape(t) for t in sorted(specials, key=len)[::-1]))
        cut = max((m.end() for m in self.special.finditer(before)), default=0) if specials else 0
        match = self.special.search(after) if specials else None
        stop = match.start() if match else len(after)
        self.head, self.lead = before[:cut], before[cut:]
        self.trail, self.tail = after[:stop], after[stop:]
        # What the tokenizer itself puts in front (a BOS token); a chat template writes its own.
        self.start_ids = [] if tokenizer.chat_template else tokenizer("").input_ids
        self.head_ids, self.tail_ids = self._ids([self.head])[0], self._ids([self.tail])[0]
        self.separable = all(
            self._separate([probe])[0] == self.start_ids + self._ids([before + probe + after])[0]
            for probe in ("Good", "an ugly, dull 2nd part!", "«Ça va»\nnow")
        )
        probes = self._encode_whole_prompts(["Good", "1 zoo", "the end.", "«Ça»", "(I) - 'no'"])
        self.prefix_length = min(common_length(probes[0], ids) for ids in probes[1:])
        self.suffix_length = min(common_length(probes[0][::-1], ids[::-1]) for ids in probes[1:])
        self.prefix = probes[0][: self.prefix_length]  # most prompts begin so, but not every one
        self.room = max_tokens - self.prefix_length - self.suffix_length
        if self.room < 8:
            raise UserError(
                f"the question takes {max_tokens - self.room} of {max_tokens} tokens; "
                "shorten it or raise --max-tokens"
            )
        self.label_ids, self.label_words = self._find_label_ids()

    def _render(self, slot):
        """(the prompt around `slot`, what joins an answer to it: nothing or one space).

        Without a chat template the prompt ends in "Answer:". With one it ends where the template
        puts the first character of the assistant's words, which some place after a line break; a
        space before them belongs to the answer's first token, not to the prompt.
        """
        from jinja2 import TemplateError

        user = {"role": "user", "content": self.task.user_message(slot)}
        if not self.tokenizer.chat_template:
            return f"{user['content']}\n\nAnswer:", " "
        template = self.tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = DATE_MACRO + template
        options = {
            "chat_template": template,
            "tokenize": False,
            "date_string": TEMPLATE_DATE,
            "enable_thinking": False,
        }
        answer = "\ue001"
        try:
            prompt = self.tokenizer.apply_chat_template(
                [user], add_generation_prompt=True, **options
            )
            whole = self.tokenizer.apply_chat_template(
                [user, {"role": "assistant", "content": answer}], **options
            )
        except TemplateError as error:
            raise UserError(
                f"the chat template of this model cannot render a question ({error}); "
                "mend its chat_template or choose another model"
            ) from error
        gap = ""
        if whole.startswith(prompt) and answer in whole:
            gap = whole[len(prompt) : whole.index(answer)]
        joint = " " if gap.endswith(" ") else ""
        return prompt + gap[: len(gap) - len(joint)], joint

    def _ids(self, strings, **options):
        if not any(strings):
            return [[] for _ in strings]
        return self.tokenizer(strings, add_special_tokens=False, **options).input_ids

    def _separate(self, texts):
        middles = [self.lead + text + self.trail for text in texts]
        encoded = self._ids(middles, split_special_tokens=True)
        return [self.start_ids + self.head_ids + ids + self.tail_ids for ids in encoded]

    def _encode_whole_prompts(self, texts):
        if self.separable:
            return self._separate(texts)
        for text in texts:
            if match := self.special.search(text):
                raise UserError(
                    f"the text {text[:60]!r} contains {match[0]!r}, a control token of this model; "
                    "remove it from the text"
                )
        return [self.start_ids + ids for ids in self._ids([self.prompt(t) for t in texts])]

    def prompt(self, text):
        """The prompt as a string, as the model reads it."""
        return self.head + self.lead + text + self.trail + self.tail

    def encode(self, texts):
        """[(token ids, truncated)] for stripped, non-empty texts."""
        rows = []
        for ids in self._encode_whole_prompts(texts):
            excess = len(ids) - self.max_tokens
            if excess > 0:
                keep = self.prefix_length + (self.room + 1) // 2
                ids = ids[:keep] + ids[keep + excess :]
            rows.append((ids, excess > 0))
        return rows

    def _find_label_ids(self):
        """First answer-token ids per label and, where labels collide on one, the whole words.

        Ids are taken where they occur: the first token of prompt + word that the prompt alone does
        not have. Returns (ids, None), or (None, words) with the ids of every whole word per label.
        """
        prompt = self._ids([self.prompt("Good")])[0]
        firsts, wholes = [], []
        for label in self.task.labels:
            answers = self._ids([self.prompt("Good") + self.joint + word for word in label.words])
            shared = [common_length(prompt, answer) for answer in answers]
            tails = [tuple(a[n:]) for a, n in zip(answers, shared, strict=True)]
            unknown = self.tokenizer.unk_token_id
            for word, n, ids in zip(label.words, shared, tails, strict=True):
                if n < len(prompt) or not ids or (unknown is not None and unknown in ids):
                    raise UserError(
                        f"the tokenizer of this model has no tokens for the answer word {word!r} "
                        "after this prompt; choose another word"
                    )
            firsts.append(tuple(dict.fromkeys(ids[0] for ids in tails)))
            wholes.append(tuple(dict.fromkeys(tails)))
        if len({i for ids in firsts for i in ids}) == sum(len(ids) for ids in firsts):
            return tuple(firsts), None
        flat = [ids for words in wholes for ids in words]
        for i, first in enumerate(flat):
            for second in flat[:i] + flat[i + 1 :]:
                if second[: len(first)] == first:
                    raise UserError(
                        f"one answer word of task {self.task.name!r} begins another "
                        f"({self.tokenizer.decode(list(first))!r}); choose words that differ"
                    )
        return None, tuple(wholes)


def common_length(a, b):
    """Length of the longest common prefix of two sequences."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def choose_device(device="auto"):
    """`auto` → cuda, mps or cpu, whichever is there first. UserError for one that is not."""
    if device not in ("auto", "cuda", "mps", "cpu"):
        raise UserError(f"device must be auto, cuda, mps or cpu, got {device!r}")
    if device == "cpu":
        return device
    available = available_devices()
    if device == "auto":
        return available[0]
    if device not in available:
        raise UserError(f"this machine has no {device} device; use --device auto")
    return device


def available_devices():
    """Those of cuda, mps and cpu that this machine has, in this order.

    torch knows, but takes seconds to import: it is asked only where it could have another device
    than the CPU.
    """
    if cpu_only():
        return ["cpu"]
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [name for name in there if there[name]] + ["cpu"]


def cpu_only():
    """Whether the torch that is installed certainly finds no device here but the CPU.

    So it is where it was built for none, or for CUDA on a machine without the driver's library.
    """
    if sys.platform == "darwin":  # mps
        return False
    build = runpy.run_path(str(Path(find_spec("torch").origin).with_name("version.py")))
    if build["hip"] is None and build["cuda"] is not None and sys.platform == "linux":
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            return True
    return build["cuda"] is None and build["hip"] is None


def choose_dtype(dtype, device):
    """`auto` → what the device computes fast: bfloat16 or float16 on a GPU, float32 on a CPU.

    `fastest` is `auto`, except that `model_dtype` tries the model out on a CPU.
    """
    if dtype in ("auto", "fastest"):
        if device == "cuda":
            import torch

            return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
        return "float16" if device == "mps" else "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype must be auto, fastest, float32, bfloat16 or float16, got {dtype!r}")
    return dtype


def model_dtype(settings, device):
    """The dtype that `ModelSettings` give on a device; for "fastest" the probe's finding."""
    if settings.dtype == "fastest" and device == "cpu" and settings.quantization == "none":
        return fastest_dtype(settings.model)
    return choose_dtype(settings.dtype, device)


@functools.cache
def fastest_dtype(model):
    """float32, or bfloat16 where it is at least a fifth faster on this CPU: the model is tried."""
    from engine import seconds_per_batch

    seconds = {
        dtype: seconds_per_batch(load_model_and_tokenizer(ModelSettings(model, "cpu", dtype))[0])
        for dtype in ("bfloat16", "float32")
    }
    faster = seconds["float32"] > 1.2 * seconds["bfloat16"]
    return "bfloat16" if faster else "float32"


def quantization_config(quantization, device, dtype):
    """The bitsandbytes settings for `none`, `8bit` or `4bit`; UserError where it cannot run."""
    if quantization == "none":
        return None
    if quantization not in ("8bit", "4bit"):
        raise UserError(f"quantization must be none, 8bit or 4bit, got {quantization!r}")
    if device == "mps":
        raise UserError("bitsandbytes does not quantise on mps; use --quantization none")
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def quiet_libraries():
    """Keep what is no news to the user off the terminal; errors still come through."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # An adapter on a tied embedding matters to whoever merges it; it is never merged here.
    warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def torch_device(device):
    """The torch device; for cuda the one of this process, with its number."""
    import torch

    if device == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device)


@contextmanager
def loading(what, name):
    """A block that loads a model, or its tokenizer, of a folder or hub id: its errors become a
    UserError."""
    from safetensors import SafetensorError

    try:
        yield
    except (
        OSError,
        ValueError,
        ImportError,
        RuntimeError,
        KeyError,
        TypeError,
        SafetensorError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        step = (
            "is the folder complete (config.json, model.safetensors, tokenizer.json)?"
            if Path(name).is_dir()
            else "check the id and the network; for a gated model accept its licence on the hub "
            "and run: hf auth login"
        )
        raise UserError(f"cannot load the {what} {name}: {reason[:300]}; {step}") from error


def load_tokenizer(name):
    """The tokenizer of a folder or hub id, without its model. Raises UserError."""
    from transformers import AutoTokenizer

    quiet_libraries()
    check_model_name(name)
    with loading("tokenizer", name):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def load_model_and_tokenizer(settings):
    """(model, tokenizer, device) of `ModelSettings`; safetensors only, no code from the hub."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from engine import keep_freed_memory, use_float32_head

    quiet_libraries()
    keep_freed_memory()
    name = resolve_model(settings.model)
    device = choose_device(settings.device)
    check_model_name(name)
    dtype = getattr(torch, model_dtype(settings, device))
    quantization = quantization_config(settings.quantization, device, dtype)
    if settings.attention not in ATTENTION:
        raise UserError(
            f"attention must be one of {', '.join(ATTENTION)}, got {settings.attention!r}"
        )
    if settings.device_map not in DEVICE_MAPS:
        raise UserError(
            f"device_map must be one of {', '.join(DEVICE_MAPS)}, got {settings.device_map!r}"
        )
    spread = settings.device_map != "none" and device == "cuda"
    place = settings.device_map if spread else {"": torch_device(device)}
    options = {"trust_remote_code": False}
    with loading("model", name):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            quantization_config=quantization,
            device_map=place if spread or quantization else None,
            attn_implementation=None if settings.attention == "auto" else settings.attention,
            use_safetensors=True,
            **options,
        )
    if not quantization and not spread:
        model.to(torch_device(device))
    use_float32_head(model)
    model.requires_grad_(False)  # what is trained is added later
    model.eval()
    return model, tokenizer, device


FINGERPRINTED_FILES = (
    "*.safetensors",
    "*config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
)


def weights_fingerprint(folder_or_id):
    """Identity of a model or adapter: of the files of a folder, else hub id and commit."""
    folder = Path(folder_or_id)
    if folder.is_dir():
        digest = hashlib.sha256()
        for path in sorted({path for kind in FINGERPRINTED_FILES for path in folder.glob(kind)}):
            with path.open("rb") as file:
                digest.update(
                    f"{path.name} {hashlib.file_digest(file, 'sha256').digest()}".encode()
                )
        return digest.hexdigest()[:16]
    from huggingface_hub import hf_hub_download

    try:  # in the cache of the hub a file's folder is named for the commit
        commit = Path(hf_hub_download(str(folder_or_id), "config.json")).parent.name
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot find the model {folder_or_id}: {str(error).splitlines()[0][:200]}; check the "
            "id and the network, or accept its licence on the hub and run: hf auth login"
        ) from error
    return fingerprint([str(folder_or_id), commit])


def model_fingerprint(settings):
    """Identity of what `ModelSettings` load here: the weights and how they are computed with.

    Imports torch only where a dtype must be tried or a GPU may be there.
    """
    require_local(settings)
    name = resolve_model(settings.model)
    check_model_name(name)
    return fingerprint(
        [
            ENGINE_VERSION,
            package_versions(),
            weights_fingerprint(name),
            model_dtype(settings, choose_device(settings.device)),
            settings.quantization,
            settings.max_tokens,
            settings.attention,
        ]
    )


def require_local(settings):
    """Raises UserError for `ModelSettings` of a model on a server."""
    settings.check()
    if settings.backend != LOCAL:
        raise UserError(
            "fine-tuning, and all that looks into a model, needs its weights here; leave "
            "--backend and --base-url out"
        )


def check_model_name(name):
    """Raises UserError for what is neither a folder nor a hub id."""
    if not Path(name).is_dir() and (name.startswith((".", "/")) or "/" not in name):
        raise UserError(
            f"there is no model folder {name}; give a preset, a hub id such as "
            "meta-llama/Llama-3.1-8B-Instruct, or a folder that exists"
        )


class LabelScorer(Protocol):
    """Whoever computes label log-probabilities from token ids: a model here or one on a server.

    engine: divides prompts into batches, `run(sequences, prefix, score)`, and has what they share,
    `prefix(ids, adapter_active)`; `engine.Engine` or `openai_backend.Requests`.
    """

    engine: Any

    def label_logprobs(self, sequences, temperature=1.0, prefix=None) -> list:
        """For every prompt, token ids, what `prediction` makes a `Prediction` of: here (K,) nats.

        prefix: of the engine, with which every prompt begins, or None.
        """
        ...


class LogprobsClassifier(LabelScorer):
    """A `LabelScorer` as a classifier for one task; a subclass says who that is.

    Attributes: task, tokenizer, encoders (a `PromptEncoder` for each of the task's `orders`),
    encoder (the first), max_tokens of a prompt, adapter_active, device.
    """

    method = TOKEN_PROBABILITY  # of the predictions

    def _ask(self, task, encoders):
        self.task, self.encoders, self.encoder = task, encoders, encoders[0]

    def _encoders(self, task):
        orders = task.orders
        return tuple(PromptEncoder(self.tokenizer, order, self.max_tokens) for order in orders)

    def for_task(self, task):
        """A classifier for another question that shares this one's model, adapter and memory."""
        return self._sibling(task, self._encoders(task))

    def _sibling(self, task, encoders):
        sibling = copy.copy(self)
        sibling._ask(task, encoders)
        return sibling

    @property
    def orders(self):
        """For each order of the options a classifier that asks in it alone; one, if plain."""
        return tuple(self._sibling(encoder.task, (encoder,)) for encoder in self.encoders)

    @property
    def _asked(self):
        """The part of an identity that says what is asked."""
        return {
            "prompt": self.encoder.prompt("{text}"),
            "label_words": {label.name: list(label.words) for label in self.encoder.task.labels},
            "orders": len(self.encoders),
            "tokenizer": hashlib.sha256(
                self.tokenizer.backend_tokenizer.to_str().encode()
            ).hexdigest()[:16],
        }

    def _prefix(self):
        """The engine's cache of what the prompts of this task share, or None."""
        return self.engine.prefix(self.encoder.prefix, self.adapter_active)

    def classify(self, text, temperature=1.0):
        """`Prediction` for one text. Raises UserError for a text that cannot be scored."""
        prediction = self.classify_batch([text], temperature=temperature)[0]
        if prediction.error is not None:
            raise UserError(prediction.error)
        return prediction

    def classify_batch(self, texts, ids=None, temperature=1.0, progress=False):
        """One `Prediction` a text, in input order, whatever the order they are scored in.

        texts: list of str. ids: their example ids (default: their positions). temperature:
        divides the logits; 1 is the model's own distribution, another value the one that sampling
        at that temperature draws from. progress: a bar on stderr. A text that cannot be scored
        gives a row with `error` set. A lettered task is asked in every order of its options, each a
        full pass, and gives the `mean_prediction`.
        """
        from tqdm import tqdm

        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, got one string; use classify(text)")
        if len(self.encoders) > 1:
            passes = [
                order.classify_batch(texts, ids, temperature, progress) for order in self.orders
            ]
            return [mean_prediction(self.task, rows) for rows in zip(*passes, strict=True)]
        ids = [str(i) for i in range(len(texts))] if ids is None else list(ids)
        results, places = [None] * len(texts), {}  # text: where it stands, once or more
        for i, text in enumerate(texts):
            if problem := text_problem(text):
                results[i] = self._error(ids[i], problem)
            else:
                places.setdefault(text.strip(), []).append(i)
        queue = sorted(places, key=len, reverse=True)
        prefix = self._prefix() if queue else None

        def score(sequences, shared):
            return self.label_logprobs(sequences, temperature, shared)

        with tqdm(total=len(queue), unit="text", disable=not progress, file=sys.stderr) as bar:
            for start in range(0, len(queue), CHUNK):
                chunk = queue[start : start + CHUNK]
                rows, errors = self._encode_rows(chunk)
                for text, problem in errors:
                    for i in places[text]:
                        results[i] = self._error(ids[i], problem)
                sequences = [sequence for _, sequence, _ in rows]
                batches = self.engine.run(sequences, prefix, score)
                for batch, scored, seconds in batches:
                    for row, logprobs in zip(batch, scored, strict=True):
                        text, _, truncated = rows[row]
                        for i in places[text]:
                            results[i] = self.prediction(
                                ids[i], logprobs, truncated, seconds / len(batch)
                            )
                    bar.update(len(batch))
                bar.update(len(errors))
        return results

    def _error(self, example_id, message):
        return Prediction(example_id=example_id, method=self.method, error=message)

    def prediction(self, example_id, logprobs, truncated, seconds):
        """The `Prediction` that follows from a text's `label_logprobs`."""
        if not all(math.isfinite(v) for v in logprobs):
            return self._error(
                example_id, f"the model gave a label the log-probability {min(logprobs)}"
            )
        return prediction_from_logprobs(
            example_id, self.task, logprobs, truncated=truncated, latency_sec=seconds
        )

    def _encode_rows(self, texts):
        """([(text, token ids, truncated)], [(text, why it cannot be scored)])."""
        try:
            encoded = self.encoder.encode(texts)
            return [(text, *row) for text, row in zip(texts, encoded, strict=True)], []
        except UserError:  # a text holds a control token this tokenizer cannot treat as text
            rows, errors = [], []
            for text in texts:
                try:
                    rows.append((text, *self.encoder.encode([text])[0]))
                except UserError as error:
                    errors.append((text, str(error)))
            return rows, errors


class TransformerLogprobsClassifier(LogprobsClassifier):
    """A causal language model as a classifier for one task.

    model: `ModelSettings`, or a preset name, hub id or folder. adapter: folder of a LoRA adapter;
    it shares the base weights in memory, and `without_adapter()` switches it off for a while.
    task: the question and its labels. max_tokens is bounded by the model's context.

    Attributes besides those of every `LogprobsClassifier`: device ("cuda", "mps", "cpu"), dtype (a
    torch dtype), engine (`Engine`: whether prompts are shared, how many batches at a time),
    tolerance: the largest difference of a probability between batched and one-at-a-time scoring.
    """

    def __init__(self, model="embedded", adapter=None, task=SENTIMENT):
        self.settings = model if isinstance(model, ModelSettings) else ModelSettings(model=model)
        require_local(self.settings)
        self.adapter = str(adapter) if adapter is not None else None
        if self.adapter is not None and not (Path(adapter) / "adapter_config.json").exists():
            raise UserError(f"no adapter in {adapter}/; run: python fine_tune_model.py")
        from engine import Engine

        model, self.tokenizer, self.device = load_model_and_tokenizer(self.settings)
        self.engine = Engine(model, self._sharing_problem, self.settings.batch_tokens)
        self.dtype = self.model.dtype
        half = str(self.dtype) != "torch.float32" or self.settings.quantization != "none"
        self.tolerance = HALF_PRECISION_TOLERANCE if half else FULL_PRECISION_TOLERANCE
        if self.adapter is not None:
            self._load_adapter()
        self._switch = {"adapter": self.adapter is not None}  # shared by `for_task` siblings
        config = self.model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None) or self.settings.max_tokens
        self.max_tokens = min(self.settings.max_tokens, context - 8)
        self._ask(task, self._encoders(task))

    @property
    def model(self):
        """The causal language model, with its adapter; siblings and engine see the same one."""
        return self.engine.model

    @model.setter
    def model(self, model):
        self.engine.model = model

    def _sharing_problem(self):
        """Why whole prompts have to be scored, or None; prunes the last layer where it can.

        What cannot be made faster is said on stderr.
        """
        from engine import prune_last_layer, sharing_problem

        prompts = [ids for ids, _ in self.encoder.encode(CHECK_TEXTS)]
        pruning = prune_last_layer(self.model, prompts, self.tolerance)
        length = self.encoder.prefix_length
        sharing = sharing_problem(self.model, prompts, length, self.tolerance)
        for problem, what in (
            (pruning, "the last layer is computed at every token"),
            (sharing, "every text is scored with its whole prompt"),
        ):
            if problem is not None:
                print(
                    f"warning: {self.settings.model}: {what}, which is slower: {problem}",
                    file=sys.stderr,
                )
        return sharing

    @property
    def adapter_active(self):
        """Whether the adapter answers: there is one, and no `without_adapter` block is open."""
        return self._switch["adapter"]

    def _load_adapter(self):
        import safetensors
        from peft import PeftModel

        from engine import fold_adapter

        try:
            self.model = PeftModel.from_pretrained(self.model, self.adapter)
        except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise UserError(
                f"the adapter in {self.adapter}/ does not fit {self.settings.model} or is damaged "
                f"({reason}); run: python fine_tune_model.py --force-retrain"
            ) from error
        self.model.eval()
        fold_adapter(self.model)

    @property
    def identity(self):
        """What a calibrator is tied to: a change of any part changes the fingerprint."""
        parts = {
            "model": self.settings.model,
            "model_fingerprint": weights_fingerprint(resolve_model(self.settings.model)),
            "adapter_fingerprint": weights_fingerprint(self.adapter)
            if self.adapter_active
            else None,
            **self._asked,
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantization": self.settings.quantization,
        }
        return {**parts, "fingerprint": fingerprint(parts)}

    @contextmanager
    def without_adapter(self):
        """Inside the block the base model answers."""
        if not self.adapter_active:
            yield self
            return
        self._switch["adapter"] = False
        frozen = [p for p in self.model.parameters() if not p.requires_grad]
        try:
            with self.model.disable_adapter():
                yield self
        finally:
            for p in frozen:  # PEFT hands an adapter back as one that is trained
                p.requires_grad_(False)
            self._switch["adapter"] = True

    @contextmanager
    def dropout(self, seed):
        """Inside the block one sub-network of the adapter answers, drawn from `seed`.

        Each input of a LoRA layer is dropped with the rate of its training, for every text and
        position alike: a draw of the weights, so that an answer depends on the seed and the text
        alone and all that is fast otherwise stays so. Raises UserError where there is no active
        adapter or one without dropout.
        Source: Gal and Ghahramani 2016, https://arxiv.org/abs/1512.05287 (one mask for all
        positions); Kirsch et al. 2019, https://arxiv.org/abs/1906.08158 (one for all texts)
        """
        import torch

        inputs = [  # (weights that read them, rate)
            (module.lora_A[name].weight, layer.p)
            for module in self.model.modules()
            for name, layer in getattr(module, "lora_dropout", {}).items()
            if name in module.lora_A and isinstance(layer, torch.nn.Dropout) and layer.p > 0
        ]
        if not self.adapter_active or not inputs:
            raise UserError(
                "Monte-Carlo dropout needs an adapter that was trained with --dropout above 0"
            )
        _ = self.engine.shares_prefix  # found out without dropout
        generator = torch.Generator().manual_seed(seed)
        whole = [weight.detach().clone() for weight, _ in inputs]
        with torch.no_grad():
            for weight, rate in inputs:
                kept = torch.rand(weight.shape[1], generator=generator) >= rate
                weight.mul_((kept / (1 - rate)).to(weight))
        try:
            yield self
        finally:
            with torch.no_grad():
                for (weight, _), before in zip(inputs, whole, strict=True):
                    weight.copy_(before)

    @contextmanager
    def counted_passes(self):
        """Inside the block the list that it gives grows by the sequences of every forward pass."""
        counts = []
        embeddings = self.model.get_input_embeddings()
        hook = embeddings.register_forward_hook(lambda _, inputs, __: counts.append(len(inputs[0])))
        try:
            yield counts
        finally:
            hook.remove()

    def label_logprobs(self, sequences, temperature=1.0, prefix=None):
        """[(K,) list of log-probabilities in nats] for prompts given as token ids.

        prefix: a `SharedPrefix` with which every prompt begins.
        """
        import torch

        if self.encoder.label_ids is not None:
            logits = self.engine.logits(sequences, prefix=prefix)  # (B, V)
            logprobs = (logits / temperature).log_softmax(-1)
            sums = [logprobs[:, list(ids)].logsumexp(-1) for ids in self.encoder.label_ids]
            return torch.stack(sums, dim=1).tolist()
        labels = []
        for words in self.encoder.label_words:  # words that collide on their first token
            scores = []
            for word in words:
                longer = [ids + list(word[:-1]) for ids in sequences]
                places = [list(range(len(ids) - 1, len(ids) - 1 + len(word))) for ids in sequences]
                logits = self.engine.logits(longer, places, prefix)  # (B · W, V)
                logprobs = (logits / temperature).log_softmax(-1)
                logprobs = logprobs.view(len(sequences), len(word), -1)
                scores.append(logprobs[:, torch.arange(len(word)), list(word)].sum(-1))
            labels.append(torch.stack(scores).logsumexp(0))
        return torch.stack(labels, dim=1).tolist()

    def explain(self, text, k=8):
        """`Explanation` of one text: prediction, top-k tokens and each label's words."""
        orders = tuple(order.classify(text) for order in self.orders)
        ids, _ = self.encoder.encode([text.strip()])[0]
        logprobs = self.engine.logits([ids], prefix=self._prefix())[0].log_softmax(-1)
        return self.explanation(text, orders, logprobs, k)

    def explanation(self, text, orders, logprobs, k=8):
        """The `Explanation` that follows from a text's prediction in every order of the options
        and from the log-probabilities (V,), nats, of the token after its (first) prompt."""
        order = logprobs.argsort(descending=True)
        rank = {int(token): i + 1 for i, token in enumerate(order.tolist())}

        def row(token):
            value = float(logprobs[token])
            name = visible_token(self.tokenizer, token)
            return TokenProbability(rank[token], token, name, value, math.exp(value))

        words = {}
        for i, label in enumerate(self.task.labels):
            if self.encoder.label_ids is not None:
                tokens = self.encoder.label_ids[i]
            else:
                tokens = tuple(dict.fromkeys(word[0] for word in self.encoder.label_words[i]))
            words[label.name] = tuple(sorted(map(row, tokens), key=lambda t: t.rank))
        top = tuple(row(token) for token in order[:k].tolist())
        prompt, answer = self.encoder.prompt(text.strip()), mean_prediction(self.task, orders)
        return Explanation(prompt, orders[0], top, words, orders, answer)

    def greedy_replies(self, sequences, max_new_tokens):
        """[str] what the model generates after each prompt, given as token ids, up to its end.

        The most probable token is taken at every step, whatever its generation settings say.
        """
        import torch
        from transformers import GenerationConfig

        end = self.model.generation_config.eos_token_id
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=end if end is not None else self.tokenizer.eos_token_id,
            pad_token_id=0,  # behind the mask: any id does
        )
        replies = [""] * len(sequences)
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        while order:
            width = len(sequences[order[0]])
            size = max(1, self.engine.budget // (width + max_new_tokens))
            batch, order = order[:size], order[size:]
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(
                batch
            ):  # padded on the left: every reply starts at the same place
                ids[row, width - len(sequences[i]) :] = torch.tensor(sequences[i])
                mask[row, width - len(sequences[i]) :] = 1
            with torch.inference_mode():
                generated = self.model.generate(
                    input_ids=ids.to(self.device),
                    attention_mask=mask.to(self.device),
                    generation_config=settings,
                )[:, width:]
            for i, tokens in zip(batch, generated.tolist(), strict=True):
                replies[i] = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return replies

    def raw_prompt_ids(self, prompt):
        """Token ids of `prompt` as it stands; one beyond the context loses its beginning.

        Raises UserError for an empty prompt.
        """
        if not prompt:
            raise UserError("the prompt is empty; give at least one character")
        if problem := encoding_problem(prompt):
            raise UserError(problem)
        start = self.tokenizer("").input_ids
        ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
        return start + ids[-(self.encoder.max_tokens - len(start)) :]

    def next_token_distribution(self, prompt, k=8):
        """The k most probable next tokens after `prompt` as it stands, without a template.

        Raises UserError as `raw_prompt_ids` does.
        """
        logprobs = self.engine.logits([self.raw_prompt_ids(prompt)])[0].log_softmax(-1)
        values, tokens = logprobs.topk(min(k, len(logprobs)))
        return [
            TokenProbability(i + 1, t, visible_token(self.tokenizer, t), v, math.exp(v))
            for i, (v, t) in enumerate(zip(values.tolist(), tokens.tolist(), strict=True))
        ]


def mean_prediction(task, predictions):
    """One `Prediction` out of those in every order of the options; of a single one, itself.

    Probabilities are averaged, not their logarithms: the mean is what a model says that is shown
    the options in an order drawn at random. An error in one order is one of the whole.
    """
    failed = [p for p in predictions if p.error is not None]
    if failed or len(predictions) == 1:
        return (failed or predictions)[0]
    logprobs = np.array([p.label_logprobs for p in predictions])  # (orders, K)
    return prediction_from_logprobs(
        predictions[0].example_id,
        task,
        np.logaddexp.reduce(logprobs, axis=0) - np.log(len(predictions)),
        method=predictions[0].method,
        label_slack=mean_slack(predictions),
        truncated=any(p.truncated for p in predictions),
        latency_sec=sum(p.latency_sec for p in predictions),
    )


def mean_slack(predictions):
    """(K,) mean of the predictions' label_slack, or None where every answer word was read."""
    known = [p.label_slack for p in predictions if p.label_slack is not None]
    return np.sum(known, axis=0) / len(predictions) if known else None


def open_classifier(settings, adapter=None, task=SENTIMENT, sampling=False):
    """The `LogprobsClassifier` that `ModelSettings` name: of a model here, or of a server.

    sampling: of a server without log-probabilities answers may be drawn. Raises UserError.
    """
    settings.check()
    if settings.backend == LOCAL:
        return TransformerLogprobsClassifier(settings, adapter, task)
    if adapter is not None:
        raise UserError(
            "--backend openai takes no adapter from a folder; give it to the server, and give the "
            "name that it has there as --model (docs/SCALING.md)"
        )
    from openai_backend import ServerLogprobsClassifier

    return ServerLogprobsClassifier(settings, task, sampling)


def load_classifier(settings, adapter=None, task=None, sampling=False):
    """The classifier that the flags --model, --adapter and --task of a command line name.

    settings: `ModelSettings`; their model may also be "base", the embedded model, or "finetuned",
    the model that the adapter was trained on. adapter: a folder, for "finetuned" by default
    fine_tuned_sentiment_model/. task: by default the one that the adapter was trained for, else
    sentiment. sampling: as for `open_classifier`. Raises UserError.
    """
    if settings.backend != LOCAL:  # the server has names of its own
        return open_classifier(settings, adapter, task or SENTIMENT, sampling)
    if settings.model == "base":
        settings = replace(settings, model=ModelSettings.model)
    trained_here = settings.model == "finetuned"
    if trained_here:
        adapter = FINE_TUNED_DIR if adapter is None else adapter
        settings = replace(settings, model=_base_model(adapter))
    if task is None and adapter is not None:
        path = Path(adapter) / "task.json"
        if trained_here or path.exists():
            try:
                task = Task.from_json(read_json(path, RETRAIN))
            except (KeyError, TypeError) as error:
                raise UserError(f"{path} is damaged ({error!r}); {RETRAIN}") from error
    return open_classifier(settings, adapter, task or SENTIMENT, sampling)


def _base_model(adapter):
    """The model that the adapter in this folder was trained on, if its weights are still those."""
    path = Path(adapter) / "manifest.json"
    manifest = read_json(path, RETRAIN)
    base = manifest.get("base_model")
    if not isinstance(base, str):
        raise UserError(f"{path} is damaged (it names no base_model); {RETRAIN}")
    if manifest.get("base_fingerprint") != weights_fingerprint(resolve_model(base)):
        raise UserError(
            f"the adapter in {adapter}/ was trained on other weights than {base} has now; {RETRAIN}"
        )
    return base


def text_problem(text):
    """Why a text cannot be scored, or None."""
    if not isinstance(text, str):
        return f"a text must be a string, got {type(text).__name__}"
    if not text.strip():
        return "the text is empty; give at least one visible character"
    return encoding_problem(text)


def encoding_problem(text):
    if any("\ud800" <= c <= "\udfff" for c in text):
        return "the text holds half a character (a lone surrogate); is it valid UTF-8?"
    return None


def visible_token(tokenizer, token_id):
    """A token as quoted text: ' Yes', '\\n\\n'; bytes that are no text on their own as <E2 80>."""
    text = tokenizer.decode([token_id])
    if "�" not in text:
        return repr(text)
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return f"<{match[1]}>"
    alphabet = byte_alphabet()
    if all(c in alphabet for c in piece):
        return "<" + " ".join(f"{alphabet[c]:02X}" for c in piece) + ">"
    return repr(piece)


def byte_alphabet():
    """{character: byte} of byte-level BPE: printable bytes are themselves, the rest follow 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}


DEMONSTRATION_TEXTS = (
    "An absolutely wonderful film, I loved every minute of it.",
    "Terrible service, cold food and a rude waiter. Never again.",
    "It was fine, I suppose.",
    "Best worst thing ever",
    "The second half starts at four o'clock.",
)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts to classify")
    parser.add_argument(
        "--model", default="embedded", help="base, finetuned, preset, hub id or folder"
    )
    parser.add_argument("--adapter", help="folder of a LoRA adapter; its task is the default")
    add_arguments(parser, TaskSettings)
    arguments = parser.parse_args(argv)
    try:
        own = from_arguments(TaskSettings, arguments)
        task = None if own == TaskSettings() else own.build()
        settings = ModelSettings(model=arguments.model)
        classifier = load_classifier(settings, arguments.adapter, task)
        task = classifier.task
        texts = arguments.texts or list(DEMONSTRATION_TEXTS)
        predictions = classifier.classify_batch(texts)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    first = f"P({task.label_names[0]})"
    wide, name = max(12, len(first)), max(10, *map(len, task.label_names))
    print(f"{'confidence':>10}  {'label mass':>10}  {first:>{wide}}  {'predicted':<{name}} text")
    for text, p in zip(texts, predictions, strict=True):
        if p.error is not None:
            print(f"{'':>10}  {'':>10}  {'':>{wide}}  {'error':<{name}} {p.error}")
            continue
        print(
            f"{p.confidence:>10.4f}  {p.label_mass:>10.4f}  {p.probability:>{wide}.4f}  "
            f"{p.predicted:<{name}} {text}"
        )
    if len(texts) == 1 and predictions[0].error is None:
        print("\n" + "\n".join(detail_lines(classifier, predictions[0])))
    return 1 if any(p.error is not None for p in predictions) else 0


def detail_lines(classifier, prediction):
    """What follows from the label probabilities of one text, and how samples converge on them."""
    import numpy as np

    from consistency_confidence import convergence_lines
    from prompted_confidence import content_free_rows
    from records import label_probabilities
    from signals import certainty, entropy, mean_probabilities, prior_corrected

    names = classifier.task.label_names
    logprobs = np.array(prediction.label_logprobs)
    unsure = float(entropy(label_probabilities(logprobs)))
    lines = [
        f"margin     {prediction.margin:.4f} nats between the two most probable labels",
        f"entropy    {unsure:.4f} nats over the labels, "
        f"certainty {certainty(unsure, len(names)):.4f}",
    ]
    if free := content_free_rows(classifier):
        prior = mean_probabilities(np.array([row["label_logprobs"] for row in free]))
        corrected = np.exp(prior_corrected(logprobs, prior))
        for title, values in (("prior", prior), ("corrected", corrected)):
            shares = ", ".join(f"{name} {p:.4f}" for name, p in zip(names, values, strict=True))
            lines.append(f"{title:<9}  {shares}")
        lines[-2] += "  (answers to texts that say nothing)"
        lines[-1] += "  (contextual calibration: the prior divided out)"
    return [*lines, "", *convergence_lines(classifier.task, prediction.label_logprobs)]


if __name__ == "__main__":
    sys.exit(main())
