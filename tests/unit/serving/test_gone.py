"""A client that goes away gives its slots back at once, whether it was streaming or waited for the whole answer."""

import asyncio
from collections.abc import Iterator

import pytest

from serving.calls import CompletionCall, Sampling
from serving.replica import Replica
from tests.unit.serving.conftest import Shelf

pytestmark = pytest.mark.anyio

LONG = Sampling(max_tokens=240, temperature=1.0, top_p=1.0, seed=1, stop=(), logit_bias={2: -100.0})


@pytest.fixture
def replica(chat_shelf: Shelf) -> Iterator[Replica]:
    replica = Replica(base=str(chat_shelf.base), home=str(chat_shelf.home.root), max_rows=2)
    yield replica
    replica.stop()


async def drained(replica: Replica) -> None:
    """Returns once nothing runs and nothing waits."""
    async with asyncio.timeout(60):
        while (status := await replica.status()).running or status.waiting:
            await asyncio.sleep(0)


async def test_a_caller_that_stops_waiting_frees_its_slots(replica: Replica) -> None:
    call = CompletionCall("wide", ["the cat", "why does"], 4, LONG)
    task = asyncio.create_task(replica.answer(call))
    async with asyncio.timeout(60):
        while (await replica.status()).running < 2:
            await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await drained(replica)
    assert (await replica.status()).completed < 8


async def test_a_stream_that_is_closed_frees_its_slot(replica: Replica) -> None:
    events = replica.generate(CompletionCall("wide", ["the cat"], 1, LONG))
    await anext(events)
    await anext(events)
    await events.aclose()  # type: ignore[attr-defined]
    await drained(replica)
    assert (await replica.status()).completed == 0
