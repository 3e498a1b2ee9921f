"""What rows say reaches whoever asked together, and without waiting where waiting is felt."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from serving.calls import Done, Event, Piece
from serving.engine.row import Ended, TextPiece
from serving.errors import RequestError
from serving.outgoing import Told, events_of, joined_pieces
from serving.tool_stream import CallPiece

FOREVER = 3600.0
SOON = 30.0


async def following(events: AsyncIterator[list[Event]]) -> list[Event]:
    return await asyncio.wait_for(anext(events), SOON)


def text(said: str, tokens: int) -> TextPiece:
    return TextPiece(said, (), tokens)


def test_the_first_text_and_an_end_go_at_once_and_what_is_between_goes_together() -> None:
    async def run() -> None:
        told, loop = Told(), asyncio.get_running_loop()
        events = events_of(told, 1, pause_s=lambda: FOREVER)
        told.tell(loop, 0, text("a", 1))
        assert await following(events) == [Piece(0, "a", (), 1)]
        waiting = asyncio.create_task(anext(events))  # type: ignore[arg-type]
        for n, letter in enumerate("bcd", start=2):
            told.tell(loop, 0, text(letter, n))
            await asyncio.sleep(0.02)
            assert not waiting.done()
        told.tell(loop, 0, Ended("stop", 4))
        assert await asyncio.wait_for(waiting, SOON) == [Piece(0, "bcd", (), 4), Done(0, "stop", 4)]
        with pytest.raises(StopAsyncIteration):
            await anext(events)

    asyncio.run(run())


def test_text_wakes_nobody_who_does_not_wait_for_it() -> None:
    class Counting:
        """A loop that counts how often other threads wake it."""

        def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
            self.loop, self.woken = loop, 0

        def call_soon_threadsafe(self, *call: Any) -> None:
            self.woken += 1
            self.loop.call_soon_threadsafe(*call)

    async def run() -> None:
        told = Told()
        loop: Any = Counting(asyncio.get_running_loop())
        events = events_of(told, 1, pause_s=lambda: FOREVER)
        waiting = asyncio.create_task(anext(events))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        for n in range(100):
            told.tell(loop, 0, text("a", n + 1))
        assert loop.woken == 1
        assert await asyncio.wait_for(waiting, SOON) == [Piece(0, "a" * 100, (), 100)]
        waiting = asyncio.create_task(anext(events))  # type: ignore[arg-type]
        for n in range(100):
            await asyncio.sleep(0)
            told.tell(loop, 0, text("b", n + 101))
        assert loop.woken == 1
        told.tell(loop, 0, Ended("stop", 200))
        assert await asyncio.wait_for(waiting, SOON) == [Piece(0, "b" * 100, (), 200), Done(0, "stop", 200)]
        assert loop.woken == 2

    asyncio.run(run())


def test_choices_end_one_after_another_and_each_says_all_that_it_had() -> None:
    async def run() -> None:
        told, loop = Told(), asyncio.get_running_loop()
        events = events_of(told, 2, pause_s=lambda: FOREVER)
        for choice, said in ((0, "a"), (1, "x"), (0, "b")):
            told.tell(loop, choice, text(said, 1))
        assert await following(events) == [Piece(0, "ab", (), 1), Piece(1, "x", (), 1)]
        told.tell(loop, 1, Ended("length", 1))
        assert await following(events) == [Done(1, "length", 1)]
        told.tell(loop, 0, text("c", 2))
        told.tell(loop, 0, RequestError("no more"))
        assert await following(events) == [Piece(0, "c", (), 2)]
        with pytest.raises(RequestError, match="no more"):
            await following(events)

    asyncio.run(run())


def test_a_whole_answer_has_each_call_once_also_where_all_of_it_came_at_once() -> None:
    begun, more = CallPiece(0, "id", "weather", ""), CallPiece(0, None, None, '{"city": "Bern"}')
    assert joined_pieces([Piece(0, "", (), 9, (begun, more)), Done(0, "tool_calls", 9)]) == [
        Piece(0, "", (), 9, (CallPiece(0, "id", "weather", '{"city": "Bern"}'),)),
        Done(0, "tool_calls", 9),
    ]


def test_nothing_is_lost_that_other_threads_say_at_any_time() -> None:
    count = 20_000

    async def run() -> str:
        told, loop = Told(), asyncio.get_running_loop()

        def say() -> None:
            for n in range(count):
                told.tell(loop, 0, text(chr(ord("a") + n % 26), n + 1))
            told.tell(loop, 0, Ended("stop", count))

        threading.Thread(target=say).start()
        said = ""
        async for events in events_of(told, 1, pause_s=lambda: 0.0):
            said += "".join(event.text for event in events if isinstance(event, Piece))
        return said

    assert asyncio.run(run()) == "".join(chr(ord("a") + n % 26) for n in range(count))
