"""Rows of a data file, checked one by one: `train.jsonl:17: "messages" is empty; ...`.

A chat row is `{"messages": [...]}` as OpenAI writes it, or `{"prompt": ..., "completion": ...}`. A text-classification row is a text and
a label, from JSONL, CSV, TSV or Parquet.
"""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hone.errors import DataError
from hone.recipe import DataSettings

SHOWN = 20
ROLES = ("system", "developer", "user", "assistant", "tool")

Row = dict[str, Any]


def read_rows(path: str | Path, *, task: str, data: DataSettings) -> list[Row]:
    """Every row of a file, in order: `{"messages": [...]}` (chat) or `{"text": ..., "label": ...}` (text-classification).

    Raises:
        DataError: the file is missing, empty or unreadable, or rows in it are bad: one line for each of the first 20, the rest counted.
    """
    path = Path(path)
    check: Callable[[Row], Row] = _chat_row if task == "chat" else lambda row: _labelled_row(row, data)
    rows: list[Row] = []
    bad: list[str] = []
    for line, row in _open(path):
        try:
            rows.append(check(row if isinstance(row, dict) else _not_an_object(row)))
        except DataError as error:
            bad.append(f"{path}:{line}: {error.message}")
    if bad:
        more = [f"... and {len(bad) - SHOWN} more bad rows"] if len(bad) > SHOWN else []
        raise DataError("\n".join([*bad[:SHOWN], *more]))
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def _open(path: Path) -> Iterator[tuple[int, Any]]:
    """(line or row number from 1, parsed row) of each row."""
    if not path.is_file():
        raise DataError(f"{path}: no such data file" if not path.is_dir() else f"{path}: is a folder; name one file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    match path.suffix.lower():
        case ".jsonl":
            return _jsonl(path)
        case ".csv" | ".tsv":
            return _csv(path, "\t" if path.suffix.lower() == ".tsv" else ",")
        case ".parquet":
            return _parquet(path)
    raise DataError(f"{path}: unknown kind of file {path.suffix!r}; use .jsonl, .csv, .tsv or .parquet")


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            cut = "" if line.endswith("\n") else " and the file ends inside it; was it cut short?"
            yield number, DataError(f"not valid JSON ({error.msg} at column {error.colno}){cut}")


def _csv(path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            yield reader.line_num, DataError("more fields than the header has columns") if None in row else row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not valid CSV ({error})") from None


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}); was it cut short?") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: byte {line[error.start]:#04x} at column {error.start + 1} is not UTF-8; save the file as UTF-8"
                ) from None


def _not_an_object(value: Any) -> Row:
    raise value if isinstance(value, DataError) else DataError(f"a row is a JSON object; this is {type(value).__name__}")


def _chat_row(row: Row) -> Row:
    if "prompt" in row and "completion" in row and "messages" not in row:
        for key in ("prompt", "completion"):
            if not isinstance(row[key], str) or not row[key].strip():
                raise DataError(f'"{key}" must be a text that is not empty')
        return {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    messages = row.get("messages")
    if not isinstance(messages, list):
        raise DataError('no "messages" list; a chat row is {"messages": [{"role": ..., "content": ...}, ...]}')
    if not messages:
        raise DataError('"messages" is empty; each row needs at least one assistant turn')
    checked = [_message(n, message) for n, message in enumerate(messages)]
    if not any(m["role"] == "assistant" for m in checked):
        raise DataError('no message with role "assistant", so there is nothing to learn')
    return {"messages": checked}


def _message(n: int, message: Any) -> Row:
    if not isinstance(message, dict):
        raise DataError(f"messages[{n}] is not an object")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"messages[{n}].role is {role!r}; use one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"messages[{n}].content must be a text, not {type(content).__name__}")
    if role == "assistant" and not content.strip():
        raise DataError(f"messages[{n}].content is empty; an assistant turn must say something")
    return {"role": role, "content": content}


def _labelled_row(row: Row, data: DataSettings) -> Row:
    for column in (data.text_column, data.label_column):
        if column not in row:
            raise DataError(f"no column {column!r} (there are: {', '.join(map(str, row))}); set data.text_column and data.label_column")
    text, label = row[data.text_column], row[data.label_column]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{data.text_column!r} must be a text that is not empty")
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise DataError(f"{data.label_column!r} must be a class name or number, not {label!r}")
    return {"text": text, "label": str(label)}
