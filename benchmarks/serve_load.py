"""Load on the HTTP API: what batching, adapters and overload do to a real server process.

    python benchmarks/serve_load.py                          # everything, about 6 minutes
    python benchmarks/serve_load.py --parts batching,overload --seconds 20
    python benchmarks/serve_load.py --parts litserve         # needs: pip install litserve

Servers that are compared run at the same time and take turns under load, in short rounds, so that
other work on the machine hits both alike; their ratio is what counts. Traffic goes to 127.0.0.1
alone. Progress on stderr, a table on stdout, and as its last line one JSON object.
Exit codes: 0 done, 1 a request failed or an answer was wrong, 2 bad usage.
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from settings import EMBEDDED_MODEL_DIR, ROOT, SENTIMENT, UserError, exit_code

ROUND_SEC = 5.0
CLIENTS = 32
N_ADAPTERS = 10


# ----------------------------------------------------------------------------------------- servers


class Server:
    """A server process on a free port; `url` once it listens."""

    def __init__(self, command, environment=None):
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
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
        total, pids = 0, [str(self.process.pid)]
        while pids:
            pid = pids.pop()
            try:
                status = Path(f"/proc/{pid}/status").read_text()
                pids += Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            except OSError:
                continue
            total += int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024
        return total

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode


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


async def take_turns(contestants, seconds):
    """{name: Tally}; contestants: {name: (port, bodies, clients, path)}, rounds of ROUND_SEC."""
    tallies = {name: Tally() for name in contestants}
    rounds = max(1, round(seconds / ROUND_SEC))
    for number in range(rounds):
        for name, (port, bodies, clients, path) in contestants.items():
            found, took = await load(port, bodies, clients, min(seconds, ROUND_SEC), path)
            tallies[name].add(found, took)
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
    together, alone = classify_api(), classify_api("--batch-tokens", 1)
    try:
        await together.ready()
        await alone.ready()
        bodies = [{"text": text} for text in texts]
        await load(together.port, bodies, CLIENTS, 2)  # warm
        await load(alone.port, bodies, CLIENTS, 2)
        before = together.rss_mib
        tallies = await take_turns(
            {
                "together": (together.port, bodies, CLIENTS, "/classify"),
                "alone": (alone.port, bodies, CLIENTS, "/classify"),
            },
            seconds,
        )
        return {
            "clients": CLIENTS,
            "together": tallies["together"].numbers(),
            "alone": tallies["alone"].numbers(),
            "throughput_ratio": ratio(tallies["together"], tallies["alone"]),
            "rss_mib_before": before,
            "rss_mib_after": together.rss_mib,
        }
    finally:
        together.stop()
        alone.stop()


async def overload(texts, seconds, _):
    """Ten times the clients and a short queue: what is refused, how fast, and what follows."""
    server = classify_api("--queue-tokens", 4096)
    try:
        await server.ready()
        bodies = [{"texts": texts[i : i + 8]} for i in range(0, 800, 8)]
        found, _ = await load(server.port, bodies, 10 * CLIENTS, seconds, "/classify/batch")
        ended = time.perf_counter()
        client = Client(server.port)
        while (await client.ask("POST", "/classify", {"text": "Good."}))[0] != 200:
            await asyncio.sleep(0.01)
        recovered = time.perf_counter() - ended
        refused = [sec for status, sec in found if status == 503]
        statuses = sorted({status for status, _ in found})
        return {
            "clients": 10 * CLIENTS,
            "statuses": {str(s): sum(status == s for status, _ in found) for s in statuses},
            "refusal_p50_sec": float(np.quantile(refused, 0.5)) if refused else None,
            "refusal_p99_sec": float(np.quantile(refused, 0.99)) if refused else None,
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
    from records import write_json

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
                "ten": (server.port, ten, CLIENTS, "/classify"),
                "one": (server.port, one, CLIENTS, "/classify"),
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


async def equality(texts, _, folder):
    """Every held-out text over HTTP, in batches and among 32 clients, against `classify_batch`."""
    from logprobs_confidence import TransformerLogprobsClassifier
    from settings import FINE_TUNED_DIR

    models = {"base": None}
    if (FINE_TUNED_DIR / "manifest.json").exists():
        models["finetuned"] = FINE_TUNED_DIR
    if not (folder / "adapter-0").exists():
        write_adapters(folder)
    models["adapter-0"] = folder / "adapter-0"
    server = classify_api("--adapters-dir", folder)
    numbers = {"texts": len(texts)}
    try:
        await server.ready()
        for name, adapter in models.items():
            offline = TransformerLogprobsClassifier("embedded", adapter).classify_batch(texts)
            first = SENTIMENT.label_names[0]
            found = {}

            async def batches(queue, client, name=name, found=found):
                while queue:
                    start = queue.pop()
                    body = {"texts": texts[start : start + 100], "model": name}
                    _, content = await client.ask("POST", "/classify/batch", body)
                    for i, answer in enumerate(json.loads(content)["answers"], start):
                        found["batch", i] = answer

            async def singles(queue, client, name=name, found=found):
                while queue:
                    i = queue.pop()
                    body = {"text": texts[i], "model": name}
                    _, content = await client.ask("POST", "/classify", body)
                    found["alone", i] = json.loads(content)

            queue = list(range(0, len(texts), 100))
            await asyncio.gather(*(batches(queue, Client(server.port)) for _ in range(4)))
            queue = list(range(len(texts)))
            await asyncio.gather(*(singles(queue, Client(server.port)) for _ in range(CLIENTS)))
            differences = [
                abs(found[way, i]["probabilities"][first]["raw"] - p.probability)
                for i, p in enumerate(offline)
                for way in ("batch", "alone")
            ]
            labels = sum(
                found[way, i]["label"] != p.predicted
                for i, p in enumerate(offline)
                for way in ("batch", "alone")
            )
            numbers[name] = {"largest_difference": max(differences), "other_labels": labels}
        return numbers
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
                "ours": (ours.port, bodies, CLIENTS, "/classify"),
                "litserve": (theirs.port, bodies, CLIENTS, "/predict"),
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


PARTS = {part.__name__: part for part in (batching, overload, adapters, equality, litserve)}


def lines_of(numbers, indent=0):
    for key, value in numbers.items():
        if isinstance(value, dict):
            yield " " * indent + key
            yield from lines_of(value, indent + 2)
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            yield f"{' ' * indent}{key:<22} {shown}"


def run(parts, seconds):
    """Measure and print. Raises UserError when a request failed or an answer was wrong."""
    texts = held_out_texts()
    folder = Path(tempfile.mkdtemp(prefix="serve_load_"))
    numbers = {"load_average": os.getloadavg()[0], "cores": os.cpu_count(), "seconds": seconds}
    try:
        for part in parts:
            print(part, file=sys.stderr)
            numbers[part] = asyncio.run(PARTS[part](texts, seconds, folder))
            print("\n".join([part, *lines_of(numbers[part], 2)]), flush=True)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(numbers))
    for part, contestants in (("batching", ("together", "alone")), ("adapters", ("ten", "one"))):
        for name in contestants:
            if part in numbers and numbers[part][name]["failed"]:
                raise UserError(f"{part}, {name}: {numbers[part][name]['failed']} requests failed")
    if set(numbers.get("overload", {}).get("statuses", {})) - {"200", "503"}:
        raise UserError("overload was answered with something else than 200 and 503")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="of these (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="under load, each contestant (default: 60)"
    )
    arguments = parser.parse_args(arguments)
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {min(unknown)!r}; known: {', '.join(PARTS)}")
    if not 0 < arguments.seconds <= 600:
        parser.error(f"--seconds must lie in 0 to 600, got {arguments.seconds}")
    return exit_code(run, parts, arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())
