"""A model on an OpenAI-compatible server as a classifier: vLLM, SGLang, llama.cpp, OpenAI.

    vllm serve meta-llama/Llama-3.1-8B-Instruct
    python classify_cli.py --backend openai --base-url http://127.0.0.1:8000/v1 \\
        --model meta-llama/Llama-3.1-8B-Instruct "Best worst thing ever"

Prompts are made here, as for a model that is loaded here, and one token is asked for with
POST /completions. How much the server says of it is found out once, best first: the log-probability
of every answer word (vLLM's logprob_token_ids), those of its 100, 20 or 5 most probable tokens, or
none. A word that is not among them counts with the most that its probability can be, and the
prediction says so (`records.Prediction.label_slack`). Without log-probabilities answers are drawn,
if that is wanted. Prompts are sent as token ids or, where the server takes text only, as text that
it reads as the same tokens, which is checked for every row; a text that it would read otherwise,
such as one with a control token in it, is an error of its row.
"""

import itertools
import math
import os
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from consistency_confidence import prediction_from_draws
from http_client import JsonServer, NoAnswer
from logprobs_confidence import (
    CHECK_TEXTS,
    HALF_PRECISION_TOLERANCE,
    Explanation,
    LogprobsClassifier,
    TokenProbability,
    load_tokenizer,
    mean_prediction,
    visible_token,
)
from records import CONSISTENCY, prediction_from_logprobs
from settings import EvaluationSettings, UserError, fingerprint, resolve_model

KEY_VARIABLE = "OPENAI_API_KEY"
FIRST_PATIENCE_SEC = 5.0  # with a server that cannot be reached, before it has answered once
PATIENCE_SEC = 300.0  # with one that has answered, or says that it is busy
FIRST_WAIT_SEC, LONGEST_WAIT_SEC = 0.5, 30.0  # between two tries; doubled each time
BUSY = {408, 425, 429, 500, 502, 503, 504, 529}  # statuses after which it is worth asking again
TOP_TOKENS = (100, 20, 5)  # most probable tokens to ask for: the first that a server grants
MOST_TOKEN_IDS = 128  # of vLLM's logprob_token_ids
NO_CHANCE = -9999.0  # nats, as vLLM writes it: JSON has no infinity
ROUNDING = 1e-6  # of the probabilities that a server returns, in sum
# What GET /models says of a model that belongs to its identity; the rest changes with every start.
REPORTED = ("root", "parent", "owned_by", "max_model_len", "meta")


class Refused(Exception):
    """The server does not do what was asked, and says why; status: of its answer."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class Requests:
    """The requests to a server; in the place of `engine.Engine`. For any number of threads.

    workers: requests under way at the same time. counters: lists that grow by 1 for each prompt.
    """

    shares_prefix = False
    budget = 1  # token: every prompt is a batch of its own

    def __init__(self, url, workers):
        key = os.environ.get(KEY_VARIABLE)
        if key is not None and (not key.isascii() or not key.isprintable() or key != key.strip()):
            raise UserError(f"{KEY_VARIABLE} must be printable ASCII without spaces at its ends")
        headers = {"Authorization": f"Bearer {key}"} if key else None
        self.server = JsonServer(url, "--base-url", headers, workers)
        self.workers, self.counters = workers, []
        self.busy = BUSY - {500}  # until it is known what the server can do
        self._reached = False
        self._stopped = threading.Event()
        self._said, self._saying = -float("inf"), threading.Lock()

    def prefix(self, ids, adapter_active):
        """None: what prompts share is the server's matter."""
        return None

    def run(self, sequences, prefix, score):
        """As `engine.Engine.run`; a batch is one prompt."""

        def work(row):
            started = time.perf_counter()
            return [row], score([sequences[row]], None), time.perf_counter() - started

        pool = ThreadPoolExecutor(min(self.workers, len(sequences)) or 1)
        try:
            yield from pool.map(work, range(len(sequences)))
        except BaseException:
            self._stopped.set()  # whoever waits for another try gives up
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self._stopped.clear()

    def ask(self, method, path, body=None):
        """The JSON object that answers. What fails for now is tried again, with longer and longer
        waits or when the server says. Raises Refused; UserError when patience ends."""
        for counter in self.counters:
            counter.append(1)
        started = time.monotonic()
        for attempt in itertools.count():
            try:
                answer = self.server.ask(method, path, body)
            except NoAnswer as error:
                reason, wait_sec = f"no answer: {error}", None
                patience_sec = PATIENCE_SEC if self._reached else FIRST_PATIENCE_SEC
            else:
                self._reached, patience_sec = True, PATIENCE_SEC
                if answer.status == 200 and isinstance(answer.data, dict):
                    return answer.data
                if answer.status in (401, 403):
                    raise UserError(
                        f"the server {self.server.url} wants a key or refuses the one it got "
                        f"({answer.status}); set {KEY_VARIABLE}"
                    )
                reason, wait_sec = message_of(answer), answer.retry_after_sec
                if answer.status not in self.busy:
                    raise Refused(answer.status, reason)
            if wait_sec is None:
                wait_sec = min(LONGEST_WAIT_SEC, FIRST_WAIT_SEC * 2**attempt)
                wait_sec *= random.uniform(0.75, 1.25)  # so that not all come back together
            if time.monotonic() + wait_sec > started + patience_sec:
                raise UserError(
                    f"{self.server.url}: {reason}, for {patience_sec:g} s; is the server running, "
                    "and --base-url right? The same command continues with what is missing"
                )
            self._say(f"{self.server.url}: {reason}; asking again in {wait_sec:.1f} s")
            if self._stopped.wait(wait_sec):
                raise UserError("interrupted")

    def _say(self, message):
        with self._saying:
            if time.monotonic() > self._said + 5:  # one of many threads speaks for all
                self._said = time.monotonic()
                print(message, file=sys.stderr)


def message_of(answer):
    """What an answer that is none says, in one line."""
    data = answer.data if isinstance(answer.data, dict) else {}
    error = data.get("error", data.get("detail", data.get("message")))
    error = error.get("message") if isinstance(error, dict) else error
    reason = " ".join(str(error).split())[:300] if error else "without an explanation"
    return f"status {answer.status}, {reason}"


@dataclass(frozen=True)
class Reading:
    """How a server is asked. by_ids: the prompt is sent as token ids, else as text. top: most
    probable tokens that it returns; 0: exactly the tokens asked for; None: no log-probabilities.
    drop: characters at the start of a text prompt, of a token that the server puts there itself.
    texts: it names tokens by their text and not by their id.
    """

    by_ids: bool
    top: int | None
    drop: int = 0
    texts: bool = False

    @property
    def name(self):
        prompt = "token ids" if self.by_ids else "text"
        what = {0: "logprob_token_ids", None: "sampled answers"}.get(self.top, f"top {self.top}")
        return f"{what}, prompts as {prompt}"


@dataclass(frozen=True)
class Reply:
    """What a server said of one prompt. label_logprobs: (K,) nats; label_slack: as in
    `records.Prediction`; or counts: (K,) answers drawn; or error: why there is nothing."""

    label_logprobs: tuple[float, ...] | None = None
    label_slack: tuple[float, ...] | None = None
    counts: tuple[int, ...] | None = None
    error: str | None = None


class ServerLogprobsClassifier(LogprobsClassifier):
    """A model that an OpenAI-compatible server has, as a classifier for one task.

    settings: `ModelSettings` with a base_url; their model is the server's name of it. sampling: if
    the server has no log-probabilities, answers are drawn and the predictions are those of response
    consistency; otherwise that is a UserError. Raises UserError.

    Attributes besides those of every `LogprobsClassifier`: engine (`Requests`), reading
    (`Reading`: how the server is asked), tolerance: of a probability between two requests.
    """

    adapter_active, device, dtype = False, "server", "of the server"
    tolerance = HALF_PRECISION_TOLERANCE

    def __init__(self, settings, task, sampling=False):
        self.settings = settings
        self.engine = Requests(settings.base_url, settings.concurrency)
        self.name, self.report = self._find_model()
        self.tokenizer = load_tokenizer(self._tokenizer_name())
        self.max_tokens = self._longest_prompt()
        self.reading, self._tokenizing = None, threading.Lock()  # no tokenizer is thread-safe
        self._ask(task, self._encoders(task))
        self.reading = self._find_reading()
        self.engine.busy = BUSY
        if self.reading.top is None and not sampling:
            raise UserError(
                f"{settings.base_url} gives no log-probabilities; only classify_cli.py can do "
                "without them, by drawing answers. Start the server so that it returns them"
            )
        self.method = CONSISTENCY if self.reading.top is None else type(self).method
        self._check_words()
        if self.reading.top != 0:
            print(f"{self.name}: {self._caveat()}", file=sys.stderr)

    # ------------------------------------------------------------------------- what the server is

    def _find_model(self):
        """(the server's name of the model, what it reports of it)."""
        url = self.engine.server.url
        try:
            models = self.engine.ask("GET", "/models").get("data")
            listed = {model["id"]: model for model in models}
        except (Refused, TypeError, KeyError) as error:
            raise UserError(
                f"{url}/models does not list models ({error}); --base-url is the address of an "
                "OpenAI-compatible API and mostly ends in /v1"
            ) from error
        for name in (self.settings.model, resolve_model(self.settings.model)):
            if name in listed:
                report = listed[name]
                return name, {key: report[key] for key in REPORTED if report.get(key) is not None}
        known = ", ".join(list(listed)[:20])
        raise UserError(
            f"the server {url} has no model {self.settings.model!r}; --model is one of: {known}"
        )

    def _tokenizer_name(self):
        if self.settings.tokenizer is not None:
            return resolve_model(self.settings.tokenizer)
        name = resolve_model(self.settings.model)
        if "/" in name or Path(name).is_dir():
            return name
        raise UserError(
            f"{self.settings.model!r} is no preset, folder or hub id, so its tokenizer is not "
            "known; name it with --tokenizer"
        )

    def _longest_prompt(self):
        meta = self.report.get("meta")
        known = (
            self.report.get("max_model_len"),
            meta.get("n_ctx_train") if isinstance(meta, dict) else None,
            self.tokenizer.model_max_length,  # a huge number where nobody knows
        )
        context = min(n for n in known if isinstance(n, int) and n > 0)
        return min(self.settings.max_tokens, context - 8)

    def _find_reading(self):
        """The best `Reading` that the server grants. Raises UserError if it grants none."""
        ((ids, _),) = self.encoder.encode(CHECK_TEXTS[1:2])
        wanted = sorted({word[0] for words in self.words for word in words})[:MOST_TOKEN_IDS]
        reason = None
        forms = [(by_ids, top) for by_ids in (True, False) for top in (0, *TOP_TOKENS)]
        for by_ids, top in [*forms, (True, None), (False, None)]:
            reading = Reading(by_ids, top)
            try:
                answer = self._complete(reading, ids, wanted)
                if not by_ids and prompt_tokens(answer) == len(ids) + 1:
                    reading = replace(reading, drop=len(self._text(reading, ids[:1])))
                    answer = self._complete(reading, ids, wanted)
            except Refused as error:
                if error.status == 404:
                    raise UserError(
                        f"{self.engine.server.url} has no /completions for {self.name} ({error}); "
                        "one of chat completions alone cannot be used: its prompts are not known"
                    ) from error
                reason = str(error)
                continue
            read = prompt_tokens(answer)
            if read != len(ids) and (read is not None or not by_ids):
                reason = f"it counts {read} tokens in a prompt of {len(ids)}"
                continue
            returned = returned_logprobs(answer)
            if top is None or (top and returned) or (top == 0 and returned.keys() >= set(wanted)):
                return replace(reading, texts=any(isinstance(name, str) for name in returned))
        raise UserError(
            f"{self.engine.server.url} refuses every form of request ({reason}); is --tokenizer "
            "that of its model?"
        )

    @property
    def identity(self):
        """What a calibrator is tied to. The weights are out of reach: the server's word for the
        model stands in their place, and its address is no part of it."""
        parts = {
            "model": self.name,
            "model_fingerprint": None,
            "weights": "on a server, not fingerprinted: a calibrator trusts that model and report "
            "name the same weights as when it was fitted",
            "report": self.report,
            "reading": self.reading.name,
            "adapter_fingerprint": None,
            **self._asked,
            "dtype": self.dtype,
            "quantization": self.dtype,
        }
        return {**parts, "fingerprint": fingerprint(parts)}

    # ---------------------------------------------------------------------------- answer words

    def _ask(self, task, encoders):
        super()._ask(task, encoders)
        firsts, wholes = self.encoder.label_ids, self.encoder.label_words
        # (K, words of a label, its tokens): the first token decides, unless labels share one
        self.words = wholes or tuple(tuple((token,) for token in ids) for ids in firsts)
        if self.reading is not None:
            self._check_words()

    def _check_words(self):
        """Raises UserError for answer words that this server's answers do not tell apart."""
        if self.reading.top is None and self.encoder.label_words is not None:
            raise UserError(
                "the labels begin with the same token, and the server gives no log-probabilities; "
                "choose answer words that differ in their first token"
            )
        if not self.reading.texts:
            return
        for token in {t for words in self.words for word in words for t in word}:
            if self._texts.count(self._texts[token]) > 1:
                raise UserError(
                    f"several tokens of this model read {self._texts[token]!r}, and the server "
                    "names tokens by their text; choose another answer word, or a server that has "
                    "logprob_token_ids (vLLM)"
                )

    @cached_property
    def _texts(self):
        """[str] how every token of the vocabulary reads."""
        every = [[token] for token in range(len(self.tokenizer))]
        return self.tokenizer.batch_decode(every, clean_up_tokenization_spaces=False)

    def _caveat(self):
        if self.reading.top is None:
            n = EvaluationSettings.samples
            return f"no log-probabilities; {n} answers are drawn for each text, by the server"
        return (
            f"only the {self.reading.top} most probable tokens are known; an answer word that is "
            "not among them counts with the most that it can have"
        )

    # ----------------------------------------------------------------------------------- requests

    def _text(self, reading, ids):
        """Token ids as the text of a prompt."""
        with self._tokenizing:
            text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text[reading.drop :]

    def _reads_the_same(self, ids):
        """Whether token ids, as text, are read as the same ids."""
        text = self._text(replace(self.reading, drop=0), ids)
        with self._tokenizing:
            return self.tokenizer(text, add_special_tokens=False).input_ids == list(ids)

    def _complete(self, reading, ids, wanted=(), **options):
        """The answer to one prompt. wanted: tokens whose log-probability is of interest."""
        body = {"model": self.name, "max_tokens": 1, "temperature": 0, "stream": False}
        body["prompt"] = list(ids) if reading.by_ids else self._text(reading, ids)
        if reading.top is not None:
            body["logprobs"] = reading.top or 1
        if reading.top == 0:
            body |= {"logprob_token_ids": list(wanted), "return_tokens_as_token_ids": True}
        answer = self.engine.ask("POST", "/completions", body | options)
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices:
            raise Refused(200, "an answer without choices")
        return answer

    def _token_bounds(self, ids, wanted):
        """{token: (lower, upper)} probabilities of the token after a prompt.

        A token that was not returned has at most what the least probable returned one has, and at
        most what all returned ones leave.
        """
        found = {}
        for start in range(0, len(wanted), MOST_TOKEN_IDS):
            part = wanted[start : start + MOST_TOKEN_IDS]
            answer = self._complete(self.reading, ids, part)
            self._check_read(answer, ids)
            returned = returned_logprobs(answer)
            if not returned:
                raise Refused(200, "an answer without log-probabilities")
            chances = np.exp(list(returned.values()))
            most = min(chances.min(), max(1.0 - chances.sum(), 0.0) + ROUNDING)
            for token in part:
                logprob = returned.get(self._texts[token] if self.reading.texts else token)
                if logprob is None and self.reading.top == 0:
                    raise Refused(200, "an answer without all logprob_token_ids")
                known = None if logprob is None else np.exp(logprob)
                found[token] = (0.0, most) if known is None else (known, known)
        return found

    def _check_read(self, answer, ids):
        read = prompt_tokens(answer)
        if not self.reading.by_ids and read != len(ids):
            raise Refused(200, f"the server read {read} tokens where the prompt has {len(ids)}")

    def _label_bounds(self, ids):
        """((K,) lower, (K,) upper) probabilities of the labels after a prompt."""
        after = {}  # what was said of an answer so far: the tokens that may come next
        for word in (word for words in self.words for word in words):
            for n, token in enumerate(word):
                after.setdefault(word[:n], set()).add(token)
        bounds = {
            said: self._token_bounds([*ids, *said], sorted(tokens))
            for said, tokens in after.items()
        }
        chances = [  # (K,) of (words, 2)
            [
                np.prod([bounds[word[:n]][token] for n, token in enumerate(word)], axis=0)
                for word in words
            ]
            for words in self.words
        ]
        lower, upper = np.array([np.sum(words, axis=0) for words in chances]).T
        return np.minimum(lower, 1.0), np.minimum(upper, 1.0)

    def _draws(self, ids):
        """(K,) how often each label was drawn, of `EvaluationSettings.samples` answers."""
        label_of = {
            self._text(replace(self.reading, drop=0), word).strip(): k
            for k, words in enumerate(self.words)
            for word in words
        }
        counts, drawn = np.zeros(len(self.words), dtype=int), 0
        n_samples, seed = EvaluationSettings.samples, EvaluationSettings.evaluation_seed
        while drawn < n_samples:
            left = n_samples - drawn  # not every server draws more than one
            answer = self._complete(
                self.reading, ids, temperature=1, top_p=1, n=left, seed=seed + drawn
            )
            self._check_read(answer, ids)
            for choice in answer["choices"][:left]:
                if (label := label_of.get(str(choice.get("text")).strip())) is not None:
                    counts[label] += 1
                drawn += 1
        return tuple(counts.tolist())

    def label_logprobs(self, sequences, temperature=1.0, prefix=None):
        """[`Reply`] to prompts given as token ids. Raises UserError."""
        if temperature != 1.0:
            raise UserError("a server gives log-probabilities at temperature 1; leave it at 1")
        return [self._reply(ids) for ids in sequences]

    def _reply(self, ids):
        if not self.reading.by_ids and not self._reads_the_same(ids):
            return Reply(
                error="the server takes prompts as text and would read this one as other tokens: "
                "the text holds a control token of this model, or lost half a word when it was "
                "shortened; use a server that takes token ids (vLLM)"
            )
        try:
            if self.reading.top is None:
                return Reply(counts=self._draws(ids))
            lower, upper = self._label_bounds(ids)
        except Refused as error:
            if error.status == 404:  # the model is gone, and no other row will fare better
                raise UserError(f"{self.engine.server.url}: {error}") from error
            return Reply(error=f"the server refuses this text: {error}")
        with np.errstate(divide="ignore"):  # −inf is an error of the row, in `prediction`
            logprobs = tuple(np.log(upper).tolist())
        slack = tuple((upper - lower).tolist())
        return Reply(logprobs, slack if any(slack) else None)

    def prediction(self, example_id, reply, truncated, seconds):
        """The `Prediction` that follows from a `Reply`."""
        if reply.error is not None:
            return self._error(example_id, reply.error)
        if reply.label_logprobs is not None and not np.isfinite(reply.label_logprobs).all():
            return super().prediction(example_id, reply.label_logprobs, truncated, seconds)
        cost = {"truncated": truncated, "latency_sec": seconds}
        if reply.counts is not None:
            samples = EvaluationSettings.samples
            return prediction_from_draws(example_id, self.task, reply.counts, samples, **cost)
        return prediction_from_logprobs(
            example_id, self.task, reply.label_logprobs, label_slack=reply.label_slack, **cost
        )

    # ------------------------------------------------------------------------ what is shown of it

    def explain(self, text, k=8):
        """`Explanation` of one text with the k most probable tokens, or as many as are granted.

        Raises UserError for a text that cannot be scored.
        """
        orders = tuple(order.classify(text) for order in self.orders)
        ((ids, _),) = self.encoder.encode([text.strip()])
        firsts = [list(dict.fromkeys(word[0] for word in words)) for words in self.words]
        try:
            top = self._top_tokens(ids, k)
            bounds = self._token_bounds(ids, sorted({t for tokens in firsts for t in tokens}))
        except Refused as error:
            raise UserError(f"the server refuses this text: {error}") from error
        ranks = {t.token_id: t.rank for t in top}

        def row(token):
            lower, upper = map(float, bounds[token])
            name = visible_token(self.tokenizer, token)
            logprob = math.log(upper) if upper > 0 else NO_CHANCE
            return TokenProbability(
                ranks.get(token), token, name, logprob, upper, bound=lower < upper
            )

        words = {
            name: tuple(sorted(map(row, tokens), key=lambda t: -t.probability))
            for name, tokens in zip(self.task.label_names, firsts, strict=True)
        }
        prompt, answer = self.encoder.prompt(text.strip()), mean_prediction(self.task, orders)
        return Explanation(prompt, orders[0], tuple(top[:k]), words, orders, answer)

    def _top_tokens(self, ids, k):
        """[`TokenProbability`] of the most probable tokens after a prompt, at least one.

        They are k or more, unless the server grants fewer. Raises Refused.
        """
        numbers, options = [self.reading.top], {}
        if self.reading.top == 0:  # how many it grants is not known, and tokens go by their id
            numbers = list(dict.fromkeys(min(k, most) for most in TOP_TOKENS))
            options = {"return_tokens_as_token_ids": True}
        for number in numbers:
            try:
                answer = self._complete(replace(self.reading, top=number), ids, **options)
                break
            except Refused:
                if number == numbers[-1]:
                    raise
        self._check_read(answer, ids)
        returned = sorted(returned_logprobs(answer).items(), key=lambda item: -item[1])
        if not returned:
            raise Refused(200, "an answer without log-probabilities")
        rows = []
        for rank, (token, logprob) in enumerate(returned, 1):
            name = repr(token)
            if isinstance(token, str):
                token = self._texts.index(token) if self._texts.count(token) == 1 else None
            if token is not None:
                name = visible_token(self.tokenizer, token)
            rows.append(TokenProbability(rank, token, name, logprob, math.exp(logprob)))
        return rows

    # ------------------------------------------------------- what an evaluation asks besides labels

    @contextmanager
    def without_adapter(self):
        """The model as it is: an adapter of a server is a model of its own."""
        yield self

    @contextmanager
    def counted_passes(self):
        """Inside the block the list that it gives grows by 1 for each prompt that is sent."""
        counts = []
        self.engine.counters.append(counts)
        try:
            yield counts
        finally:
            self.engine.counters.remove(counts)

    def greedy_replies(self, sequences, max_new_tokens):
        """[str] what the model generates after each prompt of token ids, its most probable tokens.

        Raises UserError where the server refuses one.
        """
        reading = replace(self.reading, top=None)

        def score(rows, _):
            try:
                answer = self._complete(reading, rows[0], max_tokens=max_new_tokens)
            except Refused as error:
                raise UserError(f"{self.engine.server.url}: {error}") from error
            return [str(answer["choices"][0].get("text"))]

        replies = {}
        for (row,), (text,), _ in self.engine.run(sequences, None, score):
            replies[row] = text
        return [replies[row] for row in range(len(sequences))]


def returned_logprobs(answer):
    """{token id or text: log-probability} that came with the first token of an answer.

    In OpenAI's form they are an object of texts, in vLLM's of "token_id:9642"; llama.cpp's server
    has a list of objects with an id.
    """
    logprobs = answer["choices"][0].get("logprobs") or {}
    if content := logprobs.get("content"):
        rows = [content[0], *content[0].get("top_logprobs", [])]
        return {row.get("id", row["token"]): float(row["logprob"]) for row in rows}
    (first,) = (logprobs.get("top_logprobs") or [None])[:1]
    named = {name.removeprefix("token_id:"): value for name, value in (first or {}).items()}
    if named.keys() != (first or {}).keys():
        return {int(name): float(value) for name, value in named.items()}
    return {name: float(value) for name, value in named.items()}


def prompt_tokens(answer):
    """Tokens that a server counted in the prompt, or None if it does not say."""
    usage = answer.get("usage")
    return usage.get("prompt_tokens") if isinstance(usage, dict) else None
