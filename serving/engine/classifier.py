"""Rows that wait to be classified; those that can share a forward pass do. All of it on the model's thread."""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from models.tasks.task import TokenRow
from serving.engine.heads import Heads
from serving.engine.lora import AdapterWeights
from serving.engine.measures import Measures
from serving.errors import EngineError

BATCH_TOKENS = 4096
"""Tokens, padding included, of one forward pass; a longer row is read alone."""


@dataclass(eq=False)
class Asked:
    """One text, picture or sound to classify."""

    row: TokenRow
    cost: int
    """Its tokens, or as many as it amounts to."""
    heads: Heads
    adapter: AdapterWeights | None
    result: "Future[Tensor]"
    """float32 logits on the CPU: [outputs], or [places, outputs]."""
    places: Sequence[int] | None = None
    """Of which tokens the logits are wanted, where tokens have classes."""
    alike: tuple[int, ...] = ()
    """Rows of one forward pass have the same: where padding would change what a row is answered."""
    queued_at: float = field(default_factory=time.monotonic)


class Classification:
    """The queue. Rows of different adapters of one base run together, those of a model of its own among themselves."""

    def __init__(self, *, max_rows: int, measures: Measures | None = None) -> None:
        self._measures = Measures() if measures is None else measures
        self.max_rows = max_rows
        self._waiting: deque[Asked] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def add(self, asked: Sequence[Asked]) -> None:
        self._waiting.extend(asked)

    def step(self) -> bool:
        batch = self._take()
        if batch:
            self._run(sorted(batch, key=lambda asked: id(asked.adapter)))
        return bool(batch)

    def abandon(self, error: EngineError) -> None:
        for asked in self._waiting:
            if asked.result.set_running_or_notify_cancel():
                asked.result.set_exception(error)
        self._waiting.clear()

    def _take(self) -> list[Asked]:
        """The one that waits longest, and those behind it that fit into its forward pass."""
        batch: list[Asked] = []
        left: list[Asked] = []
        dearest = 0
        while self._waiting and len(batch) < self.max_rows:
            asked = self._waiting.popleft()
            cost = max(dearest, asked.cost)
            fits = not batch or (_can_share(batch[0], asked) and cost * (len(batch) + 1) <= BATCH_TOKENS)
            if not fits:
                left.append(asked)
            elif asked.result.set_running_or_notify_cancel():
                batch.append(asked)
                dearest = cost
        self._waiting.extendleft(reversed(left))
        return batch

    def _run(self, batch: list[Asked]) -> None:
        heads = batch[0].heads
        self._measures.classify_rows.observe(len(batch))
        now = time.monotonic()
        for asked in batch:
            self._measures.queue_wait.observe(now - asked.queued_at)
        try:
            logits = heads.logits(heads.collate([asked.row for asked in batch]), [asked.adapter for asked in batch]).cpu()
        except Exception as cause:
            error = EngineError(f"the model failed on this batch ({type(cause).__name__}: {cause})")
            for asked in batch:
                asked.result.set_exception(error)
            return
        for asked, row in zip(batch, logits, strict=True):
            answer = row if asked.places is None else row[list(asked.places)]
            if answer.isnan().any():
                asked.result.set_exception(EngineError("the model's numbers overflowed on this input"))
            else:
                asked.result.set_result(answer)


def _can_share(first: Asked, other: Asked) -> bool:
    return other.heads is first.heads and other.alike == first.alike
