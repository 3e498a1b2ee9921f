"""What a task is, and the padding that all of them share."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.utils.rnn import pad_sequence

from hone.base_model import BaseModel
from hone.data.formats import Row
from hone.errors import DataError

Batch = dict[str, torch.Tensor]
TokenRow = dict[str, Any]
"""One row of a data set: what `Encoded` says, by the same names, `labels` and the like as numbers."""
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
"""What a classifier is asked for, as transformers names it."""
Sums = dict[str, torch.Tensor]
"""Metric name -> its sum over the targets of a batch."""

IGNORED = -100
"""The label of what is not to be predicted, as transformers and torch write it."""
NO_INTS = np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class Encoded:
    """One row as a model reads it."""

    input_ids: npt.NDArray[np.int32] = field(default_factory=lambda: NO_INTS)
    """Tokens, cut to max_length."""
    labels: npt.NDArray[np.int32] = field(default_factory=lambda: NO_INTS)
    """For each token itself where it is to be predicted, else -100; or the tokens of the target, where that is a text of its own; or
    for each token the number of its word, where words have classes."""
    n_targets: int = 1
    """What the loss averages over: predicted tokens, words with a class, or 1 for a row with one answer."""
    length: int = 1
    """Tokens (pixels, samples) before it was cut."""
    cost: int = 1
    """How much work it is, by which rows are dealt out: tokens, samples, or 1."""
    is_cut: bool = False
    label: str | None = None
    """Its class."""
    classes: tuple[str, ...] | None = None
    """Its classes, where it has any number of them, or the class of each word."""
    number: float | None = None
    parts: tuple[int, ...] | None = None
    """Lengths of the sequences that stand one after another in `input_ids`, or the shape of `content`."""
    content: bytes | None = None
    """A picture or a sound, decoded and of the size that the model takes."""


@dataclass(frozen=True)
class Head:
    """What a new head answers."""

    labels: list[str] | None = None
    """Class names, in the order of its outputs."""
    problem_type: ProblemType | None = None


@dataclass(frozen=True)
class Inputs:
    """What turns rows into tensors."""

    pad_token_id: int = 0
    processor: Any = None
    """The image processor or feature extractor, where there is one."""


def inputs_by(processor: Any) -> Inputs:
    """With a tokenizer, an image processor or a feature extractor."""
    return Inputs(getattr(processor, "pad_token_id", None) or 0, processor)


@dataclass(frozen=True)
class LossOptions:
    """What a loss can be told while training."""

    label_smoothing: float = 0.0
    beta: float = 0.1
    """DPO's."""
    base: Callable[[], AbstractContextManager[Any]] = nullcontext
    """A block in which the model is the base."""


PLAIN = LossOptions()


class Task(Protocol):
    """What training and serving need to know about a task. The facts that users see are in hone.tasks."""

    name: ClassVar[str]
    shape: ClassVar[str]
    """The shape of row that it learns from; see hone.data.formats."""
    unit: ClassVar[str]
    """What lengths are counted in."""
    peft_task_type: ClassVar[str | None]
    can_be_packed: ClassVar[bool]
    """Whether rows may stand end to end in one sequence."""
    rows_at_once: ClassVar[int]
    """Rows that are encoded together."""

    def check_base(self, base: BaseModel) -> None:
        """Raise BaseModelError where the base cannot do this task."""

    def load_processor(self, folder: Path) -> Any:
        """What turns rows into numbers: the base's tokenizer, image processor or feature extractor.

        Raises:
            BaseModelError: there is none, or none that this task can use.
        """

    def find_head(self, counted: Mapping[str, int], answers: set[str]) -> Head:
        """What the head is to answer, by the classes that the training rows name (and how often), and which of label, classes and
        number they have.

        Raises:
            DataError: rows from which nothing can be learnt.
        """

    def encode(self, rows: Sequence[Row], processor: Any, *, max_length: int) -> list[list[Encoded] | DataError]:
        """Rows as the model reads them (one may become several), or what is wrong with one.

        Args:
            max_length: Tokens; for a sound, milliseconds.
        """

    def model_class(self) -> Any:
        """The transformers auto class that loads a base for this task."""

    def load_model(
        self, folder: Path, *, head: Head, dtype: torch.dtype, pad_token_id: int, options: dict[str, Any] | None = None
    ) -> tuple[Any, set[str]]:
        """The base as a transformers model, and the names of parameters that the folder does not have (a new head)."""

    def head_modules(self, model: Any, fresh: Collection[str] = ()) -> list[str]:
        """Names of the modules that start fresh, and so train and are saved whole beside an adapter's weights.

        Args:
            model: The base.
            fresh: The parameters that its folder does not have, as `load_model` names them.
        """

    def nothing(self, inputs: Inputs) -> TokenRow:
        """A row that counts for nothing."""

    def collate(self, rows: Sequence[TokenRow], *, inputs: Inputs, packed: bool) -> Batch:
        """Tensors of one forward pass: the model's inputs, padded to [rows, length] or packed into [1, tokens], and its targets."""

    def loss(self, model: Any, batch: Batch, options: LossOptions = PLAIN) -> tuple[torch.Tensor, Sums]:
        """Summed loss over the targets, and the sums of what else is measured, all scalars."""

    def log_probs(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model thinks of each target: float32 log-probabilities [targets, outcomes], and the row in the batch of each target.

        Raises:
            DataError: the answers are numbers, which have no probabilities.
        """

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
