"""Adapters in memory: loaded once, never dropped in use, refused where they would answer wrongly."""

import asyncio
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from hone.manifest import AdapterManifest
from hone.storage import Home
from serving import adapters
from serving.adapters import AdapterPool
from serving.base import Engine
from serving.errors import AdapterRefusedError, DeadlineError, RequestError, UnreachableError
from serving.loading import AdapterLoader
from tests.serving_fixtures import edit_config, publish
from tests.unit.serving.conftest import Shelf

pytestmark = pytest.mark.anyio

PLAIN: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]}


def fake(name: str) -> Any:
    return SimpleNamespace(ref=f"{name}@1", digest=name)


class Loads:
    """Counts loads, and holds them until told to go on."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.go = threading.Event()
        self.go.set()
        self.error: RequestError | None = None

    def __call__(self, manifest: AdapterManifest) -> Any:
        self.counts[str(manifest.ref)] += 1
        assert self.go.wait(10)
        if self.error:
            raise self.error
        return f"weights of {manifest.ref}"


async def test_many_who_ask_at_once_share_one_load() -> None:
    loads = Loads()
    loads.go.clear()
    pool = AdapterPool(loads, capacity=2)

    async def use() -> Any:
        async with pool.pinned(fake("a")) as served:
            return served

    tasks = [asyncio.create_task(use()) for _ in range(5)]
    await asyncio.sleep(0.05)
    tasks[0].cancel()
    loads.go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == ["weights of a@1"] * 4
    assert loads.counts == {"a@1": 1}


async def test_the_least_recently_used_adapter_leaves_and_never_one_in_use() -> None:
    loads = Loads()
    pool = AdapterPool(loads, capacity=2)
    async with pool.pinned(fake("a")):
        async with pool.pinned(fake("b")):
            pass
        async with pool.pinned(fake("c")):
            assert pool.resident == ["a@1", "c@1"]
    async with pool.pinned(fake("a")):
        pass
    assert loads.counts == {"a@1": 1, "b@1": 1, "c@1": 1}


async def test_where_all_are_in_use_the_next_waits_for_one_to_be_free() -> None:
    pool = AdapterPool(Loads(), capacity=1)
    entered = asyncio.Event()

    async def other() -> None:
        async with pool.pinned(fake("b")):
            entered.set()

    async with pool.pinned(fake("a")):
        task = asyncio.create_task(other())
        await asyncio.sleep(0.05)
        assert pool.resident == ["a@1"]
        assert not entered.is_set()
    await task
    assert pool.resident == ["b@1"]


async def test_who_waits_for_room_gets_it_though_all_adapters_have_requests_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "PATIENCE_S", 0.1)
    loads = Loads()
    pool = AdapterPool(loads, capacity=2)
    answered = Counter[str]()

    async def keeps_asking(name: str) -> None:
        while True:
            async with pool.pinned(fake(name)):
                await asyncio.sleep(0.03)
            answered[name] += 1

    busy = []
    for name in ("a", "b") * 3:  # one after another, so that each adapter has a request at any time
        busy.append(asyncio.create_task(keeps_asking(name)))
        await asyncio.sleep(0.01)
    async with asyncio.timeout(10), pool.pinned(fake("c")):
        assert "c@1" in pool.resident
    before = answered.copy()
    async with asyncio.timeout(10):
        while any(answered[name] < before[name] + 5 for name in ("a", "b")):
            await asyncio.sleep(0.01)
    for task in busy:
        task.cancel()
    await asyncio.gather(*busy, return_exceptions=True)
    assert loads.counts["c@1"] == 1


async def test_nobody_waits_behind_others_for_what_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "PATIENCE_S", 60)
    pool = AdapterPool(Loads(), capacity=2)
    entered, leave = list[str](), {name: asyncio.Event() for name in "abcd"}

    async def use(name: str, label: str) -> None:
        async with pool.pinned(fake(name)):
            entered.append(label)
            await leave[name].wait()

    tasks = []
    for label in ("a", "b", "c, first", "d", "c, second"):
        tasks.append(asyncio.create_task(use(label[0], label)))
        await asyncio.sleep(0.02)
    assert entered == ["a", "b"]
    leave["a"].set()
    async with asyncio.timeout(5):
        while len(entered) < 4:
            await asyncio.sleep(0.01)
    assert entered[2:] == ["c, first", "c, second"], "and not behind d, which there is no room for yet"
    for event in leave.values():
        event.set()
    await asyncio.gather(*tasks)
    assert entered[4:] == ["d"]


async def test_the_wait_for_room_and_for_the_load_ends_at_the_deadline() -> None:
    loads = Loads()
    pool = AdapterPool(loads, capacity=1)
    async with pool.pinned(fake("a")):
        with pytest.raises(DeadlineError, match="before its answer began"):
            async with pool.pinned(fake("b"), deadline=time.monotonic() + 0.05):
                pass
    loads.go.clear()
    with pytest.raises(DeadlineError):
        async with pool.pinned(fake("b"), deadline=time.monotonic() + 0.05):
            pass
    loads.go.set()
    async with pool.pinned(fake("b")) as served:
        assert served == "weights of b@1"
    assert loads.counts == {"a@1": 1, "b@1": 1}


async def test_a_load_that_fails_when_everyone_has_left_is_tried_anew() -> None:
    loads = Loads()
    loads.go.clear()
    loads.error = UnreachableError("no registry")
    pool = AdapterPool(loads, capacity=1)
    with pytest.raises(DeadlineError):
        async with pool.pinned(fake("a"), deadline=time.monotonic() + 0.05):
            pass
    loads.go.set()
    await asyncio.sleep(0.1)
    loads.error = None
    async with pool.pinned(fake("a")) as served:
        assert served == "weights of a@1"


async def test_a_refusal_is_remembered_for_a_while_and_leaves_nothing_behind() -> None:
    loads = Loads()
    loads.error = AdapterRefusedError("no")
    pool = AdapterPool(loads, capacity=1)
    for _ in range(3):
        with pytest.raises(AdapterRefusedError, match="no"):
            async with pool.pinned(fake("a")):
                pass
    assert loads.counts == {"a@1": 1}
    assert pool.resident == []


def refusal(shelf: Shelf, engine: Engine, home: Home, **settings: Any) -> str:
    manifest = publish(home, shelf.base, "odd", **{"seed": 9, **PLAIN} | settings)
    with pytest.raises(AdapterRefusedError) as caught:
        AdapterLoader(type(shelf.registry)(home), engine).load(manifest)
    assert caught.value.status == 500
    return caught.value.message


def test_outputs_that_are_not_the_recorded_ones_are_refused(chat_shelf: Shelf, engine: Engine, home: Home) -> None:
    assert "does not reproduce the outputs recorded" in refusal(chat_shelf, engine, home, shift=0.5)


def test_weights_that_are_not_those_that_were_recorded_are_refused(chat_shelf: Shelf, engine: Engine, home: Home) -> None:
    def swap(folder: Path) -> None:
        state = load_file(folder / "adapter_model.safetensors")
        save_file({name: tensor * 1.05 for name, tensor in state.items()}, folder / "adapter_model.safetensors")

    assert "does not reproduce" in refusal(chat_shelf, engine, home, edit=swap)


def test_a_changed_file_is_refused_by_name(chat_shelf: Shelf, engine: Engine, home: Home) -> None:
    manifest = publish(home, chat_shelf.base, "odd", seed=9, **PLAIN)
    registry = type(chat_shelf.registry)(home)
    with (registry.path(manifest.ref) / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x07")
    with pytest.raises(AdapterRefusedError, match=r"adapter_model\.safetensors has changed"):
        AdapterLoader(registry, engine).load(manifest)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding_A"),
        ({"modules_to_save": ["norm"]}, "brings whole modules (model.layers.0.input_layernorm"),
        ({"edit": lambda folder: edit_config(folder, peft_type="LOHA")}, "LOHA"),
        ({"edit": lambda folder: edit_config(folder, new_variant={"a": 1})}, "new_variant"),
        ({"edit": lambda folder: (folder / "golden.safetensors").unlink()}, "golden.safetensors"),
    ],
)
def test_what_this_engine_does_not_compute_is_refused_by_name(
    chat_shelf: Shelf, engine: Engine, home: Home, settings: dict[str, Any], said: str
) -> None:
    assert said in refusal(chat_shelf, engine, home, **settings)


def test_matrices_that_fit_no_layer_are_refused_by_name(chat_shelf: Shelf, engine: Engine, home: Home) -> None:
    def rename(folder: Path) -> None:
        state = load_file(folder / "adapter_model.safetensors")
        save_file({name.replace("q_proj", "qkv"): tensor for name, tensor in state.items()}, folder / "adapter_model.safetensors")

    assert "self_attn.qkv, which is not a linear layer of this base" in refusal(chat_shelf, engine, home, edit=rename)


def test_versions_that_were_trained_on_one_base_share_a_tokenizer(chat_shelf: Shelf, engine: Engine, home: Home) -> None:
    made = [publish(home, chat_shelf.base, "bot", seed=seed, **PLAIN) for seed in (1, 2)]
    assert made[0].files.keys() == made[1].files.keys() > {"report.html", "tokenizer_config.json"}
    assert made[0].files["report.html"] != made[1].files["report.html"]
    loader = AdapterLoader(type(chat_shelf.registry)(home), engine)
    first, second = (loader.load(manifest) for manifest in made)
    assert first.processor is second.processor
