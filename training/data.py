"""From a data file to tokens in Arrow files, once: cached in the home under the digest of everything that shapes them.

Every worker, epoch, trial and retry memory-maps the same two files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hone.base_model import BaseModel
from hone.chat import ensure_template
from hone.data.files import DataFile, find_files
from hone.data.formats import Row
from hone.data.gate import examine, row_digest
from hone.data.readers import sha256_of
from hone.data.report import MEANINGS, Report
from hone.data.rows import BadRows, ReadRow, read_rows
from hone.errors import DataError
from hone.recipe import Recipe
from hone.storage import Home, digest_of, new_folder, write_text
from training.batches import Rows
from training.job import PreparedData
from training.split import held_out
from training.tasks import TASKS, Task

LAYOUT = 2
"""Raised whenever the same inputs would make different Arrow files."""
SUMMARY_FILE = "prepared.json"
REPORT_FILE = "report.json"
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
    files = {"train": find_files(data.train), "validation": find_files(data.validation) if data.validation else []}
    digest = digest_of(
        {
            "layout": LAYOUT,
            "task": recipe.task,
            "data": data.model_dump(exclude={"train", "validation"}),
            "files": {part: [_fingerprint(file) for file in each] for part, each in files.items()},
            "tokenizer": base.id.fingerprint,
            "seed": recipe.train.seed,
        }
    )
    folder = home.datasets / digest[:32]
    if not (folder / SUMMARY_FILE).exists():
        found = _read(recipe, task, files)
        with new_folder(folder) as staging:
            _encode_all(recipe, task, base, found, staging, digest)
    summary = PreparedData.model_validate_json((folder / SUMMARY_FILE).read_bytes())
    return summary.model_copy(update={"folder": folder})


@dataclass
class _Found:
    """Checked rows, and what is to be said of them."""

    train: list[Row]
    validation: list[Row]
    report: Report


def _fingerprint(file: DataFile) -> list[str | None]:
    """What of a file shapes its rows: every byte, what kind it is, and for a picture the folder that names its class."""
    return [sha256_of(file), file.kind, file.class_folder]


def _read(recipe: Recipe, task: Task, files: dict[str, list[DataFile]]) -> _Found:
    """Every good row, split into training and validation.

    Raises:
        DataError: more bad rows than the recipe allows, none that are good, or a finding that the recipe stops at.
    """
    data = recipe.data
    read = {part: list(read_rows(each, shape=task.shape, columns=data.columns)) for part, each in files.items()}
    _refuse_bad_rows(recipe, [row for rows in read.values() for row in rows])
    for part, each in files.items():
        if each and not any(row.row for row in read[part]):
            raise DataError(f"{each[0].name}{' and others' if len(each) > 1 else ''}: no rows")
    if not files["validation"] and data.validation_fraction:
        read = _split(recipe, read["train"])
    report = examine(read["train"], read["validation"] or None, near_rows=data.near_duplicate_rows)
    for finding in report.stopping(data.stop_on):
        where = f" ({finding.where[0]})" if finding.where else ""
        raise DataError(f"{MEANINGS[finding.kind]}: {finding.count}{where}; mend the data, or take {finding.kind} out of data.stop_on")
    train, validation = ([row.row for row in read[part] if row.row] for part in ("train", "validation"))
    return _Found(train, validation, report)


def _refuse_bad_rows(recipe: Recipe, rows: list[ReadRow]) -> None:
    bad = BadRows()
    for row in rows:
        if row.row is None:
            bad.add(row)
    if bad.count > recipe.data.max_bad_fraction * len(rows):
        raise DataError(bad.message())


def _split(recipe: Recipe, read: list[ReadRow]) -> dict[str, list[ReadRow]]:
    """Training and validation rows. The same row never stands on both sides."""
    data, good = recipe.data, [row for row in read if row.row]
    labels = [str(row.row.get("label")) for row in good if row.row]
    groups = [row_digest(row.row) for row in good if row.row]
    chosen = held_out(groups, fraction=data.validation_fraction, seed=recipe.train.seed, strata=labels if data.stratify else None)
    if not 0 < chosen.sum() < len(good):
        raise DataError(
            f"{_named(data.train)}: {len(good)} rows are too few to hold out {data.validation_fraction:.0%}; "
            "give data.validation a file, or set data.validation_fraction=0"
        )
    bad = [row for row in read if not row.row]
    return {
        "train": bad + [row for row, is_out in zip(good, chosen, strict=True) if not is_out],
        "validation": [row for row, is_out in zip(good, chosen, strict=True) if is_out],
    }


def _named(sources: str | list[str]) -> str:
    return sources if isinstance(sources, str) else ", ".join(sources)


def _encode_all(recipe: Recipe, task: Task, base: BaseModel, found: _Found, folder: Path, digest: str) -> None:
    tokenizer = load_tokenizer(base.folder)
    labels = task.find_labels(found.train)
    _refuse_unknown_labels(recipe, labels, found.validation)
    max_length = min(recipe.data.max_length, base.max_context)
    n_train, cut, dropped = _encode(task, tokenizer, found.train, folder / "train.arrow", max_length, labels)
    if not n_train:
        raise DataError(f"{_named(recipe.data.train)}: no row has anything to learn within data.max_length {max_length} tokens; raise it")
    n_validation, _, _ = _encode(task, tokenizer, found.validation, folder / "validation.arrow", max_length, labels)
    summary = PreparedData(
        folder=folder,
        digest=digest,
        train_rows=n_train,
        validation_rows=n_validation,
        cut_rows=cut,
        dropped_rows=dropped,
        pad_token_id=tokenizer.pad_token_id,
        labels=labels,
        formats=list(found.report.train.formats),
        bad_rows=sum(finding.count for finding in found.report.findings if finding.kind == "bad_rows"),
        findings={finding.kind: finding.count for finding in found.report.findings},
    )
    write_text(folder / REPORT_FILE, found.report.model_dump_json(indent=2))
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
            f"{_named(recipe.data.validation or recipe.data.train)}: validation has classes that training never names: "
            f"{', '.join(unknown[:5])}; training names {', '.join(labels[:10])}"
        )
