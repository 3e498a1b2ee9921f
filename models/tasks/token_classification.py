"""`token-classification`: an encoder with a new head names the class of each word (names of people, parts of speech)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from hone.base_model import BaseModel
from hone.data.formats import Row
from hone.errors import DataError
from models.tasks.classification import ClassificationTask
from models.tasks.language import LabelledTokens
from models.tasks.task import IGNORED, Batch, Encoded, Head
from models.tasks.tokenizer import load_tokenizer


class TokenClassification(LabelledTokens, ClassificationTask):
    """Cross entropy at the first token of each word, averaged over the words of the global batch."""

    name: ClassVar[str] = "token-classification"
    shape: ClassVar[str] = "token-labels"
    unit: ClassVar[str] = "tokens"
    peft_task_type: ClassVar[str | None] = "TOKEN_CLS"
    rows_at_once: ClassVar[int] = 256

    def check_base(self, base: BaseModel) -> None:
        """Every base with a token-classification class in transformers will do; loading says if there is none."""

    def load_processor(self, folder: Path) -> Any:
        return load_tokenizer(folder)

    def find_head(self, counted: Mapping[str, int], answers: set[str]) -> Head:  # noqa: ARG002
        if len(counted) < 2:
            raise DataError(f"the training rows name only one class, {next(iter(counted), None)!r}; a classifier needs at least two")
        return Head(sorted(counted))

    def encode(self, rows: Sequence[Row], processor: Any, *, max_length: int) -> list[list[Encoded] | DataError]:
        made = word_tokens(processor, [row["tokens"] for row in rows])
        return [_encoded(row, ids, words, max_length) for row, (ids, words) in zip(rows, made, strict=True)]

    def model_class(self) -> Any:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Of each row's last token: [rows, classes]."""
        last = batch["attention_mask"].sum(-1) - 1
        return self.logits(model, batch)[torch.arange(len(last), device=last.device), last]

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits[:, -batch["input_ids"].shape[1] :]  # learnt vectors before the words have logits too


def word_tokens(tokenizer: Any, rows: Sequence[Sequence[str]]) -> list[tuple[list[int], list[int]]]:
    """For each row of words its tokens, and for each token the number of its word where it is the first of it, else -100."""
    encoded = tokenizer([list(words) for words in rows], is_split_into_words=True, verbose=False)
    made = []
    for n, ids in enumerate(encoded["input_ids"]):
        words = [IGNORED if word is None else word for word in encoded.word_ids(n)]
        firsts = [word if at == 0 or word != words[at - 1] else IGNORED for at, word in enumerate(words)]
        made.append((ids, firsts))
    return made


def _encoded(row: Row, ids: list[int], words: list[int], max_length: int) -> list[Encoded] | DataError:
    if len({word for word in words if word >= 0}) < len(row["tokens"]):
        lost = next(n for n in range(len(row["tokens"])) if n not in words)
        return DataError(f"tokens[{lost}] {row['tokens'][lost]!r:.50} is nothing to this base's tokenizer, so it cannot have a class")
    kept = np.asarray(words[:max_length], dtype=np.int32)
    return [
        Encoded(
            np.asarray(ids[:max_length], dtype=np.int32),
            kept,
            int((kept >= 0).sum()),
            length=len(ids),
            cost=min(len(ids), max_length),
            is_cut=len(ids) > max_length,
            classes=tuple(row["labels"]),
        )
    ]
