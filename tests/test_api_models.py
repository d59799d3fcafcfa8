"""A server process and its models: equal to the offline answers, and changed while under load."""

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import pytest
import urllib3

from api_server import ServerProcess, write_adapter
from dataset_loader import load_splits
from logprobs_confidence import TransformerLogprobsClassifier
from serving.settings import MOST_TEXTS
from settings import FINE_TUNED_DIR, SENTIMENT, DataSettings

TEXT = "Best worst thing ever"
CLIENTS = 32


@pytest.mark.slow
def test_all_held_out_texts_are_answered_as_offline(tmp_path, classifier):
    """The fine-tuned model is that of the pipeline where it has run, else one of random weights."""
    tuned = FINE_TUNED_DIR
    if not (tuned / "manifest.json").exists():
        tuned = write_adapter(tmp_path / "tuned", classifier, 1)
    examples = load_splits(DataSettings(), SENTIMENT)
    texts = [e.text for e in examples if e.split in ("calibration", "test")]
    assert len(texts) == 2000
    offline = {"base": classifier, "finetuned": TransformerLogprobsClassifier("embedded", tuned)}
    arguments = ("--fine-tuned-dir", tuned, "--adapters-dir", tmp_path / "none")
    with ServerProcess(*arguments, "--deadline-sec", 300) as server:
        server.wait_until_ready()
        with urllib3.PoolManager(maxsize=CLIENTS, block=True, retries=False) as connections:

            def ask(path, **body):
                url = server.url + path
                response = connections.request("POST", url, json=body, timeout=300)
                assert response.status == 200, response.data
                return response.json()

            for name, local in offline.items():
                together = [
                    answer
                    for i in range(0, len(texts), MOST_TEXTS)
                    for answer in ask(
                        "/classify/batch", texts=texts[i : i + MOST_TEXTS], model=name
                    )["answers"]
                ]

                def alone(text, name=name):
                    return ask("/classify", text=text, model=name)

                with ThreadPoolExecutor(CLIENTS) as pool:
                    among_others = list(pool.map(alone, texts))
                by_itself = [alone(text) for text in texts[::20]]
                expected = local.classify_batch(texts)
                for answers, wanted in (
                    (together, expected),
                    (among_others, expected),
                    (by_itself, expected[::20]),
                ):
                    assert_equal(answers, wanted, local)


def assert_equal(answers, predictions, classifier):
    first = SENTIMENT.label_names[0]
    for answer, p in zip(answers, predictions, strict=True):
        difference = abs(answer["probabilities"][first]["raw"] - p.probability)
        assert difference <= classifier.tolerance
        assert abs(answer["label_mass"] - p.label_mass) <= classifier.tolerance
        if abs(p.probability - 0.5) > classifier.tolerance:
            assert answer["label"] == p.predicted
        assert answer["truncated"] == p.truncated
        assert answer["model_fingerprint"] == classifier.identity["fingerprint"]


class Clients:
    """Clients who ask models in turn until the block ends, and what they were answered."""

    def __init__(self, url, models, number=10):
        self.url, self.models, self.answers = url, models, []  # (start, model, response)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(number)]

    def _ask(self, number):
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self._stop.is_set():
                model = self.models[number % len(self.models)]
                number += 1
                started = time.monotonic()
                response = client.post("/classify", json={"text": TEXT, "model": model})
                self.answers.append((started, model, response))

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join(120)

    def wait_for(self, model, matches):
        """The time of the first answer from now on that matches(response)."""
        seen, until = len(self.answers), time.monotonic() + 60
        while time.monotonic() < until:
            for _, name, response in self.answers[seen:]:
                seen += 1
                if name == model and matches(response):
                    return time.monotonic()
            time.sleep(0.02)
        raise AssertionError(f"{model} was not answered so in time")


def put_link(folder, name, target):
    """Have `name` in `folder` stand for the folder `target`, from one moment to the next."""
    link = folder / f".{name}"
    link.symlink_to(target)
    os.replace(link, folder / name)


@pytest.mark.slow
def test_models_are_added_swapped_and_broken_under_load(tmp_path, classifier):
    """Those that stay never notice; an answer is always that of the version it names."""
    versions, adapters = tmp_path / "versions", tmp_path / "adapters"
    adapters.mkdir()
    expected = {}
    for seed, name in enumerate(("steady", "one", "two", "added")):
        write_adapter(versions / name, classifier, seed)
        adapter = TransformerLogprobsClassifier("embedded", versions / name)
        key = adapter.identity["adapter_fingerprint"]
        expected[name] = key, adapter.classify(TEXT).probability
    probability = {None: classifier.classify(TEXT).probability, **dict(expected.values())}
    put_link(adapters, "steady", versions / "steady")
    put_link(adapters, "changing", versions / "one")
    shutil.copytree(versions / "one", adapters / "breaking")

    def is_version(name):
        return lambda response: (
            response.status_code == 200 and response.json()["adapter"] == expected[name][0]
        )

    models = ["base", "steady", "changing", "breaking", "added"]
    arguments = ("--adapters-dir", adapters, "--fine-tuned-dir", tmp_path / "none")
    with ServerProcess(*arguments, "--max-adapters", 3, "--deadline-sec", 120) as server:
        server.wait_until_ready()
        with Clients(server.url, models) as clients:
            clients.wait_for("steady", is_version("steady"))
            changes = []
            for name in ("two", "one"):
                put_link(adapters, "changing", versions / name)
                changes.append((clients.wait_for("changing", is_version(name)), name))
            shutil.copytree(versions / "added", adapters / ".added")
            os.rename(adapters / ".added", adapters / "added")
            added = clients.wait_for("added", is_version("added"))
            weights = adapters / "breaking" / "adapter_model.safetensors"
            whole = weights.read_bytes()
            for broken in (whole[: len(whole) // 2], b""):
                weights.write_bytes(broken)  # in its place, whoever reads it
                clients.wait_for("breaking", lambda response: response.status_code == 503)
                weights.write_bytes(whole)
                clients.wait_for("breaking", is_version("one"))
        code = server.stop()
    assert code == 0
    assert len(clients.answers) > 100
    for started, model, response in clients.answers:
        if response.status_code == 200:
            answer = response.json()
            assert answer["model"] == model
            raw = answer["probabilities"]["positive"]["raw"]
            assert raw == pytest.approx(probability[answer["adapter"]], abs=classifier.tolerance)
            continue
        assert model not in ("base", "steady"), response.text
        if response.status_code == 404:
            assert model == "added" and started < added, response.text
        else:
            assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
    for model, name in (("base", None), ("steady", "steady"), ("breaking", "one")):
        key = None if name is None else expected[name][0]
        keys = {r.json()["adapter"] for _, m, r in clients.answers if m == model and r.is_success}
        assert keys == {key}
    for (since, name), (until, _) in zip(changes, [*changes[1:], (float("inf"), "")], strict=True):
        for started, model, response in clients.answers:
            if model == "changing" and since < started < until and response.is_success:
                said = response.json()["adapter"]
                # the next version may be there before anyone has seen it
                assert said == expected[name][0] or until != float("inf")
    assert not any("Traceback" in line for line in server.lines)
