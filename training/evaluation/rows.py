"""Any files as rows that a trained model reads, checked and encoded as in training."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hone.data.files import find_files
from hone.data.gate import report
from hone.data.parts import cut
from hone.errors import DataError
from models.tasks import Head
from training.evaluation.watch import Watch
from training.job import PreparedData
from training.token_rows import Shards, TokenRows
from training.tokenise import Tokenising, tokenise
from training.trained import Trained

PART = "validation"
ANSWER = {"single_label_classification": "label", "multi_label_classification": "classes", "regression": "number"}
SPELLED = {"label": "one class a row ('label')", "classes": "any number of classes a row ('labels')", "number": "a number a row ('number')"}


def rows_of(sources: Sequence[str], trained: Trained, *, columns: Mapping[str, str] | None, folder: Path, watch: Watch) -> TokenRows:
    """The rows of some files that have anything to predict.

    Args:
        sources: Files, folders, globs or URIs.
        trained: What is to read them.
        columns: Our name of a column -> its name in the files; by default the recipe's.
        folder: Where the encoded rows go.
        watch: Told how far it is.

    Raises:
        DataError: bad rows, classes that the model does not know, or nothing to predict.
    """
    parts = cut(find_files(sources))
    work = Tokenising(
        task=trained.recipe.task,
        base_folder=trained.base_folder,
        columns=dict(trained.recipe.data.columns if columns is None else columns),
        group_by=None,
        max_length=trained.max_length,
        keeps_text=False,
        folder=folder,
    )
    shards = []
    for n, part in enumerate(parts):
        watch("reading", n, len(parts))
        shard = tokenise([part], n, work, near_rows=0)
        if shard.look.counts["bad_rows"]:
            [bad] = [finding for finding in report(shard.look, near_rows=0).findings if finding.kind == "bad_rows"]
            raise DataError("\n".join(bad.where))
        shards.append(folder / shard.name)
    numbers = np.flatnonzero(Shards(shards).column("n_targets")) if shards else np.empty(0, dtype=np.int64)
    if not len(numbers):
        raise DataError(f"{', '.join(sources)}: no rows with anything to predict")
    _check_answers(Shards(shards), trained.head, ", ".join(sources))
    np.save(folder / f"{PART}.npy", numbers)
    data = PreparedData(
        folder=folder,
        shards=shards,
        digest="",
        train_rows=0,
        validation_rows=len(numbers),
        cut_rows=0,
        dropped_rows=0,
        formats=[],
        bad_rows=0,
        findings={},
        pad_token_id=trained.inputs().pad_token_id,
        max_length=trained.max_length,
        labels=trained.head.labels,
        problem_type=trained.head.problem_type,
    )
    return TokenRows(data, PART)


def _check_answers(shards: Shards, head: Head, name: str) -> None:
    """The rows must be answered as the model answers, with classes that it knows."""
    wanted = ANSWER.get(head.problem_type or "", "classes" if head.labels else "")
    if not wanted:
        return
    there = [answer for answer in SPELLED if shards.has(answer)]
    if there != [wanted]:
        raise DataError(f"{name}: has {' and '.join(SPELLED[each] for each in there)}, and the model answers with {SPELLED[wanted]}")
    if head.labels is None:
        return
    values = shards.column(wanted)
    named = set(values) if wanted == "label" else {each for classes in values for each in classes}
    unknown = sorted(named - set(head.labels))
    if unknown:
        raise DataError(
            f"{name}: class {unknown[0]!r} is none of the model's ({len(unknown)} such); it knows {', '.join(head.labels[:10])}"
        )
