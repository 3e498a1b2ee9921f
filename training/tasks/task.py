"""What a task is, and the padding that all of them share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.utils.rnn import pad_sequence

from hone.base_model import BaseModel
from hone.data.formats import Row
from hone.errors import DataError

Batch = dict[str, torch.Tensor]
TokenRow = dict[str, Any]
"""One row of a data set, as integer arrays or lists: `input_ids` and `labels`."""


@dataclass(frozen=True)
class Encoded:
    """One row as tokens, cut to max_length."""

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    """For each token itself where it is to be predicted, else -100; empty where the whole row has one label."""
    n_targets: int
    """What the loss averages over: predicted tokens, or 1 for a labelled row."""
    length: int
    """Tokens before it was cut."""
    label: str | None = None
    """Its class."""


class Task(Protocol):
    """What training needs to know about a task."""

    name: ClassVar[str]
    shape: ClassVar[str]
    """The shape of row that it learns from; see hone.data.formats."""
    peft_task_type: ClassVar[str]
    accuracy_name: ClassVar[str]
    """What the share of right answers is called in the metrics."""
    can_be_packed: ClassVar[bool]
    """Whether rows may stand end to end in one sequence."""

    def check_base(self, base: BaseModel) -> None:
        """Raise BaseModelError where the base cannot do this task."""

    def find_labels(self, counted: Mapping[str, int]) -> list[str] | None:
        """The classes in head order, of those that the training rows name (and how often), or None where the task has none."""

    def encode(self, rows: Sequence[Row], tokenizer: Any, *, max_length: int) -> list[Encoded | DataError]:
        """Tokens and targets of rows, or what is wrong with one."""

    def model_class(self) -> Any:
        """The transformers auto class that loads a base for this task."""

    def load_model(self, folder: Path, *, labels: list[str] | None, dtype: torch.dtype, pad_token_id: int) -> tuple[Any, set[str]]:
        """The base as a transformers model, and the names of parameters that the folder does not have (a fresh head)."""

    def head_modules(self, model: Any) -> list[str] | None:
        """Names of the modules that start fresh, and so train and are saved whole beside LoRA weights."""

    def collate(self, rows: Sequence[TokenRow], *, pad_token_id: int, packed: bool) -> Batch:
        """Tensors of one forward pass: the model's inputs, padded to [rows, length] or packed into [1, tokens], and its targets."""

    def loss(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed cross entropy over the targets, and how many of them were predicted right (both scalars)."""

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """What a served answer depends on, one vector per row: [rows, outputs]."""


def ids_of(row: TokenRow, column: str = "input_ids") -> torch.Tensor:
    """One column of a row as [length] int64, copied out of the file that it may still be in."""
    return torch.from_numpy(np.array(row[column], dtype=np.int64))


def pad(rows: Sequence[TokenRow], value: int, column: str = "input_ids") -> Batch:
    """Right-pad one column to its longest row: {column, attention_mask}, each [rows, length] int64."""
    values = [ids_of(row, column) for row in rows]
    present = [torch.ones_like(value) for value in values]
    return {
        column: pad_sequence(values, batch_first=True, padding_value=value),
        "attention_mask": pad_sequence(present, batch_first=True),
    }
