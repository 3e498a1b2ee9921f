"""Training rows that are a little different each time they are seen."""

from collections.abc import Callable
from typing import Any

import numpy as np

from hone.errors import DataError
from hone.recipe import TextAugmentation
from training.augment.text import augment_text
from training.batches import Rows
from training.job import Job
from training.tasks import Task
from training.token_rows import TokenRows
from training.tokenise import load_tokenizer


def augmented(rows: TokenRows, job: Job, task: Task) -> Callable[[int, Rows], list[dict[str, Any]]]:
    """What gives the training rows of a step by their numbers: changed as the recipe says, each time anew, or as they are."""
    settings = job.recipe.data.augment.text
    if settings is None:
        return lambda _step, numbers: rows.take(numbers)
    tokenizer, seed = load_tokenizer(job.base_folder), job.recipe.train.seed
    return AugmentedText(rows, task, tokenizer, settings, seed=seed, max_length=job.data.max_length).take


class AugmentedText:
    """Rows of texts with one class each, changed anew at every step: what is drawn depends on (seed, step, row) alone."""

    def __init__(self, rows: TokenRows, task: Task, tokenizer: Any, settings: TextAugmentation, *, seed: int, max_length: int) -> None:
        self._rows, self._task, self._tokenizer, self._settings = rows, task, tokenizer, settings
        self._seed, self._max_length = seed, max_length

    def take(self, step: int, numbers: Rows) -> list[dict[str, Any]]:
        """Rows by number, as `TokenRows.take` gives them."""
        rows = self._rows.take(numbers)
        changed = [self._changed(number, step) for number in numbers.tolist()]
        texts = [{"text": text, "label": ""} for text in changed if text is not None]
        encoded = iter(self._task.encode(texts, self._tokenizer, max_length=self._max_length) if texts else [])
        for row, text in zip(rows, changed, strict=True):
            if text is not None:
                made = next(encoded)
                assert not isinstance(made, DataError)
                row["input_ids"] = made.input_ids
        return rows

    def _changed(self, number: int, step: int) -> str | None:
        """The text as it is this time; None where it stays as it is."""
        rng, settings = np.random.default_rng([self._seed, step, number]), self._settings
        if rng.random() >= settings.probability:
            return None
        return augment_text(
            self._rows.text(number),
            rng,
            word_dropout=settings.word_dropout,
            word_swap=settings.word_swap,
            case_noise=settings.case_noise,
        )
