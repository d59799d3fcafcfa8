"""Scripts of the repository in processes of their own that need not import torch again.

A process that has imported torch, transformers and peft waits for orders and forks itself. Where a
test needs a process that can be killed, joined with others or looked at from outside, this saves it
the six seconds of processor time that the imports of each take. That a user's plain `python script`
works is what other tests are for.
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


def run_script(script, arguments, out, err, environment):
    """`python script arguments`, in a forked process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the server ignores
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [script, *arguments]
    with open(1, "w", closefd=False) as sys.stdout, open(2, "w", closefd=False) as sys.stderr:
        runpy.run_path(str(ROOT / script), run_name="__main__")


def start_script(script, *arguments, out=os.devnull, err=os.devnull, **environment):
    """A running `multiprocessing.Process`; out, err: paths that its output goes to."""
    process = FORKING.Process(
        target=run_script, args=(script, [*map(str, arguments)], str(out), str(err), environment)
    )
    process.start()
    return process
