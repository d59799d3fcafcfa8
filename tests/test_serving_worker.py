"""The queue and the worker, without HTTP and without a model."""

import threading
import time

import pytest

from serving.problems import Problem
from serving.worker import Job, ModelWorker, TokenQueue
from settings import UserError


def job(texts=("a",), tokens=None, deadline_sec=60.0, model="base", explain=None):
    tokens = [10] * len(texts) if tokens is None else tokens
    return Job(model, list(texts), list(tokens), time.monotonic() + deadline_sec, explain)


class EchoModel:
    """Answers a text with itself; records the batches. A text "bad" raises, "missing" cannot be."""

    go_tokens = 100

    def __init__(self, gate=None):
        self.batches, self.gate = [], gate

    def classify(self, rows):
        self.batches.append([text for _, text in rows])
        if self.gate is not None:
            self.gate.wait(30)
        if any(text == "bad" for _, text in rows):
            raise RuntimeError("a bug")
        return [UserError("gone") if text == "missing" else text for _, text in rows]

    def explain(self, model, text, k):
        self.batches.append([f"explain {text}"])
        return (text, k)


def running(model, queue, observe=lambda *_: None):
    worker = ModelWorker(lambda: model, queue, observe, lambda error: None)
    worker.start()
    return worker


def test_each_job_gets_its_own_answers_in_order():
    queue, model = TokenQueue(10_000), EchoModel()
    jobs = [job([f"{i}-{k}" for k in range(i % 7 + 1)]) for i in range(50)]
    for one in jobs:
        queue.put(one)
    worker = running(model, queue)
    assert [one.future.result(30) for one in jobs] == [one.texts for one in jobs]
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
    assert queue.take(100)[0][0].texts == ["short"]
    with pytest.raises(Problem):
        queue.put(job(["short"], [1]))
    assert queue.take(100)[0][0].texts == ["long"]
    queue.put(job(["short"], [1]))


def test_a_batch_stays_within_its_budget_unless_one_text_alone_exceeds_it():
    queue = TokenQueue(10_000)
    for tokens in (40, 40, 40, 500, 10):
        queue.put(job([str(tokens)], [tokens]))
    taken = [[one.texts[row] for one, row in queue.take(100)] for _ in range(4)]
    assert taken == [["40", "40"], ["40"], ["500"], ["10"]]


def test_a_long_job_does_not_keep_a_short_one_waiting():
    queue = TokenQueue(10_000)
    queue.put(job([f"long {i}" for i in range(100)]))
    queue.put(job(["short"]))
    assert "short" in [one.texts[row] for one, row in queue.take(100)]


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
    assert jobs[1].future.result(30) == ("b", 3)
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
    queue, model, observed = TokenQueue(1000), EchoModel(), []
    worker = running(model, queue, observe=lambda *numbers: observed.append(numbers))
    refused, wrong = [], []

    def client(number):
        for i in range(200):
            mine = job([f"{number}-{i}-{k}" for k in range(i % 3 + 1)])
            try:
                queue.put(mine)
            except Problem as problem:
                refused.append(problem.kind)
                continue
            if mine.future.result(30) != mine.texts:
                wrong.append(mine.texts)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    worker.stop()
    assert wrong == [] and set(refused) <= {"queue-full"}
    assert (queue.rows, queue.tokens) == (0, 0)
    assert sum(rows for rows, _, _ in observed) == sum(len(batch) for batch in model.batches)
