"""Requests to a server that answers JSON: what `serving.client` and `openai_backend` share.

    server = JsonServer("http://127.0.0.1:8000", "--server")
    answer = server.ask("GET", "/models")

Nothing is tried again here but a connection that the server had closed; when to wait and when to
give up is the matter of whoever asks.
"""

import json
from dataclasses import dataclass

import urllib3
from urllib3.exceptions import HTTPError, InvalidHeader, LocationParseError

from settings import UserError

CONNECT_SEC, ANSWER_SEC = 10.0, 300.0
# To ask twice does no harm, so a connection that was closed is opened again; nothing else is.
RETRIES = urllib3.Retry(
    connect=0,
    read=1,
    redirect=0,
    status=0,
    other=0,
    allowed_methods=None,
    raise_on_redirect=False,
    respect_retry_after_header=False,  # done by whoever asks, with a word about it
)


class NoAnswer(Exception):
    """There was no answer, and why, in a few words."""


@dataclass(frozen=True)
class Answer:
    """data: the JSON that was sent, or None for what is none. retry_after_sec: if it said so."""

    status: int
    data: object
    retry_after_sec: float | None


class JsonServer:
    """A server and the connections to it; for any number of threads.

    url: its address, given with `flag`, which the messages name. headers: of every request, with
    the key that the server wants; they appear in no message. Raises UserError for what is no
    address.
    """

    def __init__(self, url, flag, headers=None, connections=1):
        self.url = url.rstrip("/")
        try:
            parts = urllib3.util.parse_url(self.url)
        except LocationParseError:
            parts = urllib3.util.Url()
        if parts.auth:
            raise UserError(f"{flag} holds a name or password; leave them out of the address")
        if parts.scheme not in ("http", "https") or not parts.host or parts.query or parts.fragment:
            raise UserError(f"{url!r} is no address of a server; it is like http://127.0.0.1:8000")
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._pool = urllib3.PoolManager(
            retries=RETRIES,
            timeout=urllib3.Timeout(connect=CONNECT_SEC, read=ANSWER_SEC),
            maxsize=connections,
        )

    def ask(self, method, path, body=None):
        """The `Answer` to a request; body: what is sent as JSON. Raises NoAnswer."""
        data = None if body is None else json.dumps(body).encode("ascii")
        try:
            response = self._pool.request(method, self.url + path, body=data, headers=self._headers)
        except HTTPError as error:
            raise NoAnswer(reason_of(error)) from error
        try:
            retry_after_sec = RETRIES.get_retry_after(response)
        except InvalidHeader:
            retry_after_sec = None
        try:
            answer = json.loads(response.data)
        except ValueError:
            answer = None
        return Answer(response.status, answer, retry_after_sec)


def reason_of(error):
    """What was wrong with a connection, in a few words."""
    reason = getattr(error, "reason", None) or error
    cause = reason.__cause__ or reason
    return getattr(cause, "strerror", None) or str(cause)
