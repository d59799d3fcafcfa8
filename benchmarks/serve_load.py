"""Load on the HTTP API: what batching, adapters and overload do to a real server process.

    python benchmarks/serve_load.py                          # everything, about 9 minutes
    python benchmarks/serve_load.py --update-docs            # and rewrites docs/SERVING.md
    python benchmarks/serve_load.py --parts batching,overload --seconds 20

The part litserve needs: pip install litserve

Servers that are compared take turns under load, in short rounds (the other one is halted
meanwhile), so that other work on the machine hits both alike; their ratio is what counts. Traffic
goes to 127.0.0.1 alone. Progress on stderr; on stdout what was asked for and measured, and as the
last line one JSON object. Exit codes: 0 all is kept, 1 something is not, 2 bad usage.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from records import write_json
from report import markdown_table, rewrite_document
from settings import EMBEDDED_MODEL_DIR, ROOT, SENTIMENT, UserError, exit_code

ROUND_SEC = 5.0
CLIENTS = 32
N_ADAPTERS = 10
OVERLOAD = 10
TEXTS = 16  # of a request under overload
DOCUMENT, NUMBERS = ROOT / "docs" / "SERVING.md", ROOT / "docs" / "serving.json"


# ----------------------------------------------------------------------------------------- servers


class Server:
    """A server process on a free port; `url` once it listens."""

    def __init__(self, command):
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # so that its children can be stopped with it
        )
        self.port, self.lines = None, []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])

    async def ready(self, path="/ready", method="GET", body=None):
        until = time.monotonic() + 600
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise UserError("the server ended: " + "".join(self.lines)[-500:])
            try:
                if self.port is not None:
                    client = Client(self.port)
                    status, _ = await client.ask(method, path, body)
                    client.close()
                    if status == 200:
                        return self
            except OSError:
                pass
            await asyncio.sleep(0.3)
        raise UserError("the server was not ready within 10 minutes")

    @property
    def rss_mib(self):
        """Resident memory of the process and its children."""
        main = psutil.Process(self.process.pid)
        processes = [main, *main.children(recursive=True)]
        return sum(process.memory_info().rss for process in processes) / 2**20

    def stop(self):
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # litserve leaves its workers behind
        self.process.wait()


def classify_api(*arguments):
    return Server([sys.executable, ROOT / "classify_api.py", "--port", "0", *map(str, arguments)])


class Client:
    """One connection that is kept open; as little work as possible, for it shares the cores."""

    def __init__(self, port):
        self.port, self.reader, self.writer = port, None, None

    async def ask(self, method, path, body=None):
        """(status, body) of a request."""
        data = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writer.write(head.encode() + data)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = re.search(r"content-length: (\d+)", head)
        content = await self.reader.readexactly(int(length[1])) if length else b""
        if "connection: close" in head:
            self.close()
        return int(head.split(" ", 2)[1]), content

    def close(self):
        if self.writer is not None:
            self.writer.close()
            self.writer = None


async def load(port, bodies, clients, seconds, path="/classify"):
    """[(status, seconds)] of what so many clients get who each ask one thing after another."""
    until, found, number = time.perf_counter() + seconds, [], 0

    async def one():
        nonlocal number
        client = Client(port)
        while time.perf_counter() < until:
            body = bodies[number % len(bodies)]
            number += 1
            started = time.perf_counter()
            status, _ = await client.ask("POST", path, body)
            found.append((status, time.perf_counter() - started))
        client.close()

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    return found, time.perf_counter() - started


class Tally:
    """What one contestant did in all its rounds."""

    def __init__(self):
        self.latency, self.rates, self.other = [], [], 0

    def add(self, found, seconds):
        good = [sec for status, sec in found if status == 200]
        self.latency += good
        self.other += len(found) - len(good)
        self.rates.append(len(good) / seconds)

    def numbers(self):
        p50, p99 = np.quantile(self.latency, [0.5, 0.99]).tolist()
        return {
            "requests": len(self.latency),
            "failed": self.other,
            "per_sec": float(np.mean(self.rates)),
            "p50_sec": p50,
            "p99_sec": p99,
        }


@contextlib.contextmanager
def halted(servers):
    """Inside the block these servers compute nothing: litserve polls while nobody asks."""
    for server in servers:
        os.killpg(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for server in servers:
            os.killpg(server.process.pid, signal.SIGCONT)


async def take_turns(contestants, seconds, after_round=lambda: None):
    """{name: Tally}; contestants: {name: (server, bodies, clients, path)}, rounds of ROUND_SEC."""
    tallies = {name: Tally() for name in contestants}
    servers = {server for server, *_ in contestants.values()}
    rounds = max(1, round(seconds / ROUND_SEC))
    for number in range(rounds):
        for name, (server, bodies, clients, path) in contestants.items():
            with halted(servers - {server}):
                one = min(seconds, ROUND_SEC)
                found, took = await load(server.port, bodies, clients, one, path)
            tallies[name].add(found, took)
        after_round()
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return tallies


def ratio(first, second):
    """Throughput of first over second: the median over the rounds."""
    pairs = zip(first.rates, second.rates, strict=True)
    return float(np.median([a / b for a, b in pairs]))


# ------------------------------------------------------------------------------------------- parts


def held_out_texts():
    from dataset_loader import load_splits
    from settings import DataSettings

    examples = load_splits(DataSettings(), SENTIMENT)
    return [e.text for e in examples if e.split in ("calibration", "test")]


async def batching(texts, seconds, _):
    """32 clients: texts scored together, and the same server when each is scored alone."""
    roomy = ("--queue-tokens", 16384)  # the default follows from the size of a batch
    together, alone = classify_api(*roomy), classify_api(*roomy, "--batch-tokens", 1)
    rss = []  # after each round
    try:
        await together.ready()
        await alone.ready()
        bodies = [{"text": text} for text in texts]
        await load(together.port, bodies, CLIENTS, 2)  # warm
        await load(alone.port, bodies, CLIENTS, 2)
        tallies = await take_turns(
            {
                "together": (together, bodies, CLIENTS, "/classify"),
                "alone": (alone, bodies, CLIENTS, "/classify"),
            },
            seconds,
            after_round=lambda: rss.append(together.rss_mib),
        )
        return {
            "clients": CLIENTS,
            "together": tallies["together"].numbers(),
            "alone": tallies["alone"].numbers(),
            "throughput_ratio": ratio(tallies["together"], tallies["alone"]),
            "rss_mib": rss,
            "rss_growth": rss[-1] / rss[len(rss) // 4] - 1,
        }
    finally:
        together.stop()
        alone.stop()


async def offer(port, bodies, per_sec, seconds):
    """Batches at a steady rate, whether or not earlier ones are answered, and what follows.

    Returns ([(status, seconds)], requests a second that were really sent, seconds from the last one
    until a new client, who asks about one text and again when refused, is answered).
    """
    idle, found, tasks = [], [], set()

    async def one(body):
        client = idle.pop() if idle else Client(port)
        started = time.perf_counter()
        status, _ = await client.ask("POST", "/classify/batch", body)
        found.append((status, time.perf_counter() - started))
        idle.append(client)

    started, sent = time.perf_counter(), 0
    while (now := time.perf_counter() - started) < seconds:
        while sent < per_sec * now:
            task = asyncio.create_task(one(bodies[sent % len(bodies)]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
        await asyncio.sleep(0.002)
    ended = time.perf_counter()
    newcomer = Client(port)
    while (await newcomer.ask("POST", "/classify", {"text": "Good."}))[0] != 200:
        await asyncio.sleep(0.02)
    recovered = time.perf_counter() - ended
    await asyncio.gather(*tasks)
    for client in (newcomer, *idle):
        client.close()
    return found, sent / (ended - started), recovered


async def overload(texts, seconds, _):
    """Ten times as many requests a second as the server can answer, and the time after them.

    Requests have several texts, so that what is overloaded is the model and not the client that
    shares the cores with it.
    """
    server = classify_api()
    try:
        await server.ready()
        parts = [texts[i : i + TEXTS] for i in range(0, len(texts) - TEXTS + 1, TEXTS)]
        bodies = [{"texts": part} for part in parts]
        await load(server.port, bodies, 2, 2, "/classify/batch")
        # Two at a time are never refused and keep the model busy.
        calm, took = await load(
            server.port, bodies, 2, min(seconds, 2 * ROUND_SEC), "/classify/batch"
        )
        capacity = len(calm) / took
        found, offered, recovered = await offer(server.port, bodies, OVERLOAD * capacity, seconds)
        refused = [sec for status, sec in found if status == 503]
        answered = [sec for status, sec in found if status == 200]
        if not refused or not answered:
            raise UserError(f"{OVERLOAD} times the load was not too much, or nothing was answered")
        statuses = sorted({status for status, _ in found})
        return {
            "texts_of_a_request": TEXTS,
            "capacity_per_sec": capacity,
            "offered_per_sec": offered,
            "answered_per_sec": len(answered) / seconds,
            "statuses": {str(s): sum(status == s for status, _ in found) for s in statuses},
            "refusal_p50_sec": float(np.quantile(refused, 0.5)),
            "refusal_p99_sec": float(np.quantile(refused, 0.99)),
            "answer_p99_sec": float(np.quantile(answered, 0.99)),
            "recovered_sec": recovered,
        }
    finally:
        server.stop()


def write_adapters(folder):
    """Ten adapters of random weights, as fine_tune_model.py writes them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from logprobs_confidence import weights_fingerprint

    for number in range(N_ADAPTERS):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL_DIR, dtype=torch.float32)
        config = LoraConfig(
            task_type="CAUSAL_LM", r=16, target_modules="all-linear", init_lora_weights=False
        )
        path = folder / f"adapter-{number}"
        get_peft_model(model, config).save_pretrained(path, save_embedding_layers=False)
        write_json(path / "task.json", SENTIMENT.to_json())
        base = {
            "base_model": "embedded",
            "base_fingerprint": weights_fingerprint(EMBEDDED_MODEL_DIR),
        }
        write_json(path / "manifest.json", base)


async def adapters(texts, seconds, folder):
    """32 clients who ask ten adapters in turn, and who ask one."""
    write_adapters(folder)
    server = classify_api("--adapters-dir", folder)
    try:
        await server.ready()
        ten = [{"text": t, "model": f"adapter-{i % N_ADAPTERS}"} for i, t in enumerate(texts)]
        one = [{"text": t, "model": "adapter-0"} for t in texts]
        await load(server.port, ten, CLIENTS, 5)  # loads the adapters
        tallies = await take_turns(
            {
                "ten": (server, ten, CLIENTS, "/classify"),
                "one": (server, one, CLIENTS, "/classify"),
            },
            seconds,
        )
        return {
            "ten": tallies["ten"].numbers(),
            "one": tallies["one"].numbers(),
            "time_ratio": 1 / ratio(tallies["ten"], tallies["one"]),
        }
    finally:
        server.stop()


LITSERVE = """
import sys
sys.path.insert(0, {root!r})
import litserve
from logprobs_confidence import TransformerLogprobsClassifier

class Api(litserve.LitAPI):
    def setup(self, device):
        self.classifier = TransformerLogprobsClassifier()
    def decode_request(self, request):
        return request["text"]
    def predict(self, texts):
        return self.classifier.classify_batch(texts)
    def batch(self, inputs):
        return inputs
    def unbatch(self, outputs):
        return outputs
    def encode_response(self, prediction):
        return {{"label": prediction.predicted, "probability": prediction.probability}}

if __name__ == "__main__":
    api = Api(max_batch_size={clients}, batch_timeout=0.01)
    print("listening on http://127.0.0.1:{port}", file=sys.stderr, flush=True)
    litserve.LitServer(api, accelerator="cpu", workers_per_device=1).run(
        host="127.0.0.1", port={port}, log_level="error", generate_client_file=False
    )
"""


async def litserve(texts, seconds, folder):
    """32 clients: this server, and the same `classify_batch` under litserve."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = folder / "under_litserve.py"
    script.write_text(LITSERVE.format(root=str(ROOT), clients=CLIENTS, port=port))
    ours, theirs = classify_api(), Server([sys.executable, script])
    try:
        await ours.ready()
        await theirs.ready("/predict", "POST", {"text": "Good."})
        bodies = [{"text": text} for text in texts]
        await load(ours.port, bodies, CLIENTS, 2)
        await load(theirs.port, bodies, CLIENTS, 2, "/predict")
        tallies = await take_turns(
            {
                "ours": (ours, bodies, CLIENTS, "/classify"),
                "litserve": (theirs, bodies, CLIENTS, "/predict"),
            },
            seconds,
        )
        return {
            "ours": tallies["ours"].numbers(),
            "litserve": tallies["litserve"].numbers(),
            "throughput_ratio": ratio(tallies["ours"], tallies["litserve"]),
        }
    finally:
        ours.stop()
        theirs.stop()


PARTS = {part.__name__: part for part in (batching, litserve, overload, adapters)}


def verdicts(numbers):
    """[(what was asked for, what was measured, whether it is kept)] of the parts that ran."""
    rows = []

    def row(what, shown, kept):
        rows.append((what, shown, bool(kept)))

    if part := numbers.get("batching"):
        together, alone = part["together"], part["alone"]
        row(
            f"{CLIENTS} clients, scored together: at least 1.8 times the texts a second of scoring "
            "each alone",
            f"{part['throughput_ratio']:.2f} ({together['per_sec']:.0f} to {alone['per_sec']:.0f})",
            part["throughput_ratio"] >= 1.8,
        )
        row(
            "and a lower 99th percentile of the latency",
            f"{together['p99_sec']:.2f} s to {alone['p99_sec']:.2f} s",
            together["p99_sec"] < alone["p99_sec"],
        )
        row(
            f"no error in {together['requests']:,} requests",
            f"{together['failed']}",
            together["failed"] == 0,
        )
        row(
            "memory is flat: under 5 % more at the end than after a quarter of the time",
            f"{100 * part['rss_growth']:+.1f} % ({part['rss_mib'][-1]:.0f} MiB)",
            part["rss_growth"] < 0.05,
        )
    if part := numbers.get("litserve"):
        ours, theirs = part["ours"], part["litserve"]
        row(
            f"{CLIENTS} clients: at least the texts a second of the same function under litserve",
            f"{part['throughput_ratio']:.2f} ({ours['per_sec']:.0f} to {theirs['per_sec']:.0f})",
            part["throughput_ratio"] >= 1,
        )
    if part := numbers.get("overload"):
        row(
            f"{OVERLOAD} times the load is really offered, and answered with 200 and 503 alone",
            f"{part['offered_per_sec']:.0f} requests a second, "
            f"{part['capacity_per_sec']:.1f} when calm: "
            + ", ".join(f"{n:,} × {status}" for status, n in part["statuses"].items()),
            set(part["statuses"]) <= {"200", "503"}
            and part["offered_per_sec"] > 0.95 * OVERLOAD * part["capacity_per_sec"],
        )
        row(
            "503 comes within a second (median, 99th percentile)",
            f"{part['refusal_p50_sec']:.3f} s, {part['refusal_p99_sec']:.3f} s",
            part["refusal_p99_sec"] < 1,
        )
        row(
            "a second after the load ends a new client has its answer",
            f"{part['recovered_sec']:.2f} s",
            part["recovered_sec"] < 1,
        )
    if part := numbers.get("adapters"):
        row(
            f"{N_ADAPTERS} adapters at once take at most 1.3 times the time of one",
            f"{part['time_ratio']:.2f}",
            part["time_ratio"] <= 1.3,
        )
    return rows


def measured_block(numbers):
    """The block of docs/SERVING.md: a table, and where and for how long it was measured."""
    rows = [[what, shown, "yes" if kept else "**no**"] for what, shown, kept in verdicts(numbers)]
    table = markdown_table(["asked", "measured", "kept"], rows)
    return (
        f"{table}\n\n({numbers['seconds']:g} s of load for each contestant, {numbers['cores']} CPU "
        f"cores; load average before it {numbers['load_average']:.1f}.)"
    )


def update_document(numbers):
    """Rewrite docs/serving.json and the block of docs/SERVING.md."""
    rewrite_document(DOCUMENT, {"serving": measured_block(numbers)})
    write_json(NUMBERS, numbers)


def run(parts, seconds, update_docs):
    """Measure and print. Raises UserError when something that was asked for is not kept."""
    texts = held_out_texts()
    folder = Path(tempfile.mkdtemp(prefix="serve_load_"))
    numbers = {"load_average": os.getloadavg()[0], "cores": os.cpu_count(), "seconds": seconds}
    try:
        for part in parts:
            print(part, file=sys.stderr)
            numbers[part] = asyncio.run(PARTS[part](texts, seconds, folder))
    finally:
        shutil.rmtree(folder)
    found = verdicts(numbers)
    for what, shown, kept in found:
        print(f"{'kept    ' if kept else 'NOT KEPT'}  {what}: {shown}")
    print(json.dumps(numbers))
    if update_docs:
        update_document(numbers)
    if broken := sum(not kept for _, _, kept in found):
        raise UserError(f"{broken} of {len(found)} are not kept; other work on the machine?")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="of these (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="under load, each contestant (default: 60)"
    )
    parser.add_argument(
        "--update-docs", action="store_true", help="rewrite docs/SERVING.md and docs/serving.json"
    )
    arguments = parser.parse_args(arguments)
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {min(unknown)!r}; known: {', '.join(PARTS)}")
    if not 0 < arguments.seconds <= 600:
        parser.error(f"--seconds must lie in 0 to 600, got {arguments.seconds}")
    if arguments.update_docs and set(parts) != set(PARTS):
        parser.error("--update-docs needs all parts; leave --parts out")
    return exit_code(run, parts, arguments.seconds, arguments.update_docs)


if __name__ == "__main__":
    sys.exit(main())
