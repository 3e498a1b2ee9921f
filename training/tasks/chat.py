"""`chat`: a causal language model learns the assistant's turns; nothing else counts in the loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from hone.base_model import BaseModel
from hone.chat import encode_chat
from hone.data.formats import Row
from hone.errors import BaseModelError
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

    def find_labels(self, rows: Sequence[Row]) -> list[str] | None:  # noqa: ARG002 - the protocol's signature
        return None

    def encode(self, row: Row, tokenizer: Any, *, max_length: int, labels: list[str] | None) -> tuple[Encoded, bool]:  # noqa: ARG002
        chat = encode_chat(tokenizer, row["messages"], tools=row.get("tools"))
        ids, targets = chat.input_ids[:max_length], chat.is_target[:max_length]
        # The first token has nothing before it to be predicted from.
        marked = [token if wanted and n else causal.IGNORED for n, (token, wanted) in enumerate(zip(ids, targets, strict=True))]
        return Encoded(ids, marked, sum(label != causal.IGNORED for label in marked)), len(chat.input_ids) > max_length

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
