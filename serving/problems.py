"""Errors as answers: problem details of RFC 9457, `application/problem+json`.

Every answer that is not a success is one: type, title, status, detail, request_id, and for input
that does not fit `errors`, one entry a place. What a client sent is never repeated in them, nor
what went wrong inside the server.
Source: https://www.rfc-editor.org/rfc/rfc9457
"""

import json
from dataclasses import dataclass, field
from http import HTTPStatus

from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

PROBLEM_JSON = "application/problem+json"
TYPE_PREFIX = "urn:howsure:problem:"

KINDS = {  # name: (status, title)
    "bad-request": (400, "The request cannot be read"),
    "unauthorized": (401, "The API key is missing or wrong"),
    "not-found": (404, "There is nothing at this address"),
    "unknown-model": (404, "There is no model of this name"),
    "method-not-allowed": (405, "This address does not answer this method"),
    "body-timeout": (408, "The request did not arrive in time"),
    "too-large": (413, "The request body is too large"),
    "unsupported-media-type": (415, "The request body must be JSON"),
    "invalid-input": (422, "The request does not fit the description of this address"),
    "invalid-text": (422, "The text cannot be scored"),
    "client-gone": (499, "The client closed the connection"),
    "internal-error": (500, "The server failed"),
    "starting": (503, "The model is not loaded yet"),
    "stopping": (503, "The server is shutting down"),
    "queue-full": (503, "Too many requests are waiting"),
    "deadline-exceeded": (503, "The request waited too long"),
    "model-unavailable": (503, "This model cannot be used"),
}
BY_STATUS = {
    400: "bad-request",
    404: "not-found",
    405: "method-not-allowed",
    408: "body-timeout",
    413: "too-large",
}


@dataclass
class Problem(Exception):
    """An answer that is no success. kind: a key of KINDS; retry_after_sec: for a 503."""

    kind: str
    detail: str
    retry_after_sec: int | None = None
    errors: list = field(default_factory=list)
    headers: dict = field(default_factory=dict)

    @property
    def status(self):
        return KINDS[self.kind][0]

    def to_json(self):
        status, title = KINDS[self.kind]
        data = {
            "type": TYPE_PREFIX + self.kind,
            "title": title,
            "status": status,
            "detail": self.detail,
        }
        return data | ({"errors": self.errors} if self.errors else {})


class FieldError(BaseModel):
    """One place of the request that does not fit."""

    where: str = Field(description="the place, as body.texts.3 or query.model")
    problem: str = Field(description="what is wrong with it")


class ProblemDetails(BaseModel):
    """Problem details, RFC 9457."""

    type: str = Field(examples=[TYPE_PREFIX + "queue-full"])
    title: str = Field(examples=["Too many requests are waiting"])
    status: int = Field(examples=[503])
    detail: str
    request_id: str | None = None
    errors: list[FieldError] = []


def documented(*kinds):
    """What an address of the OpenAPI description says of these problems: `responses=`."""
    statuses = {}
    for kind in kinds:
        statuses.setdefault(KINDS[kind][0], []).append(kind)
    found = {}
    for status, names in sorted(statuses.items()):
        found[status] = {
            "model": ProblemDetails,
            "description": "; ".join(f"{KINDS[name][1]} ({name})" for name in names),
            "content": {PROBLEM_JSON: {}},
        }
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            found[status]["headers"] = {
                "Retry-After": {"description": "seconds", "schema": {"type": "integer"}}
            }
    return found


def problem_response(problem, request_id=None):
    body = problem.to_json() | ({"request_id": request_id} if request_id else {})
    headers = dict(problem.headers)
    if problem.retry_after_sec is not None:
        headers["Retry-After"] = str(problem.retry_after_sec)
    # ASCII alone: a detail may name what is not valid Unicode
    content = json.dumps(body, ensure_ascii=True).encode("ascii")
    return Response(content, problem.status, headers, media_type=PROBLEM_JSON)


def as_problem(error):
    """The `Problem` of any exception that reached the edge of the application."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestValidationError):
        errors = [
            {"where": ".".join(map(str, item["loc"]))[:200], "problem": item["msg"]}
            for item in error.errors()[:20]
        ]
        first = errors[0]
        return Problem("invalid-input", f"{first['where']}: {first['problem']}", errors=errors)
    if isinstance(error, HTTPException):
        kind = BY_STATUS.get(error.status_code)
        if kind is not None:
            return Problem(kind, str(error.detail), headers=dict(error.headers or {}))
    return Problem("internal-error", "the log of the server says more under this request id")
