"""What happens to answers when adapters are removed, spoilt or out of reach while a replica serves them."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from hone.registry import Registry
from hone.storage import Home
from serving.calls import CompletionCall, Event, Failed, Piece, Sampling
from serving.errors import UnknownModelError, UnreachableError
from serving.published import WEIGHTS_FILE
from serving.replica import Replica
from tests.serving_fixtures import publish_many
from tests.unit.serving.conftest import Shelf

pytestmark = pytest.mark.anyio

PLAIN = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
GREEDY = Sampling(max_tokens=100, temperature=0.0, top_p=1.0, seed=1, stop=(), logit_bias={2: -100.0})


@pytest.fixture
def replica(chat_shelf: Shelf, home: Home) -> Iterator[Replica]:
    """Three adapters, of which two fit on the device and in memory."""
    publish_many(home, chat_shelf.base, ["one", "two", "three"], **PLAIN)
    replica = Replica(base=str(chat_shelf.base), home=str(home.root), max_rows=4, max_adapters=2, adapter_memory=2 * 4 * 4 * 2 * 64 * 2)
    yield replica
    replica.stop()


def ask(model: str) -> CompletionCall:
    return CompletionCall(model, ["the cat"], 1, GREEDY)


def text(events: list[Event]) -> str:
    failed = [event.error for event in events if isinstance(event, Failed)]
    assert not failed, failed
    return "".join(event.text for event in events if isinstance(event, Piece))


def error(events: list[Event]) -> Exception:
    [failed] = [event.error for event in events if isinstance(event, Failed)]
    return failed


async def test_what_is_removed_while_it_answers_answers_to_the_end(replica: Replica, home: Home) -> None:
    expected = text(await replica.answer(ask("one")))
    registry, pieces, removed = Registry(home), list[str](), False
    async for events in replica.generate(ask("one")):
        pieces += [event.text for event in events if isinstance(event, Piece)]
        if pieces and not removed:
            registry.remove(registry.resolve("one").ref)
            removed = True
    assert removed
    assert "".join(pieces) == expected
    assert isinstance(error(await replica.answer(ask("one"))), UnknownModelError)


async def test_what_was_loaded_goes_on_while_the_registry_is_away(replica: Replica, home: Home, tmp_path: Path) -> None:
    expected = {name: text(await replica.answer(ask(name))) for name in ("one", "two")}
    assert expected["one"] != expected["two"]
    root = Registry(home).root
    root.rename(tmp_path / "away")
    for name, answer in expected.items():
        assert text(await replica.answer(ask(name))) == answer
    assert isinstance(error(await replica.answer(ask("three"))), UnreachableError)
    (tmp_path / "away").rename(root)
    assert text(await replica.answer(ask("three"))) not in expected.values()


async def test_what_was_loaded_does_not_change_with_its_file(replica: Replica, home: Home) -> None:
    """Its weights were checked when they were read; a file that is mapped would be read again whenever memory is short."""
    expected = text(await replica.answer(ask("one")))
    registry = Registry(home)
    weights = registry.path(registry.resolve("one").ref) / WEIGHTS_FILE
    weights.chmod(0o644)
    with weights.open("r+b") as file:  # in place, as a synchronising tool or a failing disk does it
        file.seek(weights.stat().st_size // 4)
        file.write(b"\x3f" * (weights.stat().st_size // 2))
    assert text(await replica.answer(ask("one"))) == expected
    with weights.open("r+b") as file:
        file.truncate(100)
    assert text(await replica.answer(ask("one"))) == expected


async def test_many_more_adapters_than_fit_each_answer_as_themselves(chat_shelf: Shelf, home: Home) -> None:
    names = [f"a{n}" for n in range(40)]
    publish_many(home, chat_shelf.base, names, **PLAIN)
    whole = Replica(base=str(chat_shelf.base), home=str(home.root), max_rows=4, max_adapters=len(names))
    tight = Replica(base=str(chat_shelf.base), home=str(home.root), max_rows=4, max_adapters=3, adapter_memory=40_000)
    try:
        expected = [text(events) for events in await asyncio.gather(*(whole.answer(ask(name)) for name in names))]
        for order in (names, names[::-1]):
            found = await asyncio.gather(*(tight.answer(ask(name)) for name in order))
            assert [text(events) for events in found] == [expected[names.index(name)] for name in order]
        assert len((await tight.status()).adapters) <= 3
        assert len(set(expected)) > len(names) // 2, "adapters that all say the same show nothing"
    finally:
        whole.stop()
        tight.stop()
