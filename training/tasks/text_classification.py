"""`text-classification`: an encoder (or decoder) with a new head names the class of a text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from hone.base_model import BaseModel
from hone.data.formats import Row
from hone.errors import DataError
from training.tasks.task import Batch, Encoded, TokenRow, pad

HEADS = ("pre_classifier", "classifier", "score", "classification_head")
"""What transformers calls the parts of a sequence classification head, whatever the architecture."""


class TextClassification:
    """Cross entropy over the classes, averaged over the rows of the global batch."""

    name: ClassVar[str] = "text-classification"
    shape: ClassVar[str] = "labelled-text"
    peft_task_type: ClassVar[str] = "SEQ_CLS"
    accuracy_name: ClassVar[str] = "accuracy"
    can_be_packed: ClassVar[bool] = False

    def check_base(self, base: BaseModel) -> None:
        """Every base with a sequence-classification class in transformers will do; loading says if there is none."""

    def find_labels(self, counted: Mapping[str, int]) -> list[str] | None:
        if len(counted) < 2:
            raise DataError(f"the training rows name only one class, {next(iter(counted), None)!r}; a classifier needs at least two")
        return sorted(counted)

    def encode(self, rows: Sequence[Row], tokenizer: Any, *, max_length: int) -> list[Encoded | DataError]:
        whole = tokenizer([row["text"] for row in rows], verbose=False)["input_ids"]
        cut = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_length)["input_ids"]
        return [_encoded(row, ids, len(full)) for row, ids, full in zip(rows, cut, whole, strict=True)]

    def model_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def load_model(self, folder: Path, *, labels: list[str] | None, dtype: torch.dtype, pad_token_id: int) -> tuple[Any, set[str]]:
        names = dict(enumerate(labels or []))
        model, info = self.model_class().from_pretrained(
            folder,
            num_labels=len(names),
            id2label=names,
            label2id={name: n for n, name in names.items()},
            dtype=dtype,
            ignore_mismatched_sizes=True,  # a base that carries another task's head gets a new one
            use_safetensors=True,
            output_loading_info=True,
        )
        model.config.pad_token_id = pad_token_id
        return model, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}

    def head_modules(self, model: Any) -> list[str] | None:
        return [name for name, _ in model.named_children() if name in HEADS]

    def collate(self, rows: Sequence[TokenRow], *, pad_token_id: int, packed: bool) -> Batch:  # noqa: ARG002 - the protocol's signature
        return {**pad(rows, pad_token_id), "labels": torch.tensor([int(row["labels"][0]) for row in rows])}

    def loss(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        labels, logits = batch["labels"], self.outputs(model, batch)
        known = labels >= 0
        return cross_entropy(logits.float(), labels, reduction="sum"), (logits.argmax(-1) == labels)[known].sum()

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits


def _encoded(row: Row, ids: list[int], length: int) -> Encoded | DataError:
    if "label" not in row:
        return DataError("task text-classification learns one class a row, in the column 'label'; this row has 'labels' or 'number'")
    return Encoded(np.asarray(ids, dtype=np.int32), np.empty(0, dtype=np.int32), 1, length=length, label=row["label"])
