"""Rows one after the other: what counts as a line, and what a file too odd to read is told."""

import io
import tracemalloc

import pytest

import table_files
from settings import UserError
from table_files import csv_records, decoded_lines, file_format, json_records, text_lines

RESTORE = "look again"


def test_the_extension_names_the_format(tmp_path):
    formats = ("csv", "jsonl")
    for name, kind in (("a.csv", "csv"), ("a.CSV.gz", "csv"), ("a.b.parquet", "parquet")):
        assert file_format(tmp_path / name, formats) == kind
    for name in ("a.txt", "csv", "a.parquet.gz", "a.gz", "a"):
        with pytest.raises(UserError, match=r"use \.csv, \.jsonl, each also with \.gz, or"):
            file_format(tmp_path / name, formats)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_csv_lines_may_end_in_every_way_and_cells_may_hold_them(tmp_path, end):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext,n" + end + b'"a' + end + b'b",1' + end + end + b"c,2")
    records = list(csv_records(path, ",", RESTORE))
    inside = end.decode()
    assert [cells for _, cells in records] == [["text", "n"], [f"a{inside}b", "1"], ["c", "2"]]
    assert [line for line, _ in records] == [1, 2, 5]


def test_a_separator_of_lines_that_is_none_stays_in_the_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\u2028still one\x0b\x85\ntwo\r\n", encoding="utf-8")
    assert list(text_lines(tmp_path / "a.txt", RESTORE)) == ["one\u2028still one\x0b\x85", "two"]


def test_a_stream_is_read_like_a_file():
    assert list(decoded_lines(io.BytesIO(b"\xef\xbb\xbfa\nb"), "standard input")) == ["a\n", "b"]
    with pytest.raises(UserError, match=r"standard input line 2 is not UTF-8 \(byte 0xff\)"):
        list(decoded_lines(io.BytesIO(b"a\n\xff\n"), "standard input"))


def test_an_endless_line_or_quote_ends_in_an_error_and_not_in_full_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "LONGEST_LINE", 1 << 16)
    path = tmp_path / "a.csv"
    path.write_bytes(b'text\n"' + b"x" * 60_000 + b"\n" + b"y,z\n" * 1_000_000)
    (tmp_path / "a.jsonl").write_bytes(b"[" + b"1," * 2_000_000)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a\.csv line 2 is malformed \(field larger than field"):
        list(csv_records(path, ",", RESTORE))
    with pytest.raises(UserError, match=r"line 1 is longer than 65,536 bytes; put every row on a"):
        list(json_records(tmp_path / "a.jsonl", RESTORE))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2_000_000


def test_the_first_rows_come_before_the_file_is_read_to_its_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' * 3 + b"no JSON\n")
    rows = json_records(path, RESTORE)
    assert [next(rows)[2] for _ in range(3)] == [{"a": 1}] * 3
    with pytest.raises(UserError, match=r"line 4 is not a JSON object"):
        next(rows)
