"""A model on a running server, for programs that load none themselves.

    model = RemoteModel("http://127.0.0.1:8000", "finetuned", key=None)
    answers = model.classify(["Great film.", ""])

A 503 is waited out, as long as its Retry-After says. Whatever else is no answer is a UserError,
whose message names the next step.
"""

import json
import sys
import time

from http_client import JsonServer, NoAnswer
from serving.settings import API_KEY_VARIABLE, length_problem
from settings import UserError

MOST_TEXTS_AT_ONCE = 64  # so that the texts of others find room between
PATIENCE_SEC = 600.0  # of being refused, until a request is given up


class RemoteModel:
    """url: of the server; name: base, finetuned or an adapter; key: what the server wants, or None.

    info: what GET /models says of the model; limits: what a request may have, of the same answer.
    Raises UserError.
    """

    def __init__(self, url, name, key):
        self._server = JsonServer(url, "--server", None if key is None else {"X-API-Key": key})
        self.url, self.name = self._server.url, name
        until = time.monotonic() + PATIENCE_SEC
        while (data := self._ask("GET", "/models", until)) is None:
            pass
        try:
            models, self.limits = {model["name"]: model for model in data["models"]}, data["limits"]
        except (TypeError, KeyError):
            raise self._stranger("its list of models is another") from None
        if name not in models:
            known = ", ".join(list(models)[:20])
            raise UserError(
                f"the server {self.url} has no model {name!r}; --model is one of {known}"
            )
        self.info = models[name]
        if self.info["status"] == "broken":
            raise UserError(f"the server {self.url} cannot use {name}: {self.info['reason']}")

    @property
    def calibrator_fingerprint(self):
        calibrator = self.info["calibrator"]
        return None if calibrator is None else calibrator["fingerprint"]

    def classify(self, texts):
        """What POST /classify/batch says of each text, in order: an answer, or {"error": ...}.

        texts: strings without lone surrogates. Raises UserError, also if the model or its
        calibrator is no longer that of `info`.
        """
        too_long = [length_problem(text, self.limits["text_chars"]) for text in texts]
        sent = [text for text, problem in zip(texts, too_long, strict=True) if problem is None]
        found = (answer for portion in self._portions(sent) for answer in self._classify(portion))
        answers = [next(found) if problem is None else {"error": problem} for problem in too_long]
        expected = self.info["model_fingerprint"], self.calibrator_fingerprint
        for answer in answers:
            if "error" in answer:
                continue
            if (answer["model_fingerprint"], answer["calibrator_fingerprint"]) != expected:
                raise UserError(
                    f"{self.name} was replaced on the server {self.url} meanwhile; run the same "
                    "command again"
                )
        return answers

    def _portions(self, texts):
        """Yields the texts in lists that a request may have."""
        most, envelope = self.limits["body_bytes"], 2 * len(self.name) + 200
        most_texts = min(self.limits["texts"], MOST_TEXTS_AT_ONCE)
        portion, size = [], envelope
        for text in texts:
            own = len(json.dumps(text)) + len(", ")
            if portion and (len(portion) == most_texts or size + own > most):
                yield portion
                portion, size = [], envelope
            portion.append(text)
            size += own
        if portion:
            yield portion

    def _classify(self, texts):
        """The answers to one portion. What is refused is asked for again in halves: less finds room
        sooner, and is done sooner."""
        body, until = {"model": self.name, "texts": texts}, time.monotonic() + PATIENCE_SEC
        while (data := self._ask("POST", "/classify/batch", until, body)) is None:
            if half := len(texts) // 2:
                return self._classify(texts[:half]) + self._classify(texts[half:])
        try:
            if len(data["answers"]) == len(texts):
                return data["answers"]
        except (TypeError, KeyError):
            pass
        raise self._stranger("its answers are others")

    def _ask(self, method, path, until, body=None):
        """The JSON that answers a request; None after a 503, once its Retry-After is over."""
        try:
            answer = self._server.ask(method, path, body)
        except NoAnswer as error:
            raise UserError(
                f"no answer from {self.url} ({error}); start the server with: python "
                "classify_api.py, or give another --server"
            ) from error
        if answer.data is None:
            raise self._stranger(f"status {answer.status} without JSON")
        if answer.status == 200:
            return answer.data
        problem = answer.data if isinstance(answer.data, dict) else {}
        detail = problem.get("detail", "it does not say why")
        if answer.status == 401:
            raise UserError(
                f"the server {self.url} wants its key; set {API_KEY_VARIABLE} to the one it was "
                "started with"
            )
        if answer.status != 503 or str(problem.get("type")).endswith(":model-unavailable"):
            raise UserError(f"the server {self.url} answered {answer.status}: {detail}")
        wait_sec = 1.0 if answer.retry_after_sec is None else answer.retry_after_sec
        if time.monotonic() + wait_sec > until:
            raise UserError(
                f"the server {self.url} has refused for {PATIENCE_SEC:g} s ({detail}); run the "
                "same command again later"
            )
        print(f"{self.url}: {detail}; asking again in {wait_sec:g} s", file=sys.stderr)
        time.sleep(wait_sec)
        return None

    def _stranger(self, why):
        return UserError(
            f"{self.url} does not answer like a classify_api.py of this version ({why}); give "
            "another --server"
        )
