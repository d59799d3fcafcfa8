"""A queue that is bounded in tokens, and a thread that fills batches from it.

Requests put `Job`s into the queue and wait for the job's future. One thread owns the model: it
takes what is waiting, up to a budget of tokens, whenever a batch can be scored, has the adapters
that are asked brought into memory, and hands the batch to a pool, where the model is asked a few at
a time (`parallel`: one on a GPU, on a CPU as many as keep its cores busy). So the answers of one
batch are sent, and the next one fills, while another is scored. Under light load a text is scored
at once and alone, under heavy load many together, and nothing ever waits for company. Jobs take
turns row by row, so a long one delays a short one by a batch and not by its whole length. Nothing
here knows of HTTP.
"""

import contextlib
import logging
import math
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from serving.problems import Problem
from settings import UserError

log = logging.getLogger("howsure")

LEAST_TOKENS = 512  # of a batch while more wait: smaller ones cost more than they save in waiting


@dataclass(eq=False)
class Job:
    """Texts for one model. rows: `serving.models.EncodedText`s; deadline: of time.monotonic().

    explain: number of next tokens to show of the one text, None to classify. The future's result is
    a list with a `Prediction` (or an `Explanation`) or an exception for each text.
    """

    model: object
    rows: list
    deadline: float
    explain: int | None = None
    future: Future = field(default_factory=Future)
    taken: int = 0
    results: dict = field(default_factory=dict)

    @property
    def waiting_tokens(self):
        return sum(row.tokens for row in self.rows[self.taken :])

    def finish(self, result=None, error=None):
        """Give the result to whoever still waits for it; once."""
        if self.future.done() or not self.future.set_running_or_notify_cancel():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class TokenQueue:
    """Jobs that wait: none is added to `max_tokens` or more. Any thread may put, one takes."""

    def __init__(self, max_tokens):
        self.max_tokens = max_tokens
        self.tokens = 0  # of the rows that wait
        self.rows = 0
        self.closed = False
        self.tokens_per_sec = 5000.0  # of the worker; it says better once it has measured
        self._jobs = deque()
        self._changed = threading.Condition()

    def retry_after_sec(self):
        """Seconds after which there should be room again."""
        return max(1, min(60, math.ceil(self.tokens / self.tokens_per_sec / 2)))

    def check_room(self):
        """Raises Problem if no job would be taken now."""
        if self.closed:
            raise Problem("stopping", "the server takes no new work", retry_after_sec=5)
        if self.tokens >= self.max_tokens:
            raise Problem(
                "queue-full",
                f"{self.tokens} tokens of {self.max_tokens} are waiting; try again later",
                retry_after_sec=self.retry_after_sec(),
            )

    def put(self, job):
        """Queue the job whole. Raises Problem if the queue is full.

        Until then it takes a job of any size, so that a large one is not refused for ever where
        small ones fill every gap.
        """
        with self._changed:
            self.check_room()
            self.tokens += job.waiting_tokens
            self.rows += len(job.rows)
            self._jobs.append(job)
            self._changed.notify()

    def take(self, most_tokens, parallel=1, most_models=math.inf):
        """[(job, row number)], at least one; waits for it. [] at the end.

        At most `most_tokens`, and of what waits the share of one of `parallel` batches, unless that
        is little; of at most `most_models` models. A job that explains is taken alone. Jobs whose
        client is gone are dropped, those beyond their deadline are answered with a Problem.
        """
        with self._changed:
            while True:
                while not self._jobs and not self.closed:
                    self._changed.wait()
                if not self._jobs:
                    return []
                share = max(LEAST_TOKENS, self.tokens / parallel)
                if batch := self._drain(min(most_tokens, share), most_models):
                    return batch

    def _drain(self, budget, most_models):
        batch, models, used, now = [], set(), 0, time.monotonic()
        while self._jobs:
            job = self._jobs[0]
            if job.future.cancelled() or now > job.deadline or job.future.done():
                self._jobs.popleft()
                self._forget(job)
                job.finish(
                    error=Problem(
                        "deadline-exceeded",
                        "the request waited longer than the server allows",
                        retry_after_sec=self.retry_after_sec(),
                    )
                )
                continue
            tokens = job.rows[job.taken].tokens
            too_many = len(models | {job.model}) > most_models
            if batch and (used + tokens > budget or too_many or job.explain is not None):
                break
            self._jobs.popleft()
            batch.append((job, job.taken))
            models.add(job.model)
            used += tokens
            job.taken += 1
            self.tokens -= tokens
            self.rows -= 1
            if job.taken < len(job.rows):
                self._jobs.append(job)
            if job.explain is not None:
                break
        return batch

    def _forget(self, job):
        self.tokens -= job.waiting_tokens
        self.rows -= len(job.rows) - job.taken

    def close(self):
        """Take no more jobs; those that wait are still handed out."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()


class ModelWorker:
    """The thread of the model, and the pool in which its batches are scored.

    load: called in the thread, gives the `serving.model_process.ModelProcess`, which says how many
    batches of how many tokens; it is closed at the end. observe(rows, tokens, seconds): called
    after each. on_failure(error): called if the model cannot be loaded; the worker has ended then.
    """

    def __init__(self, load, queue, observe, on_failure):
        self.queue, self.observe = queue, observe
        self.model, self.failure = None, None
        self._load, self._on_failure = load, on_failure
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._results = threading.Lock()  # of jobs, whose rows may be in several batches
        self._slots = None  # one for each batch that may be scored at the same time

    def start(self):
        self._thread.start()

    def stop(self):
        """Answer what was accepted, then end. Waits for it."""
        self.queue.close()
        self._thread.join()

    def _run(self):
        try:
            self.model = self._load()
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("the model cannot be loaded")
            self.failure = error
            self.queue.close()
            self._on_failure(error)
            return
        model, self._slots = self.model, threading.Semaphore(self.model.parallel)
        with (
            contextlib.closing(model),
            ThreadPoolExecutor(model.parallel, thread_name_prefix="scoring") as pool,
        ):
            while True:
                self._slots.acquire()  # before anything is taken: until then the batch can grow
                batch = self.queue.take(model.batch_tokens, model.parallel, model.max_adapters)
                if not batch:
                    return
                pool.submit(self._go, self._with_adapters(batch)).add_done_callback(log_failure)

    def _with_adapters(self, batch):
        """The rows whose adapters are in memory now; the others are answered with the reason."""
        models = dict.fromkeys(job.model for job, _ in batch)
        failed = self.model.prepare(list(models), self._wait_until_idle)
        missing = [(job, row) for job, row in batch if job.model in failed]
        self._give(missing, [failed[job.model] for job, _ in missing])
        return [(job, row) for job, row in batch if job.model not in failed]

    def _wait_until_idle(self):
        """Returns when nothing is being scored; a slot is the caller's own."""
        others = range(self.model.parallel - 1)
        for _ in others:
            self._slots.acquire()
        for _ in others:
            self._slots.release()

    def _go(self, batch):
        """Score a batch and free its slot; in the pool."""
        started = time.perf_counter()
        try:
            if batch:
                self._score(batch)
        finally:
            self._slots.release()
        if batch:
            seconds = time.perf_counter() - started
            tokens = sum(job.rows[row].tokens for job, row in batch)
            speed = self.model.parallel * tokens / seconds
            self.queue.tokens_per_sec += 0.1 * (speed - self.queue.tokens_per_sec)
            self.observe(len(batch), tokens, seconds)

    def _score(self, batch):
        (job, row), explain = batch[0], batch[0][0].explain
        try:
            if explain is None:
                results = self.model.classify([(job.model, job.rows[row]) for job, row in batch])
            else:
                results = [self.model.explain(job.model, job.rows[row], explain)]
        except Exception as error:  # whatever it is, the worker goes on
            if len(batch) > 1:  # one row must not fail the others
                for one in batch:
                    self._score([one])
                return
            log_unexpected(error)
            results = [error]
        self._give(batch, results)

    def _give(self, batch, results):
        """Note the results of rows, and answer the jobs that have all of theirs."""
        for (job, row), result in zip(batch, results, strict=True):
            with self._results:
                job.results[row] = result
                complete = len(job.results) == len(job.rows)
            if complete:
                job.finish([job.results[i] for i in range(len(job.rows))])


def log_failure(done):
    """What a scoring thread raised besides the errors of its rows: a pool keeps that to itself."""
    if (error := done.exception()) is not None:
        log_unexpected(error)


def log_unexpected(error):
    if not isinstance(error, UserError):
        log.error("scoring failed", exc_info=error)
