"""Which version answers for an alias, what its shadow is sent, and when it goes back by itself: over a backend that does as it is told."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hone.manifest import BaseModelId
from hone.promotion import Wishes, promote
from hone.registry import Registry
from hone.releases import RollbackPolicy
from hone.storage import Home
from serving.calls import (
    ChatCall,
    Classified,
    ClassifyCall,
    CompletionCall,
    Done,
    EmbedCall,
    Embedded,
    Event,
    Failed,
    Sampling,
    Started,
    Status,
    TokenizeCall,
    Tokenized,
)
from serving.catalog import BaseDescription
from serving.error_window import ErrorWindow
from serving.errors import (
    AdapterRefusedError,
    DeadlineError,
    RequestError,
    StoppingError,
    UnavailableError,
    UnknownModelError,
    UnreachableError,
)
from serving.ingress import BusyError
from serving.releases import Released, adapter_header
from serving.shadow import AT_ONCE
from tests.manifests import Describe, weights
from tests.unit.hone.test_registry import publish

pytestmark = pytest.mark.anyio
SAMPLING = Sampling(max_tokens=1, temperature=0, top_p=1, seed=None, stop=())
POLICY = RollbackPolicy(error_rate=0.1, min_requests=10)


class Told:
    """Answers every call at once, except those for versions in `wrong`, with what that makes."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.wrong: dict[str, Callable[[], Exception]] = {}
        self.held = asyncio.Event()
        self.slow: set[str] = set()

    async def describe(self) -> BaseDescription:
        return BaseDescription(BaseModelId(name="tiny", fingerprint="f" * 64), "chat", 256, 1, tasks=("chat",), mixed_tasks=("chat",))

    async def status(self) -> Status:
        return Status(0, 0, 0, [], [])

    async def generate(self, call: ChatCall | CompletionCall) -> AsyncIterator[list[Event]]:
        for event in await self.answer(call):
            yield [event]

    async def answer(self, call: ChatCall | CompletionCall) -> list[Event]:
        failed = await self._ask(call)
        return [failed] if failed else [Started(call.model, "digest", 1), Done(0, "stop", 1)]

    async def classify(self, call: ClassifyCall) -> Classified | Failed:
        return await self._ask(call) or Classified(call.model, "digest", (), None, [], 1)

    async def embed(self, call: EmbedCall) -> Embedded | Failed:
        return await self._ask(call) or Embedded(call.model, "digest", [], 1)

    async def tokenize(self, call: TokenizeCall) -> Tokenized | Failed:
        return await self._ask(call) or Tokenized(call.model, "digest", [1], ["a"], 8)

    async def _ask(self, call: Any) -> Failed | None:
        self.asked.append(call)
        if call.model in self.slow:
            await self.held.wait()
        if call.model not in self.wrong:
            return None
        error = self.wrong[call.model]()
        if isinstance(error, RequestError) and not isinstance(error, BusyError):
            return Failed(error)
        raise error


@pytest.fixture
def registry(home: Home, tmp_path: Path) -> Registry:
    """bot@1 to bot@3; prod is bot@1."""
    for n in range(3):
        publish(home, weights(tmp_path / str(n), float(n)))
    registry = Registry(home)
    promote(registry, "prod", "bot@1")
    return registry


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def released(told: Told, registry: Registry) -> Released:
    return Released(told, registry, chance=random.Random(5))


def chat(model: str = "prod", user: str | None = None) -> ChatCall:
    return ChatCall(model, [], 1, SAMPLING, user=user)


async def settled(registry: Registry, number: int) -> None:
    """Until the alias is in that state."""
    async with asyncio.timeout(60):
        while registry.alias("prod").number < number:  # type: ignore[union-attr]
            await asyncio.sleep(0.01)


async def test_requests_of_every_kind_fall_by_weight_and_name_exact_versions(told: Told, released: Released, registry: Registry) -> None:
    promote(registry, "prod", "bot@2", wishes=Wishes(share=0.25))
    for _ in range(100):
        await released.answer(chat())
        [_ async for _ in released.generate(CompletionCall("prod", ["x"], 1, SAMPLING))]
        await released.classify(ClassifyCall("prod", ["x"]))
        await released.embed(EmbedCall("prod", ["x"]))
    asked = Counter((type(call), call.model) for call in told.asked)
    assert set(asked) == {(kind, v) for kind in (ChatCall, CompletionCall, ClassifyCall, EmbedCall) for v in ("bot@1", "bot@2")}
    assert sum(n for (_, version), n in asked.items() if version == "bot@2") == pytest.approx(100, abs=35)


async def test_a_sticky_user_gets_one_version_from_every_server(told: Told, registry: Registry) -> None:
    promote(registry, "prod", "bot@2", wishes=Wishes(share=0.5, sticky=True))
    for seed in range(3):
        server = Released(told, registry, chance=random.Random(seed))
        for user in range(20):
            await server.answer(chat(user=f"user-{user}"))
    by_user = {user: {call.model for call in told.asked if call.user == user} for user in {call.user for call in told.asked}}
    assert all(len(versions) == 1 for versions in by_user.values())
    assert set.union(*by_user.values()) == {"bot@1", "bot@2"}


async def test_what_is_no_alias_is_handed_on_as_it_is(told: Told, released: Released) -> None:
    for model in ("bot", "bot@2", "tiny", "nobody", "../etc/passwd", "", "prod@1"):
        await released.answer(chat(model))
        assert told.asked[-1].model == model
    assert released.report()["aliases"] == {}


async def test_the_base_keeps_its_name_where_an_alias_of_it_is_of_another_base(
    told: Told, released: Released, registry: Registry, tmp_path: Path
) -> None:
    class OfAnother(Describe):
        def __call__(self, version: int, files: Any) -> Any:
            return super().__call__(version, files).model_copy(update={"base": BaseModelId(name="other", fingerprint="0" * 64)})

    registry.publish(weights(tmp_path / "other"), "stranger", describe=OfAnother("stranger"))
    promote(registry, "tiny", "stranger@1")
    await released.answer(chat("tiny"))
    promote(registry, "tiny", "bot@1", force=True)
    await released.answer(chat("tiny"))
    registry.root.rename(tmp_path / "away")
    await released.answer(chat("tiny"))
    assert [call.model for call in told.asked] == ["tiny", "bot@1", "bot@1"], "nor is the base taken for it while the registry is away"


@pytest.mark.parametrize("kind", ["answer", "stream", "raised"])
async def test_a_version_that_fails_too_often_is_taken_back_with_the_reason(
    told: Told, released: Released, registry: Registry, kind: str
) -> None:
    promote(registry, "prod", "bot@2", wishes=Wishes(share=0.5, rollback=POLICY))
    told.wrong["bot@2"] = ConnectionError if kind == "raised" else lambda: AdapterRefusedError("it does not reproduce its outputs")
    for _ in range(60):
        if kind == "answer":
            await released.answer(chat())
        elif kind == "stream":
            events = released.generate(chat())
            await anext(events)  # as the routes do: a first event that says no is the last that they read
        else:
            with suppress(ConnectionError):
                await released.answer(chat())
    await settled(registry, 3)
    state = registry.alias("prod").current  # type: ignore[union-attr]
    assert (state.says(), state.restores) == ("bot@1", 1)
    assert "10 of 10 requests to bot@2 failed in 60 s, past 10%" in state.why
    assert state.by.startswith("server on ")
    await released.answer(chat())
    assert told.asked[-1].model == "bot@1"
    counts = released.report()["aliases"]["prod"]
    assert counts["bot@1"]["errors"] == 0
    assert counts["bot@2"]["errors"] == counts["bot@2"]["requests"] >= 10


@pytest.mark.parametrize(
    "error",
    [
        lambda: RequestError("too long", "messages"),
        lambda: UnknownModelError("is of another base"),
        lambda: DeadlineError("timeout_s has passed"),
        lambda: UnreachableError("no registry"),
        lambda: StoppingError("draining"),
        lambda: UnavailableError("no replica is there"),
        lambda: BusyError("full"),
    ],
)
async def test_what_is_no_fault_of_the_version_moves_nothing(
    told: Told, released: Released, registry: Registry, error: Callable[[], RequestError]
) -> None:
    promote(registry, "prod", "bot@2", wishes=Wishes(rollback=POLICY))
    told.wrong["bot@2"] = error
    for _ in range(30):
        with suppress(BusyError):
            await released.answer(chat())
    assert released.report()["aliases"]["prod"]["bot@2"] == {"requests": 30, "errors": 0}
    assert not released._moves


async def test_callers_mistakes_do_not_hide_a_version_that_fails(told: Told, released: Released, registry: Registry) -> None:
    promote(registry, "prod", "bot@1")
    promote(registry, "prod", "bot@2", wishes=Wishes(rollback=RollbackPolicy(error_rate=0.5, min_requests=4)))
    for turn in range(80):
        told.wrong["bot@2"] = (lambda: AdapterRefusedError("x")) if turn % 20 == 19 else (lambda: RequestError("too long", "messages"))
        await released.answer(chat())
    await settled(registry, 3)
    state = registry.alias("prod")
    assert state is not None
    assert "4 of 4 requests to bot@2 failed" in state.current.why


async def test_failures_within_the_policy_move_nothing(told: Told, released: Released, registry: Registry) -> None:
    promote(registry, "prod", "bot@2", wishes=Wishes(rollback=POLICY))
    for turn in range(60):
        told.wrong = {"bot@2": lambda: AdapterRefusedError("x")} if turn % 10 == 9 else {}
        await released.answer(chat())
    assert released.report()["aliases"]["prod"]["bot@2"] == {"requests": 60, "errors": 6}
    assert not released._moves


async def test_of_several_servers_that_see_it_one_moves_the_alias(told: Told, registry: Registry) -> None:
    promote(registry, "prod", "bot@2")
    promote(registry, "prod", "bot@3", wishes=Wishes(rollback=POLICY))
    told.wrong["bot@3"] = lambda: AdapterRefusedError("x")
    servers = [Released(told, registry) for _ in range(4)]
    for _ in range(10):
        for server in servers:  # all of them see state 3 and count to the limit before any has moved it
            server._count((await server._pick(chat())) or pytest.fail("an alias"), AdapterRefusedError("x"))
            if registry.alias("prod").number > 3:  # type: ignore[union-attr]
                break
    await asyncio.gather(*(move for server in servers for move in server._moves))
    assert [state.main.version for state in registry.alias("prod").history] == ["bot@1", "bot@2", "bot@3", "bot@2"]  # type: ignore[union-attr]


async def test_a_version_with_nothing_before_it_stays_and_is_said_once(
    told: Told, released: Released, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    promote(registry, "only", "bot@2", wishes=Wishes(rollback=POLICY))
    told.wrong["bot@2"] = lambda: AdapterRefusedError("x")
    for _ in range(50):
        await released.answer(chat("only"))
    await asyncio.gather(*released._moves)
    assert registry.alias("only").number == 1  # type: ignore[union-attr]
    assert sum("is not moved back" in line for line in caplog.messages) == 1


async def test_an_alias_goes_on_while_the_registry_is_away(told: Told, released: Released, registry: Registry) -> None:
    await released.answer(chat())
    registry.root.rename(registry.root.with_name("unmounted"))
    await released.answer(chat())
    await released.answer(chat("never-asked"))
    assert [call.model for call in told.asked] == ["bot@1", "bot@1", "never-asked"]


async def test_a_shadow_is_asked_the_same_and_nobody_hears_its_answer(told: Told, released: Released, registry: Registry) -> None:
    promote(registry, "prod", "bot@1", wishes=Wishes(shadow=("bot@2", 1.0)))
    told.wrong["bot@2"] = ConnectionError
    call = ChatCall("prod", [{"role": "user", "content": "hello"}], 2, SAMPLING)
    assert await released.answer(call) == [Started("bot@1", "digest", 1), Done(0, "stop", 1)]
    assert [event async for ready in released.generate(call) for event in ready] == [Started("bot@1", "digest", 1), Done(0, "stop", 1)]
    await released.classify(ClassifyCall("prod", ["x"]))
    await released.embed(EmbedCall("prod", ["x"]))
    await asyncio.gather(*released._shadows._running)
    copies = [each for each in told.asked if each.model == "bot@2"]
    assert [(copies[0].messages, copies[0].n)] == [(call.messages, 2)]
    assert copies[0].caller.tenant.weight < call.caller.tenant.weight
    assert [type(each) for each in copies] == [ChatCall, ChatCall, ClassifyCall, EmbedCall]
    assert released.report()["shadows"]["bot@2"] == {"requests": 4, "errors": 4, "skipped": 0, "seconds": 0.0}
    assert registry.alias("prod").number == 2, "a shadow's failures move nothing"  # type: ignore[union-attr]


async def test_a_slow_shadow_holds_up_nobody(told: Told, released: Released, registry: Registry) -> None:
    promote(registry, "prod", "bot@1", wishes=Wishes(shadow=("bot@2", 1.0)))
    told.slow.add("bot@2")
    for _ in range(AT_ONCE + 3):
        await released.answer(chat())
    assert released.report()["shadows"]["bot@2"]["skipped"] == 3
    told.held.set()
    await asyncio.gather(*released._shadows._running)
    counts = released.report()["shadows"]["bot@2"]
    assert (counts["requests"], counts["errors"]) == (AT_ONCE, 0)
    assert counts["seconds"] > 0


async def test_a_shadow_gets_its_share_and_nothing_of_what_failed(told: Told, released: Released, registry: Registry) -> None:
    promote(registry, "prod", "bot@1", wishes=Wishes(shadow=("bot@2", 0.25)))
    for _ in range(200):
        await released.answer(chat())
        await asyncio.gather(*released._shadows._running)
    copies = sum(call.model == "bot@2" for call in told.asked)
    assert copies == pytest.approx(50, abs=30)
    told.wrong["bot@1"] = lambda: RequestError("no")
    for _ in range(50):
        await released.answer(chat())
    assert sum(call.model == "bot@2" for call in told.asked) == copies


async def test_a_caller_who_leaves_is_told_to_the_backend_and_not_counted(registry: Registry) -> None:
    class Streams(Told):
        is_closed = False

        async def generate(self, call: ChatCall | CompletionCall) -> AsyncIterator[list[Event]]:
            try:
                for _ in range(100):
                    yield [Started(call.model, "digest", 1)]
            finally:
                self.is_closed = True

    streams = Streams()
    released = Released(streams, registry)
    events: Any = released.generate(chat())
    await anext(events)
    await events.aclose()
    assert streams.is_closed
    assert released.report()["aliases"] == {}


def test_errors_leave_the_window_with_time() -> None:
    window = ErrorWindow(60)
    for second in range(30):
        window.add(is_error=second < 10, now=1000.0 + second)
    assert window.counts(1030) == (30, 10)
    assert window.counts(1065) == (22, 2), "those of the first eight seconds have left"
    assert window.counts(1030 + 61) == (0, 0)
    window.add(is_error=True, now=2000)
    assert window.counts(2000) == (1, 1)


def test_the_header_is_two_words_whatever_the_base_is_called() -> None:
    assert adapter_header(Started("bot@3", "abc", 1)) == {"x-hone-adapter": "bot@3 abc"}
    assert adapter_header(Started("/models/für dich", "abc", 1)) == {"x-hone-adapter": "/models/f%C3%BCr%20dich abc"}
