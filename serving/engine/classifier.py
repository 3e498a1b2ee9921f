"""Rows that wait to be classified: tenants take turns by tokens, and rows that can share a forward pass do. All of it on the model's
thread."""

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from models.tasks.task import TokenRow
from serving.engine.fairness import EVERYONE, FairQueue, Tenant
from serving.engine.heads import Heads
from serving.engine.lora import AdapterWeights
from serving.engine.measures import Measures
from serving.engine.row import TOO_LATE
from serving.errors import DeadlineError, EngineError

BATCH_TOKENS = 4096
"""Tokens, padding included, of one forward pass; a longer row is read alone."""
PASSED_AT_MOST = 1024
"""Rows that one batch looks past for others that fit: a millisecond or two."""


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
    tenant: Tenant = EVERYONE
    deadline: float = math.inf
    """When it is given up, by `time.monotonic()`."""
    queued_at: float = field(default_factory=time.monotonic)


class Classification:
    """The queue. Rows of different adapters of one base run together, those of a model of its own among themselves."""

    def __init__(self, *, max_rows: int, measures: Measures | None = None) -> None:
        self._measures = Measures() if measures is None else measures
        self.max_rows = max_rows
        self._waiting: FairQueue[Asked] = FairQueue()
        self._next_deadline = math.inf
        """None that waits has an earlier one."""

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def add(self, asked: Sequence[Asked]) -> None:
        self._waiting.extend(asked)
        self._next_deadline = min([self._next_deadline, *(each.deadline for each in asked)])

    def step(self) -> bool:
        self._give_up(time.monotonic())
        batch = self._take()
        if batch:
            self._run(sorted(batch, key=lambda asked: id(asked.adapter)))
        for asked in batch:
            self._waiting.done(asked)
        return bool(batch)

    def abandon(self, error: EngineError) -> None:
        for asked in self._waiting:
            if asked.result.set_running_or_notify_cancel():
                asked.result.set_exception(error)
        self._waiting = FairQueue()

    def _give_up(self, now: float) -> None:
        """Tell rows that are past their deadline. Nobody looks through the queue before there is one."""
        if now >= self._next_deadline:
            self._waiting.remove(lambda asked: _is_out(asked, now))
            self._next_deadline = min((asked.deadline for asked in self._waiting), default=math.inf)

    def _take(self) -> list[Asked]:
        """The row whose turn it is, and in their turn those that fit into its forward pass.

        Behind a row that does not fit, the tenant whose turn it is goes on giving, and any other sits out until its own turn: a row that
        is passed by one batch after another, all of them begun by other tenants, would wait for ever.
        """
        batch = _Batch(self.max_rows)
        passed: list[Asked] = []
        sitting_out: set[str] = set()
        while not batch.is_full and (asked := self._waiting.peek(besides=sitting_out)):
            if batch.fits(asked):
                self._begin(self._waiting.pop(besides=sitting_out), batch)
            elif asked.tenant.name == batch.rows[0].tenant.name and len(passed) < PASSED_AT_MOST:
                passed.append(self._waiting.pop(besides=sitting_out))
            else:
                sitting_out.add(asked.tenant.name)
        self._waiting.put_back(passed)
        return batch.rows

    def _begin(self, asked: Asked, batch: "_Batch") -> None:
        """Add a row to a batch, unless nobody waits for it any more."""
        if not asked.result.set_running_or_notify_cancel():
            self._waiting.done(asked)
            return
        batch.add(asked)
        self._waiting.charge(asked.tenant, max(asked.cost, 1))  # of a tiny picture it is 0, and nothing is free

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


class _Batch:
    """Rows of one forward pass."""

    def __init__(self, max_rows: int) -> None:
        self.rows: list[Asked] = []
        self._max_rows = max_rows
        self._dearest = 0

    @property
    def is_full(self) -> bool:
        return len(self.rows) == self._max_rows or (bool(self.rows) and not self._has_room(self._dearest))

    def fits(self, asked: Asked) -> bool:
        if not self.rows:
            return True
        first = self.rows[0]
        return asked.heads is first.heads and asked.alike == first.alike and self._has_room(asked.cost)

    def add(self, asked: Asked) -> None:
        self.rows.append(asked)
        self._dearest = max(self._dearest, asked.cost)

    def _has_room(self, cost: int) -> bool:
        """For one more row, each padded to the longest."""
        return max(self._dearest, cost) * (len(self.rows) + 1) <= BATCH_TOKENS


def _is_out(asked: Asked, now: float) -> bool:
    """Whether a row is not to be read; one that is past its deadline is told."""
    if now >= asked.deadline and not asked.result.done() and asked.result.set_running_or_notify_cancel():
        asked.result.set_exception(DeadlineError(TOO_LATE))
    return asked.result.done()
