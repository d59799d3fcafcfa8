"""The server behind its addresses: from a question to the results of the model, off the event loop.

event loop ──> front thread ──> queue ──> model thread ──> process of the model
HTTP, JSON     names, tokens    bounded   batches          adapters, forward passes
"""

import asyncio
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor

from serving.metrics import Metrics
from serving.model_process import ModelProcess
from serving.models import ENOUGH_TOKENS, Catalogue
from serving.problems import Problem
from serving.worker import Job, ModelWorker, TokenQueue
from settings import UserError

log = logging.getLogger("howsure")

ROUNDS_THAT_WAIT = 2  # of batches fill the queue, unless it was said how many tokens do


class Service:
    """What one process serves.

    settings: `ServingSettings`; model_settings: `settings.ModelSettings`; task: the base model's.
    on_failure(error): called when the model cannot be loaded, and when its process ends.
    """

    def __init__(self, settings, model_settings, task, on_failure=lambda error: None):
        self.settings, self.model_settings, self.task = settings, model_settings, task
        self.started_at = time.monotonic()
        self.status = "starting"
        self.accepted = self.answered = 0
        self.catalogue = None
        self.queue = TokenQueue(settings.queue_tokens or math.inf)  # `_load` knows better
        self.metrics = Metrics(self.queue, lambda: len(self.loaded_adapters))
        self.front = ThreadPoolExecutor(1, thread_name_prefix="front")
        self.on_failure = on_failure
        self.worker = ModelWorker(self._load, self.queue, self.metrics.observe_batch, on_failure)

    @property
    def loaded_adapters(self):
        return () if self.worker.model is None else self.worker.model.loaded

    def _load(self):
        """In the model thread."""
        started = time.perf_counter()
        settings = self.settings
        model = ModelProcess(self.model_settings, self.task, settings.max_adapters, self._ended)
        base = model.base
        if settings.queue_tokens is None:
            batch_tokens = max(base.batch_tokens, ENOUGH_TOKENS)
            self.queue.max_tokens = ROUNDS_THAT_WAIT * base.parallel * batch_tokens
        catalogue = Catalogue(base, settings)
        served = [m.name for m in catalogue.all()]
        self.catalogue = catalogue
        self.status = "ok"
        log.info(
            "ready after %.1f s: %s on %s, %s; models: %s",
            time.perf_counter() - started,
            self.model_settings.model,
            base.device,
            base.identity["dtype"],
            ", ".join(served),
        )
        return model

    def _ended(self, error):
        """The process of the model has ended by itself: so does the server."""
        self.status = "stopping"
        self.queue.close()
        self.on_failure(error)

    async def start(self):
        self.worker.start()

    async def stop(self):
        """Answer what was accepted, then end."""
        self.status = "stopping"
        await asyncio.to_thread(self.worker.stop)
        self.front.shutdown()
        log.info("stopped: %d requests accepted, %d answered", self.accepted, self.answered)

    def check_started(self):
        """Raises Problem unless the model answers."""
        if self.status == "starting":
            failed = self.worker.failure
            detail = "ask again later" if failed is None else f"it cannot be loaded: {failed}"
            raise Problem("starting", detail, retry_after_sec=5)

    def check_room(self):
        """Raises Problem unless a question would be taken now."""
        self.check_started()
        self.queue.check_room()

    async def in_front(self, call, *arguments):
        """The result of a call in the thread of the `Catalogue`."""
        self.check_started()
        return await asyncio.get_running_loop().run_in_executor(self.front, call, *arguments)

    def catalogue_models(self):
        return self.catalogue.all()

    def _prepare(self, name, texts):
        model = self.catalogue.find(name)
        return model, self.catalogue.encode(model, texts)

    async def ask(self, request, name, texts, explain=None):
        """(ServedModel, results): for each text a `Prediction`, or a str why it has none.

        explain: the one result is an `Explanation` with so many tokens. Raises Problem, and gives
        the work up when the client goes away or the deadline passes.
        """
        deadline = time.monotonic() + self.settings.deadline_sec
        if self.settings.log == "texts":
            log.info("%s texts for %s: %s", request.state.request_id, ascii(name), ascii(texts))
        self.check_room()
        model, encoded = await self.in_front(self._prepare, name, texts)
        good = [i for i, row in enumerate(encoded) if not isinstance(row, str)]
        if not good:
            return model, encoded
        job = Job(model, [encoded[i] for i in good], deadline, explain)
        self.queue.put(job)
        self.accepted += 1
        try:
            found = await self._result(request, job)
        finally:
            self.answered += 1
        for result in found:
            if isinstance(result, UserError):
                problem = Problem("model-unavailable", f"{name}: {result}", retry_after_sec=60)
                raise problem from result
            if isinstance(result, Exception):
                raise result
        if explain is not None:
            return model, found
        for i, prediction in zip(good, found, strict=True):
            encoded[i] = prediction if prediction.error is None else prediction.error
        return model, encoded

    async def _result(self, request, job):
        future = asyncio.wrap_future(job.future)
        gone = asyncio.ensure_future(client_gone(request))
        try:
            done, _ = await asyncio.wait(
                {future, gone},
                timeout=max(0.0, job.deadline - time.monotonic()),
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            gone.cancel()
            if not future.done():
                future.cancel()
        if future in done:
            return future.result()
        if gone in done:
            gone.result()
            raise Problem("client-gone", "nobody waits for this answer")
        raise Problem(
            "deadline-exceeded",
            f"there was no answer within {self.settings.deadline_sec:g} s",
            retry_after_sec=self.queue.retry_after_sec(),
        )


async def client_gone(request):
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
