"""classify_cli.py --engine ray: two workers on this machine, and what can go wrong there."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from types import SimpleNamespace

import psutil
import pytest

from classify_cli import COLUMNS, Unfinished, main
from ray_engine import REQUIREMENT, STORE_BYTES, Cluster, division
from settings import ROOT, UserError

# Not imported here: what `connect` sets counts when Ray is imported for the first time.
pytestmark = pytest.mark.skipif(
    find_spec("ray") is None, reason=f'no Ray; to test with it: pip install "{REQUIREMENT}"'
)

TEXTS = [
    "An absolutely wonderful film, I loved every minute of it.",
    'Terrible service, "cold" food\nand a rude waiter. Never again.',
    "电影很好看 – naïve 😀",
    "It was fine, I suppose. " * 200,
]
BAD = ["", None, 7, ["a"], "half \ud83d"]


# The cluster, with scorers that are no models


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster(None, 2, uses_gpu=False)
    yield cluster
    import ray

    ray.shutdown()


def answers(cluster, score, chunks):
    """What workers with the function `score` answer to the list `chunks`."""
    return cluster.score(lambda: SimpleNamespace(score=score, depends={}), {}, lambda: chunks)


def test_two_workers_answer_in_the_order_of_the_chunks(cluster):
    def score(number):
        time.sleep(0.3 if number % 4 == 0 else 0.01)
        return number, os.getpid()

    found = list(answers(cluster, score, list(range(24))))
    assert [number for number, _ in found] == list(range(24))
    assert len({process for _, process in found}) == 2
    assert os.getpid() not in {process for _, process in found}


def test_every_value_arrives_as_it_is(cluster):
    chunks = [[*TEXTS, *BAD], [], [b"\0\0"], [1.5, float("inf"), {"a": None}]]
    assert list(answers(cluster, lambda texts: texts, chunks)) == chunks


def test_no_chunks_are_no_answers(cluster):
    assert list(answers(cluster, lambda texts: texts, [])) == []


def test_what_is_read_ahead_is_bounded_by_the_store_and_not_by_the_file(cluster, tmp_path):
    size, total = 4_000_000, 200
    read = tmp_path / "read"

    def chunks():
        for _ in range(total):
            with read.open("ab") as file:
                file.write(b".")
            yield bytes(size)

    load = lambda: SimpleNamespace(score=bytes, depends={})  # noqa: E731
    found = cluster.score(load, {}, chunks)
    ahead = []
    for done, chunk in enumerate(found):  # results as large as what they were made of
        assert len(chunk) == size
        time.sleep(0.02)  # the reader is faster than this
        ahead.append(read.stat().st_size - done)
    assert len(ahead) == total
    assert max(ahead) * size < STORE_BYTES < total * size


def test_a_dead_worker_is_replaced_and_its_chunk_scored_again(cluster, tmp_path):
    died = tmp_path / "died"

    def score(number):
        if number == 7 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    assert list(answers(cluster, score, list(range(20)))) == list(range(20))
    assert died.exists()


def test_an_error_of_the_user_is_the_same_here_and_a_mistake_is_not_one(cluster):
    def refuse(*_):
        raise UserError("mend this; then run: that")

    def fail(*_):
        raise ZeroDivisionError("a mistake of ours")

    for action in (
        lambda: cluster.ask(refuse),
        lambda: list(answers(cluster, refuse, [1])),
        lambda: list(cluster.score(lambda: SimpleNamespace(score=len, depends={}), {}, refuse)),
    ):
        with pytest.raises(UserError) as refused:
            action()
        assert str(refused.value) == "mend this; then run: that"
    with pytest.raises(Exception, match="a mistake of ours") as failed:
        list(answers(cluster, fail, [1]))
    assert not isinstance(failed.value, UserError)


def test_a_worker_whose_model_is_another_refuses(cluster):
    def load():
        return SimpleNamespace(score=len, depends={"calibrator": "b"})

    with pytest.raises(UserError, match="the machines of this cluster differ in the calibrator"):
        list(cluster.score(load, {"calibrator": "a"}, lambda: [[1]]))


def test_more_workers_than_cores_are_refused(cluster):
    import ray

    cores = int(ray.cluster_resources()["CPU"])
    with pytest.raises(
        UserError, match=f"--workers {cores + 1}: every worker needs a CPU, and the"
    ):
        division(cores + 1, uses_gpu=True)
    assert division(cores, uses_gpu=True) == (cores, {"num_cpus": 1, "num_gpus": 0})
    assert division(None, uses_gpu=True) == (1, {"num_cpus": cores, "num_gpus": 0})


def test_only_this_machine_can_reach_the_cluster(cluster):
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = {
        connection.laddr
        for process in processes
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert len(listening) > 3
    assert {ip.removeprefix("::ffff:") for ip, _ in listening} <= {"127.0.0.1", "::1"}
    assert 8265 not in {port for _, port in listening}  # where Ray's dashboard would be


@pytest.mark.parametrize(
    "address", ["ray://127.0.0.1:10001", "127.0.0.1:1", "no.such.host:1", "nonsense"]
)
def test_a_cluster_that_is_not_there_is_one_line(address, tmp_path):
    (tmp_path / "a.csv").write_text("text\nfine film\n")
    flags = [f"--file={tmp_path / 'a.csv'}", f"--output={tmp_path / 'b.csv'}", "--engine=ray"]
    code, _, errors = finish(start(*flags, f"--ray-address={address}"))
    assert code == 1
    assert errors.splitlines()[-1].startswith("error: ") and "--ray-address" in errors
    assert "Traceback" not in errors and [p.name for p in tmp_path.iterdir()] == ["a.csv"]


# Files, with the embedded model


def start(*arguments):
    """classify_cli.py in a process group of its own, as a terminal starts it."""
    return subprocess.Popen(
        [sys.executable, ROOT / "classify_cli.py", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process):
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"n": i, "text": t}) + "\n" for i, t in enumerate(texts)))
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for mine, wanted in zip(found, expected, strict=True):
        assert list(mine) == ["n", "text", *COLUMNS]
        for name, value in wanted.items():
            if isinstance(value, float):
                value = pytest.approx(value, abs=1e-5)
            assert mine[name] == value, name


def test_a_file_gets_the_answers_of_the_local_engine(tmp_path):
    texts = [*BAD, *(f"{text} {i}" for i in range(25) for text in TEXTS), *BAD]
    path = write_rows(tmp_path / "a.jsonl", texts)
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    flags = [f"--file={path}", "--chunk-rows=7"]
    assert main([*flags, f"--output={here}"]) == 0
    code, output, _ = finish(start(*flags, f"--output={there}", "--engine=ray", "--workers=2"))
    assert code == 0 and "110 rows, 100 scored" in output and "not scored" in output
    found = read_rows(there)
    assert [row["n"] for row in found] == list(range(len(texts)))
    assert_same(found, read_rows(here))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "here.jsonl", "there.jsonl"]


@pytest.fixture
def unfinished(tmp_path):
    """(flags, process, Unfinished) of a run that has answered, and is not done."""
    path, made = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_rows(path, [f"{TEXTS[i % 3]} {i}" for i in range(900)])
    flags = [f"--file={path}", f"--output={made}", "--chunk-rows=5", "--engine=ray", "--workers=2"]
    process, unfinished = start(*flags), Unfinished(made)
    try:
        while process.poll() is None and lines_of(unfinished.journal) < 6:
            time.sleep(0.01)
        assert process.poll() is None
        yield flags, process, unfinished
    finally:
        process.kill()
        process.wait()


def lines_of(journal):
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def assert_goes_on(flags, unfinished):
    """The same command finishes the file, without what was done."""
    assert not unfinished.output.exists()
    code, output, errors = finish(start(*flags))
    assert code == 0 and "900 rows, 900 scored" in output
    assert "continuing after row " in errors
    found = read_rows(unfinished.output)
    assert [row["n"] for row in found] == list(range(900))
    assert all(row["predicted"] and row["error"] is None for row in found)


def models(process):
    """The workers below a process, which hold the models."""
    family = psutil.Process(process.pid).children(recursive=True)
    return [child for child in family if "MapWorker" in child.name()]


def assert_ended(processes):
    until = time.monotonic() + 60
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_killed_run_continues_and_leaves_no_model_in_memory(unfinished):
    flags, process, output = unfinished
    workers = models(process)
    process.kill()
    process.wait()
    assert len(workers) == 2
    assert_ended(workers)
    assert_goes_on(flags, output)


def test_an_interruption_is_one_line(unfinished):
    flags, process, output = unfinished
    workers = models(process)
    os.killpg(process.pid, signal.SIGINT)
    code, shown, errors = finish(process)
    assert (code, shown) == (1, "")
    lines = [line for line in errors.splitlines() if line.strip() and "/900 [" not in line]
    assert lines == ["interrupted; the same command continues where it stopped"]
    assert_ended(workers)
    assert_goes_on(flags[:-2], output)  # with the local engine, whose answers are the same
