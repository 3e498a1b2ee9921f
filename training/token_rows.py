"""Rows as a model reads them, memory-mapped from the shards that hold them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from models.tasks.task import IGNORED
from training.batches import Rows
from training.job import PreparedData

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("parts", pa.list_(pa.int32())),
        ("n_targets", pa.int32()),
        ("cost", pa.int32()),
        ("label", pa.string()),
        ("classes", pa.list_(pa.string())),
        ("number", pa.float32()),
        ("digest", pa.uint64()),
        ("group", pa.uint64()),
        ("text", pa.large_string()),
        ("content", pa.large_binary()),
    ]
)
"""One row of a shard: the fields of `models.tasks.Encoded`, each where the task has it. `digest` tells rows apart, `group` those that
stay together; `text` is there where it is to be changed each time."""
Answer = Callable[[int, dict[str, Any]], Any]
"""The labels of a row by its number in its part, from those of its tokens."""


class Shards:
    """All rows of some shards, numbered through, each file mapped and none of it read before it is asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        batches = [batch for path in paths for batch in _batches(path)]
        self._batches = batches
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def column(self, name: str) -> npt.NDArray[Any]:
        """A column of single values, whole."""
        parts = [batch.column(name).to_numpy(zero_copy_only=False) for batch in self._batches]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def has(self, name: str) -> bool:
        """Whether any row has a value there."""
        return any(batch.column(name).null_count < batch.num_rows for batch in self._batches)

    def codes(self, name: str) -> npt.NDArray[np.int64]:
        """A column of texts, whole, as a number for each text."""
        whole = pa.chunked_array([batch.column(name) for batch in self._batches], type=pa.string())
        codes: npt.NDArray[np.int64] = whole.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
        return codes

    def lists(self, row: int, names: Sequence[str]) -> dict[str, npt.NDArray[np.int32]]:
        """Columns of lists of one row, as arrays over the file itself."""
        batch, at = self._place(row)
        return {name: batch.column(name)[at].values.to_numpy() for name in names}

    def value(self, row: int, name: str) -> Any:
        """A single value of one row."""
        batch, at = self._place(row)
        return batch.column(name)[at].as_py()

    def content(self, row: int) -> memoryview:
        """A picture or sound, in the file itself."""
        batch, at = self._place(row)
        return memoryview(batch.column("content")[at].as_buffer())

    def _place(self, row: int) -> tuple[Any, int]:
        n = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._batches[n], row - int(self._starts[n])


class TokenRows:
    """The rows of one part of a prepared data set: train, validation or retain."""

    def __init__(self, data: PreparedData, part: str) -> None:
        """Open `part`."""
        self._shards = Shards(data.shards)
        self.numbers: Rows = np.load(data.folder / f"{part}.npy", mmap_mode="r")
        """The number of each row over all shards."""
        self.lengths = self._shards.column("cost")[self.numbers].astype(np.int64)
        """How much work each row is: its tokens, its samples, or 1."""
        self.n_targets: Rows = self._shards.column("n_targets")[self.numbers].astype(np.int64)
        """What the loss averages over, for each row."""
        self._lists = ["input_ids", "labels", *(["parts"] if self._shards.has("parts") else [])]
        self._has_content = self._shards.has("content")
        self._answer = _answers(self._shards, self.numbers, data)

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, rows: Rows) -> list[dict[str, Any]]:
        """Rows by number: input_ids and labels (of tokens, or of the row), and `parts` and `content` where there are some."""
        return [self._row(int(n)) for n in rows]

    def text(self, row: int) -> str:
        """What a row was made of, where it was kept."""
        return str(self._shards.value(int(self.numbers[row]), "text"))

    def _row(self, n: int) -> dict[str, Any]:
        number = int(self.numbers[n])
        row: dict[str, Any] = self._shards.lists(number, self._lists)
        if self._has_content:
            row["content"] = self._shards.content(number)
        if self._answer:
            row["labels"] = self._answer(n, row)
        return row


def _answers(shards: Shards, numbers: Rows, data: PreparedData) -> Answer | None:
    """What turns names of classes into numbers of the head's outputs; None where rows have no classes."""
    if data.problem_type == "regression":
        values = shards.column("number")[numbers]
        return lambda n, _: values[n : n + 1]
    if data.labels is None:
        return None
    if data.problem_type == "single_label_classification":
        codes = np.searchsorted(np.asarray(data.labels), shards.column("label")[numbers].astype(str))
        return lambda n, _: codes[n : n + 1]
    places = {label: place for place, label in enumerate(data.labels)}
    if data.problem_type == "multi_label_classification":
        return lambda n, _: _many(shards.value(int(numbers[n]), "classes"), places)
    return lambda n, row: _of_words(row["labels"], shards.value(int(numbers[n]), "classes"), places)


def _many(classes: Sequence[str], places: dict[str, int]) -> npt.NDArray[np.float32]:
    """1 for each class that a row has, 0 for the others."""
    made = np.zeros(len(places), dtype=np.float32)
    made[[places[name] for name in classes]] = 1
    return made


def _of_words(words: npt.NDArray[np.int32], classes: Sequence[str], places: dict[str, int]) -> npt.NDArray[np.int64]:
    """For each token the class of the word that it begins, else -100."""
    of_word = np.array([places[name] for name in classes], dtype=np.int64)
    return np.where(words >= 0, of_word[np.maximum(words, 0)], IGNORED)


def _batches(path: Path) -> list[Any]:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return [reader.get_batch(n) for n in range(reader.num_record_batches)]
