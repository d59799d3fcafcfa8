"""How fast classification and fine-tuning are, beside what a user would otherwise run.

    python benchmarks/speed.py                  # everything, some 20 minutes on two cores
    python benchmarks/speed.py --quick          # the same code on few rows
    python benchmarks/speed.py --update-docs    # write the last results into docs/PERFORMANCE.md

Contestants have the same weights, token ids and dtype, run in processes of their own and take turns
(`workers.py`); a ratio is the median over the rounds. Tables appear as they are measured. At the
end benchmarks/results.json is written (a quick run writes only where --output says), and the last
line of the output is the same as one JSON object. The machine should have nothing else to do.
Arms whose package is missing are left out; they need: pip install -r benchmarks/requirements.txt
Exit codes: 0 done, 1 failed, 2 bad usage.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import arms
from benchmarks.workers import MIB_OF_MAXRSS, Worker, ratios, take_turns
from records import read_json, versions, write_json
from report import markdown_table, rewrite_document, text_table
from settings import EMBEDDED_MODEL_DIR, ROOT, UserError, exit_code

RESULTS = ROOT / "benchmarks" / "results.json"
DOCUMENT = ROOT / "docs" / "PERFORMANCE.md"
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}  # largest difference of a probability
SAMPLES = 10
QUIET = 0.7  # load average below which a machine has nothing else to do
ENGINE = "this engine, float32"
INSTALL = "pip install -r benchmarks/requirements.txt"
ONNX = ("onnxruntime", "onnxscript")
COMPILED = "this engine, torch.compile"
CLASSIFIERS = {  # title: (what makes it, packages that it needs)
    "generate, one by one": (arms.generate, ()),
    "lm-evaluation-harness": (arms.lm_eval, ("lm_eval",)),
    "batches of 32": (arms.batched, ()),
    "onnxruntime": (arms.onnxruntime, ONNX),
    "onnxruntime, last position": (arms.onnxruntime, ONNX),
    ENGINE: (arms.engine, ()),
    "this engine, bfloat16": (partial(arms.engine, dtype="bfloat16"), ()),
}
GRAPHS = {"onnxruntime": True, "onnxruntime, last position": False}  # logits of every position


class Sizes:
    """How much is measured: enough for an answer, or enough to see that it works."""

    def __init__(self, quick):
        self.rounds = 1 if quick else 5
        self.texts = 16 if quick else 256
        self.parity_texts = 16 if quick else None  # None: all
        self.prefix_texts = 96
        self.prefixes = () if quick else (0, 48, 200)
        self.shapes = {"29M": 8} if quick else {"29M": 64, "135M": 32}  # texts of each
        self.rate_texts = {"": 64} if quick else {"": 1000, "135M": 96}
        self.graphs = () if quick else tuple(GRAPHS)
        self.compiled = not quick
        self.generated_texts = 1 if quick else 16
        self.training_rows = 32 if quick else 256
        self.reference_rows = 16 if quick else 64
        self.growth = (50, 100) if quick else (1_000, 10_000, 100_000)


# ------------------------------------------------------------------------------------- the parts


def missing(packages):
    return [name for name in packages if find_spec(name) is None]


def contestants(folder, data, graphs, leave_out=()):
    """({title: (make, arguments)}, {title: why not}) of all that classify `data` with one model.

    data: (token ids, what they begin with, label ids). graphs: {title: path of its ONNX graph}; a
    title that is not among them is left out without a word.
    """
    found, left_out = {}, {}
    for title, (make, packages) in CLASSIFIERS.items():
        if title in leave_out or (
            title in GRAPHS and title not in graphs and not missing(packages)
        ):
            continue
        if lacking := missing(packages):
            left_out[title] = f"needs {', '.join(lacking)}: {INSTALL}"
        else:
            found[title] = make, (graphs.get(title, folder), *data)
    return found, left_out


def classify_in_turns(title, data, found, left_out, rounds):
    """The numbers of all that `contestants` names."""
    sequences, prefix, _ = data
    for name, why in left_out.items():
        print(f"{name} left out: it {why}")
    workers = {}
    try:
        for name, (make, arguments) in found.items():
            workers[name] = Worker(make, *arguments)
        tallies = take_turns({name: (w, len(sequences), ()) for name, w in workers.items()}, rounds)
    finally:
        for worker in workers.values():
            worker.close()
    answers = {name: tally.first.result for name, tally in tallies.items()}
    reference = answers["generate, one by one"]
    rows = [
        {
            "arm": name,
            **tally.numbers(),
            "engine_is_faster": ratios(tallies[ENGINE], tally),
            "largest_difference": float(abs(answers[name] - reference).max()),
        }
        for name, tally in tallies.items()
    ]
    numbers = {
        "title": title,
        "texts": len(sequences),
        "mean_tokens": sum(map(len, sequences)) / len(sequences),
        "shared_tokens": len(prefix),
        "rows": rows,
        "left_out": left_out,
    }
    show(classification_title(numbers), *classification_table(numbers))
    return numbers


def with_prefix(sequences, shared, length):
    """(sequences, what they begin with): the question repeated or cut to `length` tokens."""
    question = list(shared)
    prefix = (question * (length // len(question) + 1))[:length]
    return [prefix + ids[len(question) :] for ids in sequences], prefix


def classification(sizes, data, folders, work):
    texts, sequences, prefix, label_ids = data
    graphs = {}
    for name, every_position in GRAPHS.items():
        if name in sizes.graphs and not missing(ONNX):
            graphs[name] = str(Path(work) / f"{name}.onnx")
            with Worker(arms.export, EMBEDDED_MODEL_DIR, graphs[name], every_position) as worker:
                worker.run()
    asked = every(sizes.texts, sequences), prefix, label_ids
    found, left_out = contestants(EMBEDDED_MODEL_DIR, asked, graphs)
    for dtype in ("float32", "bfloat16"):
        whole = partial(arms.whole, dtype=dtype)
        found[f"from text, {dtype}"] = whole, (EMBEDDED_MODEL_DIR, every(sizes.texts, texts))
    if sizes.compiled and shutil.which("g++"):
        found[COMPILED] = partial(arms.engine, compiled=True), (EMBEDDED_MODEL_DIR, *asked)
    elif sizes.compiled:
        left_out[COMPILED] = "needs g++"
    yield classify_in_turns("the embedded model", asked, found, left_out, sizes.rounds)
    for length in sizes.prefixes:
        rows, shared = with_prefix(every(sizes.prefix_texts, sequences), prefix, length)
        asked = rows, shared, label_ids
        found, _ = contestants(EMBEDDED_MODEL_DIR, asked, graphs, ("lm-evaluation-harness",))
        title = f"the embedded model, {length} shared tokens"
        yield classify_in_turns(title, asked, found, {}, sizes.rounds)
    for shape, n in sizes.shapes.items():
        asked = every(n, sequences), prefix, label_ids
        found, _ = contestants(folders[shape]["folder"], asked, {})
        title = f"{folders[shape]['parameters'] / 1e6:.0f} million random weights"
        yield classify_in_turns(title, asked, found, {}, sizes.rounds)


def parity(sizes, data):
    """The largest difference of a probability from whole prompts scored one by one, float32."""
    _, sequences, prefix, label_ids = data
    asked = every(sizes.parity_texts or len(sequences), sequences), prefix, label_ids
    with Worker(arms.generate, EMBEDDED_MODEL_DIR, *asked) as worker:
        reference = worker.run().result
    found = {"texts": len(asked[0])}
    for dtype, tolerance in TOLERANCES.items():
        with Worker(partial(arms.engine, dtype=dtype), EMBEDDED_MODEL_DIR, *asked) as worker:
            difference = float(abs(worker.run().result - reference).max())
        found[dtype] = {"largest_difference": difference, "tolerance": tolerance}
    show("Label probabilities against whole prompts one by one, float32", *parity_table(found))
    return found


def matrix_rates(sizes, data, folders):
    import statistics

    _, sequences, prefix, _ = data
    found = []
    for shape, n in sizes.rate_texts.items():
        about = folders[shape]
        with Worker(arms.matrix_rate, about["folder"], every(n, sequences), prefix) as worker:
            worker.run()
            turns = [worker.run().result for _ in range(sizes.rounds)]
        median = {key: statistics.median(t[key] for t in turns) for key in turns[0]}
        found.append({"parameters": about["parameters"], "texts": n, **median})
    show("Share of the matrix-product rate, float32", *rate_table(found))
    return found


def consistency(sizes, data):
    texts, sequences, *_ = data
    n = sizes.generated_texts
    few, many = every(n, sequences), every(sizes.texts, texts)
    with (
        Worker(arms.consistency, EMBEDDED_MODEL_DIR, many, 0) as classified,
        Worker(arms.consistency, EMBEDDED_MODEL_DIR, many, SAMPLES) as sampled,
        Worker(arms.generations, EMBEDDED_MODEL_DIR, few, SAMPLES) as generated,
    ):
        tallies = take_turns(
            {
                "one classification": (classified, len(many), ()),
                f"consistency, N = {SAMPLES}": (sampled, len(many), ()),
                f"{SAMPLES} generations": (generated, n, ()),
            },
            sizes.rounds,
        )
    names = list(tallies)
    found = {
        "rows": [{"arm": name, **tally.numbers()} for name, tally in tallies.items()],
        "cost_of_one_classification": 1 / ratios(tallies[names[1]], tallies[names[0]])["wall"],
        "faster_than_generations": ratios(tallies[names[1]], tallies[names[2]]),
    }
    show("Response consistency", *consistency_table(found))
    return found


def fine_tuning(sizes):
    with (
        Worker(arms.fine_tuning, EMBEDDED_MODEL_DIR, sizes.training_rows) as ours,
        Worker(arms.reference_fine_tuning, EMBEDDED_MODEL_DIR, sizes.reference_rows) as reference,
    ):
        tallies = take_turns(
            {
                "batch 1 × accumulation 16, every position, checkpointing": (
                    reference,
                    sizes.reference_rows,
                    (),
                ),
                "fine_tune_model.py": (ours, sizes.training_rows, ()),
            },
            sizes.rounds,
        )
    reference, ours = tallies.values()
    with Worker(arms.gradient_difference, EMBEDDED_MODEL_DIR, 16) as worker:
        difference = worker.run().result
    found = {
        "rows": [{"arm": name, **tally.numbers()} for name, tally in tallies.items()],
        "faster": ratios(ours, reference),
        "gradient_relative_difference": difference,
    }
    show("LoRA fine-tuning of the embedded model, float32", *training_table(found))
    return found


def growth(sizes, data, work):
    """`classify_cli.py` on files of growing length, each text of which is another one."""
    texts = data[0]
    found = []
    for n in sizes.growth:
        path, output = Path(work) / f"{n}.jsonl", Path(work) / f"{n}.out.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for i in range(n):
                file.write(json.dumps({"text": f"{i}. {texts[i % len(texts)]}"}) + "\n")
        command = [
            *(sys.executable, str(ROOT / "classify_cli.py")),
            *("--file", str(path), "--output", str(output)),
        ]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        said = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # it was waited for here
        if process.returncode != 0:
            raise UserError(f"classify_cli.py failed: {said.strip().splitlines()[-1]}")
        found.append(
            {
                "texts": n,
                "wall_sec": time.perf_counter() - started,
                "cpu_sec": usage.ru_utime + usage.ru_stime,
                "peak_mib": usage.ru_maxrss * MIB_OF_MAXRSS,
            }
        )
        output.unlink()
    show("`classify_cli.py` on files of growing length, float32", *growth_table(found))
    return found


def every(n, rows):
    """n rows, spread evenly."""
    return [rows[i * len(rows) // n] for i in range(n)]


# ------------------------------------------------------------------------------------- the tables


def show(title, header, rows):
    print(f"\n{title}\n\n{text_table(header, rows)}", flush=True)


def times(ratio):
    return f"{ratio:.2f}×"


def speed_cells(row, unit=""):
    return [row["arm"], f"{row['per_sec']:.3g}{unit}", f"{row['per_cpu_sec']:.3g}{unit}"]


def classification_title(found):
    return (
        f"Classification: {found['title']}; {found['texts']} texts of {found['mean_tokens']:.0f} "
        f"tokens on average, {found['shared_tokens']} of them shared"
    )


def classification_table(found):
    header = [
        "arm",
        "texts/s",
        "texts per CPU-second",
        "engine float32 is … as fast",
        "by CPU time",
        "largest Δ probability",
        "load, s",
        "peak memory, MiB",
    ]
    rows = [
        [
            *speed_cells(row),
            times(row["engine_is_faster"]["wall"]),
            times(row["engine_is_faster"]["cpu"]),
            f"{row['largest_difference']:.0e}",
            f"{row['load_sec']:.1f}",
            f"{row['peak_mib']:.0f}",
        ]
        for row in found["rows"]
    ]
    return header, rows


def parity_table(found):
    header = [f"dtype, {found['texts']:,} held-out texts", "largest Δ probability", "allowed"]
    return header, [
        [dtype, f"{found[dtype]['largest_difference']:.1e}", f"{tolerance:.0e}"]
        for dtype, tolerance in TOLERANCES.items()
    ]


def rate_table(found):
    header = ["parameters", "texts", "matrix products, GFLOP/s", "share reached by the engine"]
    return header, [
        [
            f"{row['parameters'] / 1e6:.1f} million",
            f"{row['texts']:,}",
            f"{row['gflop_per_sec']:.0f}",
            f"{row['reached_fraction']:.2f}",
        ]
        for row in found
    ]


def consistency_table(found):
    faster = found["faster_than_generations"]
    notes = ["", f"{found['cost_of_one_classification']:.3f} of it", times(faster["wall"])]
    return ["what", "texts/s", "texts per CPU-second", "cost; gain over it"], [
        [*speed_cells(row), note] for row, note in zip(found["rows"], notes, strict=True)
    ]


def training_table(found):
    faster = found["faster"]
    gains = ["", f"{times(faster['wall'])}, by CPU time {times(faster['cpu'])}"]
    return ["setting", "examples/s", "per CPU-second", "gain", "peak memory, MiB"], [
        [*speed_cells(row), gain, f"{row['peak_mib']:.0f}"]
        for row, gain in zip(found["rows"], gains, strict=True)
    ]


def growth_table(found):
    return ["texts", "seconds", "CPU-seconds", "texts/s", "peak memory, MiB"], [
        [
            f"{row['texts']:,}",
            f"{row['wall_sec']:.1f}",
            f"{row['cpu_sec']:.1f}",
            f"{row['texts'] / row['wall_sec']:.0f}",
            f"{row['peak_mib']:.0f}",
        ]
        for row in found
    ]


def tables(results):
    """The Markdown of results.json that stands in docs/PERFORMANCE.md."""
    machine, part = results["machine"], results["parts"]
    packages = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    blocks = [
        f"Measured on {results['date']} by `{results['command']}` on {machine['cores']} cores of "
        f"{machine['cpu']} with {machine['memory_gib']:.0f} GiB; {packages}; "
        f"load average before {machine['load_average_before']:.1f}. Medians of "
        f"{results['rounds']} rounds, {results['seconds'] / 60:.0f} minutes in all."
    ]

    def add(title, table, note=""):
        blocks.append("\n\n".join(filter(None, [f"**{title}**", markdown_table(*table), note])))

    for found in part["classification"]:
        left_out = "; ".join(f"{arm} left out, it {why}" for arm, why in found["left_out"].items())
        add(classification_title(found), classification_table(found), left_out)
    add("Equal answers", parity_table(part["parity"]))
    add("Share of the matrix-product rate, float32", rate_table(part["matrix_rates"]))
    add("Response consistency", consistency_table(part["consistency"]))
    difference = part["fine_tuning"]["gradient_relative_difference"]
    add(
        "LoRA fine-tuning of the embedded model, float32",
        training_table(part["fine_tuning"]),
        f"Gradients of a batch with a shared prefix and of its rows one by one differ by "
        f"{difference:.0e} of their norm.",
    )
    add("`classify_cli.py` on files of growing length, float32", growth_table(part["growth"]))
    return "\n\n".join(blocks)


# ------------------------------------------------------------------------------------------ all


def machine():
    import psutil

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = named[0].partition(":")[2].strip() if named else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu,
        "cores": cores,
        "memory_gib": psutil.virtual_memory().total / 2**30,
        "load_average_before": os.getloadavg()[0],
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def measure(settings):
    sizes, started = Sizes(settings.quick), time.perf_counter()
    command = ["python", "benchmarks/speed.py", *(["--quick"] if settings.quick else [])]
    compared = {name: version(name) for name in ("lm_eval", "onnxruntime") if not missing((name,))}
    if (load := os.getloadavg()[0]) > QUIET:
        print(
            f"warning: the load average is {load:.1f}, not below {QUIET}: others compute here, "
            "and contestants with several threads suffer most from that",
            file=sys.stderr,
        )
    results = {
        "date": date.today().isoformat(),
        "command": shlex.join(command),
        "quick": settings.quick,
        "rounds": sizes.rounds,
        "machine": machine(),
        "versions": versions() | compared,
    }
    with tempfile.TemporaryDirectory() as work:
        with Worker(arms.prompts) as worker:
            data = worker.run().result
        card = read_json(EMBEDDED_MODEL_DIR / "training.json", "run: git checkout embedded_model")
        folders = {"": {"folder": EMBEDDED_MODEL_DIR, "parameters": card["parameters"]}}
        for shape in sizes.shapes:
            folder = Path(work) / shape
            with Worker(arms.random_model, folder, shape) as worker:
                folders[shape] = {"folder": folder, "parameters": worker.run().result}
        parts = {
            "classification": list(classification(sizes, data, folders, work)),
            "parity": parity(sizes, data),
            "matrix_rates": matrix_rates(sizes, data, folders),
            "consistency": consistency(sizes, data),
            "fine_tuning": fine_tuning(sizes),
            "growth": growth(sizes, data, work),
        }
    results |= {"seconds": time.perf_counter() - started, "parts": parts}
    path = settings.output or (None if settings.quick else RESULTS)
    if path is not None:
        write_json(path, results)
        print(f"\nresults: {path}")
    print(json.dumps(results))


def update_document():
    results = read_json(RESULTS, "run: python benchmarks/speed.py")
    rewrite_document(DOCUMENT, {"speed": tables(results)})


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Exit codes: 0 done, 1 failed, 2 bad usage."
    )
    parser.add_argument("--quick", action="store_true", help="few rows, one round: does it work?")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON file of the results (default: benchmarks/results.json; none of a quick run)",
    )
    parser.add_argument(
        "--update-docs",
        action="store_true",
        help="measure nothing; write benchmarks/results.json into docs/PERFORMANCE.md",
    )
    settings = parser.parse_args(arguments)
    if settings.update_docs and (settings.quick or settings.output):
        parser.error("--update-docs writes what the last full run measured; give it alone")
    if settings.quick and settings.output and settings.output.resolve() == RESULTS:
        parser.error(f"{RESULTS.name} is for a full run; choose another --output")
    return settings


def main(arguments=None):
    settings = parse_arguments(arguments)
    if settings.update_docs:
        return exit_code(update_document)
    return exit_code(measure, settings, interrupted="nothing was written")


if __name__ == "__main__":
    sys.exit(main())
