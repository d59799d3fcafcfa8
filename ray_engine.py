"""Chunks of texts scored on a Ray cluster: one reader here, a classifier in every worker.

    pip install -r requirements-ray.txt
    python classify_cli.py --engine ray --workers 2 --file reviews.csv --output scored.csv

Ray Data moves the chunks: a task beside this process reads them, each worker takes the next one
when it is free, and the answers come back in the order of the chunks. How many are under way is
bounded by Ray's object store, not by the file. A worker that dies is started again, and its chunk
with it.
"""

import logging
import math
import os
import pickle
import signal
import socket
import sys
from contextlib import contextmanager

from settings import UserError

REQUIREMENT = "ray[data]==2.60.0"  # of requirements-ray.txt
STATISTICS = "RAY_USAGE_STATS_ENABLED"
# At 0 Ray listens on the loopback address alone, as it does by itself on macOS and Windows; it is
# read when Ray is imported. No parameter of Ray's says the same.
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
CONNECT_SEC = 10.0
STORE_BYTES = 200_000_000  # object store of a cluster that is started here; chunks are small


class Cluster:
    """A cluster, and what each of the workers gets of it.

    address: of a running one, of which this machine is a part; None starts one here that only this
    machine can reach and that ends with this process. workers: how many classifiers (default: one
    for every GPU; without GPUs one for every machine, with all its cores). uses_gpu: whether a
    worker may take a GPU. Raises UserError.
    """

    def __init__(self, address, workers, uses_gpu):
        connect(address)
        self.workers, self.share = division(workers, uses_gpu)

    def ask(self, question):
        """What the function `question` answers on a worker. Raises UserError."""
        import ray

        # max_calls: the process ends, and a model that it loaded leaves the memory to the workers.
        task = ray.remote(**self.share, max_calls=1)(question)
        with user_errors():
            return ray.get(task.remote())

    def score(self, load, depends, chunks):
        """Yields what `load().score` answers to each chunk, in their order.

        load: a function that makes a scorer, once in every worker; depends: what its `depends`
        must be everywhere. chunks: a function that gives the chunks, called in another process of
        this machine. Raises UserError.
        """
        import ray.data

        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.target_max_block_size = 1  # a block is one row, a row one chunk; never joined
        context.raise_original_map_exception = True
        context.enable_progress_bars = False
        source = ray.data.read_datasource(chunk_source(chunks), num_cpus=0, override_num_blocks=1)
        answers = source.map_batches(
            Worker,
            fn_constructor_args=(load, depends),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=self.workers),
            **self.share,
        )
        with user_errors(), quiet_end():
            for row in answers.iter_rows():
                yield pickle.loads(row["chunk"])


@contextmanager
def quiet_end():
    """After an interruption inside the block nothing more reaches stdout.

    Ray ends its workers then, and reports there, from a thread of its own, every task that this
    breaks off.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, or another program's matter
        yield
        return

    def interrupt(number, frame):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends, and soon
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def connect(address):
    """Be a part of the cluster at `address`, or start one. Raises UserError."""
    os.environ[STATISTICS] = "0"
    if address is None:
        os.environ[LOOPBACK_ONLY] = "0"
    elif address != "auto":
        require_listener(address)
    try:
        import ray.data
    except ImportError as error:
        raise UserError(
            f'--engine ray needs Ray, which is not installed; run: pip install "{REQUIREMENT}"'
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    own = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    try:
        ray.init(
            address=address or "local",
            logging_level=logging.ERROR,
            **(own if address is None else {}),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"no Ray cluster at {address or 'this machine'} ({reason}); start one with: ray start "
            "--head, or leave out --ray-address"
        ) from error


def require_listener(address):
    """Raises UserError unless something listens at `address`; Ray would wait for it."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_SEC).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"no Ray cluster at {address} ({error}); --ray-address is auto on a machine of the "
            "cluster, or like 10.0.0.1:6379, the address that ray start has named"
        ) from error


def division(workers, uses_gpu):
    """(number of workers, what each reserves of its machine), as in `Cluster`."""
    import ray

    machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
    kind = "GPU" if uses_gpu and any("GPU" in machine for machine in machines) else "CPU"
    machines = [machine for machine in machines if machine.get(kind, 0) >= 1]
    places = int(sum(machine[kind] for machine in machines))
    workers = workers or (places if kind == "GPU" else len(machines)) or 1
    if workers > places:
        raise UserError(
            f"--workers {workers}: every worker needs a {kind}, and the cluster has {places}"
        )
    cores = min(machine.get("CPU", 0) for machine in machines)
    cores = max(1, int(cores) // math.ceil(workers / len(machines)))
    return workers, {"num_cpus": cores, "num_gpus": int(kind == "GPU")}


@contextmanager
def user_errors():
    """A UserError of another process is raised here as such, a failure of the cluster as one."""
    from ray.exceptions import RayError, RayTaskError, UserCodeException

    try:
        yield
    except Exception as error:
        cause = error
        while cause is not None:
            # A RayTaskError passes for a UserError too, with a traceback as its text. Ray Data adds
            # lines about itself to the text of the real one.
            if type(cause) is UserError:
                raise UserError(str(cause).splitlines()[0]) from None
            cause = getattr(cause, "cause", None) or cause.__cause__
        if isinstance(error, RayError) and not isinstance(error, RayTaskError | UserCodeException):
            raise UserError(
                f"the Ray cluster failed ({str(error).strip().splitlines()[0]}); run the same "
                "command again, it continues with what is there"
            ) from error
        raise


class Worker:
    """A classifier in a process of its own, which Ray hands one chunk after the other."""

    def __init__(self, load, depends):
        self.scorer, self.depends = load(), depends

    def __call__(self, batch):
        for name, wanted in self.depends.items():
            if self.scorer.depends[name] != wanted:
                raise UserError(
                    f"the machines of this cluster differ in the {name}; give all of them the same "
                    "files, and name --device and --dtype"
                )
        (chunk,) = batch["chunk"].to_pylist()
        return packed(self.scorer.score(pickle.loads(chunk)))


def packed(value):
    """The block of one row that carries any value, texts that are none included."""
    import pyarrow

    return pyarrow.table({"chunk": pyarrow.array([pickle.dumps(value)], pyarrow.large_binary())})


def chunk_source(chunks):
    """The Ray Data source of what the function `chunks` gives, read on this machine alone."""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class Chunks(Datasource):
        supports_distributed_reads = False

        def estimate_inmemory_data_size(self):
            return None

        def get_read_tasks(self, parallelism, per_task_row_limit=None, data_context=None):
            unknown = BlockMetadata(None, None, None, None)
            return [ReadTask(lambda: map(packed, chunks()), unknown)]

    return Chunks()
