"""The process of the model: a real one, called from many threads, failing and left alone."""

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving.model_process import ModelProcess
from serving.models import Catalogue, ServedModel
from serving.settings import ServingSettings
from settings import SENTIMENT, ModelSettings, UserError

TEXTS = [f"The film was {word}." for word in ("good", "bad", "long", "short", "loud", "fine")]


@pytest.fixture(scope="module")
def ended():
    return []


@pytest.fixture(scope="module")
def process(ended):
    process = ModelProcess(ModelSettings(), SENTIMENT, 2, ended.append)
    yield process
    process.close()


@pytest.fixture(scope="module")
def catalogue(process, tmp_path_factory):
    empty = str(tmp_path_factory.mktemp("nothing"))
    return Catalogue(process.base, ServingSettings(adapters_dir=empty, fine_tuned_dir=empty))


@pytest.fixture(scope="module")
def rows(catalogue):
    base = catalogue.find("base")
    return [(base, text) for text in catalogue.encode(base, TEXTS)]


def test_every_caller_gets_its_own_answer(process, rows, classifier):
    expected = [p.probability for p in classifier.classify_batch(TEXTS)]
    assert process.base.identity == classifier.identity

    def ask(number):
        (prediction,) = process.classify([rows[number % len(rows)]])
        return prediction.probability

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(60)))
    assert found == pytest.approx([expected[i % len(rows)] for i in range(60)], abs=1e-4)


def test_an_unexpected_exception_comes_with_its_traceback_and_the_process_goes_on(process, rows):
    (model, text), *_ = rows
    with pytest.raises(RuntimeError, match=r"(?s)Traceback .* in explain.*TypeError"):
        process.explain(model, text, "many")
    assert len(process.classify(rows)) == len(rows)


def test_an_adapter_that_is_gone_is_reported_for_its_model_alone(process, rows, tmp_path):
    base, calls = rows[0][0], []
    gone = ServedModel("gone", tmp_path / "no", "key", SENTIMENT, (), {}, None, None, None, None)
    failed = process.prepare([base, gone], lambda: calls.append("idle"))
    assert list(failed) == [gone] and isinstance(failed[gone], UserError)
    assert calls == ["idle"] and process.loaded == () and process.failed == {}
    assert process.prepare([base], lambda: calls.append("idle")) == {} and calls == ["idle"]


def test_the_process_ends_with_the_pipe(process, rows, ended):
    """Last. It is what the operating system does to the pipe of a server that was killed."""
    with socket.socket(fileno=os.dup(process._pipe.fileno())) as pipe:
        pipe.shutdown(socket.SHUT_RDWR)
    until = time.monotonic() + 30
    while process._process.is_alive() and time.monotonic() < until:
        time.sleep(0.05)
    assert not process._process.is_alive()
    with pytest.raises(UserError, match="the process of the model has ended"):
        process.classify(rows)
    assert len(ended) == 1
