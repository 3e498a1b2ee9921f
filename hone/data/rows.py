"""Checked rows of one shape, file by file: `train.jsonl:17: "messages" is empty; ...`."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from hone.data.files import MEDIA, DataFile
from hone.data.formats import Format, Row, convert, media_path
from hone.data.media import check_media, read_media
from hone.data.parts import Part, cut
from hone.data.readers import read_raw
from hone.errors import DataError


@dataclass(frozen=True)
class ReadRow:
    """A row, and where it stands; or what is wrong with it."""

    file: DataFile
    number: int
    """Line, or row where the file has no lines; from 1 at the beginning of the part."""
    row: Row | None = None
    format: Format | None = None
    group: str | None = None
    """What it is grouped by."""
    content: str | None = None
    """Hex SHA-256 of its picture or sound, wherever that stands."""
    error: str = ""


def read_rows(
    parts: Iterable[Part],
    *,
    shape: str | None = None,
    columns: Mapping[str, str] | None = None,
    group_by: str | None = None,
) -> Iterator[ReadRow]:
    """Every row of the parts, good or bad, in order and a few at a time. A row with a picture or sound that cannot be decoded is bad.

    Args:
        parts: From `cut`.
        shape: The shape of row that is wanted; by default what the columns of each row make.
        columns: Our name of a column -> its name in the files, where they differ.
        group_by: Column (as the files name it) that says which rows belong together.

    Raises:
        DataError: a file that cannot be read at all.
    """
    for part in parts:
        file = part.file
        for number, raw in read_raw(part):
            if isinstance(raw, DataError):
                yield ReadRow(file, number, error=raw.message)
                continue
            try:
                row, found = convert(raw, shape=shape, columns=columns)
                row, content = _with_media(row, found.shape, file) if found.shape in MEDIA else (row, None)
                yield ReadRow(file, number, row, found, _group(raw, group_by), content)
            except DataError as error:
                yield ReadRow(file, number, error=error.message)


def named_media(files: Sequence[DataFile], *, shape: str, columns: Mapping[str, str]) -> Iterator[tuple[str, int, int]]:
    """Path, bytes and time of change (ns) of every picture or sound that tables name, and of none that stand in the tables themselves.

    What the tables say of them is not read here: a path that is wrong makes a bad row later.
    """
    for file in files:
        if file.kind in MEDIA:
            continue
        names = []
        for part in cut([file]):
            for _, raw in read_raw(part):
                value = raw.get(columns.get(shape, shape)) if isinstance(raw, dict) else None
                value = value.get("path") if isinstance(value, dict) and not value.get("bytes") else value
                if isinstance(value, bytes):
                    break  # they are all in the table
                if isinstance(value, str):
                    names.append(str(PurePosixPath(file.path).parent / value))
            else:
                continue
            break
        for info in file.filesystem.get_file_info(sorted(set(names))) if names else []:
            yield info.path, info.size or 0, info.mtime_ns or 0


def _group(raw: Mapping[str, Any], column: str | None) -> str | None:
    if column is None:
        return None
    if raw.get(column) is None:
        raise DataError(f"no {column!r}, which data.group_by groups rows by (there are: {', '.join(map(str, raw))[:200]})")
    value = raw[column]
    if isinstance(value, float) and value.is_integer():  # Parquet's integers where some are null
        value = int(value)
    return str(value) if isinstance(value, str | int) else json.dumps(value, sort_keys=True, default=str)


def _with_media(row: Row, kind: str, file: DataFile) -> tuple[Row, str]:
    """The row, whose picture or sound was decoded once: named by its bytes or by a full path or URI. And the digest of those bytes.

    A path in a table is one below the folder of that table, in the same file system: beside `s3://bucket/set/rows.jsonl`,
    `cats/1.png` is `s3://bucket/set/cats/1.png`. `read_media` reads either with the file system of the row's file.
    """
    value, where = row[kind], ""
    if isinstance(value, str) and file.kind not in MEDIA:
        path = media_path(value, str(PurePosixPath(file.path).parent), kind)
        row, where = row | {kind: file.name.removesuffix(file.path) + path}, f"{kind!r} {value!r:.200}: "
    try:
        content = read_media(row[kind], file.filesystem)
        check_media(content, kind)
    except DataError as error:
        raise DataError(where + error.message) from None
    return row, hashlib.sha256(content).hexdigest()
