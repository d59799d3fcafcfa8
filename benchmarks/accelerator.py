"""How fast an accelerator classifies and trains with a model of Llama-3.1-8B's shape.

    python benchmarks/accelerator.py                 # a minute on an H200, of which it takes 46 GiB
    python benchmarks/accelerator.py --quick         # the same code, a small shape, any device
    python benchmarks/accelerator.py --update-docs   # write the results into docs/PERFORMANCE.md

The weights are random, in bfloat16 and made on the device: nothing is downloaded. The texts are the
held-out ones of dataset/ in the question of the default task, with the embedded model's token ids.
The arithmetic limit is what the device could do if it did nothing but the matrix products that a
text needs (its own tokens through every layer, one position through the head and what follows the
last layer's keys and values; in training twice that, forwards and backwards, and what the prompts
of a batch share once) at the rate at which it multiplies two 8192 × 8192 matrices.
benchmarks/accelerator.json keeps the last results of every device. Exit codes: 0 done, 1 failed,
2 bad usage.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import arms
from records import read_json, versions, write_json
from report import markdown_table, rewrite_document, text_table
from settings import ROOT, ModelSettings, UserError, exit_code

RESULTS = ROOT / "benchmarks" / "accelerator.json"
DOCUMENT = ROOT / "docs" / "PERFORMANCE.md"
STARTED = time.perf_counter()
LLAMA_8B = {  # meta-llama/Llama-3.1-8B
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


class Sizes:
    """How much is measured."""

    def __init__(self, quick):
        self.shape = arms.SHAPES["29M"] if quick else LLAMA_8B
        self.square = 256 if quick else 8192
        self.rounds = 1 if quick else 3
        self.texts, self.plain_texts = (8, 4) if quick else (1000, 128)
        self.batch_tokens = (None,) if quick else (None, 4096, 65536)  # None: the default
        self.rows = 8 if quick else 64
        self.batches = (None, 4) if quick else (None, 64)  # rows of a step


def synchronize():
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def note(what):
    print(f"{time.perf_counter() - STARTED:5.0f} s: {what}", file=sys.stderr, flush=True)


def seconds(what, run, rounds):
    """Median seconds of `run()`, once more than that to warm up."""
    run()
    taken = []
    for _ in range(rounds):
        synchronize()
        started = time.perf_counter()
        run()
        synchronize()
        taken.append(time.perf_counter() - started)
    note(f"{what}: {statistics.median(taken):.3g} s")
    return statistics.median(taken)


def product_rate(square, device):
    """Operations per second of a product of two square bfloat16 matrices of random numbers."""
    import torch

    a, b = (torch.randn(square, square, device=device, dtype=torch.bfloat16) for _ in range(2))

    def run():
        for _ in range(20):
            a @ b

    return 20 * 2 * square**3 / seconds("matrix products", run, 5)


def random_classifier(shape):
    """A classifier with the embedded model's tokenizer and random weights of a shape."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from engine import Engine, use_float32_head
    from logprobs_confidence import TransformerLogprobsClassifier

    classifier = TransformerLogprobsClassifier(ModelSettings(dtype="bfloat16"))
    torch.manual_seed(0)
    with torch.device(classifier.model.device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    use_float32_head(model)
    model.requires_grad_(False)
    classifier.engine = Engine(model.eval(), classifier._sharing_problem)
    return classifier


def peak_gib():
    """Most memory that tensors had since it was last asked, GiB; 0 where nobody says."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    most = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return most


def classification(classifier, sizes, rate):
    """[texts/s and share of the limit of the engine with each size of a batch, and without it]."""
    import torch

    encoder, engine = classifier.encoder, classifier.engine
    _, sequences, prefix, _ = arms.prompts()()
    sequences = sequences[: sizes.texts]
    tails = sum(len(ids) - len(prefix) for ids in sequences)
    limit = rate * len(sequences) / arms.operations(classifier.model, tails, len(sequences))
    shared = engine.prefix(prefix, adapter_active=False)
    default, rows = engine.budget, []

    def score(batch, prefix):
        return classifier.label_logprobs(batch, prefix=prefix)

    def add(arm, texts, run):
        per_sec = texts / seconds(arm, run, sizes.rounds)
        rows.append({"arm": arm, "per_sec": per_sec, "share_of_limit": per_sec / limit})

    name = "this engine" if shared is not None else "this engine, prompt not shared"
    for budget in sizes.batch_tokens:
        engine.budget = budget or default
        arm = f"{name}, batches of {engine.budget:,} tokens" + ", the default" * (budget is None)
        add(arm, len(sequences), lambda: list(engine.run(sequences, shared, score)))
    engine.budget = default
    device = classifier.model.device

    def forward(ids, last):
        logits = classifier.model(input_ids=ids.to(device), use_cache=False).logits
        return logits[torch.arange(len(ids)), last].float().cpu()

    whole = sequences[:: max(1, len(sequences) // sizes.plain_texts)][: sizes.plain_texts]
    run = arms.in_batches(whole, encoder.label_ids, forward)
    add(f"whole prompts in batches of {arms.BATCH}", len(whole), run)
    return rows


def training(classifier, sizes, rate):
    """[examples/s and share of the limit of LoRA training with each size of a batch]."""
    settings = arms.lora(classifier)
    peak_gib()
    base = classifier.model.get_base_model()
    texts = [example.text.strip() for example in arms.training_rows(sizes.rows)]
    prompts = [ids for ids, _ in classifier.encoder.encode(texts)]
    prefix = len(classifier.encoder.prefix)
    tails = sum(map(len, prompts)) - prefix * len(prompts)
    rows = []
    for size in sizes.batches:
        used = settings if size is None else replace(settings, batch_size=size, accumulation=1)
        arm = f"batch {used.batch_size} × accumulation {used.accumulation}"
        arm += ", the default" * (size is None)
        taken = seconds(arm, arms.epoch(classifier, used, sizes.rows), sizes.rounds)
        once = prefix * -(-sizes.rows // used.batch_size)
        needed = 2 * arms.operations(base, tails + once, len(prompts))
        rows.append(
            {
                "arm": arm,
                "per_sec": sizes.rows / taken,
                "share_of_limit": needed / rate / taken,
                "peak_gib": peak_gib(),
            }
        )
    return rows


def classification_table(found):
    return ["classification", "texts/s", "share of the limit"], [
        [row["arm"], f"{row['per_sec']:.4g}", f"{row['share_of_limit']:.2f}"]
        for row in found["classification"]
    ]


def training_table(found):
    return ["LoRA training", "examples/s", "share of the limit", "peak memory, GiB"], [
        [
            row["arm"],
            f"{row['per_sec']:.3g}",
            f"{row['share_of_limit']:.2f}",
            f"{row['peak_gib']:.1f}",
        ]
        for row in found["training"]
    ]


def measure(arguments):
    import torch

    if not arguments.quick and not torch.accelerator.is_available():
        raise UserError("this machine has no accelerator; --quick runs a small shape on the CPU")
    sizes = Sizes(arguments.quick)
    note("random weights")
    classifier = random_classifier(sizes.shape)
    device = classifier.model.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    rate = product_rate(sizes.square, device)
    found = {
        "accelerator": name,
        "date": date.today().isoformat(),
        "versions": versions() | {"torch": torch.__version__},
        "parameters": classifier.model.num_parameters(),
        "tflop_per_sec": rate / 1e12,
        "classification": classification(classifier, sizes, rate),
        "training": training(classifier, sizes, rate),
    }
    found["seconds"] = time.perf_counter() - STARTED
    print(f"{name}: {found['tflop_per_sec']:.3g} TFLOP/s in matrix products, bfloat16")
    for table in (classification_table(found), training_table(found)):
        print(f"\n{text_table(*table)}")
    path = arguments.output or (None if arguments.quick else RESULTS)
    if path is not None:
        known = read_json(path, "remove it")["accelerators"] if path.exists() else []
        known = [row for row in known if row["accelerator"] != name]
        write_json(path, {"accelerators": [*known, found]})
        print(f"\nresults: {path}")
    print(json.dumps(found))


def tables(results):
    """The Markdown of accelerator.json that stands in docs/PERFORMANCE.md."""
    blocks = []
    for found in results["accelerators"]:
        packages = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        blocks += [
            f"**{found['accelerator']}**, {found['date']}, `python benchmarks/accelerator.py`; "
            f"{found['parameters'] / 1e9:.2f} billion random weights in bfloat16; "
            f"{found['tflop_per_sec']:.0f} TFLOP/s in matrix products; {packages}.",
            markdown_table(*classification_table(found)),
            markdown_table(*training_table(found)),
        ]
    return "\n\n".join(blocks)


def update_document():
    results = read_json(RESULTS, "run: python benchmarks/accelerator.py")
    rewrite_document(DOCUMENT, {"accelerator": tables(results)})


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Exit codes: 0 done, 1 failed, 2 bad usage."
    )
    parser.add_argument("--quick", action="store_true", help="a small shape: does it work?")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON file of the results (default: benchmarks/accelerator.json; none of a quick run)",
    )
    parser.add_argument(
        "--update-docs",
        action="store_true",
        help="measure nothing; write benchmarks/accelerator.json into docs/PERFORMANCE.md",
    )
    settings = parser.parse_args(arguments)
    if settings.update_docs:
        return exit_code(update_document)
    return exit_code(measure, settings, interrupted="nothing was written")


if __name__ == "__main__":
    sys.exit(main())
