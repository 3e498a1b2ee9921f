"""One file as its raw rows, a few at a time, whatever its size. A row that cannot be read is a DataError in its place."""

import bz2
import csv
import gzip
import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from hone.data.files import DataFile
from hone.data.parts import Part
from hone.errors import DataError

LONGEST_ROW = 32 * 2**20
"""Bytes of one line. What is longer is a file without line ends rather than a row, and would be held in memory whole."""
LARGEST_JSON = 2**30
"""Bytes of a .json file, which has to be held in memory whole."""
BATCH_ROWS = 1024
DEEPEST_JSON = "is nested too deeply"

Raw = dict[str, Any] | DataError
Numbered = tuple[int, Raw]
"""A line or row number, from 1, and what stands there."""


def read_raw(part: Part) -> Iterator[Numbered]:
    """The rows of a file or of a part of one, in order, numbered from the part's beginning.

    Raises:
        DataError: the file as a whole cannot be read (a torn Parquet footer, say); the message names it.
    """
    file = part.file
    try:
        yield from READERS[file.kind](part)
    except DataError:
        raise
    except (OSError, EOFError, ValueError) as error:
        what = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"{file.name}: cannot be read as {file.kind} ({what}); was it cut short?") from None


def sha256_of(file: DataFile) -> str:
    """Hex SHA-256 of its bytes, as stored.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open_file(replace(file, compression=None)) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read ({error})") from None


@contextmanager
def open_file(file: DataFile) -> Iterator[io.BufferedIOBase]:
    """Its bytes, decompressed."""
    from pyarrow.fs import LocalFileSystem

    local = isinstance(file.filesystem, LocalFileSystem)
    stream: Any
    if local and file.compression in (None, "gzip", "bz2"):
        opener: Any = {None: open, "gzip": gzip.open, "bz2": bz2.open}[file.compression]
        stream = opener(file.path, "rb")
    else:  # what is not compressed can be sought in, as parts of a file need
        remote = file.filesystem
        opened: Any = (
            remote.open_input_stream(file.path, compression=file.compression) if file.compression else remote.open_input_file(file.path)
        )
        stream = io.BufferedReader(opened, 2**20)
    with stream:
        yield stream


def parse_json(text: str) -> Any:
    """One JSON value, in which no key stands twice.

    Raises:
        DataError: what is wrong with it, and where.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise DataError(DEEPEST_JSON) from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"not valid JSON ({error})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DataError(f"the key {twice[:80]!r} stands there twice")
    return made


def _jsonl(part: Part) -> Iterator[Numbered]:
    with open_file(part.file) as stream:
        for number, line in _lines(stream, part.start, part.end):
            if isinstance(line, DataError):
                yield number, line
            elif line.strip():
                yield number, _json_row(line)


def _json_row(line: bytes) -> Raw:
    try:
        return _mapping(parse_json(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return DataError(f"byte {line[error.start]:#04x} at column {error.start + 1} is not UTF-8; save the file as UTF-8")
    except DataError as error:
        cut = "" if line.endswith(b"\n") else " and the file ends inside it; was it cut short?"
        return DataError(error.message + (cut if "not valid JSON" in error.message else ""))


def _mapping(value: Any) -> Raw:
    return value if isinstance(value, dict) else DataError(f"a row is a JSON object; this is {type(value).__name__}")


def _lines(stream: io.BufferedIOBase, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes | DataError]]:
    """The lines that begin within these bytes, numbered; one that is too long is skipped over without being held."""
    at = start
    if start:  # what the part before has begun, it also ends
        stream.seek(start - 1)
        at = start - 1 + _rest_of_line(stream)
    number = 0
    while (end is None or at < end) and (line := stream.readline(LONGEST_ROW + 1)):
        number += 1
        size = len(line)
        if size > LONGEST_ROW and not line.endswith(b"\n"):
            size += _rest_of_line(stream)
        at += size
        if size > LONGEST_ROW:
            yield number, DataError(f"the line has {size / 2**20:.0f} MiB; at most {LONGEST_ROW / 2**20:.0f} MiB are read as one row")
        else:
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 and not start else line


def _rest_of_line(stream: io.BufferedIOBase) -> int:
    """Skip to where the next line begins; the bytes skipped."""
    size = 0
    while line := stream.readline(LONGEST_ROW):
        size += len(line)
        if line.endswith(b"\n"):
            break
    return size


def _json(part: Part) -> Iterator[Numbered]:
    """A list of objects, or one object with such a list in it (`{"data": [...]}`). Rows are counted, not lines."""
    file = part.file
    if file.size > LARGEST_JSON:
        raise DataError(f"{file.name}: has {file.size / 2**30:.1f} GiB and would have to be held in memory whole; save it as .jsonl")
    with open_file(file) as stream:
        content = stream.read().removeprefix(b"\xef\xbb\xbf")
    try:
        value = parse_json(content.decode("utf-8"))
    except (UnicodeDecodeError, DataError) as error:
        what = error.message if isinstance(error, DataError) else "not UTF-8"
        raise DataError(f"{file.name}: {what}; was it cut short? Lines of one object each are called .jsonl") from None
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        value = lists[0] if len(lists) == 1 and len(value) <= 3 else [value]
    if not isinstance(value, list):
        raise DataError(f"{file.name}: holds {type(value).__name__}, not a list of objects")
    yield from ((number, _mapping(row)) for number, row in enumerate(value, start=1))


def _csv(part: Part) -> Iterator[Numbered]:
    file = part.file
    with open_file(file) as stream:
        # Bytes that are not UTF-8 become surrogates, which the check of the row's texts then finds: the row is named, and the next is read.
        text: Any = io.TextIOWrapper(cast("io.BufferedReader", stream), encoding="utf-8-sig", errors="surrogateescape", newline="")
        csv.field_size_limit(LONGEST_ROW)
        reader = csv.reader(text, delimiter="\t" if file.kind == "tsv" else ",", strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise DataError(f"{file.name}:1: not valid CSV ({error})") from None
        if len(set(header)) < len(header) or not all(name.strip() for name in header):
            raise DataError(f"{file.name}:1: the first line must name each column, and each name once; it is {', '.join(header)[:200]!r}")
        while True:
            number = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, DataError(f"not valid CSV ({error})")
                continue
            if not fields:
                continue
            if len(fields) == len(header):
                yield number, dict(zip(header, fields, strict=True))
            else:
                yield number, DataError(f"{len(fields)} fields, and the header has {len(header)} columns")


def _parquet(part: Part) -> Iterator[Numbered]:
    from pyarrow.parquet import ParquetFile

    with part.file.filesystem.open_input_file(part.file.path) as opened, ParquetFile(opened) as table:
        groups = None if part.end is None else range(part.start, part.end)
        yield from _numbered(table.iter_batches(BATCH_ROWS, row_groups=groups))


def _arrow(part: Part) -> Iterator[Numbered]:
    """Arrow's file format (feather too), or its stream format, which `datasets` writes."""
    file = part.file
    import pyarrow as pa

    with file.filesystem.open_input_file(file.path) as opened:
        is_file = opened.read(6) == b"ARROW1"
        opened.seek(0)
        if not is_file:
            yield from _numbered(pa.ipc.open_stream(opened))
            return
        reader = pa.ipc.open_file(opened)
        yield from _numbered(reader.get_batch(n) for n in range(reader.num_record_batches))


def _numbered(batches: Any) -> Iterator[Numbered]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for row in batch.slice(start, BATCH_ROWS).to_pylist():
                number += 1
                yield number, row


def _text(part: Part) -> Iterator[Numbered]:
    """Paragraphs, which blank lines part; numbered by their first line."""
    file = part.file
    with open_file(file) as stream:
        first, paragraph = 0, b""
        for number, line in _lines(stream):
            if isinstance(line, DataError):
                yield number, line
                continue
            if line.strip():
                first = first if paragraph else number
                paragraph += line
                if len(paragraph) <= LONGEST_ROW:
                    continue
            if paragraph:
                yield first, _paragraph(paragraph)
            paragraph = b""
        if paragraph:
            yield first, _paragraph(paragraph)


def _paragraph(paragraph: bytes) -> Raw:
    try:
        return {"text": paragraph.decode("utf-8").replace("\r\n", "\n").strip("\n")}
    except UnicodeDecodeError as error:
        return DataError(f"byte {paragraph[error.start]:#04x} is not UTF-8; save the file as UTF-8")


def _media(part: Part) -> Iterator[Numbered]:
    """A picture or sound is a row by itself, of the class that its folder names."""
    file = part.file
    path = file.path if Path(file.path).is_absolute() else file.name
    yield 1, {file.kind: path, "label": file.class_folder}


READERS = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "tsv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
    "text": _text,
    "image": _media,
    "audio": _media,
}
