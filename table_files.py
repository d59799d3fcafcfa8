"""Rows of CSV, TSV, JSONL, text and Parquet files, one after the other, whatever their size.

    for line, cells in csv_records(path, ",", "give an existing file with --data"): ...

No more than a row is held in memory, of a Parquet file a batch. Text files are UTF-8, a byte order
mark is left out, and those whose name ends in .gz are unpacked on the way. Whatever is wrong with a
file is a UserError that names the file, the line and the next step; `restore` is that step for a
file that is not there.
Layer 1: standard library; pyarrow only when a Parquet file is read.
"""

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from settings import UserError

LONGEST_LINE = 1 << 24  # bytes; a longer one is no row of a table, and memory stays small


def file_format(path: Path, text_formats: Iterable[str]) -> str:
    """The extension of a file, .gz left aside: one of `text_formats` or parquet. UserError."""
    name = path.name.lower()
    extension = name.removesuffix(".gz").rpartition(".")[2]
    if extension in text_formats or name.endswith(".parquet"):
        return extension
    known = ", ".join(f".{extension}" for extension in text_formats)
    raise UserError(
        f"{path} has no extension that is read here; use {known}, each also with .gz, or .parquet"
    )


@contextmanager
def _open_bytes(path: Path, restore: str) -> Iterator[io.BufferedIOBase]:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {restore}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}); pack it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {restore}") from None


def decoded_lines(file: io.BufferedIOBase, name: Path | str) -> Iterator[str]:
    """The lines of an open file with their ends; `name` is what messages call the file."""
    number = 0
    while raw := file.readline(LONGEST_LINE):
        number += 1
        if len(raw) == LONGEST_LINE:
            raise UserError(
                f"{name} line {number} is longer than {LONGEST_LINE:,} bytes; put every row on a "
                "line of its own"
            )
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name} line {number} is not UTF-8 (byte 0x{raw[error.start]:02x}); save the file "
                "with the encoding UTF-8"
            ) from None


def text_lines(path: Path, restore: str) -> Iterator[str]:
    """The lines of a text file without their ends."""
    with _open_bytes(path, restore) as file:
        for line in decoded_lines(file, path):
            yield line.rstrip("\r\n")


def csv_records(path: Path, delimiter: str, restore: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of every record, the header first; blank lines are none."""
    csv.field_size_limit(LONGEST_LINE)
    columns: list[str] = []
    line = 1
    with _open_bytes(path, restore) as file:
        pieces = (
            piece
            for decoded in decoded_lines(file, path)
            for piece in io.StringIO(decoded, newline="")  # a carriage return alone ends a line too
        )
        reader = csv.reader(pieces, delimiter=delimiter, strict=True)
        try:
            for cells in reader:
                if cells and not columns:
                    columns = cells
                    require_unique(path, columns)
                elif cells and len(cells) != len(columns):
                    raise UserError(
                        f"{path} line {line} has {len(cells)} fields, the header {len(columns)}; "
                        'put "..." around a text that holds a separator or a line break'
                    )
                if cells:
                    yield line, cells
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{path} line {line} is malformed ({error}); close every quote, and double a quote "
                'inside a quoted text: ""'
            ) from None


def require_unique(path: Path, columns: list[str]) -> None:
    if twice := [name for name, n in Counter(columns).items() if n > 1]:
        raise UserError(f"{path} has the column {twice[0]!r} twice; rename one of them")


def json_records(path: Path, restore: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(line, the line itself, its object) of every line of a JSONL file that is not blank."""
    with _open_bytes(path, restore) as file:
        for number, line in enumerate(decoded_lines(file, path), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                problem = None if isinstance(row, dict) else f"a {type(row).__name__}"
            except (ValueError, RecursionError) as error:
                problem = str(error)
            if problem:
                raise UserError(
                    f"{path} line {number} is not a JSON object ({problem}); write one object a "
                    "line, for a JSON array: jq -c '.[]'"
                )
            yield number, line, row


@contextmanager
def open_parquet(path: Path, restore: str) -> Iterator[Any]:
    """The pyarrow `ParquetFile`; an error of reading it, in the block too, is a UserError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path} needs pyarrow; run: python -m pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {restore}") from None
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not a sound Parquet file ({error}); write it again") from None


def parquet_batches(path: Path, restore: str, columns: list[str] | None, rows: int) -> Iterator:
    """Record batches of at most so many rows, of some columns or of all."""
    with open_parquet(path, restore) as file:
        for batch in file.iter_batches(batch_size=rows, columns=columns):
            batch.validate(full=True)
            yield batch
