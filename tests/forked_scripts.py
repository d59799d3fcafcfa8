"""Scripts of the repository in processes of their own that need not import torch again.

A process that has imported torch, transformers and peft waits for orders and forks itself. Where a
test needs a process that can be killed, joined with others or looked at from outside, this saves it
the seconds that the imports of each take. That a user's plain `python script` works is what other
tests are for.
"""

import os
import runpy
import signal
import sys
from multiprocessing import get_context

from settings import ROOT

FORKING = get_context("forkserver")
FORKING.set_forkserver_preload(
    ["peft", "transformers.models.llama.modeling_llama", "sklearn.linear_model"]
)


def run_script(script, arguments, streams, environment):
    """`python script arguments`, in a forked process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the server ignores
    os.environ.update(environment)
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, closefd=False) for number, mode in enumerate("rww")
    )
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def start_script(
    script, *arguments, stdin=os.devnull, stdout=os.devnull, stderr=os.devnull, **environment
):
    """A running `multiprocessing.Process`. stdin, stdout, stderr: paths."""
    streams = [str(path) for path in (stdin, stdout, stderr)]
    process = FORKING.Process(
        target=run_script, args=(script, [*map(str, arguments)], streams, environment)
    )
    process.start()
    return process
