"""Some parts of a data set as one shard of tokens: what runs beside the rows, on any node, in bounded memory."""

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hone.base_model import BaseModel
from hone.data.files import MEDIA
from hone.data.gate import Look, Measured, text_digest
from hone.data.media import read_media
from hone.data.parts import Part
from hone.data.rows import ReadRow, read_rows
from hone.errors import DataError, ResourceError
from hone.recipe import Recipe
from models.tasks import TASKS, Encoded, Task
from training.token_rows import SCHEMA

BATCH_BYTES = 2**20
"""At least so many bytes stand in one record batch: whoever opens a shard holds an object for each batch."""
PLAIN_FIELDS = ("parts", "n_targets", "cost", "label", "classes", "number", "content")
_Kept = tuple[Encoded, ReadRow, int]
"""A row as tokens, as it was read, and its digest."""


@dataclass(frozen=True)
class Tokenising:
    """What to do with the parts."""

    task: str
    base_folder: Path
    columns: dict[str, str]
    group_by: str | None
    max_length: int
    """Tokens; for a sound, milliseconds."""
    keeps_text: bool
    """Whether rows carry their text, for what changes it anew each time it is seen."""
    folder: Path
    """Where the shards go."""


@dataclass(frozen=True)
class Shard:
    """One that was written."""

    name: str
    rows: int
    look: Look


def tokenise(parts: Sequence[Part], number: int, work: Tokenising, *, near_rows: int) -> Shard:
    """Read, check, tokenise and write some parts; near duplicates are looked for among its first `near_rows` rows.

    Raises:
        DataError: a file cannot be read at all.
        ResourceError: this node does not see the home or the base.
    """
    for folder in (work.folder, work.base_folder):
        if not folder.is_dir():
            raise ResourceError(f"node {socket.gethostname()} does not see {folder}; all nodes must mount the home and the base model")
    task = TASKS[work.task]
    processor = task.load_processor(work.base_folder)
    look = Look(unit=task.unit)
    path, count = work.folder / f"shard-{number:05d}.arrow", 0
    kept: list[_Kept] = []
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        for part in parts:
            look.begin(part, sketched_rows=near_rows)
            rows = read_rows([part], shape=task.shape, columns=work.columns, group_by=work.group_by)
            for reads in _batched(rows, task.rows_at_once):
                kept += _encoded(reads, task, processor, work.max_length, look)
                if sum(_bytes(row) for row, _, _ in kept) >= BATCH_BYTES:
                    count += _write(writer, kept, work)
                    kept = []
        count += _write(writer, kept, work)
    return Shard(path.name, count, look)


def longest(recipe: Recipe, base: BaseModel) -> int:
    """What rows are cut to: tokens, or milliseconds of a sound. Learnt vectors before the words have positions too."""
    if recipe.task == "audio-classification":
        return round(recipe.data.max_seconds * 1000)
    return max(1, min(recipe.data.max_length, base.max_context - getattr(recipe.method, "num_virtual_tokens", 0)))


def with_media(read: ReadRow) -> dict[str, Any]:
    """A good row, its picture or sound as bytes."""
    row = read.row or {}
    return {name: read_media(value, read.file.filesystem) if name in MEDIA else value for name, value in row.items()}


def measured(made: Sequence[Encoded]) -> Measured:
    """What the gate shows of a row."""
    total = sum(each.length for each in made)
    return Measured(total, sum(each.n_targets for each in made), is_cut=any(each.is_cut for each in made))


def _write(writer: Any, kept: list[_Kept], work: Tokenising) -> int:
    writer.write_batch(_record_batch(kept, keeps_text=work.keeps_text))
    return len(kept)


def _bytes(row: Encoded) -> int:
    return 4 * (len(row.input_ids) + len(row.labels)) // 2 + len(row.content or b"")


def _encoded(reads: list[ReadRow], task: Task, processor: Any, max_length: int, look: Look) -> list[_Kept]:
    """The good rows as the model reads them; all of them looked at."""
    good = [with_media(read) for read in reads if read.row is not None]
    encoded = iter(task.encode(good, processor, max_length=max_length) if good else [])
    kept: list[_Kept] = []
    for read in reads:
        made = next(encoded) if read.row is not None else []
        if isinstance(made, DataError):
            read, made = ReadRow(read.file, read.number, error=made.message), []
        look.add(read, measured(made) if made else None)
        kept += [(each, read, look.digests[-1]) for each in made]
    return kept


def _record_batch(kept: list[_Kept], *, keeps_text: bool) -> pa.RecordBatch:
    rows = [row for row, _, _ in kept]
    columns: dict[str, Any] = {
        "input_ids": _lists([row.input_ids for row in rows]),
        "labels": _lists([row.labels for row in rows]),
        **{name: [getattr(row, name) for row in rows] for name in PLAIN_FIELDS},
        "digest": [digest for _, _, digest in kept],
        "group": [digest if read.group is None else text_digest(read.group) for _, read, digest in kept],
        "text": [read.row["text"] if keeps_text and read.row else None for _, read, _ in kept],
    }
    arrays = [made if isinstance(made := columns[field.name], pa.Array) else pa.array(made, field.type) for field in SCHEMA]
    return pa.record_batch(arrays, schema=SCHEMA)


def _lists(values: list[npt.NDArray[np.int32]]) -> pa.Array:
    offsets = np.cumsum([0, *map(len, values)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate([np.empty(0, np.int32), *values])))


def _batched(rows: Iterator[ReadRow], size: int) -> Iterator[list[ReadRow]]:
    batch: list[ReadRow] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
