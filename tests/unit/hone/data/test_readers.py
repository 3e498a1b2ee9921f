"""Raw rows of every kind of file, and what is said of files and rows that are broken."""

import bz2
import contextlib
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from hone.data import readers
from hone.data.files import find_files
from hone.data.parts import Part, cut, numbers_in
from hone.data.readers import read_raw
from hone.errors import DataError

ROWS = [{"text": "a, b\nc", "label": "x"}, {"text": "ä", "label": "y"}]


def raw(path: Path) -> list[tuple[int, Any]]:
    [file] = find_files(str(path))
    return [(number, row.message if isinstance(row, DataError) else row) for part in cut([file]) for number, row in read_raw(part)]


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path: Path) -> None:
    table = pa.table({key: [row[key] for row in ROWS] for key in ROWS[0]})
    match path.name.partition(".")[2]:
        case "jsonl":
            path.write_bytes(lines(ROWS))
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines(ROWS)))
        case "jsonl.bz2":
            path.write_bytes(bz2.compress(lines(ROWS)))
        case "jsonl.zst":
            path.write_bytes(pa.compress(lines(ROWS), "zstd", asbytes=True))
        case "json":
            path.write_text(json.dumps({"version": 1, "data": ROWS}))
        case "csv":
            path.write_text('text,label\r\n"a, b\nc",x\r\nä,y\r\n', newline="")
        case "tsv":
            path.write_text('text\tlabel\n"a, b\nc"\tx\nä\ty\n')
        case "parquet":
            pq.write_table(table, path)
        case "feather":
            pyarrow.feather.write_feather(table, path)
        case "arrow":
            with pa.ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.zst", "json", "csv", "tsv", "parquet", "feather", "arrow"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    write(path)
    assert [row for _, row in raw(path)] == ROWS


def test_plain_text_is_read_by_paragraphs_numbered_by_their_first_line(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "\none\r\ntwo\r\n\r\n\r\nthree")
    assert raw(path) == [(2, {"text": "one\ntwo"}), (6, {"text": "three"})]


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n')
    assert raw(path) == [(1, {"a": 1}), (3, {"a": 2})]


def test_line_separators_inside_texts_part_no_rows(tmp_path: Path) -> None:
    assert raw(written(tmp_path / "a.jsonl", '{"a": "x\u2028y\x85z"}\n')) == [(1, {"a": "x\u2028y\x85z"})]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"a": ', "not valid JSON"),
        (b"[1]", "a row is a JSON object; this is list"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands there twice"),
        (b'{"a": "caf\xe9"}', "byte 0xe9 at column 11 is not UTF-8"),
        (b'{"a": "\0"}', "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": "' + b"x" * 3000 + b'"}', "at most 0 MiB are read as one row"),
    ],
)
def test_a_broken_line_is_named_and_the_next_one_read(tmp_path: Path, line: bytes, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if b"xxx" in line:
        monkeypatch.setattr(readers, "LONGEST_ROW", 1000)
    found = raw(written(tmp_path / "a.jsonl", b'{"a": 0}\n' + line + b'\n{"a": 3}\n'))
    assert (found[0], found[2]) == ((1, {"a": 0}), (3, {"a": 3}))
    assert found[1][0] == 2
    assert said in found[1][1]


def test_a_last_line_without_its_end_may_have_been_cut_short(tmp_path: Path) -> None:
    assert "was it cut short?" in raw(written(tmp_path / "a.jsonl", b'{"a": 0}\n{"a'))[1][1]


@pytest.mark.parametrize(
    ("content", "number", "said"),
    [
        ("a,b\n1,2\n3\n4,5\n", 3, "1 fields, and the header has 2 columns"),
        ("a,b\n1,2\n3,4,5\n4,5\n", 3, "3 fields"),
        ('a,b\n1,2\n"3"x,4\n4,5\n', 3, "not valid CSV"),
    ],
)
def test_a_ragged_line_of_csv_is_named_and_the_next_one_read(tmp_path: Path, content: str, number: int, said: str) -> None:
    found = raw(written(tmp_path / "a.csv", content))
    assert found[0] == (2, {"a": "1", "b": "2"})
    assert found[1][0] == number
    assert said in found[1][1]
    assert found[2] == (4, {"a": "4", "b": "5"})


@pytest.mark.parametrize("content", ["a,a\n1,2\n", "a,,b\n1,2,3\n"])
def test_columns_without_names_of_their_own_are_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"a\.csv:1: the first line must name each column"):
        raw(written(tmp_path / "a.csv", content))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.feather", "a.json", "a.jsonl.zst"])
def test_a_torn_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=rf"{name}: .*was it cut short\?"):
        raw(path)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_crash_a_reader(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    for kind in ("jsonl", "json", "csv", "tsv", "txt", "parquet", "arrow", "jsonl.gz"):
        with contextlib.suppress(DataError):
            for number, row in raw(written(folder / f"a.{kind}", content or b"\n")):
                assert number >= 1
                assert isinstance(row, dict | str)


@given(st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")), max_size=20), st.integers(1, 40))
@settings(deadline=None)
def test_parts_of_a_file_hold_its_lines_once_with_their_numbers(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], part_bytes: int
) -> None:
    path = written(tmp_path_factory.mktemp("parts") / "a.jsonl", b"\n".join(contents) + b"\n{}")
    [file] = find_files(str(path))
    whole = [(number, repr(row)) for number, row in read_raw(cut([file])[0])]
    # A file system that is not the local one is read by other means, as an object store is.
    remote = replace(file, path=path.name, filesystem=SubTreeFileSystem(str(path.parent), LocalFileSystem()))
    for each in (file, remote):
        assert [(number, repr(row)) for number, row in numbered_on(cut([each], part_bytes=part_bytes))] == whole


def test_parquet_is_parted_by_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": range(10)}), path, row_group_size=4)
    parts = cut(find_files(str(path)), part_bytes=1)
    assert len(parts) == 3
    assert len(cut(find_files(str(path)), part_bytes=sum(part.size for part in parts[:2]))) == 2
    assert numbered_on(parts) == [(n + 1, {"n": n}) for n in range(10)]


def numbered_on(parts: list[Part]) -> list[tuple[int, Any]]:
    """Rows of all parts of one file, with their numbers in the file."""
    before, rows = 0, []
    for part in parts:
        rows += [(before + number, row) for number, row in read_raw(part)]
        before += numbers_in(part)
    return rows
