"""Evaluate the base and the fine-tuned model once on held-out rows, calibrate, and keep the result.

    python generate_evaluation_cache.py                        # both models, 2,000 held-out rows
    python generate_evaluation_cache.py --base-only            # before any fine-tuning
    python generate_evaluation_cache.py --data my.csv --output-dir my_run ...

Writes evaluation_cache/: base_model_results.json, finetuned_model_results.json (every row's label
log-probabilities, response consistency and the other signals of --signals), calibrated_results.json
(calibrators and the blend of the signals, fitted on the calibration rows, judged on the test rows)
and, last, evaluation_metadata.json. Everything after this stage reads these files and loads no
model. docs/CACHE_SCHEMA.md describes them field by field. An interrupted run continues with the
rows that are missing; the same run again says so and stops.
"""

import argparse
import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from records import (
    CONSISTENCY,
    MC_DROPOUT,
    MODEL_FILES,
    P_TRUE,
    PARAPHRASE,
    SCHEMA_VERSION,
    TOKEN_PROBABILITY,
    VERBALISED,
    ModelResults,
    Prediction,
    changed_packages,
    load_held_out,
    package_versions,
    prediction_from_json,
    prediction_to_json,
    read_json,
    versions,
    write_json,
)
from settings import (
    BACKENDS,
    LOCAL,
    OPENAI,
    DataSettings,
    EvaluationSettings,
    ModelSettings,
    OutputSettings,
    TaskSettings,
    UserError,
    add_arguments,
    fingerprint,
    from_arguments,
    resolve_model,
)

NEXT_STEP = "run: python generate_evaluation_cache.py --force"
RETRAIN = "run: python fine_tune_model.py --force-retrain"
CHUNK = 256  # rows between two writes of the partial results
SIGNALS = (PARAPHRASE, MC_DROPOUT, P_TRUE, VERBALISED)  # what --signals may name


def cache_fingerprint(held_out, data_print, task, model_print, evaluation, adapter_print):
    """Identity of an evaluation: the same one gives the same numbers."""
    return fingerprint(
        [
            SCHEMA_VERSION,
            data_print,
            [[e.id, e.category, e.domain, e.group] for e in held_out],
            task.to_json(),
            model_print,
            asdict(evaluation),
            adapter_print,
        ]
    )


class PartialResults:
    """Predictions kept on disk while a model is being evaluated, one JSON line a row.

    The first line holds the fingerprint of what the rows belong to; rows of another one are
    dropped, and so is what follows a damaged line, such as a last one that was cut off.
    """

    def __init__(self, path, run_print):
        self.path, self.run_print = Path(path), run_print

    def read(self):
        """{(method, example id): Prediction} of an earlier, interrupted run."""
        if not self.path.exists():
            return {}
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        if lines[0] != self.run_print:
            return {}
        rows = {}
        for line in lines[1:-1]:  # what follows the last line break was not finished
            try:
                row = prediction_from_json(json.loads(line))
            except (ValueError, TypeError):
                break
            rows[row.method, row.example_id] = row
        return rows

    def write(self, predictions):
        """Start the file again with these rows; `append` adds to it."""
        self._write("w", [self.run_print, *map(self._line, predictions)])

    def append(self, predictions):
        self._write("a", map(self._line, predictions))

    @staticmethod
    def _line(prediction):
        return json.dumps(prediction_to_json(prediction), ensure_ascii=False)

    def _write(self, mode, lines):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open(mode, encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in lines))
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; free space and run again to continue"
            ) from error


class NoAnswer(UserError):
    """A signal has no value for any of the texts it was tried on."""


def evaluate_method(method, ask, classifier, examples, partial, done):
    """One `Prediction` an example, in their order, of what `ask` says, with what each row cost.

    ask: (examples) → [Prediction]. done: {(method, id): Prediction} of all
    rows there are, to which these are added. The texts are divided into chunks in one fixed order,
    and a chunk is asked as a whole, so an interrupted run ends with the numbers of any other.
    """
    from tqdm import tqdm

    ordered = sorted(examples, key=lambda e: len(e.text))
    chunks = [ordered[start : start + CHUNK] for start in range(0, len(ordered), CHUNK)]
    with tqdm(total=len(ordered), desc=method, unit="text", file=sys.stderr) as bar:
        for chunk in chunks:
            if not all((method, e.id) in done for e in chunk):
                started = time.perf_counter()
                with classifier.counted_passes() as counts:
                    rows = ask(chunk)
                seconds = time.perf_counter() - started
                cost = {
                    "passes": round(sum(counts) / len(rows), 4),
                    "latency_sec": seconds / len(rows),
                }
                rows = [replace(row, **cost) for row in rows]
                partial.append(rows)
                done |= {(method, row.example_id): row for row in rows}
            bar.update(len(chunk))
    return [done[method, e.id] for e in examples]


def chosen_signals(evaluation):
    """The names in --signals, in the order of SIGNALS. Raises UserError for an unknown one."""
    given = [name.strip() for name in evaluation.signals.split(",")]
    names = [] if given == ["none"] else given
    if unknown := [name for name in names if name not in SIGNALS]:
        raise UserError(
            f"--signals has {unknown[0]!r}; give none, or some of {', '.join(SIGNALS)}, "
            "joined by commas"
        )
    return [name for name in SIGNALS if name in names]


def askers(classifier, evaluation):
    """({method: ask}, {method: why it is left out}) of the chosen signals, for one model.

    ask: (texts, their token-probability rows) → [Prediction].
    """
    from consistency_confidence import (
        dropout_predictions,
        other_wordings,
        paraphrase_predictions,
    )
    from prompted_confidence import (
        p_true_predictions,
        p_true_siblings,
        stated_siblings,
        verbalised_predictions,
    )

    def paraphrase():
        siblings = [classifier.for_task(task) for task in other_wordings(classifier.task)]
        return lambda texts, own: paraphrase_predictions(siblings, texts, own)

    def mc_dropout():
        if not classifier.adapter_active:
            raise UserError("the base model has no LoRA layers to drop out")
        with classifier.dropout(0):  # refuses an adapter without dropout
            pass
        seed, n_passes = evaluation.evaluation_seed, evaluation.dropout_passes
        return lambda texts, own: dropout_predictions(classifier, texts, own, n_passes, seed)

    def p_true():
        siblings = p_true_siblings(classifier)
        return lambda texts, own: p_true_predictions(siblings, texts, own)

    def verbalised():
        siblings = stated_siblings(classifier)
        return lambda texts, own: verbalised_predictions(siblings, texts, own)

    make = {
        PARAPHRASE: paraphrase,
        MC_DROPOUT: mc_dropout,
        P_TRUE: p_true,
        VERBALISED: verbalised,
    }
    asks, left_out = {}, {}
    for name in chosen_signals(evaluation):
        try:
            asks[name] = make[name]()
        except UserError as error:
            left_out[name] = str(error)
    return asks, left_out


def model_results(name, classifier, task, examples, evaluation, partial):
    """`ModelResults` of one model: the rows of every method for every example."""
    from consistency_confidence import consistency_predictions, other_wordings
    from prompted_confidence import content_free_rows

    started = time.perf_counter()
    done = partial.read()
    partial.write(done.values())
    position = {e.id: i for i, e in enumerate(examples)}

    def classify(chunk, temperature=1.0):
        texts, ids = [e.text for e in chunk], [e.id for e in chunk]
        return classifier.classify_batch(texts, ids, temperature=temperature)

    def sample(chunk):
        rows = [done[TOKEN_PROBABILITY, e.id] for e in chunk]
        if evaluation.temperature != 1.0:  # draws at another temperature: its own distribution
            rows = classify(chunk, evaluation.temperature)
        return consistency_predictions(task, rows, evaluation, [position[e.id] for e in chunk])

    def signal(method, ask):
        """`ask` for a chunk; about a text without a token-probability row nothing is asked.

        Raises NoAnswer where the first chunk has none: the model cannot do what it is asked.
        """

        def rows_of(chunk):
            own = {e.id: done[TOKEN_PROBABILITY, e.id] for e in chunk}
            kept = [e for e in chunk if own[e.id].error is None]
            asked = ask([e.text for e in kept], [own[e.id] for e in kept]) if kept else []
            errors = [row.error for row in asked if row.error is not None]
            if errors and len(errors) == len(asked) and not any(m == method for m, _ in done):
                raise NoAnswer(f"scored 0 of the first {len(asked)} texts; an error: {errors[0]}")
            found = {row.example_id: row for row in asked}
            failed = {i: Prediction(i, method, error=row.error) for i, row in own.items()}
            return [found.get(e.id, failed[e.id]) for e in chunk]

        return rows_of

    def run(method, ask):
        return evaluate_method(method, ask, classifier, examples, partial, done)

    predictions = run(TOKEN_PROBABILITY, classify)
    failed = [p for p in predictions if p.error is not None]
    if len(failed) == len(predictions):
        raise UserError(f"{name}: no row could be scored; the first error: {failed[0].error}")
    predictions += run(CONSISTENCY, sample)
    asks, left_out = askers(classifier, evaluation)
    for method, ask in asks.items():
        try:
            predictions += run(method, signal(method, ask))
        except NoAnswer as error:
            left_out[method] = str(error)
    wordings = [
        {"question": other.question, "negated": other.labels != task.labels}
        for other in other_wordings(task)
    ]
    return ModelResults(
        name=name,
        task=task,
        identity=classifier.identity,
        examples=tuple(examples),
        predictions=tuple(predictions),
        run={
            "device": classifier.device,
            "seconds": round(time.perf_counter() - started, 1),
            "evaluation": asdict(evaluation),
            "signals": {
                "wordings": wordings if PARAPHRASE in asks else [],
                "content_free": content_free_rows(classifier),
                "left_out": left_out,
            },
            "versions": versions(),
        },
    )


def held_out_examples(task, data, folder, base_only):
    """The calibration and test rows, checked against those the adapter was kept away from."""
    from dataset_loader import data_fingerprint, load_splits

    examples = load_splits(data, task)
    held_out = [e for e in examples if e.split in ("calibration", "test")]
    if not base_only:
        kept = {e.id: (e.text, e.label, e.split) for e in load_held_out(folder)}
        if kept != {e.id: (e.text, e.label, e.split) for e in held_out}:
            raise UserError(
                f"{folder}/test_set.json holds other rows than this data and --split-seed give: "
                "the adapter may have been trained on test rows; run: python fine_tune_model.py"
            )
    return held_out, data_fingerprint(examples)


def generate(task, model, data, evaluation, output, base_only=False, force=False):
    """Run the stage. Returns "evaluated" or "up to date". Raises UserError."""
    from logprobs_confidence import model_fingerprint, open_classifier, weights_fingerprint

    check_evaluation(evaluation)
    model.check()
    check_backend(model, evaluation, base_only)
    cache_dir, adapter = output.cache, None if base_only else output.fine_tuned
    if adapter is not None and not (adapter / "manifest.json").exists():
        raise UserError(
            f"no fine-tuned model in {adapter}/; run: python fine_tune_model.py or give --base-only"
        )
    if model.backend == LOCAL:
        classifier, model_print = None, model_fingerprint(model)
    else:
        classifier = open_classifier(model, task=task)
        model_print = fingerprint([classifier.identity["fingerprint"], package_versions()])
    training = None
    if adapter is not None:
        check_adapter(adapter, task, model, weights_fingerprint(resolve_model(model.model)))
        training = read_json(adapter / "training_metrics.json", RETRAIN)
    held_out, data_print = held_out_examples(task, data, output.fine_tuned, base_only)
    run_print = cache_fingerprint(
        held_out,
        data_print,
        task,
        model_print,
        evaluation,
        weights_fingerprint(adapter) if adapter else None,
    )
    metadata_path = cache_dir / "evaluation_metadata.json"
    if not force and is_up_to_date(metadata_path, run_print, base_only):
        return "up to date"
    from comparison import judge_calibrators
    from signal_comparison import judge_signals

    classifier = classifier or open_classifier(model, adapter, task)
    results = {}
    for name in MODEL_FILES if adapter is not None else ["base"]:
        print(f"{name} model", file=sys.stderr)
        partial = PartialResults(cache_dir / f".{name}.partial", run_print)
        if force:
            partial.path.unlink(missing_ok=True)
        with classifier.without_adapter() if name == "base" else nullcontext():
            results[name] = model_results(name, classifier, task, held_out, evaluation, partial)
    judging = (evaluation.bins, evaluation.resamples, evaluation.evaluation_seed)
    calibrated = {
        name: {"identity": r.identity, **judge_calibrators(r, *judging)}
        | {"signals": judge_signals(r, *judging)}
        for name, r in results.items()
    }
    metadata_path.unlink(missing_ok=True)  # from here on the old evaluation is being replaced
    for name, file in MODEL_FILES.items():
        if name in results:
            write_json(cache_dir / file, results[name].to_json())
        else:
            (cache_dir / file).unlink(missing_ok=True)
    write_json(
        cache_dir / "calibrated_results.json",
        {"schema_version": SCHEMA_VERSION, "task": task.to_json(), "models": calibrated},
    )
    write_json(
        metadata_path,
        {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": run_print,
            "models": {
                name: {"file": MODEL_FILES[name], "identity": r.identity, "counts": r.counts()}
                for name, r in results.items()
            },
            "rows": {s: sum(e.split == s for e in held_out) for s in ("calibration", "test")},
            "data_fingerprint": data_print,
            "settings": {
                "model": model_to_json(model) | {"device": classifier.device},
                "data": asdict(data) | {"data": Path(data.data).name if data.data else None},
                "evaluation": asdict(evaluation),
            },
            "training": training,
            "versions": results["base"].run["versions"],
        },
    )
    for name in MODEL_FILES:
        (cache_dir / f".{name}.partial").unlink(missing_ok=True)
    return "evaluated"


def model_to_json(model):
    """The `ModelSettings` that the other backend does not have to itself, without an address."""
    left_out = {"base_url", *BACKENDS[OPENAI if model.backend == LOCAL else LOCAL]}
    return {name: value for name, value in asdict(model).items() if name not in left_out}


def check_backend(model, evaluation, base_only):
    """Raises UserError for what a model on a server cannot be asked."""
    if model.backend == LOCAL:
        return
    if not base_only:
        raise UserError(
            "--backend openai evaluates the one model that --model names; add --base-only (an "
            "adapter that the server has is a --model by its own name)"
        )
    if evaluation.temperature != 1.0:
        raise UserError(
            "a server gives log-probabilities at temperature 1; leave --temperature out"
        )


def check_adapter(adapter, task, model, base_print):
    """Raises UserError for an adapter of other base weights or of another task."""
    manifest = read_json(adapter / "manifest.json", RETRAIN)
    if manifest.get("base_fingerprint") != base_print:
        raise UserError(
            f"the adapter in {adapter}/ was trained on other weights than those of "
            f"{model.model}; run: python fine_tune_model.py --model {model.model}"
        )
    trained_for = read_json(adapter / "task.json", RETRAIN)
    trained_for |= {"wordings": (), "negated": ()}  # which training never saw
    if fingerprint(trained_for) != fingerprint(task.asked.to_json()):
        raise UserError(
            f"the adapter in {adapter}/ was trained for the question "
            f"{trained_for.get('question')!r} and its labels, not for {task.question!r}; "
            "run fine_tune_model.py with the same --question and --labels"
        )


def is_up_to_date(metadata_path, run_print, base_only):
    """True if the cache was made from the same things and all its files are there."""
    if not metadata_path.exists():
        return False
    metadata = read_json(metadata_path, NEXT_STEP)
    if changed := changed_packages(metadata.get("versions", {})):
        print(f"{metadata_path.parent} was made with other packages: {changed}", file=sys.stderr)
    if metadata.get("fingerprint") != run_print:
        return False
    files = ["calibrated_results.json", MODEL_FILES["base"]]
    files += [] if base_only else [MODEL_FILES["finetuned"]]
    return all((metadata_path.parent / file).exists() for file in files)


def check_evaluation(evaluation):
    """Raises UserError for a setting out of range."""
    chosen_signals(evaluation)
    for name in ("samples", "temperature", "dropout_passes", "bins", "resamples"):
        if not 0 < getattr(evaluation, name) < math.inf:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} must be above 0 and finite, got {getattr(evaluation, name)}")
    if evaluation.evaluation_seed < 0:
        raise UserError(f"--evaluation-seed must be at least 0, got {evaluation.evaluation_seed}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(
        parser, TaskSettings, ModelSettings, DataSettings, EvaluationSettings, OutputSettings
    )
    parser.add_argument("--base-only", action="store_true", help="leave the fine-tuned model out")
    parser.add_argument("--force", action="store_true", help="evaluate even if up to date")
    arguments = parser.parse_args(argv)
    output = from_arguments(OutputSettings, arguments)
    try:
        outcome = generate(
            from_arguments(TaskSettings, arguments).build(),
            from_arguments(ModelSettings, arguments),
            from_arguments(DataSettings, arguments),
            from_arguments(EvaluationSettings, arguments),
            output,
            arguments.base_only,
            arguments.force,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues with the missing rows", file=sys.stderr)
        return 1
    print(f"{output.cache}: {outcome}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
