"""A registry whose files do not answer: a pipe that nobody writes into holds up whoever opens it, as a share does whose server is gone."""

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from hone.registry import Registry
from hone.storage import Home
from serving import registry_reads, releases
from serving.calls import Failed
from serving.errors import UnreachableError
from serving.ingress import make_app
from serving.registry_reads import RegistryReads
from serving.replica import Replica
from tests.unit.serving.test_adapters_in_use import ask, error, replica, text

__all__ = ["replica"]

pytestmark = pytest.mark.anyio


@contextmanager
def hanging(file: Path) -> Iterator[None]:
    """In place of a file something that whoever reads it waits for, until the end of the block."""
    away = file.rename(file.with_suffix(".away"))
    os.mkfifo(file)
    try:
        yield
    finally:
        pipe = os.open(file, os.O_RDWR | os.O_NONBLOCK)
        away.replace(file)
        os.close(pipe)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_reads, "PATIENCE_S", 0.3)
    monkeypatch.setattr(releases, "LISTING_PATIENCE_S", 0.3)


@pytest.fixture
def alias_of_one(replica: Replica, home: Home) -> Path:  # noqa: ARG001
    """The file of the alias `prod`."""
    registry = Registry(home)
    registry.set_alias("prod", "one@1")
    [file] = (registry.root / ".aliases").glob("prod*.json")
    return file


async def test_what_was_loaded_goes_on_while_the_registry_hangs(replica: Replica, alias_of_one: Path) -> None:
    expected = text(await replica.answer(ask("prod")))
    with hanging(alias_of_one):
        async with asyncio.timeout(60):
            answers = await asyncio.gather(*(replica.answer(ask("prod")) for _ in range(40)))
        assert {text(events) for events in answers} == {expected}
        assert isinstance(error(await replica.answer(ask("two"))), UnreachableError), "it was not asked for before"
    async with asyncio.timeout(60):
        while isinstance((events := await replica.answer(ask("two")))[0], Failed):
            await asyncio.sleep(0.05)
    assert text(events) != expected


async def test_the_list_of_models_is_a_503_while_the_registry_hangs_and_holds_up_nobody(
    replica: Replica, home: Home, alias_of_one: Path
) -> None:
    transport = httpx.ASGITransport(make_app(replica, Registry(home)))
    async with httpx.AsyncClient(transport=transport, base_url="http://hone") as client:
        assert (await client.get("/v1/models")).status_code == 200
        with hanging(alias_of_one):
            listing = asyncio.create_task(client.get("/v1/models"))
            await asyncio.sleep(0.1)
            assert (await client.get("/healthz")).json()["status"] == "ok"
            assert not listing.done()
            for refused in (await listing, await client.get("/v1/models/prod")):
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "registry_unreachable")
                assert refused.headers["retry-after"] == "1"
        async with asyncio.timeout(60):
            while (await client.get("/v1/models")).status_code != 200:
                await asyncio.sleep(0.05)
        away = Registry(home).root.rename(home.root / "away")
        gone = await client.get("/v1/models")
        away.rename(Registry(home).root)
        assert gone.json()["error"]["code"] == "registry_unreachable", "and not a list that looks as if adapters had been removed"
        assert (await client.get("/v1/models")).status_code == 200


async def test_a_hang_is_noticed_though_every_caller_leaves_before() -> None:
    reads, come_back = RegistryReads(), threading.Event()
    for _ in range(10):
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await reads.read(come_back.wait, lambda: True)
    began = time.monotonic()
    assert await reads.read(lambda: "new", lambda: "known") == "known"
    assert time.monotonic() - began < 0.2, "nothing was begun"
    come_back.set()
    while reads.is_hanging:
        await asyncio.sleep(0.01)
    assert await reads.read(lambda: "new", lambda: "known") == "new"
