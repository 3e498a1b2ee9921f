"""Tokenised rows, memory-mapped from the shards that hold them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from training.batches import Rows
from training.job import PreparedData

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("n_targets", pa.int32()),
        ("label", pa.string()),
        ("digest", pa.uint64()),
        ("group", pa.uint64()),
        ("text", pa.large_string()),
    ]
)
"""One row of a shard. `labels` are the tokens to predict (-100 elsewhere), `label` the class, where the task has the one or
the other; `digest` tells rows apart, `group` those that stay together; `text` is there where it is to be changed each time."""


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

    def codes(self, name: str) -> npt.NDArray[np.int64]:
        """A column of texts, whole, as a number for each text."""
        whole = pa.chunked_array([batch.column(name) for batch in self._batches], type=pa.string())
        codes: npt.NDArray[np.int64] = whole.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
        return codes

    def lengths(self) -> Rows:
        """Tokens of each row."""
        parts = [np.diff(batch.column("input_ids").offsets.to_numpy()) for batch in self._batches]
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, dtype=np.int64)

    def lists(self, row: int, names: Sequence[str]) -> dict[str, npt.NDArray[np.int32]]:
        """Columns of lists of one row, as arrays over the file itself."""
        batch, at = self._place(row)
        return {name: batch.column(name)[at].values.to_numpy() for name in names}

    def value(self, row: int, name: str) -> Any:
        """A single value of one row."""
        batch, at = self._place(row)
        return batch.column(name)[at].as_py()

    def _place(self, row: int) -> tuple[Any, int]:
        n = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._batches[n], row - int(self._starts[n])


class TokenRows:
    """The training or the validation rows of a prepared data set."""

    def __init__(self, data: PreparedData, part: str) -> None:
        """Open `part`: train or validation."""
        self._shards = Shards(data.shards)
        self._index: Rows = np.load(data.folder / f"{part}.npy", mmap_mode="r")
        self.lengths = self._shards.lengths()[self._index]
        """Tokens of each row."""
        self.n_targets: Rows = self._shards.column("n_targets")[self._index].astype(np.int64)
        """What the loss averages over, for each row."""
        self._classes: Rows | None = None
        if data.labels is not None:
            self._classes = np.searchsorted(np.asarray(data.labels), self._shards.column("label")[self._index].astype(str))

    def __len__(self) -> int:
        return len(self._index)

    def take(self, rows: Rows) -> list[dict[str, Any]]:
        """Rows by number: input_ids and labels (of tokens, or [class])."""
        if self._classes is None:
            return [self._shards.lists(int(self._index[n]), ("input_ids", "labels")) for n in rows]
        classes = self._classes
        return [{**self._shards.lists(int(self._index[n]), ("input_ids",)), "labels": classes[n : n + 1]} for n in rows]

    def text(self, row: int) -> str:
        """What a row was made of, where it was kept."""
        return str(self._shards.value(int(self._index[row]), "text"))


def _batches(path: Path) -> list[Any]:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return [reader.get_batch(n) for n in range(reader.num_record_batches)]
