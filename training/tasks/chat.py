"""`chat`: a causal language model learns the assistant's turns; nothing else counts in the loss."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from hone.base_model import BaseModel
from hone.chat import EncodedChat, encode_chats
from hone.data.formats import Row
from hone.errors import BaseModelError, DataError
from training.tasks import causal
from training.tasks.task import Batch, Encoded, TokenRow


class Chat:
    """Loss on assistant tokens only, averaged over the tokens of the global batch."""

    name: ClassVar[str] = "chat"
    shape: ClassVar[str] = "chat"
    peft_task_type: ClassVar[str] = "CAUSAL_LM"
    accuracy_name: ClassVar[str] = "token_accuracy"
    can_be_packed: ClassVar[bool] = True

    def check_base(self, base: BaseModel) -> None:
        if not base.is_decoder:
            kinds = ", ".join(base.config.get("architectures") or ["unknown"])
            raise BaseModelError(f"{base.id.name}: task chat needs a causal language model, and this is {kinds}")

    def find_labels(self, counted: Mapping[str, int]) -> list[str] | None:  # noqa: ARG002 - the protocol's signature
        return None

    def encode(self, rows: Sequence[Row], tokenizer: Any, *, max_length: int) -> list[Encoded | DataError]:
        return [chat if isinstance(chat, DataError) else _encoded(chat, max_length) for chat in encode_chats(tokenizer, rows)]

    def model_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def load_model(
        self,
        folder: Path,
        *,
        labels: list[str] | None,  # noqa: ARG002
        dtype: torch.dtype,
        pad_token_id: int,  # noqa: ARG002
    ) -> tuple[Any, set[str]]:
        return self.model_class().from_pretrained(folder, dtype=dtype, use_safetensors=True), set()

    def head_modules(self, model: Any) -> list[str] | None:  # noqa: ARG002
        return None

    def collate(self, rows: Sequence[TokenRow], *, pad_token_id: int, packed: bool) -> Batch:
        return causal.collate(rows, pad_token_id=pad_token_id, packed=packed)

    def loss(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return causal.loss(model, batch)

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        return causal.logits_at(model, batch, batch["last"])


def _encoded(chat: EncodedChat, max_length: int) -> Encoded:
    ids, is_target = chat.input_ids[:max_length], chat.is_target[:max_length].copy()
    is_target[:1] = False  # the first token has nothing before it to be predicted from
    labels = np.where(is_target, ids, causal.IGNORED).astype(np.int32)
    return Encoded(ids, labels, int(is_target.sum()), length=len(chat.input_ids))
