"""From a data file to tokens in Arrow files, once: cached in the home under the digest of everything that shapes them.

Every worker, epoch, trial and retry memory-maps the same two files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hone.base_model import BaseModel
from hone.chat import ensure_template
from hone.errors import DataError
from hone.recipe import Recipe
from hone.records import Row, read_rows
from hone.storage import Home, digest_of, new_folder, sha256_file, write_text
from training.batches import Rows
from training.job import PreparedData
from training.tasks import TASKS, Task

LAYOUT = 1
"""Raised whenever the same inputs would make different Arrow files."""
SUMMARY_FILE = "prepared.json"
SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("n_targets", pa.int32())])


class TokenRows:
    """Tokenised rows, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all().combine_chunks()
        ids = self._table["input_ids"]
        self.lengths: Rows = np.asarray(pc.list_value_length(ids), dtype=np.int64)
        """Tokens of each row."""
        self.n_targets: Rows = np.asarray(self._table["n_targets"], dtype=np.int64)
        """What the loss averages over, for each row."""

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def take(self, rows: Rows) -> list[dict[str, Any]]:
        """Rows by number: input_ids and labels, as arrays over the file itself."""
        columns = {name: self._table[name] for name in ("input_ids", "labels")}
        return [{name: column[int(n)].values.to_numpy() for name, column in columns.items()} for n in rows]


def load_tokenizer(folder: Path) -> Any:
    """The base's tokenizer, with a pad token and a chat template in any case."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    ensure_template(tokenizer)
    return tokenizer


def prepare_data(recipe: Recipe, base: BaseModel, *, home: Home) -> PreparedData:
    """Read, check, split and tokenise the recipe's data, or find that done.

    Raises:
        DataError: bad files or rows, classes in validation that training never names, or no targets left within max_length.
    """
    task, data = TASKS[recipe.task], recipe.data
    files = [Path(data.train), *([Path(data.validation)] if data.validation else [])]
    digest = digest_of(
        {
            "layout": LAYOUT,
            "task": recipe.task,
            "data": data.model_dump(exclude={"train", "validation"}),
            "files": [sha256_file(f) if f.is_file() else None for f in files],
            "tokenizer": base.id.fingerprint,
            "seed": recipe.train.seed,
        }
    )
    folder = home.datasets / digest[:32]
    if not (folder / SUMMARY_FILE).exists():
        train, validation = _read_split(recipe, task)
        with new_folder(folder) as staging:
            _encode_all(recipe, task, base, train, validation, staging, digest)
    summary = PreparedData.model_validate_json((folder / SUMMARY_FILE).read_bytes())
    return summary.model_copy(update={"folder": folder})


def _read_split(recipe: Recipe, task: Task) -> tuple[list[Row], list[Row]]:
    data = recipe.data
    rows = read_rows(data.train, task=task.name, data=data)
    if data.validation:
        return rows, read_rows(data.validation, task=task.name, data=data)
    if not data.validation_fraction:
        return rows, []
    held_out = round(len(rows) * data.validation_fraction)
    if not 0 < held_out < len(rows):
        raise DataError(
            f"{data.train}: {len(rows)} rows are too few to hold out {data.validation_fraction:.0%}; "
            "give data.validation a file, or set data.validation_fraction=0"
        )
    order = np.random.default_rng([recipe.train.seed, 1]).permutation(len(rows))
    return [rows[n] for n in sorted(order[held_out:])], [rows[n] for n in sorted(order[:held_out])]


def _encode_all(recipe: Recipe, task: Task, base: BaseModel, train: list[Row], validation: list[Row], folder: Path, digest: str) -> None:
    tokenizer = load_tokenizer(base.folder)
    labels = task.find_labels(train)
    _refuse_unknown_labels(recipe, labels, validation)
    max_length = min(recipe.data.max_length, base.max_context)
    n_train, cut, dropped = _encode(task, tokenizer, train, folder / "train.arrow", max_length, labels)
    if not n_train:
        raise DataError(f"{recipe.data.train}: no row has anything to learn within data.max_length {max_length} tokens; raise it")
    n_validation, _, _ = _encode(task, tokenizer, validation, folder / "validation.arrow", max_length, labels)
    summary = PreparedData(
        folder=folder,
        digest=digest,
        train_rows=n_train,
        validation_rows=n_validation,
        cut_rows=cut,
        dropped_rows=dropped,
        pad_token_id=tokenizer.pad_token_id,
        labels=labels,
    )
    write_text(folder / SUMMARY_FILE, summary.model_dump_json(indent=2))


def _encode(task: Task, tokenizer: Any, rows: Sequence[Row], path: Path, max_length: int, labels: list[str] | None) -> tuple[int, int, int]:
    """Write one Arrow file; (rows written, rows cut, rows dropped)."""
    encoded = [task.encode(row, tokenizer, max_length=max_length, labels=labels) for row in rows]
    kept = [row for row, _ in encoded if row.n_targets]
    columns = [
        pa.array([row.input_ids for row in kept], SCHEMA.field("input_ids").type),
        pa.array([row.labels for row in kept], SCHEMA.field("labels").type),
        pa.array([row.n_targets for row in kept], pa.int32()),
    ]
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        writer.write_table(pa.table(columns, schema=SCHEMA))
    return len(kept), sum(cut for _, cut in encoded), len(encoded) - len(kept)


def _refuse_unknown_labels(recipe: Recipe, labels: list[str] | None, validation: list[Row]) -> None:
    if labels is None:
        return
    unknown = sorted({row["label"] for row in validation} - set(labels))
    if unknown:
        raise DataError(
            f"{recipe.data.validation or recipe.data.train}: validation has classes that training never names: {', '.join(unknown[:5])}; "
            f"training names {', '.join(labels[:10])}"
        )
