"""What the tests of the HTTP API share: adapters, an evaluation of them, a server process."""

import copy
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import httpx2 as httpx

from comparison import judge_calibrators
from records import SCHEMA_VERSION, TOKEN_PROBABILITY, write_json
from settings import ROOT, SENTIMENT
from signal_comparison import judge_signals
from simulated_cache import simulate


def write_adapter(folder, classifier, seed, task=SENTIMENT, modules="all-linear", rank=4):
    """A folder as fine_tune_model.py writes it, with random weights that change the answers."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, target_modules=modules, init_lora_weights=False
    )
    model = get_peft_model(copy.deepcopy(classifier.model), config)
    model.save_pretrained(folder, save_embedding_layers=False)
    write_json(folder / "task.json", task.to_json())
    base = {
        "base_model": "embedded",
        "base_fingerprint": classifier.identity["model_fingerprint"],
    }
    write_json(folder / "manifest.json", base)
    return folder


def write_evaluation(folder, identities):
    """An evaluation of simulated answers, good enough to certify, under identities of real models.

    identities: {"base": ..., "finetuned": ...}.
    """
    models = {}
    for seed, (name, identity) in enumerate(identities.items(), 1):
        simulated = simulate(name, SENTIMENT, 1000, seed, skill=1.0, sharpness=1.5)
        said = {p.example_id: p for p in simulated.predictions if p.method == TOKEN_PROBABILITY}
        examples = [
            replace(e, label=said[e.id].predicted) if i % 40 else e
            for i, e in enumerate(simulated.examples)
        ]
        results = replace(simulated, identity=identity, examples=tuple(examples))
        write_json(folder / f"{name}_model_results.json", results.to_json())
        models[name] = {"identity": identity} | judge_calibrators(results, n_resamples=10)
        models[name]["signals"] = judge_signals(results, n_resamples=10)
    write_json(
        folder / "calibrated_results.json",
        {"schema_version": SCHEMA_VERSION, "task": SENTIMENT.to_json(), "models": models},
    )
    return folder


class ServerProcess:
    """classify_api.py as a user starts it, on a free port; a context manager."""

    def __init__(self, *arguments, environment=None):
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "classify_api.py", "--port", "0", *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        self.lines, self.url = [], None
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if found := re.search(r"listening on (http://\S+)", line):
                self.url = found[1]
                self._listening.set()
        self._listening.set()

    def __enter__(self):
        self._listening.wait(120)
        if self.url is None:
            raise AssertionError("\n".join(self.lines))
        return self

    def wait_until_ready(self, timeout_sec=300):
        until = time.monotonic() + timeout_sec
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise AssertionError("\n".join(self.lines))
            try:
                if httpx.get(f"{self.url}/ready", timeout=30).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise AssertionError("not ready in time:\n" + "\n".join(self.lines))

    def stop(self, timeout_sec=120):
        """Exit code after SIGTERM to all its processes, as a service manager sends it."""
        os.killpg(self.process.pid, signal.SIGTERM)
        code = self.process.wait(timeout_sec)
        self._reader.join(10)
        return code

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
