"""A server that speaks as vLLM does, on a real port, with the real embedded model behind it.

    with CompletionServer(classifier) as server:
        settings = ModelSettings(MODEL_NAME, "openai", server.url, tokenizer="embedded")

What the tests of `openai_backend` need besides a well-behaved server is set by attributes of
`CompletionServer`. Request and response have the fields of vLLM's `CompletionRequest` and
`CompletionResponse` (vllm/entrypoints/openai/completion/protocol.py, July 2026).
"""

import json
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

MODEL_NAME = "tiny-sentiment"
KEY = "a-key-for-the-tests"


class CompletionServer:
    """classifier: `TransformerLogprobsClassifier` that computes.

    token_ids: whether prompts may be token ids; logprob_token_ids: whether it has that field, or
    ignores it as older versions do; most_logprobs: largest `logprobs`, None: it returns none;
    by_id: it answers in the form of llama.cpp's server; key: what requests must carry.
    failures: how the next requests of /completions fail: a status, (429, Retry-After), "drop", or
    seconds to wait first. bodies: what was asked. most_at_once: requests that were under way
    together.
    """

    def __init__(self, classifier, **attributes):
        self.classifier = classifier
        self.token_ids, self.logprob_token_ids, self.most_logprobs = True, True, 20
        self.by_id, self.key, self.failures, self.bodies = False, None, deque(), []
        self.fails = lambda number: None  # of the request number n, in the place of `failures`
        self.under_way = self.most_at_once = 0
        for name, value in attributes.items():
            setattr(self, name, value)
        self._lock, self._model = threading.Lock(), threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    @property
    def prompts(self):
        return [body["prompt"] for body in self.bodies]

    def models(self):
        model = {
            "id": MODEL_NAME,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "vllm",
            "root": "embedded",
            "parent": None,
            "max_model_len": 512,
            "permission": [{"id": f"modelperm-{time.monotonic_ns()}"}],
        }
        return {"object": "list", "data": [model]}

    def problem_of(self, body):
        """(status, message) for a request that is refused, or None."""
        prompt, logprobs = body["prompt"], body.get("logprobs")
        if body["model"] != MODEL_NAME:
            return 404, f"The model `{body['model']}` does not exist."
        if isinstance(prompt, list) and not self.token_ids:
            return 422, "prompt: Input should be a valid string"
        if logprobs is not None and logprobs > (self.most_logprobs or 10**9):
            return 400, (
                f"Requested sample logprobs of {logprobs}, which is greater than max allowed: "
                f"{self.most_logprobs}"
            )
        if body.get("logprob_token_ids") is not None and logprobs is None:
            return 400, "when using `logprob_token_ids`, `logprobs` must be set."
        if len(body.get("logprob_token_ids") or []) > 128:
            return 400, "logprob_token_ids has more than 128 ids"
        return None

    def complete(self, body):
        tokenizer, prompt = self.classifier.tokenizer, body["prompt"]
        if isinstance(prompt, str):
            prompt = tokenizer(prompt).input_ids  # with a BOS token of its own, as vLLM's
        generated, first = [], None
        with self._model:
            for _ in range(body["max_tokens"]):
                logits = self.classifier.engine.logits([[*prompt, *generated]])[0]
                first = logits.log_softmax(-1) if first is None else first
                generated.append(int(logits.argmax()))
                if generated[-1] == tokenizer.eos_token_id:
                    break
        drawn = [generated]
        if body["temperature"] > 0:
            generator = torch.Generator().manual_seed(body.get("seed") or 0)
            n = body.get("n") or 1
            drawn = torch.multinomial(first.exp(), n, True, generator=generator).unsqueeze(1)
            drawn = drawn.tolist()
        choices = [
            {
                "index": i,
                "text": tokenizer.decode(tokens, skip_special_tokens=True),
                "logprobs": self._logprobs(body, first, tokens[0]),
                "finish_reason": "length",
            }
            for i, tokens in enumerate(drawn)
        ]
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(generated)}
        return {
            "object": "text_completion",
            "model": MODEL_NAME,
            "choices": choices,
            "usage": usage,
        }

    def _logprobs(self, body, logprobs, sampled):
        if body.get("logprobs") is None or self.most_logprobs is None:
            return None
        top = logprobs.topk(body["logprobs"]).indices.tolist()
        if body.get("logprob_token_ids") and self.logprob_token_ids:
            top = body["logprob_token_ids"]
        tokens = dict.fromkeys([sampled, *top])
        tokenizer = self.classifier.tokenizer
        if self.by_id:
            rows = [
                {
                    "id": t,
                    "token": tokenizer.decode([t]),
                    "bytes": [],
                    "logprob": float(logprobs[t]),
                }
                for t in tokens
            ]
            return {"content": [rows[0] | {"top_logprobs": rows}]}
        as_ids = body.get("return_tokens_as_token_ids")
        named = {f"token_id:{t}" if as_ids else tokenizer.decode([t]): t for t in tokens}
        values = {name: max(float(logprobs[t]), -9999.0) for name, t in named.items()}
        return {
            "text_offset": [0],
            "token_logprobs": [float(logprobs[sampled])],
            "tokens": [next(iter(named))],
            "top_logprobs": [values],
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _send(self, status, data, headers=()):
        raw = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def _refuse(self, status, message, headers=()):
        error = {"message": message, "type": "BadRequestError", "param": None, "code": status}
        self._send(status, {"error": error}, headers)

    def _authorised(self):
        given, key = self.headers.get("Authorization"), self.owner.key
        if key is None or given == f"Bearer {key}":
            return True
        self._refuse(401, "Unauthorized")
        return False

    def do_GET(self):
        if not self._authorised():
            return
        if self.path == "/v1/models":
            self._send(200, self.owner.models())
        else:
            self._refuse(404, "Not Found")

    def do_POST(self):
        owner = self.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._authorised():
            return
        if self.path != "/v1/completions":
            self._refuse(404, "Not Found")
            return
        with owner._lock:
            owner.bodies.append(body)
            number = len(owner.bodies)
            failure = owner.failures.popleft() if owner.failures else owner.fails(number)
            owner.under_way += 1
            owner.most_at_once = max(owner.most_at_once, owner.under_way)
        try:
            self._complete(body, failure)
        finally:
            with owner._lock:
                owner.under_way -= 1

    def _complete(self, body, failure):
        if failure == "drop":
            self.close_connection = True
            self.connection.close()
            return
        if isinstance(failure, float):
            time.sleep(failure)
        elif failure is not None:
            status, *wait = failure if isinstance(failure, tuple) else (failure,)
            self._refuse(status, "not now", [("Retry-After", str(sec)) for sec in wait])
            return
        if problem := self.owner.problem_of(body):
            self._refuse(*problem)
            return
        self._send(200, self.owner.complete(body))
