"""`text-classification`: an encoder (or decoder) with a new head names the class of a text, its classes, or a number."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from hone.base_model import BaseModel
from hone.data.formats import Row
from hone.errors import DataError
from models.tasks.classification import ClassificationTask, answer_of, labels_of, no_answer
from models.tasks.task import Batch, Encoded, Inputs, TokenRow, pad
from models.tasks.tokenizer import load_tokenizer


class TextClassification(ClassificationTask):
    """Averaged over the rows of the global batch."""

    name: ClassVar[str] = "text-classification"
    shape: ClassVar[str] = "labelled-text"
    unit: ClassVar[str] = "tokens"
    peft_task_type: ClassVar[str | None] = "SEQ_CLS"
    rows_at_once: ClassVar[int] = 256

    def check_base(self, base: BaseModel) -> None:
        """Every base with a sequence-classification class in transformers will do; loading says if there is none."""

    def load_processor(self, folder: Path) -> Any:
        return load_tokenizer(folder)

    def encode(self, rows: Sequence[Row], processor: Any, *, max_length: int) -> list[list[Encoded] | DataError]:
        whole = processor([row["text"] for row in rows], verbose=False)["input_ids"]
        cut = processor([row["text"] for row in rows], truncation=True, max_length=max_length)["input_ids"]
        return [[_encoded(row, ids, len(full))] for row, ids, full in zip(rows, cut, whole, strict=True)]

    def model_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def nothing(self, inputs: Inputs) -> TokenRow:
        return no_answer({"input_ids": [inputs.pad_token_id] * 2})

    def collate(self, rows: Sequence[TokenRow], *, inputs: Inputs, packed: bool) -> Batch:  # noqa: ARG002 - the protocol's signature
        return {**pad(rows, inputs.pad_token_id), "labels": labels_of(rows)}


def _encoded(row: Row, ids: list[int], length: int) -> Encoded:
    return Encoded(np.asarray(ids, dtype=np.int32), length=length, cost=len(ids), is_cut=length > len(ids), **answer_of(row))
