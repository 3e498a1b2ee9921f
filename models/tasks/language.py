"""What the tasks share whose base has its head already, and those whose targets stand in a row of their own beside the tokens."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from models.tasks.task import IGNORED, PLAIN, Batch, Head, Inputs, LossOptions, Sums, TokenRow, ids_of, pad
from models.tasks.tokenizer import load_tokenizer


class LanguageTask:
    """A language model, causal or encoder-decoder, whose own head predicts tokens."""

    unit: ClassVar[str] = "tokens"
    rows_at_once: ClassVar[int] = 256

    def model_class(self) -> Any:
        raise NotImplementedError

    def load_processor(self, folder: Path) -> Any:
        return load_tokenizer(folder)

    def find_head(self, counted: Mapping[str, int], answers: set[str]) -> Head:  # noqa: ARG002 - the protocol's signature
        return Head()

    def load_model(
        self,
        folder: Path,
        *,
        head: Head,  # noqa: ARG002
        dtype: torch.dtype,
        pad_token_id: int,  # noqa: ARG002
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, set[str]]:
        return self.model_class().from_pretrained(folder, dtype=dtype, use_safetensors=True, **(options or {})), set()

    def head_modules(self, model: Any, fresh: Collection[str] = ()) -> list[str]:  # noqa: ARG002
        return []

    def nothing(self, inputs: Inputs) -> TokenRow:
        return no_targets(inputs)


class LabelledTokens:
    """Targets are a row of labels, -100 where nothing is to be predicted; logits stand at the same places."""

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """[rows, labels, outcomes]."""
        raise NotImplementedError

    def nothing(self, inputs: Inputs) -> TokenRow:
        return no_targets(inputs)

    def collate(self, rows: Sequence[TokenRow], *, inputs: Inputs, packed: bool) -> Batch:  # noqa: ARG002
        """`input_ids` and `attention_mask` [rows, tokens], `labels` [rows, labels] with -100 behind the shorter ones."""
        labels = pad_sequence([ids_of(row, "labels") for row in rows], batch_first=True, padding_value=IGNORED)
        return {**pad(rows, inputs.pad_token_id), "labels": labels}

    def loss(self, model: Any, batch: Batch, options: LossOptions = PLAIN) -> tuple[torch.Tensor, Sums]:
        """Summed cross entropy over the targets, and how many of them were predicted right."""
        logits, labels = self.logits(model, batch).flatten(0, 1).float(), batch["labels"].flatten()
        summed = cross_entropy(logits, labels, reduction="sum", label_smoothing=options.label_smoothing)
        return summed, {"token_accuracy": ((logits.argmax(-1) == labels) & (labels >= 0)).sum()}

    def log_probs(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        row, at = (batch["labels"] >= 0).nonzero(as_tuple=True)
        return self.logits(model, batch)[row, at].float().log_softmax(-1), row


def no_targets(inputs: Inputs) -> TokenRow:
    """A row of tokens with nothing to predict."""
    return {"input_ids": [inputs.pad_token_id] * 2, "labels": [IGNORED] * 2}
