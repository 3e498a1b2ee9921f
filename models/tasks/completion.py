"""`completion`: a causal language model goes on learning from plain text, every token of it."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from hone.data.formats import Row
from hone.errors import DataError
from models.tasks.causal import CausalTask
from models.tasks.task import IGNORED, Encoded


class Completion(CausalTask):
    """Loss on every token but a text's first, and on the token that ends it. A text longer than max_length becomes several rows."""

    name: ClassVar[str] = "completion"
    shape: ClassVar[str] = "text"

    def encode(self, rows: Sequence[Row], processor: Any, *, max_length: int) -> list[list[Encoded] | DataError]:
        texts = processor([row["text"] for row in rows], verbose=False)["input_ids"]
        end = [] if processor.eos_token_id is None else [processor.eos_token_id]
        return [_pieces(ids if ids[-1:] == end else [*ids, *end], max_length) for ids in texts]


def _pieces(ids: list[int], max_length: int) -> list[Encoded]:
    pieces = [np.asarray(ids[start : start + max_length], dtype=np.int32) for start in range(0, len(ids), max_length)]
    if len(pieces) > 1 and len(pieces[-1]) == 1:  # one token has nothing before it to be predicted from
        pieces.pop()
    return [_encoded(piece) for piece in pieces]


def _encoded(ids: np.ndarray[Any, np.dtype[np.int32]]) -> Encoded:
    labels = ids.copy()
    labels[:1] = IGNORED
    return Encoded(ids, labels, len(ids) - 1, length=len(ids), cost=len(ids))
