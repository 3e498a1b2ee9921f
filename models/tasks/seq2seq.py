"""`seq2seq`: an encoder-decoder writes one text from another: summaries, translation."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from hone.base_model import BaseModel
from hone.data.formats import Row
from hone.errors import BaseModelError, DataError
from models.tasks.task import IGNORED, PLAIN, Batch, Encoded, Head, Inputs, LossOptions, Sums, TokenRow, ids_of, pad
from models.tasks.tokenizer import load_tokenizer


class Seq2Seq:
    """Loss on the tokens of the target, averaged over those of the global batch."""

    name: ClassVar[str] = "seq2seq"
    shape: ClassVar[str] = "pair"
    unit: ClassVar[str] = "tokens"
    peft_task_type: ClassVar[str | None] = "SEQ_2_SEQ_LM"
    can_be_packed: ClassVar[bool] = False
    rows_at_once: ClassVar[int] = 256

    def check_base(self, base: BaseModel) -> None:
        if not base.config.get("is_encoder_decoder"):
            kinds = ", ".join(base.config.get("architectures") or ["unknown"])
            raise BaseModelError(f"{base.id.name}: task seq2seq needs an encoder-decoder, and this is {kinds}")

    def load_processor(self, folder: Path) -> Any:
        return load_tokenizer(folder)

    def find_head(self, counted: Mapping[str, int], answers: set[str]) -> Head:  # noqa: ARG002 - the protocol's signature
        return Head()

    def encode(self, rows: Sequence[Row], processor: Any, *, max_length: int) -> list[list[Encoded] | DataError]:
        sources = processor([row["source"] for row in rows], verbose=False)["input_ids"]
        targets = processor(text_target=[row["target"] for row in rows], verbose=False)["input_ids"]
        end = processor.eos_token_id
        return [[_encoded(source, _ended(target, end), max_length, end)] for source, target in zip(sources, targets, strict=True)]

    def model_class(self) -> Any:
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

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
        return {"input_ids": [inputs.pad_token_id] * 2, "labels": [IGNORED] * 2}

    def collate(self, rows: Sequence[TokenRow], *, inputs: Inputs, packed: bool) -> Batch:  # noqa: ARG002
        """`input_ids` and `attention_mask` [rows, source], `labels` [rows, target] with -100 behind the shorter ones."""
        labels = pad_sequence([ids_of(row, "labels") for row in rows], batch_first=True, padding_value=IGNORED)
        return {**pad(rows, inputs.pad_token_id), "labels": labels}

    def loss(self, model: Any, batch: Batch, options: LossOptions = PLAIN) -> tuple[torch.Tensor, Sums]:
        """Summed cross entropy over the target's tokens, and how many of them were predicted right."""
        logits, labels = self._logits(model, batch).flatten(0, 1).float(), batch["labels"].flatten()
        summed = cross_entropy(logits, labels, reduction="sum", label_smoothing=options.label_smoothing)
        return summed, {"token_accuracy": ((logits.argmax(-1) == labels) & (labels >= 0)).sum()}

    def log_probs(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        row, at = (batch["labels"] >= 0).nonzero(as_tuple=True)
        return self._logits(model, batch)[row, at].float().log_softmax(-1), row

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Of what follows each row's whole target but its last token: [rows, vocabulary]."""
        last = ((batch["labels"] >= 0).sum(-1) - 1).clamp_min(0)
        return self._logits(model, batch)[torch.arange(len(last), device=last.device), last]

    def _logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """[rows, target, vocabulary]: the decoder reads the target one place to the right."""
        config, labels = model.config, batch["labels"]
        start = labels.new_full((len(labels), 1), config.decoder_start_token_id)
        shifted = torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, config.pad_token_id or 0)], 1)
        logits: torch.Tensor = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=shifted, use_cache=False
        ).logits
        return logits[:, -labels.shape[1] :]


def _ended(ids: list[int], end: int | None) -> list[int]:
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _encoded(source: list[int], target: list[int], max_length: int, end: int | None) -> Encoded:
    kept = source if len(source) <= max_length else [*source[: max_length - 1], source[-1]] if source[-1:] == [end] else source[:max_length]
    labels = np.asarray(target[:max_length], dtype=np.int32)
    return Encoded(
        np.asarray(kept, dtype=np.int32),
        labels,
        len(labels),
        length=max(len(source), len(target)),
        cost=len(kept) + len(labels),
        is_cut=max(len(source), len(target)) > max_length,
    )
