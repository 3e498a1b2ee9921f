"""Continuous batching: rows join and leave at any step.

Waiting rows are admitted in the order they came, a bounded amount of prompt per step so that running rows keep moving; then every running
row gets one token. All of it runs on the model's thread.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from torch import Tensor

from serving.engine.cache import SlotCache
from serving.engine.decoder import Decoder
from serving.engine.lora import AdapterWeights, Planner
from serving.engine.sampling import Chooser, choose
from serving.engine.text import TextStream
from serving.errors import EngineError

PREFILL_TOKENS = 2048
"""Prompt tokens, padding included, that are read in one step; a longer prompt is read alone."""
FAILURES_AT_MOST = 3
"""Steps that may fail one after another before the model is given up (a lost GPU fails every time)."""


@dataclass(frozen=True)
class TextPiece:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The answer is complete."""

    reason: str
    """`stop` (end of turn or a stop string) or `length` (max_tokens)."""
    tokens: int
    """Tokens that the model made, the end-of-turn token included."""


Event = TextPiece | Ended | EngineError


@dataclass(eq=False)
class Row:
    """One answer in the making."""

    prompt: Sequence[int]
    adapter: AdapterWeights | None
    chooser: Chooser
    text: TextStream
    end_ids: frozenset[int]
    max_tokens: int
    emit: Callable[[Event], None]
    """Called on the model's thread."""
    last: int = -1
    made: int = 0
    cancelled: bool = False

    @property
    def filled(self) -> int:
        """Positions whose keys and values are in the slot: all but the last token's."""
        return len(self.prompt) + self.made - 1

    def take(self, token: int) -> bool:
        """Add a token, give out the text that it settles, and say whether the answer is complete."""
        self.last, self.made = token, self.made + 1
        ended = token in self.end_ids
        text = self.text.finish() if ended else self.text.push(token)
        reason = "stop" if ended or self.text.stopped else "length" if self.made >= self.max_tokens else None
        if reason == "length":
            text += self.text.finish()
            reason = "stop" if self.text.stopped else reason
        if text:
            self.emit(TextPiece(text))
        if reason:
            self.emit(Ended(reason, self.made))
        return reason is not None


def make_chooser(*, temperature: float, top_p: float, seed: int | None, choice: int) -> Chooser:
    """The chooser of the `choice`-th answer to a request; without a seed it is different every time."""
    return Chooser(temperature, top_p, Random() if seed is None else Random(f"{seed}/{choice}"))


def cancel(rows: Sequence[Row]) -> None:
    """Forget rows, wherever they are; nothing more is emitted for them."""
    for row in rows:
        row.cancelled = True


class Generation:
    """The running rows, in slots 0..n-1, and those that wait."""

    def __init__(self, decoder: Decoder, *, max_rows: int, max_context: int) -> None:
        self.max_rows = max_rows
        self.max_context = max_context
        self.completed = 0
        """Answers that were made to their end, since the start."""
        self._decoder = decoder
        self._planner = Planner(decoder.device)
        self._cache = SlotCache(slots=max_rows, max_context=max_context)
        self._rows: list[Row] = []
        self._waiting: deque[Row] = deque()
        self._failures = 0

    @property
    def running(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def add(self, rows: Sequence[Row]) -> None:
        """Queue rows; prompt and max_tokens of each fit the context together (the caller has checked)."""
        for row in rows:
            assert row.prompt, "a row starts from at least one token"
            assert len(row.prompt) + row.max_tokens <= self.max_context, "the caller checks the context"
        self._waiting.extend(rows)

    def step(self) -> bool:
        self._drop_cancelled()
        if not self._rows and not self._waiting:
            self._planner.forget()
            return False
        self._join()
        self._advance()
        return True

    def abandon(self, error: EngineError) -> None:
        for row in [*self._rows, *self._waiting]:
            row.emit(error)
        self._rows.clear()
        self._waiting.clear()

    def _drop_cancelled(self) -> None:
        self._waiting = deque(row for row in self._waiting if not row.cancelled)
        self._remove([n for n, row in enumerate(self._rows) if row.cancelled])

    def _join(self) -> None:
        """Read the prompts of the rows that there is room for, and give each its first token."""
        new: list[Row] = []
        longest = 0
        while self._waiting and len(self._rows) + len(new) < self.max_rows:
            longest = max(longest, len(self._waiting[0].prompt))
            if new and longest * (len(new) + 1) > PREFILL_TOKENS:
                break
            new.append(self._waiting.popleft())
        if not new:
            return
        new.sort(key=lambda row: id(row.adapter))
        first = len(self._rows)
        self._rows += new
        self._run(
            range(first, len(self._rows)),
            lambda: self._decoder.prefill(self._cache, [row.prompt for row in new], [row.adapter for row in new], first=first),
        )

    def _advance(self) -> None:
        """Give every running row its next token."""
        rows = self._rows
        if rows:
            self._run(
                range(len(rows)),
                lambda: self._decoder.decode(
                    self._cache,
                    [row.last for row in rows],
                    [row.filled for row in rows],
                    self._planner.plan([row.adapter for row in rows]),
                ),
            )

    def _run(self, slots: range, forward: Callable[[], Tensor]) -> None:
        """One forward pass for the rows in `slots`. If it fails, those rows are told and leave; the others stay."""
        rows = [self._rows[n] for n in slots]
        try:
            tokens = choose(forward(), [row.chooser for row in rows])
        except Exception as cause:
            self._failures += 1
            error = EngineError(f"the model failed on this batch ({type(cause).__name__}: {cause})")
            for slot, row in zip(slots, rows, strict=True):
                row.emit(error)
                self._cache.clear(slot)
            self._remove(list(slots))
            if self._failures >= FAILURES_AT_MOST:
                raise
            return
        self._failures = 0
        self._settle(slots, rows, tokens)

    def _settle(self, slots: range, rows: list[Row], tokens: list[int | None]) -> None:
        lost = [n for n, token in zip(slots, tokens, strict=True) if token is None]
        for n in lost:
            self._rows[n].emit(EngineError("the model's numbers overflowed on this request; its adapter's weights may be too large"))
            self._cache.clear(n)
        done = [n for n, row, token in zip(slots, rows, tokens, strict=True) if token is not None and row.take(token)]
        self.completed += len(done)
        self._remove(sorted([*lost, *done]))

    def _remove(self, slots: list[int]) -> None:
        """Free slots, closing each gap with the last row."""
        for n in reversed(slots):
            last = len(self._rows) - 1
            if n != last:
                self._cache.move(last, n, self._rows[last].filled)
                self._rows[n] = self._rows[last]
            self._rows.pop()
