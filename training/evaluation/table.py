"""`predictions.parquet`: one row a row that was evaluated, from which folds can be pooled and errors looked for.

| column | |
| --- | --- |
| row | its number over all rows of the data set, from 0 |
| loss, base_loss | means over its targets |
| targets, right | how many targets it has, and how many were predicted right |
| wanted, answer | the class, the classes, or the number |
| probabilities | of each class, or of each class of each word, end to end |

The metadata of the schema names `task`, `problem_type` and `labels`, in whose order the probabilities are.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from models.tasks import TASKS
from training.evaluation.evaluate import Found
from training.evaluation.predict import Predicted, kind_of


def write_predictions(found: Found, labels: list[str] | None, path: Path) -> None:
    """Write the table."""
    tuned, base = found.tuned, found.base
    columns: dict[str, Any] = {
        "row": pa.array(found.numbers, pa.int64()),
        "loss": pa.array(tuned.loss, pa.float64()),
        "base_loss": pa.array(base.loss, pa.float64()) if base else pa.nulls(len(tuned), pa.float64()),
        "targets": pa.array(tuned.n_targets, pa.int64()),
        "right": pa.array(tuned.right, pa.int64()),
        **_answers(tuned, labels, of_words=found.evaluation.task == "token-classification"),
    }
    about = {"task": found.evaluation.task, "problem_type": found.evaluation.problem_type or "", "labels": json.dumps(labels)}
    parquet.write_table(pa.table(columns).replace_schema_metadata(about), path)


def read_predictions(paths: Sequence[Path]) -> Predicted:
    """What several tables hold together: each row by the model that wrote it, as a cross-validation pools its folds.

    Raises:
        ValueError: the tables are not of one task with the same classes.
    """
    tables = [parquet.read_table(path) for path in paths]
    about = tables[0].schema.metadata
    if any(table.schema.metadata != about for table in tables):
        raise ValueError("these predictions are not of one task with the same classes")
    whole, labels = pa.concat_tables(tables), json.loads(about[b"labels"])
    held = {name: np.asarray(whole.column(name).to_pylist(), dtype=np.float64) for name in ("loss", "targets", "right")}
    n_targets = held["targets"].astype(np.int64)
    columns = {name: whole.column(name).to_pylist() for name in ("wanted", "answer", "probabilities") if name in whole.column_names}
    kind = kind_of(TASKS[about[b"task"].decode()], about[b"problem_type"].decode() or None)
    made = Predicted(
        kind=kind,
        loss=held["loss"],
        n_targets=n_targets,
        right=held["right"].astype(np.int64),
        row_of=np.arange(len(whole)),
        targets=np.empty(0),
        answers=np.empty(0),
        probabilities=np.empty((0, 0), dtype=np.float32),
        likelihoods=np.empty((0, 2)),
    )
    if kind == "pairs":
        return replace(made, answers=np.array(columns["answer"]))
    if kind == "number":
        return replace(made, targets=np.array(columns["wanted"]), answers=np.array(columns["answer"]))
    if labels is None:
        return made
    places = {label: n for n, label in enumerate(labels)}
    if kind == "many":
        sides = [np.array([[label in row for label in labels] for row in columns[name]], dtype=np.int64) for name, _ in _SIDES]
        return replace(made, targets=sides[0], answers=sides[1], probabilities=np.array(columns["probabilities"], dtype=np.float32))
    of_words = about[b"task"].decode() == "token-classification"
    flat = {name: [label for row in columns[name] for label in (row if of_words else [row])] for name, _ in _SIDES}
    return replace(
        made,
        row_of=np.repeat(np.arange(len(whole)), n_targets) if of_words else made.row_of,
        targets=np.array([places[label] for label in flat["wanted"]]),
        answers=np.array([places[label] for label in flat["answer"]]),
        probabilities=np.concatenate([np.array(row, dtype=np.float32) for row in columns["probabilities"]]).reshape(-1, len(labels)),
    )


def _answers(tuned: Predicted, labels: list[str] | None, *, of_words: bool) -> dict[str, Any]:
    if tuned.kind == "number":
        return {"wanted": pa.array(tuned.targets), "answer": pa.array(tuned.answers)}
    if tuned.kind == "pairs":
        return {"answer": pa.array(tuned.answers)}
    if labels is None:
        return {}
    if tuned.kind == "many":
        named = {name: [[labels[n] for n in np.flatnonzero(row)] for row in getattr(tuned, of)] for name, of in _SIDES}
        return {**{name: pa.array(values, pa.list_(pa.string())) for name, values in named.items()}, **_probabilities(tuned)}
    sides = {name: [labels[n] for n in getattr(tuned, of)] for name, of in _SIDES}
    if not of_words:
        return {**{name: pa.array(values, pa.string()) for name, values in sides.items()}, **_probabilities(tuned)}
    ends = np.cumsum(tuned.n_targets)[:-1]
    return {
        **{name: pa.array([part.tolist() for part in np.split(np.array(v), ends)], pa.list_(pa.string())) for name, v in sides.items()},
        "probabilities": pa.array([part.ravel().tolist() for part in np.split(tuned.probabilities, ends)], pa.list_(pa.float32())),
    }


def _probabilities(tuned: Predicted) -> dict[str, Any]:
    return {"probabilities": pa.array(tuned.probabilities.tolist(), pa.list_(pa.float32()))}


_SIDES = (("wanted", "targets"), ("answer", "answers"))
