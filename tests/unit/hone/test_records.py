"""Data files: what is read, and what is said of bad files and bad rows."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hone.errors import DataError
from hone.recipe import DataSettings
from hone.records import read_rows

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def read(path: Path, task: str = "chat", **settings: Any) -> list[dict[str, Any]]:
    return read_rows(path, task=task, data=DataSettings(train=str(path), **settings))


def refusal(path: Path, task: str = "chat") -> str:
    with pytest.raises(DataError) as caught:
        read(path, task)
    return caught.value.message


def jsonl(folder: Path, *rows: Any) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_chat_rows_and_prompt_completion_rows_are_read(tmp_path: Path) -> None:
    rows = read(jsonl(tmp_path, GOOD, {"prompt": "p", "completion": "c"}))
    assert rows == [GOOD, {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]}]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_labelled_rows_are_read_from_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    table = {"text": ["a, b", "c"], "label": ["x", "y"]}
    if kind == "parquet":
        pq.write_table(pa.table(table), path)
    elif kind == "jsonl":
        jsonl(tmp_path, {"text": "a, b", "label": "x"}, {"text": "c", "label": "y"}).rename(path)
    else:
        comma = "," if kind == "csv" else "\t"
        path.write_text(f'text{comma}label\n"a, b"{comma}x\nc{comma}y\n')
    assert read(path, "text-classification") == [{"text": "a, b", "label": "x"}, {"text": "c", "label": "y"}]


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"review": "fine", "stars": 4})
    assert read(path, "text-classification", text_column="review", label_column="stars") == [{"text": "fine", "label": "4"}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "not valid JSON"),
        ([1], "a row is a JSON object"),
        ({}, 'no "messages" list'),
        ({"messages": []}, '"messages" is empty; each row needs at least one assistant turn'),
        ({"messages": [{"role": "user", "content": "x"}]}, 'no message with role "assistant"'),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role is 'bot'"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content must be a text"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "messages[0].content is empty"),
        ({"prompt": "", "completion": "x"}, '"prompt" must be a text'),
    ],
)
def test_a_bad_chat_row_is_named_by_file_and_line(tmp_path: Path, row: Any, said: str) -> None:
    path = jsonl(tmp_path, GOOD, row, GOOD)
    message = refusal(path)
    assert message.startswith(f"{path}:2: ")
    assert said in message


def test_twenty_bad_rows_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    lines = refusal(jsonl(tmp_path, *[{}] * 27)).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "... and 7 more bad rows"


def test_a_row_without_the_label_column_lists_the_columns_there_are(tmp_path: Path) -> None:
    assert "(there are: text, lable)" in refusal(jsonl(tmp_path, {"text": "a", "lable": "b"}), "text-classification")


def test_a_file_cut_short_says_so(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:30])
    assert "the file ends inside it; was it cut short?" in refusal(path)


def test_a_parquet_file_cut_short_says_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a"] * 100, "label": ["b"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])
    assert "not a readable Parquet file" in refusal(path, "text-classification")


def test_text_that_is_not_utf_8_is_named_by_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "caf\xe9", "completion": "x"}\n')
    assert f"{path}:2: byte 0xe9 at column 16 is not UTF-8" in refusal(path)


@pytest.mark.parametrize(
    ("name", "text", "said"), [("a.jsonl", "", "is empty"), ("a.jsonl", "\n\n", "holds no rows"), ("a.xyz", "x", "use .jsonl")]
)
def test_files_with_nothing_to_read_are_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert said in refusal(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "no such data file" in refusal(tmp_path / "none.jsonl")
