"""Contestants in processes of their own, and the rounds in which they take turns.

A process of its own gives each contestant its own threads and settings, and numbers for itself:
time to load, CPU-seconds, most memory. They take turns in short rounds, so that other work on the
machine hits all of them alike; what counts is the ratio of two of them in the same round.
"""

import os
import resource
import signal
import statistics
import sys
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing import get_context

MIB_OF_MAXRSS = 1 / 2**20 if sys.platform == "darwin" else 1 / 2**10


@dataclass
class Turn:
    """One run of a contestant. peak_mib: most resident memory of its process so far."""

    wall_sec: float
    cpu_sec: float
    peak_mib: float
    result: object


class Worker:
    """`make(*arguments)`, in a new process, gives a function; `run` calls it there and measures.

    make: a function of a module, and arguments that can be pickled. load_sec: how long it took,
    imports included. An exception there is raised here as RuntimeError with its traceback.
    """

    def __init__(self, make, *arguments):
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, make, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.load_sec = self._answer()

    def _answer(self):
        try:
            done, value = self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"a contestant ended with {self.process.exitcode}") from None
        if not done:
            raise RuntimeError(f"a contestant failed:\n{value}")
        return value

    def run(self, *arguments):
        """The `Turn` of one call."""
        self.connection.send(arguments)
        return self._answer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End the process."""
        self.connection.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def serve(connection, make, arguments):
    """What the process of a `Worker` does until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    os.dup2(2, 1)  # what libraries print does not belong into the benchmark's output
    try:
        started = time.perf_counter()
        function = make(*arguments)
        connection.send((True, time.perf_counter() - started))
        while True:
            try:
                arguments = connection.recv()
            except EOFError:
                return
            wall, cpu = time.perf_counter(), time.process_time()
            result = function(*arguments)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MIB_OF_MAXRSS
            connection.send((True, Turn(wall, cpu, peak, result)))
    except Exception:
        connection.send((False, traceback.format_exc()))


@dataclass
class Tally:
    """The rounds of one contestant, which handles `items` of something in each."""

    items: int
    load_sec: float
    first: Turn  # before the rounds: warm-up, and what it answers
    turns: list[Turn] = field(default_factory=list)

    def per_sec(self):
        """Items per second on the wall clock, the median over the rounds."""
        return statistics.median(self.items / t.wall_sec for t in self.turns)

    def per_cpu_sec(self):
        return statistics.median(self.items / t.cpu_sec for t in self.turns)

    def numbers(self):
        return {
            "items": self.items,
            "per_sec": self.per_sec(),
            "per_cpu_sec": self.per_cpu_sec(),
            "load_sec": self.load_sec,
            "peak_mib": (self.turns or [self.first])[-1].peak_mib,
        }


def take_turns(contestants, rounds):
    """{name: Tally}; contestants: {name: (Worker, items, arguments of a run)}.

    After one run each to warm up come the rounds, every other one in the opposite order.
    """
    tallies = {
        name: Tally(items, worker.load_sec, worker.run(*arguments))
        for name, (worker, items, arguments) in contestants.items()
    }
    for number in range(rounds):
        for name in list(contestants)[:: -1 if number % 2 else 1]:
            worker, _, arguments = contestants[name]
            tallies[name].turns.append(worker.run(*arguments))
    return tallies


def ratios(fast, slow):
    """How many times as fast the first is: the medians over the rounds, wall clock and CPU."""
    pairs = list(zip(fast.turns, slow.turns, strict=True))
    scale = fast.items / slow.items
    return {
        "wall": scale * statistics.median(s.wall_sec / f.wall_sec for f, s in pairs),
        "cpu": scale * statistics.median(s.cpu_sec / f.cpu_sec for f, s in pairs),
    }
