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
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from training.evaluation.evaluate import Found
from training.evaluation.predict import Predicted


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
