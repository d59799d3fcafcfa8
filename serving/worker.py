"""One thread owns the model: a queue that is bounded in tokens, and batches that fill themselves.

Requests put `Job`s into the queue and wait for the job's future. The worker takes what is waiting,
up to a budget of tokens, scores it in one go and comes back for more: under light load a text is
scored at once and alone, under heavy load many together, and nothing ever waits for company. Jobs
take turns row by row, so a long one delays a short one by a batch and not by its whole length.
Nothing here knows of HTTP.
"""

import logging
import math
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from serving.problems import Problem
from settings import UserError

log = logging.getLogger("howsure")


@dataclass(eq=False)
class Job:
    """Texts for one model. tokens: of each text's prompt; deadline: of time.monotonic().

    explain: number of next tokens to show of the one text, None to classify. The future's result is
    a list with a `Prediction` or an exception for each text, or an `Explanation`.
    """

    model: object
    texts: list
    tokens: list
    deadline: float
    explain: int | None = None
    future: Future = field(default_factory=Future)
    taken: int = 0
    results: dict = field(default_factory=dict)

    @property
    def waiting_tokens(self):
        return sum(self.tokens[self.taken :])

    def finish(self, result=None, error=None):
        """Give the result to whoever still waits for it; once, and from the worker alone."""
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
            self.rows += len(job.texts)
            self._jobs.append(job)
            self._changed.notify()

    def take(self, budget):
        """[(job, row)] of at most `budget` tokens, at least one row; waits for one. [] at the end.

        A job that explains is taken alone. Jobs whose client is gone are dropped, those beyond
        their deadline are answered with a Problem.
        """
        with self._changed:
            while True:
                while not self._jobs and not self.closed:
                    self._changed.wait()
                if not self._jobs:
                    return []
                if batch := self._drain(budget):
                    return batch

    def _drain(self, budget):
        batch, used, now = [], 0, time.monotonic()
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
            tokens = job.tokens[job.taken]
            if batch and (used + tokens > budget or job.explain is not None):
                break
            self._jobs.popleft()
            batch.append((job, job.taken))
            used += tokens
            job.taken += 1
            self.tokens -= tokens
            self.rows -= 1
            if job.taken < len(job.texts):
                self._jobs.append(job)
            if job.explain is not None:
                break
        return batch

    def _forget(self, job):
        self.tokens -= job.waiting_tokens
        self.rows -= len(job.texts) - job.taken

    def close(self):
        """Take no more jobs; those that wait are still handed out."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()


class ModelWorker:
    """The thread of the model.

    load: called in the thread, gives the `serving.models.SharedModel`, whose `go_tokens` bound what
    is scored in one go. observe(rows, tokens, seconds): called after each go. on_failure(error):
    called if the model cannot be loaded; the worker has ended then.
    """

    def __init__(self, load, queue, observe, on_failure):
        self.queue, self.observe = queue, observe
        self.model, self.failure = None, None
        self._load, self._on_failure = load, on_failure
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

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
        while batch := self.queue.take(self.model.go_tokens):
            self._go(batch)

    def _go(self, batch):
        started = time.perf_counter()
        job = batch[0][0]
        if job.explain is not None:
            self._explain(job)
        else:
            self._classify(batch)
        seconds = time.perf_counter() - started
        tokens = sum(job.tokens[row] for job, row in batch)
        self.queue.tokens_per_sec += 0.1 * (tokens / seconds - self.queue.tokens_per_sec)
        self.observe(len(batch), tokens, seconds)

    def _explain(self, job):
        try:
            job.finish(self.model.explain(job.model, job.texts[0], job.explain))
        except Exception as error:  # whatever it is, the worker goes on
            log_unexpected(error)
            job.finish(error=error)

    def _classify(self, batch):
        try:
            results = self.model.classify([(job.model, job.texts[row]) for job, row in batch])
        except Exception as error:  # whatever it is, the worker goes on
            if len(batch) > 1:  # one row must not fail the others
                for one in batch:
                    self._classify([one])
                return
            log_unexpected(error)
            results = [error]
        for (job, row), result in zip(batch, results, strict=True):
            job.results[row] = result
            if len(job.results) == len(job.texts):
                job.finish([job.results[i] for i in range(len(job.texts))])


def log_unexpected(error):
    if not isinstance(error, UserError):
        log.error("scoring failed", exc_info=error)
