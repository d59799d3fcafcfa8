"""Requests nobody thought of: from the OpenAPI description (schemathesis), and from hypothesis.

`make test` runs a few; the marker `slow` has 20,000. No answer may be a 5xx other than a 503 that
is announced, every error must be a problem document, and no answer may belong to another request.
"""

import json
import string

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from serving.application import create_app
from serving.problems import KINDS, PROBLEM_JSON, TYPE_PREFIX
from serving.service import Service
from serving.settings import ServingSettings
from settings import SENTIMENT, ModelSettings

schemathesis = pytest.importorskip("schemathesis")
testclient = pytest.importorskip("fastapi.testclient")

FEW, MANY = 60, 20_000
ADDRESSES = ("/classify", "/classify/batch", "/explain", "/decide")
NAMES = ("text", "texts", "model", "model_type", "top_k", "samples", "seed", "promise", "bogus")


@pytest.fixture(scope="module")
def app(tmp_path_factory, forked_models):
    empty = tmp_path_factory.mktemp("nothing")
    limits = {"max_text_chars": 2000, "max_body_bytes": 65536, "deadline_sec": 300.0}
    serving = ServingSettings(adapters_dir=str(empty), fine_tuned_dir=str(empty / "no"), **limits)
    service = Service(serving, ModelSettings(), SENTIMENT)
    app = create_app(service)
    with testclient.TestClient(app) as client:
        while client.get("/ready").status_code != 200:
            assert service.worker.failure is None
        yield app


@pytest.fixture(scope="module")
def client(app):
    return testclient.TestClient(app, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def description(app):
    async def started(scope, receive, send):  # the app, which runs already
        if scope["type"] != "lifespan":
            return await app(scope, receive, send)
        message = {"type": ""}
        while message["type"] != "lifespan.shutdown":
            message = await receive()
            await send({"type": f"{message['type']}.complete"})

    return schemathesis.openapi.from_asgi("/openapi.json", started)


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


def keeps_its_description(description, requests):
    """Every operation of the OpenAPI document answers as it says, to so many requests each.

    A document cannot say that `model` and its older name must not differ, so a 422 is allowed.
    """
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    operations = [found.ok() for found in description.get_all_operations()]
    assert len(operations) >= len(ADDRESSES)
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(max_examples=requests, **QUIET)
        def answers_as_described(case):
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        answers_as_described()


def test_the_description_is_kept(description):
    keeps_its_description(description, 6)


@pytest.mark.slow
def test_the_description_is_kept_at_length(description):
    keeps_its_description(description, 500)


# Requests that are nearly right

odd_text = st.text(st.characters(), max_size=200) | st.sampled_from(
    ["", " ", "\x00", "\u200f", "<|eot_id|>", "../base", "base", "finetuned", "x" * 3000, "🎬" * 50]
)
surrogate = st.sampled_from(["\ud800", "a\udfff", "\udc80b"])
value = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True, allow_infinity=True)
    | odd_text
    | surrogate,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(odd_text, inner, max_size=3),
    max_leaves=8,
)
likely = {
    "text": odd_text | surrogate | value,
    "texts": st.lists(odd_text | surrogate | value, max_size=6) | value,
    "model": st.sampled_from(["base", "finetuned", "../base", ""]) | value,
    "model_type": st.sampled_from(["base", "nope"]) | value,
    "top_k": st.integers(-1, 60) | value,
    "samples": st.integers(-1, 1100) | value,
    "seed": st.integers(-1, 2**33) | value,
    "promise": st.sampled_from([0.9, 0.95, 0.99, 0.5]) | value,
    "bogus": value,
}
bodies = st.fixed_dictionaries({}, optional=likely) | value
raw = st.binary(max_size=300) | bodies.map(lambda body: json.dumps(body).encode())
requests = st.one_of(
    st.tuples(st.just("POST"), st.sampled_from(ADDRESSES), raw),
    st.tuples(
        st.just("GET"),
        st.dictionaries(st.sampled_from(NAMES), st.text(string.printable, max_size=50)),
        st.none(),
    ),
    st.tuples(st.sampled_from(["PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"]), st.none(), st.none()),
)


def send(client, request):
    method, where, body = request
    if method == "GET":
        return client.get("/classify", params=where)
    if method == "POST":
        return client.post(where, content=body, headers={"content-type": "application/json"})
    return client.request(method, "/classify")


def check(response):
    assert response.status_code < 500 or response.status_code == 503, response.text
    if response.status_code == 200:
        assert response.headers["content-type"].startswith("application/json")
        return
    assert response.headers["content-type"] == PROBLEM_JSON
    if response.request.method == "HEAD":
        return
    problem = response.json()
    kind = problem["type"].removeprefix(TYPE_PREFIX)
    assert KINDS[kind] == (response.status_code, problem["title"])
    assert (response.status_code == 503) == ("retry-after" in response.headers)


@settings(max_examples=FEW, **QUIET)
@given(request=requests)
def test_no_request_is_answered_with_a_failure(client, request):
    check(send(client, request))


@pytest.mark.slow
@settings(max_examples=MANY, **QUIET)
@given(request=requests)
def test_no_request_is_answered_with_a_failure_at_length(client, request):
    check(send(client, request))


@settings(max_examples=15, **QUIET)
@given(texts=st.lists(odd_text, min_size=1, max_size=6))
@example(texts=["a\ud800", "\udfff", "good"])
def test_a_batch_of_anything_has_an_answer_in_every_place(client, texts):
    response = client.post(
        "/classify/batch",
        content=json.dumps({"texts": texts}),  # escaped: a lone surrogate has no bytes in UTF-8
        headers={"content-type": "application/json"},
    )
    check(response)
    answers = response.json()["answers"]
    assert len(answers) == len(texts)
    for text, answer in zip(texts, answers, strict=True):
        whole = not any("\ud800" <= c <= "\udfff" for c in text)
        scorable = bool(text.strip()) and len(text) <= 2000 and whole
        assert ("label" in answer) == scorable
