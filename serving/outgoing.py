"""What the model's thread says of a request's rows, on its way to whoever asked: text and ends, a piece of each choice at a time."""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress

from serving.calls import Done, Event, Piece
from serving.engine.row import Ended, TextPiece
from serving.engine.row import Event as RowEvent
from serving.errors import RequestError
from serving.tool_stream import CallPiece, ToolStream, joined


class Told:
    """What the model's thread has said of a request's rows. It wakes the event loop for an end, and for text only where somebody waits for
    that: a loop that wakes for every piece takes interpreter and core from the model."""

    def __init__(self) -> None:
        self._said: deque[tuple[int, RowEvent]] = deque()
        self._has_some, self._has_end = asyncio.Event(), asyncio.Event()
        self._is_awaited = False

    def tell(self, loop: asyncio.AbstractEventLoop, choice: int, event: RowEvent) -> None:
        """From any thread."""
        self._said.append((choice, event))  # before it is seen whether anybody waits, who looks after saying so
        is_end = not isinstance(event, TextPiece)
        if is_end or self._is_awaited:
            self._is_awaited = False
            with suppress(RuntimeError):  # the loop has closed: the server is going away, and nobody listens
                loop.call_soon_threadsafe(self._wake, is_end)

    def _wake(self, is_end: bool) -> None:
        self._has_some.set()
        if is_end:
            self._has_end.set()

    async def fetch(self, *, not_before: float) -> list[tuple[int, RowEvent]]:
        """All that there is once there is something, and it is so late by the monotonic clock or something has ended; rarely nothing."""
        left = not_before - time.monotonic()
        if left > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._has_end.wait()
        self._has_some.clear()
        self._is_awaited = True
        if not self._said:
            await self._has_some.wait()
        self._is_awaited = False
        self._has_end.clear()
        return [self._said.popleft() for _ in range(len(self._said))]


async def events_of(
    told: Told, rows: int, streams: Sequence[ToolStream] = (), *, pause_s: Callable[[], float]
) -> AsyncIterator[list[Event]]:
    """What there is, a piece of each choice at most, until every row has ended; the first at once, and then after pauses.

    Raises:
        RequestError: a row could not be finished; what it had said is told first.
    """
    sent_at = -math.inf
    while rows:
        events: list[Piece | Done] = []
        failure: RequestError | None = None
        for choice, event in await told.fetch(not_before=sent_at + pause_s()):
            match event:
                case TextPiece(text, scores, tokens):
                    calls: list[CallPiece] = []
                    if streams:
                        text, calls = streams[choice].push(text)
                    if text or calls or scores:
                        events.append(Piece(choice, text, scores, tokens, tuple(calls)))
                case Ended(reason, tokens):
                    if streams:
                        text, reason = streams[choice].finish(reason)
                        events += [Piece(choice, text, (), tokens)] if text else []
                    events.append(Done(choice, reason, tokens))
                    rows -= 1
                case RequestError():
                    failure = event
        if events:
            yield _gathered(events)
            sent_at = time.monotonic()
        if failure:
            raise failure


def joined_pieces(events: Sequence[Event]) -> list[Event]:
    """One piece of each choice, and then the rest."""
    pieces: dict[int, list[Piece]] = {}
    for event in events:
        if isinstance(event, Piece):
            pieces.setdefault(event.choice, []).append(event)
    return [*map(_one, pieces.values()), *(event for event in events if not isinstance(event, Piece))]


def _gathered(events: Sequence[Piece | Done]) -> list[Event]:
    """Pieces of a choice as one; but where a tool's call begins is a piece of its own, as OpenAI sends it."""
    runs: list[list[Piece]] = []
    last: dict[int, list[Piece]] = {}
    ends = [event for event in events if isinstance(event, Done)]
    for event in events:
        if isinstance(event, Piece):
            run = last.get(event.choice)
            if run is None or _begins_call(run[-1]) or _begins_call(event):
                last[event.choice] = run = []
                runs.append(run)
            run.append(event)
    return [*(run[0] if len(run) == 1 else _one(run) for run in runs), *ends]


def _begins_call(piece: Piece) -> bool:
    return any(call.id is not None for call in piece.calls)


def _one(pieces: Sequence[Piece]) -> Piece:
    scores = tuple(score for piece in pieces for score in piece.scores)
    calls = joined([call for piece in pieces for call in piece.calls])
    return Piece(pieces[0].choice, "".join(piece.text for piece in pieces), scores, pieces[-1].tokens, tuple(calls))
