"""classify_cli.py --server: a real server's answers as the local ones, and what can go wrong."""

import contextlib
import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2 as httpx
import pandas
import pytest

from api_server import ServerProcess, write_adapter, write_evaluation
from classify_cli import COLUMNS, Unfinished, local_scorer, main
from logprobs_confidence import TransformerLogprobsClassifier
from serving.answers import Answer, LabelProbability
from serving.client import MOST_TEXTS_AT_ONCE
from serving.problems import KINDS, PROBLEM_JSON, TYPE_PREFIX
from serving.settings import API_KEY_VARIABLE
from settings import ROOT
from test_classify_cli import lines_of
from test_layers import PROBE

KEY = "correct horse battery staple"
TEXTS = [
    "An absolutely wonderful film, I loved every minute of it.",
    'Terrible service, "cold" food\nand a rude waiter. Never again.',
    "  电影很好看 – naïve 😀 ",
    "<|eot_id|> is not the end",
    "It was fine, I suppose. " * 200,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, classifier):
    """A fine-tuned model, and an evaluation with a calibrator of it and of the base model."""
    folder = tmp_path_factory.mktemp("served")
    tuned = write_adapter(folder / "fine_tuned_sentiment_model", classifier, 1)
    identity = TransformerLogprobsClassifier("embedded", tuned).identity
    write_evaluation(folder / "evaluation", {"base": classifier.identity, "finetuned": identity})
    write_adapter(folder / "adapters" / "uncalibrated", classifier, 2)
    (folder / "adapters" / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def starting(folder):
    """A server with a small queue, of which nobody has waited until it is ready."""
    with ServerProcess(
        *("--fine-tuned-dir", folder / "fine_tuned_sentiment_model"),
        *("--adapters-dir", folder / "adapters", "--cache-dir", folder / "evaluation"),
        *("--deadline-sec", 300, "--queue-tokens", 300),
        environment={API_KEY_VARIABLE: KEY},
    ) as server:
        yield server


@pytest.fixture(scope="module")
def server(starting):
    return starting.wait_until_ready()


@pytest.fixture
def ask(server, monkeypatch):
    """main() with --server and its key."""
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    return lambda *arguments: main([*map(str, arguments), f"--server={server.url}"])


def run(*arguments, key=KEY, text=None):
    return subprocess.run(
        [sys.executable, ROOT / "classify_cli.py", *map(str, arguments)],
        capture_output=True,
        input=text,
        timeout=300,
        env={**os.environ, API_KEY_VARIABLE: key},
    )


def local(folder, classifier, model, texts):
    """The answers of classify_cli.py without a server."""
    from calibration import NoCalibrator, cached_calibrator

    if model != "base":
        known = {"finetuned": "fine_tuned_sentiment_model"}
        adapter = folder / known.get(model, f"adapters/{model}")
        classifier = TransformerLogprobsClassifier("embedded", adapter)
    calibrator = None
    with contextlib.suppress(NoCalibrator):
        calibrator, _ = cached_calibrator(folder / "evaluation", classifier.identity)
    assert (calibrator is None) == (model == "uncalibrated")
    return local_scorer(classifier, calibrator).score(texts)


def assert_same(found, expected):
    for mine, wanted in zip(found, expected, strict=True):
        assert list(mine) == list(COLUMNS)
        for name, value in wanted.items():
            if isinstance(value, float):
                value = pytest.approx(value, abs=1e-4)
            assert mine[name] == value, name


def write_rows(path, texts):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# What is answered


def test_a_server_that_still_loads_its_model_is_waited_for(starting):
    """First, since all others wait until it is ready."""
    result = run(TEXTS[0], f"--server={starting.url}")
    assert result.returncode == 0 and b"calibrated confidence" in result.stdout
    assert b"ask again later; asking again in 5 s" in result.stderr


@pytest.mark.parametrize("model", ["base", "finetuned", "uncalibrated"])
def test_a_file_gets_the_answers_of_the_local_way(ask, folder, classifier, tmp_path, capsys, model):
    texts = [*TEXTS, "", None, 7, "half \ud83d", "a" * 20_001]
    rows = "".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(texts))
    (tmp_path / "a.jsonl").write_text(rows)
    made = tmp_path / "b.jsonl"
    flags = ("--file", tmp_path / "a.jsonl", "--output", made, "--chunk-rows", 4)
    assert ask(*flags, "--model", model, "--json") == 0
    shown = capsys.readouterr()
    found = read_jsonl(made)
    assert [row.pop("n") for row in found] == list(range(len(texts)))
    assert [row.pop("text") for row in found] == texts
    assert "at most 20000 are allowed" in found.pop()["error"]  # the one rule of the server's own
    assert_same(found, local(folder, classifier, model, texts[:-1]))
    counts = json.loads(shown.out)
    assert (counts["scored"], counts["failed"], counts["truncated"]) == (len(TEXTS), 5, 1)
    calibrated = model != "uncalibrated"
    assert (counts["calibrator"] is not None) == calibrated
    assert ("no calibrated confidence: " in shown.err) == (not calibrated)


def test_one_text_gets_the_answer_of_the_local_way(ask, folder, classifier, capsys):
    assert ask(TEXTS[0], "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer.pop("no_calibrator_because") is None
    assert_same([answer], local(folder, classifier, "base", TEXTS[:1]))
    assert ask(TEXTS[0], "--model=finetuned") == 0
    lines = capsys.readouterr().out.splitlines()
    (wanted,) = local(folder, classifier, "finetuned", TEXTS[:1])
    assert lines[0] == wanted["predicted"] and lines[3].endswith(wanted["action"])
    assert ", 500 texts)" in lines[2]
    for bad in ("", "half \ud83d"):
        assert ask(bad) == 1
        assert capsys.readouterr().err.startswith("error: the text ")


def test_the_standard_input_is_one_text(server, folder, classifier):
    result = run("-", "--json", f"--server={server.url}", text=TEXTS[1].encode())
    answer = json.loads(result.stdout)
    assert answer.pop("no_calibrator_because") is None
    assert_same([answer], local(folder, classifier, "base", TEXTS[1:2]))
    broken = run("-", f"--server={server.url}", text=b"\xff\xfe")
    assert broken.returncode == 1 and b"error: the standard input is not UTF-8" in broken.stderr


def test_nothing_heavy_is_loaded(server):
    command = [sys.executable, "-c", PROBE, ROOT, ROOT / "classify_cli.py", TEXTS[0]]
    result = subprocess.run(
        [*command, f"--server={server.url}"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, API_KEY_VARIABLE: KEY},
    )
    assert result.returncode == 0 and "calibrated confidence" in result.stdout
    loaded = set(json.loads(result.stderr.rstrip().split("\n")[-1]))
    assert loaded & {"torch", "transformers", "peft", "fastapi"} == set()


def test_more_texts_than_a_request_may_have_are_all_answered(ask, tmp_path, capsys):
    texts = [
        f"Film {i} was {'good' if i % 3 else 'bad'}." for i in range(2 * MOST_TEXTS_AT_ONCE + 9)
    ]
    path, made = write_rows(tmp_path / "a.csv", texts), tmp_path / "b.csv"
    assert ask("--file", path, "--output", made) == 0
    with made.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == texts
    assert all(row["predicted"] and not row["error"] for row in rows)
    assert f"{len(texts)} rows, {len(texts)} scored" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["csv.gz", "parquet"])
def test_killed_again_and_again_a_run_loses_and_doubles_no_row(ask, server, tmp_path, capsys, kind):
    texts = [f"text {i}" for i in range(90)]
    path, made = tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"
    table = pandas.DataFrame({"id": range(len(texts)), "text": texts})
    if kind == "parquet":
        table.to_parquet(path, row_group_size=16)
    else:
        table.to_csv(path, index=False)
    flags = [f"--file={path}", f"--output={made}", "--chunk-rows=3"]
    rng, journal, done = random.Random(kind), Unfinished(made).journal, 0
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, ROOT / "classify_cli.py", *flags, f"--server={server.url}"],
            stderr=subprocess.DEVNULL,
            env={**os.environ, API_KEY_VARIABLE: KEY},
        )
        wanted = done + rng.randint(2, 8)
        while process.poll() is None and lines_of(journal) < wanted:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        assert process.wait(60) == -signal.SIGKILL and not made.exists()
        assert done < lines_of(journal) < len(texts) / 3
        done = lines_of(journal)
    assert ask(*flags) == 0
    assert "continuing after row " in capsys.readouterr().err
    found = pandas.read_parquet(made) if kind == "parquet" else pandas.read_csv(made)
    assert found["text"].tolist() == texts and found["id"].tolist() == list(range(len(texts)))
    assert found["predicted"].notna().all()


# What can go wrong


def test_a_full_queue_is_waited_for(server, tmp_path, monkeypatch, capsys):
    """Others keep the queue full until the file was refused, and busy half of the time after that;
    a request of the file is larger than the queue."""
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    path = write_rows(tmp_path / "a.csv", ["It was fine, I suppose. " * 10] * 4)
    stop, refused, said = threading.Event(), [], io.StringIO()

    def was_refused():
        return "asking again in " in said.getvalue()

    def other(first):
        with httpx.Client(base_url=server.url, headers={"x-api-key": KEY}, timeout=60) as client:
            while not stop.is_set() and (first or not was_refused()):
                texts, started = [f"{TEXTS[0]} {i}" for i in range(20)], time.monotonic()
                response = client.post("/classify/batch", json={"texts": texts})
                refused.append(response.status_code == 503)
                time.sleep(max(0.05, time.monotonic() - started if was_refused() else 0))

    others = [threading.Thread(target=other, args=(i == 0,)) for i in range(4)]
    for thread in others:
        thread.start()
    try:
        while not any(refused):
            time.sleep(0.01)
        flags = f"--file={path}", f"--output={tmp_path / 'b.csv'}", f"--server={server.url}"
        with contextlib.redirect_stderr(said):
            code = main(flags)
    finally:
        stop.set()
        for thread in others:
            thread.join(60)
    assert code == 0 and "4 rows, 4 scored" in capsys.readouterr().out
    assert was_refused()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--server=http://127.0.0.1:9"], "Connection refused); start the server with: python"),
        (["--server=http://no-such-host.invalid"], "no answer from http://no-such-host.invalid ("),
        (["--server=127.0.0.1:8000"], "is no address of a server; it is like http://"),
        (["--server=ftp://127.0.0.1"], "is no address of a server"),
        (["--server=http://[::1"], "is no address of a server"),
    ],
)
def test_without_a_server_one_line_says_what_to_do(arguments, message, capsys):
    assert main(["A text.", *arguments]) == 1
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith("error: ") and message in line and shown.out == ""


def test_a_key_that_is_missing_or_weak_is_named(ask, monkeypatch, capsys):
    monkeypatch.setenv(API_KEY_VARIABLE, "another key of the server")
    assert ask("A text.") == 1
    assert f"wants its key; set {API_KEY_VARIABLE}" in capsys.readouterr().err
    monkeypatch.delenv(API_KEY_VARIABLE)
    assert ask("A text.") == 1
    assert f"wants its key; set {API_KEY_VARIABLE}" in capsys.readouterr().err
    monkeypatch.setenv(API_KEY_VARIABLE, "short")
    assert ask("A text.") == 1
    assert "at least 16 printable" in capsys.readouterr().err


def test_a_model_that_is_unknown_or_broken_is_named(ask, capsys):
    assert ask("A text.", "--model=nope") == 1
    assert "no model 'nope'; --model is one of base, finetuned, empty" in capsys.readouterr().err
    assert ask("A text.", "--model=empty") == 1
    assert "cannot use empty: empty/ has no adapter_config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag", ["--adapter=a", "--task=spam", "--cache-dir=c", "--device=cpu", "--dtype=bfloat16"]
)
def test_flags_of_a_local_model_are_bad_usage(flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["A text.", "--server=http://127.0.0.1:9", flag])
    assert stopped.value.code == 2
    name = flag.partition("=")[0]
    assert f"{name} is for a model here, not for a --server" in capsys.readouterr().err


# Servers that misbehave, by a script: what a real one does too seldom


MODELS = {
    "models": [
        {
            "name": "base",
            "status": "in memory",
            "model_fingerprint": "this",
            "calibrator": None,
            "calibrator_reason": "there is none",
        }
    ],
    "limits": {"texts": 256, "text_chars": 100, "prompt_tokens": 512, "body_bytes": 600},
}


def an_answer(fingerprint="this"):
    return Answer(
        label="positive",
        raw_probability=0.75,
        calibrated_probability=None,
        probabilities={"positive": LabelProbability(raw=0.75, calibrated=None)},
        label_mass=0.5,
        low_label_mass=False,
        truncated=False,
        model="base",
        adapter=None,
        model_fingerprint=fingerprint,
        calibrator=None,
        calibrator_fingerprint=None,
        calibrator_reason="there is none",
        latency_sec=0.0,
    ).model_dump()


def a_problem(kind, retry_after="0"):
    body = {"type": TYPE_PREFIX + kind, "detail": "it is so"}
    return KINDS[kind][0], json.dumps(body), {"Retry-After": retry_after}


@contextlib.contextmanager
def scripted(answer):
    """(address, sizes of the batches so far) of a server.

    answer(texts): None to answer them, or (status, body, headers), or "close" to hang up.
    """
    sizes = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.reply(200, json.dumps(MODELS), {})

        def do_POST(self):
            texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["texts"]
            sizes.append(len(texts))
            said = answer(texts)
            if said == "close":
                self.close_connection = True
                return
            good = 200, json.dumps({"answers": [an_answer() for _ in texts]}), {}
            self.reply(*(said or good))

        def reply(self, status, body, headers):
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", sizes
    finally:
        server.shutdown()
        server.server_close()


def file_through(url, folder, n=20):
    path, made = write_rows(folder / "a.csv", [f"text {i}" for i in range(n)]), folder / "b.csv"
    return main([f"--file={path}", f"--output={made}", f"--server={url}"])


@pytest.mark.parametrize("retry_after", ["0", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_refused_batch_is_asked_for_in_halves(tmp_path, retry_after):
    def answer(texts):
        return a_problem("queue-full", retry_after) if len(texts) > 5 else None

    with scripted(answer) as (url, sizes):
        assert file_through(url, tmp_path) == 0
    assert sizes == [20, 10, 5, 5, 10, 5, 5]


def test_the_time_that_the_server_asks_for_is_waited(tmp_path):
    times = []

    def answer(texts):
        times.append(time.monotonic())
        return a_problem("queue-full", "1") if len(times) == 1 else None

    with scripted(answer) as (url, _):
        assert file_through(url, tmp_path, n=1) == 0
    assert len(times) == 2 and times[1] - times[0] >= 1


def test_a_request_keeps_to_the_largest_body(tmp_path, monkeypatch):
    with scripted(lambda texts: None) as (url, sizes):
        assert file_through(url, tmp_path, n=1000) == 0
    assert sum(sizes) == 1000 and max(sizes) < MOST_TEXTS_AT_ONCE  # 600 bytes


def test_a_connection_that_was_closed_is_opened_again(tmp_path):
    seen = []

    def answer(texts):
        seen.append(texts)
        return "close" if len(seen) == 1 else None

    with scripted(answer) as (url, _):
        assert file_through(url, tmp_path) == 0
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (a_problem("model-unavailable", "60"), "answered 503: it is so"),
        (a_problem("internal-error"), "answered 500: it is so"),
        (a_problem("queue-full", "100000"), "has refused for 600 s (it is so); run the same"),
        ((502, "<html>", {"Content-Type": "text/html"}), "(status 502 without JSON)"),
        ((200, "[]", {}), "does not answer like a classify_api.py"),
        ((200, '{"answers": []}', {}), "does not answer like a classify_api.py"),
        ((404, '"nothing"', {"Content-Type": PROBLEM_JSON}), "answered 404: it does not say why"),
        ((307, "{}", {"Location": "http://127.0.0.1:9/"}), "answered 307"),
        (
            (200, json.dumps({"answers": [an_answer("another")] * 20}), {}),
            "base was replaced on the server",
        ),
        ("close", "no answer from"),
    ],
)
def test_what_is_no_answer_ends_the_run_in_one_line(tmp_path, capsys, said, message):
    with scripted(lambda texts: said) as (url, _):
        assert file_through(url, tmp_path) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]
    assert not (tmp_path / "b.csv").exists()
