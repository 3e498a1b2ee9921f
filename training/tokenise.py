"""Some parts of a data set as one shard of tokens: what runs beside the rows, on any node, in bounded memory."""

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hone.chat import ensure_template
from hone.data.gate import Look, Measured, text_digest
from hone.data.parts import Part
from hone.data.rows import ReadRow, read_rows
from hone.errors import BaseModelError, DataError, ResourceError
from training.tasks import TASKS, Encoded, Task
from training.token_rows import SCHEMA

ROWS_AT_ONCE = 256
BATCH_TOKENS = 2**18
"""At least so many tokens stand in one record batch: whoever opens a shard holds an object for each batch."""
_Kept = tuple[Encoded, ReadRow, int]
"""A row as tokens, as it was read, and its digest."""
NO_TEMPLATE = "the base has no chat template, so ChatML is used"


@dataclass(frozen=True)
class Tokenising:
    """What to do with the parts."""

    task: str
    base_folder: Path
    columns: dict[str, str]
    group_by: str | None
    max_length: int
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
    task, tokenizer = TASKS[work.task], load_tokenizer(work.base_folder)
    look = Look(unit="tokens")
    path, count = work.folder / f"shard-{number:05d}.arrow", 0
    kept: list[_Kept] = []
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        for part in parts:
            look.begin(part, sketched_rows=near_rows)
            rows = read_rows([part], shape=task.shape, columns=work.columns, group_by=work.group_by)
            for reads in _batched(rows, ROWS_AT_ONCE):
                kept += _encoded(reads, task, tokenizer, work.max_length, look)
                if sum(len(row.input_ids) for row, _, _ in kept) >= BATCH_TOKENS:
                    count += _write(writer, kept, work)
                    kept = []
        count += _write(writer, kept, work)
    return Shard(path.name, count, look)


def _write(writer: Any, kept: list[_Kept], work: Tokenising) -> int:
    writer.write_batch(_record_batch(kept, keeps_text=work.keeps_text))
    return len(kept)


def _encoded(reads: list[ReadRow], task: Task, tokenizer: Any, max_length: int, look: Look) -> list[_Kept]:
    """The good rows as tokens; all of them looked at."""
    good = [read.row for read in reads if read.row is not None]
    encoded = iter(task.encode(good, tokenizer, max_length=max_length) if good else [])
    kept: list[_Kept] = []
    for read in reads:
        made = next(encoded) if read.row is not None else None
        if isinstance(made, DataError):
            read = ReadRow(read.file, read.number, error=made.message)
            made = None
        look.add(read, Measured(made.length, made.n_targets, is_cut=made.length > max_length) if made else None)
        if made:
            kept.append((made, read, look.digests[-1]))
    return kept


def load_tokenizer(folder: Path) -> Any:
    """The base's tokenizer, with a pad token and a chat template in any case.

    Raises:
        BaseModelError: it is none of the tokenizers library, so it does not say which characters a token is of.
    """
    return _loaded(folder)[0]


def lacks_template(folder: Path) -> bool:
    """Whether the base has no chat template of its own, so that its tokenizer was given ChatML."""
    return _loaded(folder)[1]


@lru_cache(maxsize=2)
def _loaded(folder: Path) -> tuple[Any, bool]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise BaseModelError(
            f"{folder}: {kind} is written in Python and does not locate its tokens; add a tokenizer.json (a fast tokenizer)"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer, ensure_template(tokenizer)


def _record_batch(kept: list[_Kept], *, keeps_text: bool) -> pa.RecordBatch:
    rows = [row for row, _, _ in kept]
    columns: dict[str, Any] = {
        "input_ids": _lists([row.input_ids for row in rows]),
        "labels": _lists([row.labels for row in rows]),
        "n_targets": [row.n_targets for row in rows],
        "label": [row.label for row in rows],
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
