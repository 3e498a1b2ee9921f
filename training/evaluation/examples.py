"""Rows as people read them: decoded, with what was wanted and what was answered."""

from typing import Any

import numpy as np
import numpy.typing as npt

from models.tasks.task import TokenRow
from training.batches import Rows
from training.evaluation.generate import Written, question_of
from training.evaluation.predict import Predicted
from training.evaluation.result import Example
from training.token_rows import TokenRows
from training.trained import Trained

LONGEST = 600
"""Characters of a text that are shown."""


class Describer:
    """Tells of a row by its place among those that were evaluated."""

    def __init__(
        self, trained: Trained, rows: TokenRows, chosen: Rows, tuned: Predicted, base: Predicted | None, written: dict[int, Written]
    ) -> None:
        self._trained, self._rows, self._chosen, self._tuned, self._base, self._written = trained, rows, chosen, tuned, base, written
        self._tokenizer: Any = trained.processor() if trained.task.unit == "tokens" else None

    def __call__(self, place: int) -> Example:
        [row] = self._rows.take(self._chosen[place : place + 1])
        text, wanted = self._texts(row)
        written = self._written.get(int(self._chosen[place]))
        tuned, base = self._tuned, self._base
        return Example(
            row=int(self._rows.numbers[self._chosen[place]]),
            text=_shortened(text),
            wanted=_shortened(wanted or self._answer(tuned, tuned.targets, place)),
            answer=_shortened(written.answer if written else self._answer(tuned, tuned.answers, place)),
            base_answer=_shortened(self._answer(base, base.answers, place)) if base else "",
            loss=float(tuned.loss[place]),
            base_loss=float(base.loss[place]) if base else None,
        )

    def written(self, at: int, tuned: Written, base: Written | None) -> Example:
        """An answer that was written to the row at this place among all rows."""
        return Example(
            row=int(self._rows.numbers[at]),
            text=_shortened(tuned.prompt),
            wanted=_shortened(tuned.wanted),
            answer=_shortened(tuned.answer),
            base_answer=_shortened(base.answer) if base else "",
        )

    def _texts(self, row: TokenRow) -> tuple[str, str]:
        """What the row asks, and what answer it wants where that is a text."""
        if self._tokenizer is None:
            return "", ""
        if self._tuned.kind == "tokens":
            asked = question_of(self._trained.recipe.task, row)
            return self._decoded(asked.prompt), self._decoded(asked.wanted)
        if self._tuned.kind == "pairs":
            first = int(row["parts"][0])
            chosen, rejected = (
                question_of("chat", {name: row[name][part] for name in ("input_ids", "labels")})
                for part in (slice(first), slice(first, None))
            )
            return self._decoded(chosen.prompt), f"{self._decoded(chosen.wanted)} (and not: {self._decoded(rejected.wanted)})"
        return self._decoded(row["input_ids"]), ""

    def _decoded(self, ids: Any) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _answer(self, predicted: Predicted, values: npt.NDArray[Any], place: int) -> str:
        labels = self._trained.head.labels or []
        if predicted.kind == "number":
            return f"{values[place]:.4g}"
        if predicted.kind == "many":
            return ", ".join(labels[n] for n in np.flatnonzero(values[place])) or "none"
        if predicted.kind == "classes":
            return " ".join(labels[n] for n in values[predicted.row_of == place])
        if predicted.kind == "pairs" and len(values):
            return f"the {'chosen' if values[place] > 0 else 'rejected'} one, by {abs(values[place]):.3f}" if values[place] else "neither"
        return ""


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
