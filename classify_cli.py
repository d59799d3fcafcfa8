"""Classify one text, or every row of a file: label, confidence, calibrated confidence, zone.

    python classify_cli.py "Best worst thing ever"
    python classify_cli.py --file reviews.csv --text-column review --output scored.csv
    python classify_cli.py --file posts.jsonl.gz --output scored.jsonl --task toxicity
    python classify_cli.py --file reviews.parquet --output scored.parquet --model finetuned
    python classify_cli.py --server http://127.0.0.1:8000 --file reviews.csv --output scored.csv

A file may be CSV, TSV, JSONL or text with a text on every line, each also as .gz, or Parquet, and
larger than memory. The output has its format (that of a text file is CSV), its columns and these:

    predicted               the label
    confidence              its probability: what the model says, not how often it is right
    calibrated_confidence   how often such an answer is right; empty without a calibrator
    label_mass              how much of what the model could say is an answer at all
    zone, action            of the calibrated confidence: 90 % and above, automate
    truncated               true if the text was too long and lost its middle
    error                   why the row could not be scored; all of the above are empty then

The calibrator is the one that generate_evaluation_cache.py chose for exactly this model, adapter,
question and dtype; where there is none, the output says so and stays uncalibrated. The output
appears as a whole. Until then its rows are in a hidden file beside it, and after an interruption,
of whatever kind, the same command continues after the last finished chunk.
With --engine ray the workers of a Ray cluster score a file, each with a model of its own;
docs/SCALING.md.
With --server a running classify_api.py answers, with its models and their calibrators, and nothing
is loaded here; its key, if it has one, is taken from HOWSURE_API_KEY.
Exit codes: 0 done, 1 failed or no row could be scored, 2 bad usage.
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import os
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from logprobs_confidence import load_classifier, text_problem
from records import LOW_LABEL_MASS
from settings import (
    ModelSettings,
    UserError,
    add_arguments,
    add_classifier_arguments,
    fingerprint,
    from_arguments,
    read_task,
)
from table_files import (
    csv_records,
    file_format,
    json_records,
    open_parquet,
    parquet_batches,
    require_unique,
    text_lines,
)

COLUMNS = {  # of an answer, with their types in a Parquet file
    "predicted": "string",
    "confidence": "float64",
    "calibrated_confidence": "float64",
    "label_mass": "float64",
    "zone": "string",
    "action": "string",
    "truncated": "bool",
    "error": "string",
}
STANDARD_INPUT = "-"  # as a TEXT
TEXT_FORMATS = ("csv", "tsv", "jsonl", "json", "txt")
CHUNK_ROWS = 1000  # default of --chunk-rows
CHUNK_CHARACTERS = 4_000_000  # a chunk of long rows ends here
MERGED_BYTES = 64_000_000  # of a row group of a Parquet output
JOURNAL_VERSION = 1
NO_FILE = "give the path of an existing file with --file"


# ---------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Scorer:
    """What turns texts into answers.

    score(texts): a list with one dict of COLUMNS a text; what is no text has an `error`. depends:
    what the answers depend on, for a run that continues. calibrator: its name, fitted on so many
    `rows`; or None and `reason` says why there is none.
    """

    score: Callable
    depends: dict
    calibrator: str | None
    rows: int | None
    reason: str | None

    def score_table(self, table, skip):
        """Yields (rows, their answers) for the chunks of a `Table` behind its first `skip` rows."""
        for rows, texts in table.chunks(skip):
            yield rows, self.score(texts)


class RayScorer(Scorer):
    """The `Scorer` of a `ray_engine.Cluster`: it is given chunks of a table only."""

    def score_table(self, table, skip):
        # The texts are read once more in a process of Ray's; the rows themselves stay here.
        chunks = zip(table.chunks(skip), self.score(partial(texts_of, table, skip)), strict=True)
        for (rows, _), answers in chunks:
            yield rows, answers


def texts_of(table, skip):
    """Yields the texts of every chunk behind the first `skip` rows."""
    for _, texts in table.chunks(skip):
        yield texts


def local_scorer(classifier, calibrator, reason=None):
    """The `Scorer` of a classifier. calibrator: of exactly this classifier, or None."""
    from calibration import calibrated_probabilities

    names, identity = classifier.task.label_names, classifier.identity

    def score(texts):
        predictions = classifier.classify_batch(texts)
        answers = [
            failed_answer(text, p.error)
            if p.error is not None
            else answer_of(p.predicted, p.confidence, p.label_mass, p.truncated)
            for text, p in zip(texts, predictions, strict=True)
        ]
        scored = [i for i, answer in enumerate(answers) if answer["error"] is None]
        if calibrator is None or not scored:
            return answers
        rows = {"label_logprobs": np.array([predictions[i].label_logprobs for i in scored])}
        label = [names.index(answers[i]["predicted"]) for i in scored]
        chance = calibrated_probabilities(calibrator, rows)[np.arange(len(label)), label]
        for i, mine in zip(scored, chance, strict=True):
            answers[i] |= calibrated_answer(mine)
        return answers

    depends = {
        "model, adapter or question": identity["fingerprint"],
        "longest prompt": classifier.encoder.max_tokens,
        "longest text": None,
        "calibrator": calibrator and fingerprint(calibrator.to_json()),
    }
    name, rows = (None, None) if calibrator is None else (calibrator.name, calibrator.n_rows)
    return Scorer(score, depends, name, rows, reason)


def ray_scorer(cluster, load):
    """The `Scorer` of a `ray_engine.Cluster`. load: makes the `Scorer` of a worker there."""

    def description():
        scorer = load()
        return scorer.depends, scorer.calibrator, scorer.rows, scorer.reason

    depends, *calibrator = cluster.ask(description)
    return RayScorer(partial(cluster.score, load, depends), depends, *calibrator)


def server_scorer(model):
    """The `Scorer` of a `serving.client.RemoteModel`."""

    def answer_of_server(found):
        p, mass = found["raw_probability"], found["label_mass"]
        answer = answer_of(found["label"], p * mass, mass, found["truncated"])
        if found["calibrated_probability"] is not None:
            answer |= calibrated_answer(found["calibrated_probability"])
        return answer

    def score(texts):
        answers = [failed_answer(text, text_problem(text)) for text in texts]
        good = [i for i, answer in enumerate(answers) if answer["error"] is None]
        for i, found in zip(good, model.classify([texts[i] for i in good]), strict=True):
            failed = "error" in found
            answers[i] = (
                failed_answer(texts[i], found["error"]) if failed else answer_of_server(found)
            )
        return answers

    info, limits = model.info, model.limits
    depends = {
        "model, adapter or question": info["model_fingerprint"],
        "longest prompt": limits["prompt_tokens"],
        "longest text": limits["text_chars"],
        "calibrator": model.calibrator_fingerprint,
    }
    calibrator = info["calibrator"] or {"name": None, "rows": None}
    reason = info["calibrator_reason"]
    return Scorer(score, depends, calibrator["name"], calibrator["rows"], reason)


def answer_of(predicted, confidence, label_mass, truncated):
    """An answer that is not calibrated."""
    return dict.fromkeys(COLUMNS) | {
        "predicted": predicted,
        "confidence": rounded(confidence),
        "label_mass": rounded(label_mass),
        "truncated": truncated,
    }


def failed_answer(text, error):
    """The answer to a text that cannot be scored."""
    return dict.fromkeys(COLUMNS) | {"error": "there is no text" if text is None else error}


def calibrated_answer(chance):
    """The part of an answer that its calibrated confidence adds."""
    from decisions import ZONES, zone_of

    _, zone, action = ZONES[int(zone_of(np.array([chance]))[0])]
    return {"calibrated_confidence": rounded(chance), "zone": zone, "action": action}


def cell(value):
    """A value of an answer in a CSV file."""
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def rounded(value):
    """9 significant digits, as in evaluation_cache/."""
    return float(f"{value:.9g}")


# ------------------------------------------------------------------------------------------ files


class Table(ABC):
    """A file of rows with a text each, and the output that is made from it.

    Made by `open_table`, which reads the whole file once: columns, n_rows and the SHA-256 `digest`
    are known, and a malformed file is refused before anything is scored.
    names: the columns that the answers add; chunk_rows: most rows of a chunk; compressed: the
    output is packed by gzip.
    """

    def __init__(self, path, text_column, names, chunk_rows, compressed):
        self.path, self.text_column, self.names = path, text_column, names
        self.chunk_rows, self.compressed = chunk_rows, compressed
        self.state = file_state(path)
        self.columns, self.n_rows = self._survey()
        if not self.n_rows:
            raise UserError(f"{path} has no rows; it needs one for every text")
        if text_column not in self.columns:
            found = ", ".join(map(repr, self.columns))
            raise UserError(
                f"{path} has no column {text_column!r} but {found}; name yours with --text-column"
            )
        if clash := [name for name in names if name in self.columns]:
            raise UserError(
                f"{path} has a column {clash[0]!r} already; rename it, or put something before the "
                "names of the new columns, such as --prefix model_"
            )
        with path.open("rb") as file:
            self.digest = hashlib.file_digest(file, "sha256").hexdigest()

    def changed(self):
        """Whether the file was written to since it was opened."""
        return file_state(self.path) != self.state

    @abstractmethod
    def _survey(self):
        """(names of the columns, number of rows). Raises UserError for a malformed file."""

    @abstractmethod
    def chunks(self, skip):
        """Yields (rows, their texts) behind the first `skip` rows, which are whole chunks."""

    @abstractmethod
    def encode(self, rows, answers, first):
        """The bytes of a chunk; first: it is the first one of the output."""

    def finish(self, partial, ends, output):
        """Make `output` of the chunks in `partial`, which end at the offsets `ends`."""
        os.replace(partial, output)


def file_state(path):
    """(size, time of the last change) of a file; None for one that is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


class TextTable(Table):
    """A file of lines. `_rows` yields (what is kept of a row, its text, its characters)."""

    @abstractmethod
    def _rows(self):
        """Every row in turn."""

    def chunks(self, skip):
        rows, texts, size = [], [], 0
        for row, text, characters in islice(self._rows(), skip, None):
            rows.append(row)
            texts.append(text)
            size += characters
            if len(rows) == self.chunk_rows or size >= CHUNK_CHARACTERS:
                yield rows, texts
                rows, texts, size = [], [], 0
        if rows:
            yield rows, texts

    def encode(self, rows, answers, first):
        lines = [self._header()] if first else []
        lines += [self._line(row, answer) for row, answer in zip(rows, answers, strict=True)]
        raw = "".join(lines).encode("utf-8")
        return gzip.compress(raw, mtime=0) if self.compressed else raw

    def _header(self):
        return ""

    @abstractmethod
    def _line(self, row, answer):
        """One line of the output, with its end."""


class CsvTable(TextTable):
    """CSV and TSV: every cell stays the text that it is."""

    delimiter = ","

    def _survey(self):
        records = csv_records(self.path, self.delimiter, NO_FILE)
        _, columns = next(records, (1, []))
        return columns, sum(1 for _ in records)

    def _rows(self):
        place = self.columns.index(self.text_column)
        for _, cells in islice(csv_records(self.path, self.delimiter, NO_FILE), 1, None):
            yield cells, cells[place], sum(map(len, cells))

    def _header(self):
        return self._csv([*self.columns, *self.names])

    def _line(self, row, answer):
        return self._csv([*row, *map(cell, answer.values())])

    def _csv(self, cells):
        # A carriage return in a cell must be quoted, which the writer does not do by itself.
        quoting = csv.QUOTE_ALL if any("\r" in c for c in cells) else csv.QUOTE_MINIMAL
        line = io.StringIO()
        writer = csv.writer(line, delimiter=self.delimiter, lineterminator="\n", quoting=quoting)
        writer.writerow(cells)
        return line.getvalue()


class TsvTable(CsvTable):
    delimiter = "\t"


class LinesTable(CsvTable):
    """A text on every line; a blank line is a row without text. The output is CSV."""

    def _survey(self):
        return [self.text_column], sum(1 for _ in text_lines(self.path, NO_FILE))

    def _rows(self):
        return (([line], line, len(line)) for line in text_lines(self.path, NO_FILE))


class JsonTable(TextTable):
    """A JSON object on every line. The answer is put in behind its last value, so that everything
    else stays as it was written."""

    def _survey(self):
        columns, n_rows = {}, 0
        for _, _, row in json_records(self.path, NO_FILE):
            columns |= dict.fromkeys(row)
            n_rows += 1
        return list(columns), n_rows

    def _rows(self):
        for _, line, row in json_records(self.path, NO_FILE):
            yield line, row.get(self.text_column), len(line)

    def _line(self, row, answer):
        own = row.strip()[:-1].rstrip()
        added = json.dumps(dict(zip(self.names, answer.values(), strict=True)), ensure_ascii=False)
        return f"{own}{'' if own == '{' else ', '}{added[1:]}\n"


class ParquetTable(Table):
    """Columns keep their types. A chunk is kept as an Arrow stream until the file is whole."""

    def _survey(self):
        import pyarrow

        with open_parquet(self.path, NO_FILE) as file:
            schema, n_rows = file.schema_arrow, file.metadata.num_rows
        require_unique(self.path, schema.names)
        self.schema = schema
        for name, kind in zip(self.names, COLUMNS.values(), strict=True):
            self.schema = self.schema.append(pyarrow.field(name, pyarrow.type_for_alias(kind)))
        return schema.names, n_rows

    def chunks(self, skip):
        for batch in parquet_batches(self.path, NO_FILE, None, self.chunk_rows):
            texts = batch.column(self.text_column).to_pylist()
            start = size = 0
            for end, text in enumerate(texts, 1):
                size += len(text) if isinstance(text, str) else 0
                if size >= CHUNK_CHARACTERS or end == len(texts):
                    if skip == 0:
                        yield batch.slice(start, end - start), texts[start:end]
                    else:
                        skip -= end - start
                    start, size = end, 0

    def encode(self, rows, answers, first):
        import pyarrow

        added = [
            pyarrow.array([answer[name] for answer in answers], pyarrow.type_for_alias(kind))
            for name, kind in COLUMNS.items()
        ]
        batch = pyarrow.RecordBatch.from_arrays([*rows.columns, *added], schema=self.schema)
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, self.schema) as stream:
            stream.write_batch(batch)
        return sink.getvalue().to_pybytes()

    def finish(self, partial, ends, output):
        import pyarrow
        from pyarrow import parquet

        merged = partial.with_suffix(".merged")
        with partial.open("rb") as file, parquet.ParquetWriter(merged, self.schema) as writer:
            waiting, start = [], 0
            for end in ends:
                with pyarrow.ipc.open_stream(file.read(end - start)) as stream:
                    waiting.append(stream.read_all())
                start = end
                if sum(table.nbytes for table in waiting) >= MERGED_BYTES or end == ends[-1]:
                    writer.write_table(pyarrow.concat_tables(waiting))
                    waiting = []
        os.replace(merged, output)
        partial.unlink()


TABLES = {
    "csv": CsvTable,
    "tsv": TsvTable,
    "txt": LinesTable,
    "jsonl": JsonTable,
    "json": JsonTable,
    "parquet": ParquetTable,
}


def open_table(path, output, text_column, names, chunk_rows):
    """The `Table` of a file. Raises UserError for a file that it cannot read, or not write as
    `output`."""
    kind, made = (file_format(name, TEXT_FORMATS) for name in (path, output))
    if TABLES[made] is not (CsvTable if kind == "txt" else TABLES[kind]):
        wanted = "csv" if kind == "txt" else kind
        raise UserError(f"the output of {path} is a .{wanted} file, not {output}; rename --output")
    compressed = output.suffix.lower() == ".gz"
    return TABLES[kind](path, text_column, names, chunk_rows, compressed)


# --------------------------------------------------------------------------------------- resuming


@dataclass
class Counts:
    """What became of the rows so far."""

    scored: int = 0
    failed: int = 0
    truncated: int = 0
    low_label_mass: int = 0
    predicted: Counter = field(default_factory=Counter)
    actions: Counter = field(default_factory=Counter)
    first_error: str | None = None

    @classmethod
    def from_json(cls, data):
        counters = {name: Counter(data[name]) for name in ("predicted", "actions")}
        return cls(**{**data, **counters})

    def add(self, answers):
        for answer in answers:
            if answer["error"] is not None:
                self.first_error = (
                    self.first_error or f"row {self.scored + self.failed + 1}: {answer['error']}"
                )
                self.failed += 1
                continue
            self.scored += 1
            self.truncated += answer["truncated"]
            self.low_label_mass += answer["label_mass"] < LOW_LABEL_MASS
            self.predicted[answer["predicted"]] += 1
            if answer["action"] is not None:
                self.actions[answer["action"]] += 1


class Unfinished:
    """An output that is being made, on disk, so that a killed run can go on.

    `.NAME.partial` holds whole chunks, `.NAME.journal` what they belong to and, a line for every
    chunk, where it ends: {"rows", "bytes", "counts"}, all from the beginning. A chunk counts once
    its line is there; what stands behind it in the partial file is cut off. A lock keeps a second
    run away while one is alive.
    """

    def __init__(self, output):
        self.output = output
        self.partial, self.journal, self.lock = (
            output.with_name(f".{output.name}.{kind}") for kind in ("partial", "journal", "lock")
        )
        self.rows, self.ends, self.counts = 0, [], Counts()

    @contextmanager
    def alone(self):
        """The block in which this process, and no other, makes the output. Raises UserError."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.lock, timeout=0)
        with self.writing():
            self.output.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                raise UserError(
                    f"another run is making {self.output}; wait until it is done"
                ) from None
        try:
            yield
        finally:
            try:
                if not self.partial.exists():
                    self.lock.unlink(missing_ok=True)
            finally:
                lock.release()

    @contextmanager
    def writing(self):
        """An error of writing in the block becomes a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self.output}: {error.strerror or error}; mend that and run the "
                "same command again, it continues with what is there"
            ) from error

    def require_free(self):
        """Raises UserError if the output is there and no interrupted run has made it."""
        if self.output.exists() and not self.journal.exists():
            raise UserError(f"{self.output} exists; remove it or choose another --output")

    def resume(self, settings, n_rows):
        """Go to the end of the last finished chunk of these settings; True if all are finished and
        in place. Where input or settings are others than before, it says so and starts again."""
        lines = self._journal_lines()
        before, *chunks = (json.loads(line) for line in lines or [b"null"])
        if self.output.exists():
            if before == settings and chunks and chunks[-1]["rows"] == n_rows:
                self._go_to(chunks)
                return True
            raise UserError(f"{self.output} exists; remove it or choose another --output")
        if before is not None and before != settings:
            changed = [key for key in settings if before.get(key) != settings[key]]
            message = f"changed since the interrupted run: {', '.join(changed)}; starting again"
            print(f"{self.output}: {message}", file=sys.stderr)
            chunks = []
        size = self.partial.stat().st_size if self.partial.exists() else 0
        self._go_to([chunk for chunk in chunks if chunk["bytes"] <= size])
        with self.partial.open("ab") as file:
            file.truncate(self.ends[-1] if self.ends else 0)
        if self.ends:
            kept = lines[: 1 + len(self.ends)]
            os.truncate(self.journal, sum(len(line) + 1 for line in kept))
            print(f"continuing after row {self.rows:,} of {n_rows:,}", file=sys.stderr)
        else:
            self.journal.write_text(f"{json.dumps(settings)}\n", encoding="utf-8")
        return False

    def _journal_lines(self):
        """The lines of the journal, up to one that is damaged or was cut off."""
        lines = []
        if self.journal.exists():
            for line in self.journal.read_bytes().split(b"\n")[:-1]:
                try:
                    json.loads(line)
                except ValueError:
                    break
                lines.append(line)
        return lines

    def _go_to(self, chunks):
        self.ends = [chunk["bytes"] for chunk in chunks]
        if chunks:
            self.rows, self.counts = chunks[-1]["rows"], Counts.from_json(chunks[-1]["counts"])

    def add(self, raw, answers):
        """Append a chunk: first its bytes, then its line in the journal."""
        self.counts.add(answers)
        self.rows += len(answers)
        self.ends.append((self.ends[-1] if self.ends else 0) + len(raw))
        line = {"rows": self.rows, "bytes": self.ends[-1], "counts": vars(self.counts)}
        for path, data in ((self.partial, raw), (self.journal, f"{json.dumps(line)}\n".encode())):
            with path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

    def finish(self, table):
        """The output takes its place, and what was needed for it goes."""
        if not self.output.exists():
            table.finish(self.partial, self.ends, self.output)
        for path in (self.partial, self.journal):
            path.unlink(missing_ok=True)


def classify_file(table, scorer, settings, unfinished):
    """Score every row that is missing. Raises UserError; what is done is kept then."""
    from tqdm import tqdm

    with unfinished.writing():
        finished = unfinished.resume(settings, table.n_rows)
    if not finished:
        done = unfinished.rows
        with tqdm(total=table.n_rows, initial=done, unit="row", file=sys.stderr) as bar:
            for rows, answers in scorer.score_table(table, done):
                raw = table.encode(rows, answers, first=unfinished.rows == 0)
                with unfinished.writing():
                    unfinished.add(raw, answers)
                bar.update(len(answers))
        if table.changed():
            raise UserError(f"{table.path} changed while it was read; run the same command again")
    with unfinished.writing():
        unfinished.finish(table)


# ------------------------------------------------------------------------------------ the command


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Exit codes: 0 done, 1 failed or no row could be scored, 2 bad usage.",
    )
    parser.add_argument(
        "text",
        nargs="?",
        metavar="TEXT",
        help="one text to classify; - reads it, as a whole, from the standard input",
    )
    parser.add_argument(
        "--file", type=Path, help=".csv, .tsv, .jsonl, .txt, each also as .gz, or .parquet"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="file of the answers")
    parser.add_argument("--text-column", help="column of the text (default: text)")
    parser.add_argument(
        "--prefix",
        metavar="NAME",
        help="put before the names of the new columns (default: nothing)",
    )
    parser.add_argument(
        "--chunk-rows",
        type=int,
        metavar="N",
        help="rows that are scored and then saved together; fewer for a slow model "
        f"(default: {CHUNK_ROWS})",
    )
    parser.add_argument(
        "--server",
        metavar="URL",
        help="ask the classify_api.py that runs there and load nothing here; --model is then base, "
        "finetuned or the name of an adapter of that server",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: score a --file on a Ray cluster, with a model in every worker (default: local)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="workers of --engine ray (default: one for every GPU of the cluster; without GPUs one "
        "for every machine, with all its cores)",
    )
    parser.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="running cluster of --engine ray that this machine is part of, such as auto (default: "
        "one is started on this machine, for this run)",
    )
    add_classifier_arguments(parser)
    add_arguments(parser, ModelSettings, leave_out=("model",))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    if (arguments.text is None) == (arguments.file is None):
        parser.error("give a TEXT, or --file and --output")
    if arguments.file is None:
        for name in ("output", "text_column", "prefix", "chunk_rows"):
            if getattr(arguments, name) is not None:
                parser.error(f"--{name.replace('_', '-')} is for a --file, and there is none")
    elif arguments.chunk_rows is not None and arguments.chunk_rows < 1:
        parser.error(f"--chunk-rows must be at least 1, got {arguments.chunk_rows}")
    elif arguments.output is None:
        parser.error("--file needs --output, the file of the answers")
    elif arguments.file.resolve() == arguments.output.resolve():
        parser.error("--output must be another file than --file")
    if arguments.engine != "ray":
        for name in ("workers", "ray_address"):
            if getattr(arguments, name) is not None:
                parser.error(f"--{name.replace('_', '-')} is for --engine ray")
    elif arguments.file is None:
        parser.error("--engine ray is for a --file, and there is none")
    elif arguments.workers is not None and arguments.workers < 1:
        parser.error(f"--workers must be at least 1, got {arguments.workers}")
    if arguments.server is not None:
        own = ("engine", "adapter", "task", "cache_dir", *(f.name for f in fields(ModelSettings)))
        for name in own:
            if name != "model" and getattr(arguments, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} is for a model here, not for a --server")
    return arguments


def load_scorer(arguments):
    """The `Scorer` that was asked for; stderr says so if it has no calibrator. UserError."""
    if arguments.server is not None:
        from serving.client import RemoteModel
        from serving.settings import api_key

        model = RemoteModel(arguments.server, arguments.model or "base", api_key())
        scorer = server_scorer(model)
    elif arguments.engine == "ray":
        from ray_engine import Cluster

        uses_gpu = arguments.device in ("auto", "cuda")
        cluster = Cluster(arguments.ray_address, arguments.workers, uses_gpu)
        scorer = ray_scorer(cluster, partial(load_worker_scorer, arguments, os.getcwd()))
    else:
        scorer = load_local_scorer(arguments)
    if scorer.reason is not None:
        print(f"no calibrated confidence: {scorer.reason}", file=sys.stderr)
    return scorer


def load_worker_scorer(arguments, folder):
    """The `Scorer` of a worker, for which relative paths begin in `folder` as they do here."""
    os.chdir(folder)
    return load_local_scorer(arguments)


def load_local_scorer(arguments):
    """The `Scorer` of the model that is loaded here. Raises UserError."""
    from calibration import NoCalibrator, cached_calibrator

    task = None if arguments.task is None else read_task(arguments.task)
    model = arguments.model or ("finetuned" if arguments.adapter else "base")
    settings = replace(from_arguments(ModelSettings, arguments), model=model)
    sampling = True  # of a server without log-probabilities answers are drawn
    classifier = load_classifier(settings, arguments.adapter, task, sampling)
    try:
        calibrator, _ = cached_calibrator(arguments.cache_dir, classifier.identity)
    except NoCalibrator as missing:
        return local_scorer(classifier, None, str(missing))
    return local_scorer(classifier, calibrator)


def answer_lines(answer, scorer):
    """One answer for people."""
    lines = [
        answer["predicted"],
        f"  confidence             {answer['confidence']:.4f}  what the model says",
    ]
    if scorer.calibrator is not None:
        lines += [
            f"  calibrated confidence  {answer['calibrated_confidence']:.4f}  how often that is "
            f"right ({scorer.calibrator}, {scorer.rows:,} texts)",
            f"  zone                   {answer['zone']}: {answer['action']}",
        ]
    lines.append(f"  label mass             {answer['label_mass']:.4f}")
    if answer["label_mass"] < LOW_LABEL_MASS:
        lines.append("  The label mass is low: the model mostly says something that is no answer.")
    if answer["truncated"]:
        lines.append("  The text was too long and lost its middle.")
    return lines


def summary(output, counts, scorer):
    """What became of a file, ready for JSON."""
    return {
        "output": str(output),
        "rows": counts.scored + counts.failed,
        **vars(counts),
        "calibrator": scorer.calibrator,
        "no_calibrator_because": scorer.reason,
    }


def summary_lines(output, counts):
    """The same for people."""
    lines = [f"{output}: {counts.scored + counts.failed:,} rows, {counts.scored:,} scored"]
    for title, counter in (("predicted", counts.predicted), ("action", counts.actions)):
        if counter:
            parts = (f"{name} {n:,}" for name, n in sorted(counter.items()))
            lines.append(f"  {title}: {', '.join(parts)}")
    if counts.failed:
        lines.append(
            f"  not scored, see their error: {counts.failed:,}; first {counts.first_error}"
        )
    if counts.truncated:
        lines.append(f"  too long, scored without their middle: {counts.truncated:,}")
    if counts.low_label_mass:
        lines.append(
            f"  label mass below {LOW_LABEL_MASS}, so hardly an answer: {counts.low_label_mass:,}"
        )
    return lines


def given_text(arguments):
    """The text of the command line, or of the standard input. Raises UserError."""
    if arguments.text != STANDARD_INPUT:
        return arguments.text
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the standard input is not UTF-8 ({error}); convert it first") from error


def run_text(arguments):
    """Classify one text. Raises UserError."""
    text = given_text(arguments)
    scorer = load_scorer(arguments)
    (answer,) = scorer.score([text])
    if answer["error"] is not None:
        raise UserError(answer["error"])
    if arguments.json:
        print(json.dumps(answer | {"no_calibrator_because": scorer.reason}))
    else:
        print("\n".join(answer_lines(answer, scorer)))


def run_file(arguments):
    """Classify a file; whether a row could be scored. Raises UserError."""
    unfinished = Unfinished(arguments.output)
    prefix = arguments.prefix or ""
    names = [prefix + name for name in COLUMNS]
    with unfinished.alone():
        unfinished.require_free()
        table = open_table(
            arguments.file,
            arguments.output,
            arguments.text_column or "text",
            names,
            arguments.chunk_rows or CHUNK_ROWS,
        )
        scorer = load_scorer(arguments)
        settings = {
            "version": JOURNAL_VERSION,
            "input file": table.digest,
            "text column": table.text_column,
            "prefix": prefix,
            "rows of a chunk": table.chunk_rows,
            **scorer.depends,
        }
        classify_file(table, scorer, settings, unfinished)
    counts = unfinished.counts
    if arguments.json:
        print(json.dumps(summary(arguments.output, counts, scorer)))
    else:
        print("\n".join(summary_lines(arguments.output, counts)))
    if not counts.scored:
        raise UserError(f"no row of {arguments.file} could be scored; {counts.first_error}")


def main(argv=None):
    arguments = parse_arguments(argv)
    try:
        if arguments.file is None:
            run_text(arguments)
        else:
            run_file(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
