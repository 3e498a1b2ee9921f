"""`chat`: a causal language model learns the assistant's turns; nothing else counts in the loss."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from hone.chat import EncodedChat, encode_chats
from hone.data.formats import Row
from hone.errors import DataError
from models.tasks.causal import CausalTask
from models.tasks.task import IGNORED, Encoded


class Chat(CausalTask):
    """Loss on assistant tokens only, averaged over the tokens of the global batch."""

    name: ClassVar[str] = "chat"
    shape: ClassVar[str] = "chat"

    def encode(self, rows: Sequence[Row], processor: Any, *, max_length: int) -> list[list[Encoded] | DataError]:
        return [chat if isinstance(chat, DataError) else [_encoded(chat, max_length)] for chat in encode_chats(processor, rows)]


def _encoded(chat: EncodedChat, max_length: int) -> Encoded:
    ids, is_target = chat.input_ids[:max_length], chat.is_target[:max_length].copy()
    is_target[:1] = False  # the first token has nothing before it to be predicted from
    labels = np.where(is_target, ids, IGNORED).astype(np.int32)
    length = len(chat.input_ids)
    return Encoded(ids, labels, int(is_target.sum()), length=length, cost=len(ids), is_cut=length > max_length)
