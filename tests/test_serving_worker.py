"""The queue and the worker, without HTTP and without a model."""

import threading
import time
from typing import NamedTuple

import pytest

from serving.problems import Problem
from serving.worker import LEAST_TOKENS, Job, ModelWorker, TokenQueue
from settings import UserError


class Row(NamedTuple):
    text: str
    tokens: int


def job(texts=("a",), tokens=None, deadline_sec=60.0, model="base", explain=None):
    tokens = [10] * len(texts) if tokens is None else tokens
    rows = [Row(text, n) for text, n in zip(texts, tokens, strict=True)]
    return Job(model, rows, time.monotonic() + deadline_sec, explain)


def texts_of(batch):
    return [one.rows[row].text for one, row in batch]


class EchoModel:
    """Answers a text with itself; records the batches. A text "bad" raises, "missing" cannot be.

    The model "absent" cannot be loaded; to load one it must be idle.
    """

    batch_tokens, max_adapters = 100, 2

    def __init__(self, gate=None, parallel=1):
        self.batches, self.gate, self.parallel = [], gate, parallel
        self.scoring, self.most_scoring, self.loaded, self.closed = 0, 0, {"base"}, False
        self._lock = threading.Lock()

    def prepare(self, models, wait_until_idle):
        assert len(models) <= self.max_adapters
        failed = {}
        for model in set(models) - self.loaded:
            wait_until_idle()
            assert self.scoring == 0
            if model == "absent":
                failed[model] = UserError("no such adapter")
            else:
                self.loaded.add(model)
        return failed

    def classify(self, rows):
        with self._lock:
            self.scoring += 1
            self.most_scoring = max(self.most_scoring, self.scoring)
            self.batches.append([row.text for _, row in rows])
        try:
            assert {model for model, _ in rows} <= self.loaded
            if self.gate is not None:
                self.gate.wait(30)
            if any(row.text == "bad" for _, row in rows):
                raise RuntimeError("a bug")
            return [UserError("gone") if row.text == "missing" else row.text for _, row in rows]
        finally:
            with self._lock:
                self.scoring -= 1

    def close(self):
        self.closed = True

    def explain(self, model, row, k):
        self.batches.append([f"explain {row.text}"])
        return (row.text, k)


def running(model, queue, observe=lambda *_: None):
    worker = ModelWorker(lambda: model, queue, observe, lambda error: None)
    worker.start()
    return worker


def test_each_job_gets_its_own_answers_in_order():
    queue, model = TokenQueue(10_000), EchoModel()
    texts = [[f"{i}-{k}" for k in range(i % 7 + 1)] for i in range(50)]
    jobs = [job(own) for own in texts]
    for one in jobs:
        queue.put(one)
    worker = running(model, queue)
    assert [one.future.result(30) for one in jobs] == texts
    worker.stop()
    assert (queue.rows, queue.tokens) == (0, 0)
    assert max(len(batch) for batch in model.batches) == 10  # 100 tokens of 10 each


def test_the_queue_is_bounded_in_tokens_but_takes_any_job_until_it_is_full():
    queue = TokenQueue(100)
    queue.put(job(["short"], [99]))
    queue.put(job(["long"], [5000]))
    with pytest.raises(Problem) as caught:
        queue.put(job(["short"], [1]))
    assert caught.value.kind == "queue-full"
    assert caught.value.status == 503
    assert caught.value.retry_after_sec >= 1
    assert texts_of(queue.take(100)) == ["short"]
    with pytest.raises(Problem):
        queue.put(job(["short"], [1]))
    assert texts_of(queue.take(100)) == ["long"]
    queue.put(job(["short"], [1]))


def test_a_batch_stays_within_its_budget_unless_one_text_alone_exceeds_it():
    queue = TokenQueue(10_000)
    for tokens in (40, 40, 40, 500, 10):
        queue.put(job([str(tokens)], [tokens]))
    taken = [texts_of(queue.take(100)) for _ in range(4)]
    assert taken == [["40", "40"], ["40"], ["500"], ["10"]]


def test_a_long_job_does_not_keep_a_short_one_waiting():
    queue = TokenQueue(10_000)
    queue.put(job([f"long {i}" for i in range(100)]))
    queue.put(job(["short"]))
    assert "short" in texts_of(queue.take(100))


def test_cancelled_jobs_are_dropped_and_late_ones_answered_so():
    queue, model = TokenQueue(10_000), EchoModel()
    gone, late, good = job(["gone"]), job(["late"], deadline_sec=-1), job(["good"])
    for one in (gone, late, good):
        queue.put(one)
    assert gone.future.cancel()
    worker = running(model, queue)
    assert good.future.result(30) == ["good"]
    with pytest.raises(Problem) as caught:
        late.future.result(30)
    assert caught.value.kind == "deadline-exceeded"
    worker.stop()
    assert model.batches == [["good"]]
    assert (queue.rows, queue.tokens) == (0, 0)


def test_a_failing_text_fails_alone():
    queue, model = TokenQueue(10_000), EchoModel()
    jobs = [job(["a"]), job(["bad"]), job(["missing", "b"])]
    for one in jobs:
        queue.put(one)
    worker = running(model, queue)
    assert jobs[0].future.result(30) == ["a"]
    (error,) = jobs[1].future.result(30)
    assert isinstance(error, RuntimeError)
    missing, b = jobs[2].future.result(30)
    assert isinstance(missing, UserError) and b == "b"
    worker.stop()


def test_a_job_that_explains_is_taken_alone():
    queue, model = TokenQueue(10_000), EchoModel()
    jobs = [job(["a"]), job(["b"], explain=3), job(["c"])]
    for one in jobs:
        queue.put(one)
    worker = running(model, queue)
    assert jobs[1].future.result(30) == [("b", 3)]
    assert jobs[2].future.result(30) == ["c"]
    worker.stop()
    assert model.batches == [["a"], ["explain b"], ["c"]]


def test_stopping_answers_what_was_accepted_and_refuses_the_rest():
    gate = threading.Event()
    queue, model = TokenQueue(10_000), EchoModel(gate)
    jobs = [job([f"{i}"]) for i in range(40)]
    for one in jobs:
        queue.put(one)
    worker = running(model, queue)
    stopper = threading.Thread(target=worker.stop)
    stopper.start()
    while not queue.closed:
        time.sleep(0.001)
    with pytest.raises(Problem) as caught:
        queue.put(job())
    assert caught.value.kind == "stopping"
    gate.set()
    stopper.join(30)
    assert [one.future.result(0) for one in jobs] == [[f"{i}"] for i in range(40)]


def test_a_model_that_cannot_be_loaded_is_reported_and_ends_the_worker():
    def load():
        raise UserError("no such model")

    failures = []
    queue = TokenQueue(100)
    worker = ModelWorker(load, queue, lambda *_: None, failures.append)
    worker.start()
    worker.stop()
    assert [str(error) for error in failures] == ["no such model"]
    assert worker.failure is failures[0]


def test_many_threads_lose_nothing_and_mix_up_nothing():
    queue, model, observed = TokenQueue(1000), EchoModel(parallel=3), []
    worker = running(model, queue, observe=lambda *numbers: observed.append(numbers))
    refused, wrong = [], []

    def client(number):
        for i in range(200):
            texts = [f"{number}-{i}-{k}" for k in range(i % 3 + 1)]
            mine = job(texts, model=f"model-{(number + i // 50) % 3}")
            try:
                queue.put(mine)
            except Problem as problem:
                refused.append(problem.kind)
                continue
            if mine.future.result(30) != texts:
                wrong.append(texts)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    worker.stop()
    assert wrong == [] and set(refused) <= {"queue-full"}
    assert (queue.rows, queue.tokens) == (0, 0)
    assert sum(rows for rows, _, _ in observed) == sum(len(batch) for batch in model.batches)


def test_what_waits_is_shared_among_the_batches_that_can_be_scored():
    queue = TokenQueue(10_000)
    for number in range(200):
        queue.put(job([f"{number}"], [10]))
    taken = [len(queue.take(1500, parallel=2)) for _ in range(3)]
    assert taken == [100, LEAST_TOKENS // 10, 200 - 100 - LEAST_TOKENS // 10]


def test_a_batch_asks_no_more_adapters_than_fit_into_memory():
    queue = TokenQueue(10_000)
    for number in range(9):
        queue.put(job([f"{number}"], model=f"model-{number % 3}"))
    assert texts_of(queue.take(1000, most_models=2)) == ["0", "1"]
    assert texts_of(queue.take(1000, most_models=1)) == ["2"]
    assert texts_of(queue.take(1000, most_models=3)) == ["3", "4", "5", "6", "7", "8"]


def test_several_batches_are_scored_at_once_and_none_while_an_adapter_is_loaded():
    gate = threading.Event()
    queue, model = TokenQueue(10_000), EchoModel(gate, parallel=2)
    first = [job([f"{i}"], [100]) for i in range(2)]
    for one in first:
        queue.put(one)
    worker = running(model, queue)
    until = time.monotonic() + 30
    while model.most_scoring < 2 and time.monotonic() < until:
        time.sleep(0.001)
    assert model.most_scoring == 2
    later = [job(["other"], model="other"), job(["lost"], model="absent"), job(["last"])]
    for one in later:
        queue.put(one)
    gate.set()
    assert later[0].future.result(30) == ["other"]
    (error,) = later[1].future.result(30)
    assert str(error) == "no such adapter"
    assert later[2].future.result(30) == ["last"]
    assert [one.future.result(30) for one in first] == [["0"], ["1"]]
    worker.stop()


def test_an_explanation_of_a_missing_adapter_says_why():
    queue, model = TokenQueue(10_000), EchoModel()
    mine = job(["a"], model="absent", explain=3)
    queue.put(mine)
    worker = running(model, queue)
    (error,) = mine.future.result(30)
    assert str(error) == "no such adapter"
    worker.stop()
    assert model.batches == []
