"""Continuous batching: rows join and leave at any step.

A step reads a bounded amount of prompt, then gives every row whose prompt is read one more token. So a long prompt is read over many
steps, between which the others go on. All of it runs on the model's thread.
"""

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from serving.engine.cache import SlotCache
from serving.engine.decoder import Decoder
from serving.engine.decoding import Planner
from serving.engine.fairness import FairQueue
from serving.engine.measures import Measures
from serving.engine.prefix import BLOCK, PrefixCache
from serving.engine.row import Row, failure, is_out
from serving.engine.sampling import Chosen, choose
from serving.errors import EngineError

PREFILL_TOKENS = 512
"""Prompt tokens, padding included, that are read in one step (docs/decisions/0011)."""
FAILURES_AT_MOST = 3
"""Steps that may fail one after another before the model is given up (a lost GPU fails every time)."""


class Generation:
    """Rows in slots 0..n-1: those that are answered, and behind them at most one whose prompt a step cannot read whole; and a queue."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_rows: int,
        max_context: int,
        prefill_tokens: int = PREFILL_TOKENS,
        prefix_tokens: int = 0,
        measures: Measures | None = None,
    ) -> None:
        """`prefix_tokens` is how many tokens of earlier prompts and answers are kept for those that begin alike."""
        self.max_rows = max_rows
        self.max_context = max_context
        self.completed = 0
        """Answers that were made to their end, since the start."""
        self._decoder = decoder
        self._planner = Planner(decoder.device)
        self._cache = SlotCache(slots=max_rows, max_context=max_context)
        self.prefixes = PrefixCache(self._cache, max_tokens=prefix_tokens)
        self._prefill_tokens = prefill_tokens
        self._rows: list[Row] = []
        self._waiting: FairQueue[Row] = FairQueue()
        self._failures = 0
        self.measures = Measures() if measures is None else measures

    @property
    def running(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def active_adapters(self) -> int:
        """Adapters of the rows that run."""
        return len({id(row.adapter) for row in list(self._rows) if row.adapter})

    def add(self, rows: Sequence[Row]) -> None:
        """Queue rows; prompt and max_tokens of each fit the context together (the caller has checked)."""
        for row in rows:
            assert row.prompt, "a row starts from at least one token"
            assert row.max_tokens > 0, "a row makes at least one token"
            assert len(row.prompt) + row.max_tokens <= self.max_context, "the caller checks the context"
        self._waiting.extend(rows)

    def step(self) -> bool:
        self._drop()
        if not self._rows and not self._waiting:
            self._planner.forget()
            return False
        self._read()
        self._drop()
        self._advance()
        return True

    def abandon(self, error: EngineError) -> None:
        for row in [*self._rows, *self._waiting]:
            row.emit(error)
        self._rows.clear()
        self._waiting = FairQueue()

    @property
    def _answered(self) -> int:
        """Rows whose prompts are read."""
        return len(self._rows) - (bool(self._rows) and not self._rows[-1].is_read)

    def _drop(self) -> None:
        """Let go of rows that nobody waits for any more, and of those past their deadline."""
        now = time.monotonic()
        self._waiting.remove(lambda row: is_out(row, now))
        self._remove([n for n, row in enumerate(self._rows) if is_out(row, now)])

    def _read(self) -> None:
        """Read prompts, and give the rows whose prompts end their first token."""
        first = self._answered
        self._join()
        rows = self._rows[first:]
        if not rows:
            return
        chunks = [row.prompt[row.read : row.read + self._prefill_tokens] for row in rows]
        ends = [row for row, chunk in zip(rows, chunks, strict=True) if row.read + len(chunk) == len(row.prompt)]
        adapters, starts = [row.adapter for row in rows], [row.read for row in rows]
        tokens = self._run(
            range(first, len(self._rows)), ends, lambda: self._decoder.prefill(self._cache, chunks, adapters, first=first, starts=starts)
        )
        if tokens is None:
            return
        for slot, (row, chunk) in enumerate(zip(rows, chunks, strict=True), first):
            row.read += len(chunk)
            if row.is_read:
                self._keep(slot)
        self._settle(first, tokens)

    def _join(self) -> None:
        """Give slots to rows that wait, as far as this step's tokens go. A prompt is cut only where it is the first, so only one is ever
        read in part."""
        reading = self._rows[self._answered :]
        longest = max((len(row.prompt) - row.read for row in reading), default=0)
        new: list[Row] = []
        while len(self._rows) + len(new) < self.max_rows and (row := self._waiting.peek()):
            left = len(row.prompt) - self.prefixes.known(row.prefix_key, row.prompt)
            longest, others = max(longest, left), [*reading, *new]
            if others and (longest * (len(others) + 1) > self._prefill_tokens or self._could_share(row, others, left)):
                break
            new.append(self._waiting.pop())
            self._waiting.charge(row.tenant, left)
        for row in sorted(new, key=lambda row: id(row.adapter)):
            row.begin(self.measures, kept=self.prefixes.load(row.prefix_key, row.prompt, slot=len(self._rows)))
            self._rows.append(row)

    def _could_share(self, row: Row, others: Sequence[Row], left: int) -> bool:
        """Whether most of a prompt is being read already: the next step finds it among the prefixes."""
        is_same = any(other.prompt == row.prompt and other.prefix_key == row.prefix_key for other in others)
        return is_same and left > BLOCK and self.prefixes.keeps(row.prefix_key)

    def _advance(self) -> None:
        """Give every row that is answered its next token."""
        rows = self._rows[: self._answered]
        if not rows:
            return
        last, filled = [row.made[-1] for row in rows], [row.filled for row in rows]
        plan = self._planner.plan([row.adapter for row in rows])
        tokens = self._run(range(len(rows)), rows, lambda: self._decoder.decode(self._cache, last, filled, plan))
        if tokens is not None:
            self.measures.batch_rows.observe(len(rows))
            self._settle(0, tokens)

    def _run(self, slots: range, getting: Sequence[Row], forward: Callable[[], Tensor]) -> list[Chosen | None] | None:
        """One forward pass for the rows in `slots`, the first of which are `getting` a token. If it fails, all of them are told and leave;
        the others stay."""
        try:
            tokens = choose(forward()[: len(getting)], [row.chooser for row in getting])
        except Exception as cause:
            self._failures += 1
            error = EngineError(f"the model failed on this batch ({type(cause).__name__}: {cause})")
            for slot in slots:
                self._rows[slot].emit(error)
                self._cache.clear(slot)
            self._remove(list(slots))
            if self._failures >= FAILURES_AT_MOST:
                raise
            return None
        self._failures = 0
        return tokens

    def _settle(self, first: int, tokens: Sequence[Chosen | None]) -> None:
        """Give the rows from slot `first` their tokens; those that end leave."""
        left = []
        now = time.monotonic()
        for slot, token in enumerate(tokens, first):
            row = self._rows[slot]
            if token is None:
                row.emit(failure(row))
                self._cache.clear(slot)
                left.append(slot)
                continue
            self._waiting.charge(row.tenant, 1)
            row.timed(self.measures, now)
            if row.take(token):
                self._keep(slot)
                self.completed += 1
                left.append(slot)
        self._remove(left)

    def _keep(self, slot: int) -> None:
        """Keep what a row has read so far for others that begin alike."""
        row = self._rows[slot]
        self.prefixes.save(row.prefix_key, [*row.prompt, *row.made][: row.filled], slot=slot)

    def _remove(self, slots: Sequence[int]) -> None:
        """Free slots, closing each gap with the last row that is answered, and the gap after that with the one that is being read."""
        for gap in reversed(slots):
            self._waiting.done(self._rows[gap])
            for last in (self._answered - 1, len(self._rows) - 1):
                if gap < last:
                    self._cache.move(last, gap, self._rows[last].filled)
                    self._rows[gap], gap = self._rows[last], last
            self._rows.pop()
