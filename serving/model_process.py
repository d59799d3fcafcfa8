"""The model in a process of its own, and the calls to it.

Python runs one thread of a process at a time. Where a model shares its process with what speaks
HTTP, each waits for the other between any two operations of a forward pass; apart, both go on.
`ModelProcess` starts the process, in which `serve_model` keeps a `SharedModel`, and is asked as
that would be. Calls and answers are numbered and go through one pipe, several at the same time.

The process ends with the pipe, whoever closes it. The signals by which a terminal or a service
manager stops all processes of a server do not reach it: first what was accepted is answered.
"""

import atexit
import contextlib
import gc
import itertools
import os
import signal
import threading
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import get_context, resource_tracker

from settings import UserError

FIRST = 0  # number of the answer that comes without a call: once the model is loaded
GRACE_SEC = 30.0  # for what is under way when the process is asked to end


class ModelProcess:
    """A `SharedModel` in another process. For any number of threads.

    settings, task, max_adapters: those of `SharedModel`. on_end(error): called if the process ends
    without having been asked to. base: `BaseModel`. loaded: keys of the adapters in memory. failed:
    {key: why} of those that cannot be loaded. Raises UserError as `SharedModel` does.
    """

    def __init__(self, settings, task, max_adapters, on_end):
        self.max_adapters, self._on_end = max_adapters, on_end
        self.loaded, self.failed = (), {}
        self._numbers, self._calls = itertools.count(FIRST + 1), {FIRST: Future()}
        self._sending, self._serving, self._error = threading.Lock(), False, None
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=serve_model, args=(theirs, settings, task, max_adapters), name="model"
        )
        resource_tracker.ensure_running()  # or it would be started below, and end the blocking
        with blocked(signal.SIGINT, signal.SIGTERM):
            self._process.start()
        theirs.close()
        atexit.register(self.close)  # before multiprocessing waits for the process
        first = self._calls[FIRST]
        threading.Thread(target=self._read, name="answers", daemon=True).start()
        try:
            self.base = first.result()
        except BaseException:
            self.close()
            raise

    @property
    def parallel(self):
        return self.base.parallel

    @property
    def batch_tokens(self):
        return self.base.batch_tokens

    def prepare(self, models, wait_until_idle):
        """Have the adapters of at most `max_adapters` `ServedModel`s in memory; {model: exception}
        of those that cannot be.

        wait_until_idle(): called before an adapter comes or goes; returns when nothing is scored.
        """
        adapters = {model.key: model.adapter for model in models if model.key is not None}
        if adapters.keys() <= set(self.loaded):
            return {}
        wait_until_idle()
        try:
            self.loaded, self.failed, errors = self._call("prepare", list(adapters.values()))
        except (UserError, RuntimeError) as error:
            errors = dict.fromkeys(adapters, error)
        return {model: errors[model.key] for model in models if model.key in errors}

    def classify(self, rows):
        """A `Prediction` for each (ServedModel, `EncodedText`). Raises UserError."""
        return self._call("classify", [(model.key, text) for model, text in rows])

    def explain(self, model, text, k):
        """The `Explanation` of one `EncodedText`. Raises UserError."""
        return self._call("explain", model.key, text, k)

    def close(self):
        """Have the process end after what it has under way; wait for it."""
        atexit.unregister(self.close)
        with self._sending:
            self._serving = False
            with contextlib.suppress(OSError):  # it has ended already
                self._pipe.send(None)
        self._process.join(GRACE_SEC)
        self._process.kill()
        self._process.join()

    def _call(self, name, *arguments):
        call = Future()
        with self._sending:
            if self._error is not None:
                raise self._error
            number = next(self._numbers)
            self._calls[number] = call
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `_read` sees it too
                self._pipe.send((number, name, arguments))
        return call.result()

    def _read(self):
        """Hand out answers until the process has ended."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                number, result, error = self._pipe.recv()
                if number == FIRST:
                    self._serving = error is None
                call = self._calls.pop(number)
                if error is None:
                    call.set_result(result)
                else:
                    call.set_exception(error)
        self._process.join()
        code = self._process.exitcode or 0  # None where `close` was told first
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        error = UserError(f"the process of the model has ended ({how}); start the server again")
        with self._sending:
            self._error, calls = error, self._calls
            unasked, self._serving = self._serving, False
        for call in calls.values():
            call.set_exception(error)
        if unasked:
            self._on_end(error)


@contextlib.contextmanager
def blocked(*signals):
    """Inside the block these signals wait; in processes that are started there they do for ever."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# -------------------------------------------------------------------------------- in that process


def serve_model(pipe, *arguments):
    """Answer calls of the methods of `SharedModel(*arguments)` until there is None, or the end."""
    sending = threading.Lock()

    def answer(number, call, *arguments):
        result, error = None, None
        try:
            result = call(*arguments)
        except UserError as problem:
            error = UserError(str(problem))
        except Exception:
            error = RuntimeError(traceback.format_exc())
        try:
            with sending:
                pipe.send((number, result, error))
        except OSError:
            os._exit(1)  # nobody waits any more

    def load():
        nonlocal model
        from serving.shared_model import SharedModel

        model = SharedModel(*arguments)
        gc.collect()
        gc.freeze()  # to look through all that is loaded again stops every call for 0.3 s
        return model.base

    model = None
    answer(FIRST, load)
    threads = 1 if model is None else model.base.parallel
    with ThreadPoolExecutor(threads) as pool, contextlib.suppress(EOFError):
        for number, name, values in iter(pipe.recv, None):
            pool.submit(answer, number, getattr(model, name), *values)
