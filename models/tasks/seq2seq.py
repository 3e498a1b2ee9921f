"""`seq2seq`: an encoder-decoder writes one text from another: summaries, translation."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from hone.base_model import BaseModel
from hone.data.formats import Row
from hone.errors import BaseModelError, DataError
from models.tasks.language import LabelledTokens, LanguageTask
from models.tasks.task import IGNORED, Batch, Encoded


class Seq2Seq(LabelledTokens, LanguageTask):
    """Loss on the tokens of the target, averaged over those of the global batch."""

    name: ClassVar[str] = "seq2seq"
    shape: ClassVar[str] = "pair"
    peft_task_type: ClassVar[str | None] = "SEQ_2_SEQ_LM"
    can_be_packed: ClassVar[bool] = False

    def check_base(self, base: BaseModel) -> None:
        if not base.config.get("is_encoder_decoder"):
            kinds = ", ".join(base.config.get("architectures") or ["unknown"])
            raise BaseModelError(f"{base.id.name}: task seq2seq needs an encoder-decoder, and this is {kinds}")

    def encode(self, rows: Sequence[Row], processor: Any, *, max_length: int) -> list[list[Encoded] | DataError]:
        sources = processor([row["source"] for row in rows], verbose=False)["input_ids"]
        targets = processor(text_target=[row["target"] for row in rows], verbose=False)["input_ids"]
        end = processor.eos_token_id
        return [[_encoded(source, _ended(target, end), max_length, end)] for source, target in zip(sources, targets, strict=True)]

    def model_class(self) -> Any:
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Of what follows each row's whole target but its last token: [rows, vocabulary]."""
        last = ((batch["labels"] >= 0).sum(-1) - 1).clamp_min(0)
        return self.logits(model, batch)[torch.arange(len(last), device=last.device), last]

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
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
