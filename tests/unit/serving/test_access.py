"""Who is let in, from memory: how soon a revoked key is refused, and what happens while the store is away."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from hone.errors import ResourceError
from hone.keys import ApiKey, Keys
from hone.storage import Home
from serving import access
from serving.access import KeyRing, StoreKeys
from serving.callers import ANONYMOUS, Caller
from serving.engine.fairness import Tenant
from serving.errors import InvalidKeyError, UnavailableError

pytestmark = pytest.mark.anyio


class Source:
    """A store that can be cut off, and counts who asks."""

    def __init__(self, home: Home) -> None:
        self.keys = Keys(home.store_url)
        self.asked = 0
        self.is_away = False

    def __call__(self) -> list[ApiKey]:
        self.asked += 1
        if self.is_away:
            raise ResourceError("the store does not answer")
        return self.keys.all()


@pytest.fixture
def source(home: Home) -> Source:
    return Source(home)


def ring_of(source: Callable[[], list[ApiKey]], **settings: Any) -> KeyRing:
    return KeyRing(source, **settings)


async def come(ring: KeyRing, token: str | None, *, is_local: bool = False) -> Caller:
    return await ring.caller(token, is_local=is_local)


async def test_a_key_opens_and_its_project_is_the_tenant(source: Source) -> None:
    made, token = source.keys.create("bot", project="acme", adapters=["a*"], requests_per_minute=3, tokens_per_minute=4, weight=2.5)
    caller = await come(ring_of(source), token)
    assert (caller.key, caller.label, caller.tenant) == (made.id, "acme/bot", Tenant("acme", 2.5))
    assert (caller.models, caller.requests_per_minute, caller.tokens_per_minute) == (("a*",), 3, 4)
    for wrong in (None, "", "none", token[:-1], token + "x", made.digest, made.prefix):
        with pytest.raises(InvalidKeyError):
            await come(ring_of(source), wrong)


async def test_before_there_are_keys_this_machine_needs_none_and_others_are_told_what_to_do(source: Source) -> None:
    ring = ring_of(source)
    assert await come(ring, "none", is_local=True) is ANONYMOUS
    with pytest.raises(InvalidKeyError, match="hone keys create"):
        await come(ring, "none", is_local=False)
    with pytest.raises(InvalidKeyError):
        await come(ring_of(source, auth="required"), None, is_local=True)
    assert await come(ring_of(source, auth="off"), None, is_local=False) is ANONYMOUS


async def test_once_there_are_keys_everyone_needs_one_even_when_all_are_revoked(source: Source) -> None:
    source.keys.create("bot")
    with pytest.raises(InvalidKeyError):
        await come(ring_of(source), None, is_local=True)
    source.keys.revoke("bot")
    with pytest.raises(InvalidKeyError):
        await come(ring_of(source), None, is_local=True)


async def test_a_known_key_never_waits_for_the_store(source: Source) -> None:
    _, token = source.keys.create("bot")
    ring = ring_of(source)
    await come(ring, token)
    for _ in range(50):
        await come(ring, token)
    assert source.asked == 1


async def test_many_who_come_at_once_are_one_question(source: Source) -> None:
    _, token = source.keys.create("bot")
    ring = ring_of(source)
    await asyncio.gather(*(come(ring, token) for _ in range(50)))
    assert source.asked == 1


async def test_a_new_key_is_good_at_once(source: Source) -> None:
    ring = ring_of(source, auth="required")
    for n in range(2):
        with pytest.raises(InvalidKeyError):
            await come(ring, None)
        await come(ring, source.keys.create(f"bot{n}")[1])


async def test_unknown_keys_do_not_flood_the_store(source: Source) -> None:
    source.keys.create("bot")
    ring = ring_of(source)
    answers = await asyncio.gather(*(come(ring, f"{start}{n}") for n in range(50) for start in ("", "sk-hone-")), return_exceptions=True)
    assert {type(answer) for answer in answers} == {InvalidKeyError}
    assert source.asked <= 3


async def test_a_revoked_key_is_refused_after_the_next_reading(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "REFRESH_S", 0.01)
    _, token = source.keys.create("bot")
    ring = ring_of(source)
    keeping = asyncio.create_task(ring.keep_fresh())
    await come(ring, token)
    source.keys.revoke("bot")
    asked = source.asked
    while source.asked < asked + 2:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    with pytest.raises(InvalidKeyError, match="is revoked"):
        await come(ring, token)
    keeping.cancel()


async def test_a_key_that_expires_is_refused_without_a_reading(source: Source) -> None:
    _, token = source.keys.create("bot", expires_at=time.time() + 1.5)
    ring = ring_of(source)
    await come(ring, token)
    await asyncio.sleep(1.6)
    with pytest.raises(InvalidKeyError, match="is expired"):
        await come(ring, token)
    assert source.asked == 1


async def test_while_the_store_is_away_known_keys_go_on_and_for_no_longer_than_is_said(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, token = source.keys.create("bot")
    ring = ring_of(source)
    await come(ring, token)
    source.is_away = True
    await ring._refresh()
    await come(ring, token)
    with pytest.raises(InvalidKeyError):
        await come(ring, "sk-hone-unknown")
    monkeypatch.setattr(access, "KEPT_S", 0.0)
    for given in (token, None):
        with pytest.raises(UnavailableError) as caught:
            await come(ring, given, is_local=True)
        assert (caught.value.code, caught.value.headers) == ("keys_unavailable", {"retry-after": "1"})
    monkeypatch.undo()
    source.is_away = False
    await ring._refresh()
    await come(ring, token)


async def test_nobody_is_let_in_before_the_store_has_answered_once(source: Source) -> None:
    source.is_away = True
    ring = ring_of(source)
    with pytest.raises(UnavailableError):
        await come(ring, None, is_local=True)
    assert await come(ring_of(source, auth="off"), None) is ANONYMOUS
    source.is_away = False
    assert await come(ring, None, is_local=True) is ANONYMOUS


async def test_a_store_that_hangs_holds_up_nobody_with_a_known_key(source: Source) -> None:
    _, token = source.keys.create("bot")
    hang = threading.Event()
    answers = iter([source.keys.all()])

    def load() -> list[ApiKey]:
        for keys in answers:
            return keys
        hang.wait(20)
        return []

    ring = ring_of(load)
    await come(ring, token)
    reading = asyncio.create_task(ring._refresh())
    await asyncio.sleep(0.05)
    await asyncio.wait_for(come(ring, token), 5)
    assert not reading.done()
    hang.set()
    await reading


async def test_a_store_that_comes_later_is_read(tmp_path: Any) -> None:
    (tmp_path / "home").write_text("in the way")
    home = Home(tmp_path / "home")
    ring = ring_of(StoreKeys(home.store_url))
    with pytest.raises(UnavailableError):
        await come(ring, None, is_local=True)
    (tmp_path / "home").unlink()
    assert await come(ring, None, is_local=True) is ANONYMOUS
