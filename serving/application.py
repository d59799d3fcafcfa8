"""The addresses of the server: `create_app` puts them before a `Service`."""

import hashlib
import hmac
import logging
import re
import time
import uuid
from base64 import b64encode
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote_to_bytes

import anyio
from fastapi import Depends, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastapi.security import APIKeyHeader
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException

from serving.answers import (
    Answer,
    BatchAnswer,
    BatchQuestion,
    DecideAnswer,
    DecideQuestion,
    ExplainAnswer,
    ExplainQuestion,
    Health,
    Limits,
    ModelsAnswer,
    Ready,
    RowError,
    TextQuestion,
    answer_to,
    decision_on,
    explanation_of,
    info_on,
)
from serving.problems import Problem, as_problem, documented, problem_response

log = logging.getLogger("howsure")

PAGE = Path(__file__).with_name("page.html")
OPEN_ADDRESSES = ("/", "/health", "/ready", "/ui", "/docs", "/openapi.json")
JSON_ADDRESSES = ("/classify", "/classify/batch", "/explain", "/decide")
OPEN_FOLDERS = ("/static-offline-docs/",)
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
ASKING = (
    "bad-request",
    "unknown-model",
    "body-timeout",
    "too-large",
    "unsupported-media-type",
    "invalid-input",
    "invalid-text",
    "internal-error",
    "starting",
    "stopping",
    "queue-full",
    "deadline-exceeded",
    "model-unavailable",
)
DESCRIPTION = """Classification of texts whose confidence can be trusted: the label of a causal
language model, the probability the model gives it, and the calibrated probability, how often such
an answer is right. Errors are problem details (RFC 9457)."""


def create_app(service, key=None):
    """The ASGI application of a `Service`. key: what requests must carry as X-API-Key, or None."""

    @asynccontextmanager
    async def lifespan(_):
        await service.start()
        yield
        await service.stop()

    app = FastAPIOffline(
        title="How Sure?",
        version="1",
        description=DESCRIPTION,
        lifespan=lifespan,
        static_url=OPEN_FOLDERS[0].rstrip("/"),
        redoc_url=None,
    )
    app.add_middleware(Edge, service=service, key=key)
    for kind in (Problem, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer_problem)
    guard, refused = [], ()
    if key is not None:
        guard = [Depends(APIKeyHeader(name="X-API-Key", auto_error=False))]
        refused = ("unauthorized",)

    def asking(path, method, answer, summary):
        return getattr(app, method)(
            path,
            response_model=answer,
            summary=summary,
            dependencies=guard,
            responses=documented(*refused, *ASKING),
        )

    # ------------------------------------------------------------------------------ questions

    async def classify_one(request, question):
        model, (result,) = await service.ask(request, question.asked, [question.text])
        answer = answer_to(model, scored(result), elapsed(request))
        service.metrics.observe_answer(answer)
        return answer

    @asking("/classify", "get", Answer, "Classify a text")
    async def classify_get(request: Request, question: Annotated[TextQuestion, Query()]):
        return await classify_one(request, question)

    @asking("/classify", "post", Answer, "Classify a text")
    async def classify_post(request: Request, question: TextQuestion):
        return await classify_one(request, question)

    @asking("/classify/batch", "post", BatchAnswer, "Classify several texts")
    async def classify_batch(request: Request, question: BatchQuestion):
        model, results = await service.ask(request, question.asked, question.texts)
        seconds = elapsed(request)
        answers = [
            RowError(error=result) if isinstance(result, str) else answer_to(model, result, seconds)
            for result in results
        ]
        good = [answer for answer in answers if isinstance(answer, Answer)]
        for answer in good:
            service.metrics.observe_answer(answer)
        return BatchAnswer(
            answers=answers, failed=len(answers) - len(good), latency_sec=elapsed(request)
        )

    @asking("/explain", "post", ExplainAnswer, "Show how an answer comes about")
    async def explain(request: Request, question: ExplainQuestion):
        model, (result,) = await service.ask(
            request, question.asked, [question.text], question.top_k
        )
        found = explanation_of(
            model, scored(result), question.samples, question.seed, elapsed(request)
        )
        service.metrics.observe_answer(found.answer)
        return found

    @asking("/decide", "post", DecideAnswer, "Automate the answer, or have a person look at it")
    async def decide(request: Request, question: DecideQuestion):
        model, (result,) = await service.ask(request, question.asked, [question.text])
        found = decision_on(model, scored(result), question.promise, elapsed(request))
        service.metrics.observe_answer(found.answer)
        return found

    # ------------------------------------------------------------------------------- the server

    @app.get("/", response_model=Health, summary="Alive, and what is loaded")
    @app.get("/health", response_model=Health, summary="Alive, and what is loaded")
    async def health():
        return Health(
            status=service.status,
            base=service.model_settings.model,
            adapters_in_memory=len(service.loaded_adapters),
            waiting_rows=service.queue.rows,
            waiting_tokens=service.queue.tokens,
            uptime_sec=time.monotonic() - service.started_at,
        )

    @app.get(
        "/ready",
        response_model=Ready,
        summary="Weights loaded, warmed up, self-check passed",
        responses=documented("starting", "stopping"),
    )
    async def ready():
        service.check_started()
        if service.status == "stopping":
            raise Problem("stopping", "the server takes no new work", retry_after_sec=5)
        return Ready(status="ready")

    @app.get(
        "/models",
        response_model=ModelsAnswer,
        summary="The models that can be asked",
        dependencies=guard,
        responses=documented(*refused, "starting"),
    )
    async def models():
        found = await service.in_front(service.catalogue_models)
        return ModelsAnswer(
            base=service.model_settings.model,
            dtype=service.catalogue.base.identity["dtype"],
            device=service.catalogue.base.device,
            models=[info_on(model, service.worker.model) for model in found],
            limits=Limits(
                text_chars=service.settings.max_text_chars,
                prompt_tokens=service.catalogue.base.max_tokens,
                body_bytes=service.settings.max_body_bytes,
            ),
        )

    @app.get(
        "/metrics",
        response_class=Response,
        summary="Measurements for Prometheus",
        dependencies=guard,
        responses=documented(*refused) | {200: {"content": {"text/plain": {}}}},
    )
    async def metrics():
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    page = PAGE.read_text(encoding="utf-8")
    policy = content_security_policy(page)

    @app.get(
        "/ui", response_class=HTMLResponse, summary="A page to try it", include_in_schema=False
    )
    async def ui():
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    return app


def scored(result):
    """The result of a single text, if it has one. Raises Problem."""
    if isinstance(result, str):
        raise Problem("invalid-text", result)
    return result


def elapsed(request):
    return time.perf_counter() - request.state.arrived


async def answer_problem(request, error):
    problem = as_problem(error)
    request.state.problem = problem.kind
    return problem_response(problem, request.state.request_id)


def content_security_policy(page):
    """Nothing may run or load but the page's own script and style."""

    def hashes(tag):
        bodies = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (hashlib.sha256(body.encode("utf-8")).digest() for body in bodies)
        return " ".join(f"'sha256-{b64encode(digest).decode('ascii')}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


class Edge:
    """What holds for every request: its id, limits, key, log line and measurements.

    Whatever the application raises ends here as a problem; a request never ends without an answer.
    """

    def __init__(self, app, service, key):
        self.app, self.service, self.key = app, service, key

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, arrived=time.perf_counter(), problem=None)
        status = None

        async def send_marked(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = MutableHeaders(scope=message)
                own["X-Request-ID"] = request_id
                own["X-Content-Type-Options"] = "nosniff"
                own.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            self._admit(scope, headers)
            await self.app(scope, self._limited(receive), send_marked)
        except Exception as error:
            problem = as_problem(error)
            if problem.kind == "internal-error":
                log.error("request %s failed", request_id, exc_info=error)
            state["problem"] = problem.kind
            if status is None:
                await problem_response(problem, request_id)(scope, receive, send_marked)
        finally:
            self._record(scope, status)

    def _admit(self, scope, headers):
        """Raises Problem for a request that is refused before anyone reads its body."""
        settings, path = self.service.settings, scope["path"]
        if (
            self.key is not None
            and path not in OPEN_ADDRESSES
            and not path.startswith(OPEN_FOLDERS)
            and not hmac.compare_digest(
                headers.get("x-api-key", "").encode("latin-1"), self.key.encode("ascii")
            )
        ):
            raise Problem(
                "unauthorized",
                "send the key of this server in the header X-API-Key",
                headers={"WWW-Authenticate": "ApiKey"},
            )
        try:
            unquote_to_bytes(scope["query_string"]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise Problem("bad-request", "the query is not valid UTF-8") from error
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length) > settings.max_body_bytes:
            raise too_large(settings)
        media = headers.get("content-type", "").partition(";")[0].strip().lower()
        if path not in JSON_ADDRESSES:
            return
        self.service.check_room()  # to be refused here costs the least
        if scope["method"] == "POST" and media != "application/json":
            raise Problem("unsupported-media-type", "send JSON, as Content-Type: application/json")

    def _limited(self, receive):
        """`receive` that gives up on a body that is too large or does not come."""
        settings = self.service.settings
        until = time.monotonic() + settings.body_timeout_sec
        size, complete = 0, False

        async def receive_limited():
            nonlocal size, complete
            if complete:
                return await receive()
            with anyio.move_on_after(max(0.0, until - time.monotonic())) as waiting:
                message = await receive()
            if waiting.cancelled_caught:
                raise HTTPException(408, "the request body did not arrive in time")
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if size > settings.max_body_bytes:
                    raise HTTPException(413, too_large(settings).detail)
            return message

        return receive_limited

    def _record(self, scope, status):
        state, metrics = scope["state"], self.service.metrics
        seconds = time.perf_counter() - state["arrived"]
        known = scope["path"] if scope["path"] in JSON_ADDRESSES else "other"
        endpoint = getattr(scope.get("route"), "path", known)
        method = scope["method"] if scope["method"] in ("GET", "POST") else "other"
        metrics.requests.labels(endpoint, method, status or "none").inc()
        metrics.request_seconds.labels(endpoint).observe(seconds)
        if state["problem"] is not None:
            metrics.problems.labels(state["problem"]).inc()
        log.info(
            "%s %s %s %s %.1f ms%s",
            state["request_id"],
            method,
            endpoint,
            status or "none",
            1000 * seconds,
            "" if state["problem"] is None else f" {state['problem']}",
        )


def too_large(settings):
    return Problem("too-large", f"at most {settings.max_body_bytes} bytes are read")
