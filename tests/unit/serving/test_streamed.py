"""Everything above an engine is the same for an engine that gives tokens as they come: what it answers over HTTP is what the slot engine
answers, word for word; and rows that end early, late or not at all leave nothing behind."""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

from hone.keys import Keys
from hone.manifest import AdapterManifest
from hone.registry import Registry
from hone.storage import Home
from serving.access import KeyRing, StoreKeys
from serving.calls import CompletionCall, Event, Failed, Sampling
from serving.engine.fairness import Tenant
from serving.errors import LostEngineError, StoppingError
from serving.ingress import make_app
from serving.replica import Replica
from serving.streamed import StreamedEngine
from tests.disturbed import wait_for
from tests.serving_fixtures import publish, publish_trained
from tests.tiny import make_llama
from tests.unit.serving.conftest import Shelf
from tests.unit.serving.plain_source import PlainSource, plain_engine
from tests.unit.serving.rooms import USER, rows_of
from tests.unit.serving.rows import recorder, row

HELLO: dict[str, Any] = {"messages": USER, "max_tokens": 12}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}, "stars": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["mood", "stars"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA, "strict": True}}
TOOLS = [{"type": "function", "function": {"name": "judge", "parameters": SCHEMA}}]
GREEDY = Sampling(max_tokens=40, temperature=0.0, top_p=1.0, seed=None, stop=(), logit_bias={2: -100.0})


@dataclass(frozen=True)
class Served:
    replica: Replica
    engine: StreamedEngine
    source: PlainSource


@pytest.fixture
def made(chat_shelf: Shelf) -> Iterator[Served]:
    engine, source = plain_engine(chat_shelf.home, chat_shelf.base, max_rows=2)
    replica = Replica(base=str(chat_shelf.base), home=str(chat_shelf.home.root), engine=engine, max_adapters=2)
    yield Served(replica, engine, source)
    replica.stop()


@pytest.fixture(scope="module")
def both(chat_shelf: Shelf) -> Iterator[tuple[TestClient, TestClient]]:
    """The slot engine and the other one, behind the same routes and of the same home."""
    engine, _ = plain_engine(chat_shelf.home, chat_shelf.base)
    slots = Replica(base=str(chat_shelf.base), home=str(chat_shelf.home.root), max_context=128)
    streamed = Replica(base=str(chat_shelf.base), home=str(chat_shelf.home.root), engine=engine)
    with TestClient(make_app(slots, chat_shelf.registry)) as one, TestClient(make_app(streamed, chat_shelf.registry)) as other:
        yield one, other
    slots.stop()
    streamed.stop()


class Near(float):
    """Equal to what a sum in another order gives."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and abs(self - other) < 1e-3

    __hash__ = None  # type: ignore[assignment]


def said(client: TestClient, route: str, body: dict[str, Any]) -> tuple[int, str | None, Any]:
    """What is the same each time: status, who answered, and the body without its id and its moment. Its log probabilities are about the
    same."""
    answered = client.post(route, json=body)
    lines = [line.removeprefix("data: ") for line in answered.text.splitlines() if line] if body.get("stream") else [answered.text]
    found = [json.loads(line, parse_float=Near) for line in lines if line != "[DONE]"]
    for each in found:
        each.pop("id", None)
        each.pop("created", None)
    return answered.status_code, answered.headers.get("x-hone-adapter"), found


CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "the base": (COMPLETE, {"model": "BASE", "prompt": "the cat", "max_tokens": 12, "temperature": 0}),
    "an adapter": (CHAT, {"model": "wide", **HELLO, "temperature": 0}),
    "a version": (CHAT, {"model": "narrow@1", **HELLO, "temperature": 0}),
    "choices with a seed": (CHAT, {"model": "wide", **HELLO, "n": 3, "seed": 7, "temperature": 1.3, "top_p": 0.9, "min_p": 0.01}),
    "penalties and a bias": (
        CHAT,
        {"model": "wide", **HELLO, "temperature": 0, "frequency_penalty": 1.5, "presence_penalty": 0.5, "logit_bias": {"40": 30}},
    ),
    "log probabilities": (CHAT, {"model": "wide", **HELLO, "temperature": 0, "logprobs": True, "top_logprobs": 4}),
    "several prompts": (COMPLETE, {"model": "narrow", "prompt": ["the", "why"], "n": 2, "seed": 1, "max_tokens": 6, "logprobs": 2}),
    "too long": (COMPLETE, {"model": "narrow", "prompt": "a", "max_tokens": 1000}),
    "no such model": (CHAT, {"model": "nobody", **HELLO}),
    "no vectors": ("/v1/embeddings", {"model": "wide", "input": "a"}),
    "no head": ("/v1/classify", {"model": "wide", "input": "a"}),
    "tokens": ("/tokenize", {"model": "wide", "prompt": "the cat"}),
    "a schema": (CHAT, {"model": "wide", **HELLO, "max_tokens": 60, "temperature": 0, "response_format": FORMAT}),
    "a schema and a seed": (CHAT, {"model": "narrow", **HELLO, "max_tokens": 60, "n": 2, "seed": 3, "response_format": FORMAT}),
}


@pytest.mark.parametrize("name", ASKED)
def test_it_answers_what_the_slot_engine_answers(both: tuple[TestClient, TestClient], chat_shelf: Shelf, name: str) -> None:
    route, body = ASKED[name]
    asked = {**body, "model": str(chat_shelf.base) if body["model"] == "BASE" else body["model"]}
    first, second = (said(client, route, asked) for client in both)
    first[2][0].get("usage", {}).pop("prompt_tokens_details", None)  # how much was kept is the engine's own
    second[2][0].get("usage", {}).pop("prompt_tokens_details", None)
    assert second == first


def test_a_stop_string_ends_it_and_its_tokens_are_not_made_any_further(both: tuple[TestClient, TestClient], made: Served) -> None:
    body = {"model": "wide", **HELLO, "max_tokens": 30, "temperature": 0, "logit_bias": {"2": -100}}
    whole = said(both[0], CHAT, body)[2][0]["choices"][0]["message"]["content"]
    stop = whole[4:6]
    first, second = (said(client, CHAT, {**body, "stop": stop}) for client in both)
    assert first[2][0]["choices"] == second[2][0]["choices"]
    assert second[2][0]["choices"][0]["message"]["content"] == whole[: whole.index(stop)]
    assert second[2][0]["usage"]["completion_tokens"] < 30
    with TestClient(make_app(made.replica, made.replica._catalog.registry)) as client:
        client.post(CHAT, json={**body, "stop": stop})
        wait_for(lambda: made.source.given_up == 1)  # the answer is there before the engine has been told


def test_a_stream_brings_the_same_text(both: tuple[TestClient, TestClient]) -> None:
    body = {"model": "wide", **HELLO, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    texts = []
    for client in both:
        status, _, chunks = said(client, CHAT, body)
        assert status == 200
        texts.append("".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]))
        assert chunks[-1]["usage"]["completion_tokens"] > 0
    assert texts[0] == texts[1] != ""


def test_aliases_keys_usage_and_metrics_are_those_of_every_engine(llama: Path, tmp_path: Path) -> None:
    home = Home(tmp_path)
    publish(home, llama, "bot", seed=1, r=2, target_modules=["q_proj"])
    publish(home, llama, "other", seed=2, r=2, target_modules=["q_proj"])
    Registry(home).set_alias("prod", "bot@1")
    _, token = Keys(home.store_url).create("caller", adapters=["bot*", "prod"])
    engine, _ = plain_engine(home, llama)
    replica = Replica(base=str(llama), home=str(tmp_path), engine=engine, name="r", is_metered=True)
    who = {"authorization": f"Bearer {token}"}
    with TestClient(make_app(replica, Registry(home), KeyRing(StoreKeys(home.store_url)))) as client:
        assert client.post(CHAT, json={"model": "prod", **HELLO}).status_code == 401
        assert client.post(CHAT, json={"model": "other", **HELLO}, headers=who).status_code in (403, 404)
        answered = client.post(CHAT, json={"model": "prod", **HELLO, "n": 2}, headers=who)
        assert answered.status_code == 200, answered.text
        assert answered.headers["x-hone-adapter"].startswith("bot@1 ")
        replica.stop()  # an answer is counted after it was told
        [measured] = asyncio.run(replica.measured())
    usage = answered.json()["usage"]
    assert measured.counters["answers"] == 2
    assert measured.counters["completion_tokens"] == usage["completion_tokens"]
    assert measured.counters["prompt_tokens"] == 2 * usage["prompt_tokens"]
    assert measured.counters["cached_tokens"] == 2
    assert sum(measured.histograms["time_to_first_token_seconds"].counts) == 2
    assert sum(measured.histograms["queue_wait_seconds"].counts) == 2
    assert measured.gauges["adapters_resident"] == 1
    assert measured.keys["default/caller"].used.completion_tokens == usage["completion_tokens"]


def falsify(folder: Path) -> None:
    """Other recorded outputs. (The same ones, all shifted by a number, are the same probabilities.)"""
    golden = load_file(folder / "golden.safetensors")
    save_file({**golden, "logits": golden["logits"].flip(-1).contiguous()}, folder / "golden.safetensors")


def trained(home: Home, base: Path, name: str, **settings: Any) -> AdapterManifest:
    return publish_trained(home, base, name, task="chat", method="lora", rows=rows_of("chat"), **settings)


def test_what_it_does_not_take_is_refused_with_the_reason(llama: Path, tmp_path: Path) -> None:
    home = Home(tmp_path)
    publish(home, llama, "high", seed=1, r=16, target_modules=["q_proj"])
    publish(home, llama, "patterned", seed=1, r=2, target_modules=["q_proj"], alpha_pattern={"q_proj": 9})
    publish(home, llama, "false", seed=1, r=2, target_modules=["q_proj"], edit=falsify)
    publish(home, llama, "tone", seed=1, r=2, target_modules=["q_proj"], labels=["angry", "calm"])
    publish(home, llama, "fine", seed=1, r=2, target_modules=["q_proj"])
    trained(home, llama, "dora", use_dora=True, r=2)
    publish_trained(home, llama, "factors", task="chat", method="ia3", rows=rows_of("chat"))
    engine, source = plain_engine(home, llama, max_lora_rank=8)
    replica = Replica(base=str(llama), home=str(tmp_path), engine=engine)
    with TestClient(make_app(replica, Registry(home))) as client:
        answers = {
            name: client.post(CHAT, json={"model": name, **HELLO}) for name in ("high", "patterned", "false", "dora", "factors", "tone")
        }
        assert client.post(CHAT, json={"model": "fine", **HELLO}).status_code == 200
        listed = [model["id"] for model in client.get("/v1/models").json()["data"]]
    replica.stop()
    told = {name: (answer.status_code, answer.json()["error"]["message"]) for name, answer in answers.items()}
    assert told["high"] == (500, "high@1 cannot be served: its rank is 16, and this server takes up to 8; raise vllm.max_lora_rank")
    assert told["patterned"][0] == 500
    assert "alpha_pattern" in told["patterned"][1]
    assert told["false"][0] == 500
    assert "does not reproduce the outputs" in told["false"][1]
    for name in ("dora", "factors"):
        assert told[name][0] == 404
        assert f"hone export {name}@1 --format merged" in told[name][1]
        assert f"{name}@1" not in listed
    assert told["tone"][0] == 404
    assert "is for text-classification" in told["tone"][1]
    assert "high@1" in listed
    assert source.loaded == ["false@1", "fine@1"]
    assert source.unloaded == ["false@1"]


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_tools_are_called_as_by_the_slot_engine(tmp_path: Path, choice: str) -> None:
    home, base = Home(tmp_path / "home"), make_llama(tmp_path / "base", max_position_embeddings=1024)
    engine, _ = plain_engine(home, base, max_context=1024)
    body = {"model": base.name, **HELLO, "max_tokens": 100, "temperature": 0, "logit_bias": {"2": -100}}
    body |= {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    answers = []
    for replica in (Replica(base=str(base), home=str(home.root)), Replica(base=str(base), home=str(home.root), engine=engine)):
        with TestClient(make_app(replica, Registry(home))) as client:
            [answer] = client.post(CHAT, json=body).json()["choices"]
        replica.stop()
        answers.append((answer["message"]["content"], called(answer), answer["finish_reason"]))
    assert answers[0] == answers[1]
    assert bool(answers[0][1]) == (choice == "required")


def called(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [call["function"] for call in answer["message"].get("tool_calls") or []]


def test_an_engine_that_does_not_keep_to_the_schema_is_not_passed_on(made: Served, chat_shelf: Shelf) -> None:
    made.source.is_deaf = True
    with TestClient(make_app(made.replica, chat_shelf.registry)) as client:
        refused = client.post(CHAT, json={"model": "narrow", **HELLO, "temperature": 0, "response_format": {"type": "json_object"}})
    assert refused.status_code == 500
    assert "left the form that this request's schema or tools ask for" in refused.json()["error"]["message"]
    wait_for(lambda: made.engine.running == 0)


def test_what_leaves_the_pool_leaves_the_engine(made: Served, chat_shelf: Shelf) -> None:
    publish(chat_shelf.home, chat_shelf.base, "third", seed=9, r=2, target_modules=["v_proj"])
    with TestClient(make_app(made.replica, chat_shelf.registry)) as client:
        for name in ("wide", "narrow", "wide", "third", "narrow"):
            assert client.post(CHAT, json={"model": name, **HELLO, "max_tokens": 2}).status_code == 200
    made.replica.stop()
    assert made.source.loaded == ["wide@1", "narrow@1", "third@1", "narrow@1"]
    assert made.source.unloaded == ["narrow@1", "wide@1"]
    assert made.source.is_stopped


pytestmark = pytest.mark.anyio


async def pending(replica: Replica, call: CompletionCall, *, running: int, waiting: int) -> "asyncio.Task[list[Event]]":
    task = asyncio.create_task(replica.answer(call))
    async with asyncio.timeout(60):
        while ((status := await replica.status()).running, status.waiting) != (running, waiting):
            await asyncio.sleep(0)
    return task


def held(made: Served) -> None:
    """No answer gets further than its first token."""
    made.engine.streams.call(_cleared(made.source)).result()


async def _cleared(source: PlainSource) -> None:
    source.going.clear()


async def test_a_caller_that_goes_away_is_given_up_in_the_engine_at_once(made: Served) -> None:
    held(made)
    task = await pending(made.replica, CompletionCall("wide", ["the cat", "why does", "it"], 1, GREEDY), running=2, waiting=1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(60):
        while (status := await made.replica.status()).running or status.waiting:
            await asyncio.sleep(0)
    assert made.source.given_up == 2
    assert (len(made.source.begun), (await made.replica.status()).completed) == (2, 0)


def failed(events: list[Event]) -> Any:
    return next(event.error for event in events if isinstance(event, Failed))


async def test_a_time_limit_ends_what_runs_and_what_waits(made: Served) -> None:
    held(made)
    await pending(made.replica, CompletionCall("wide", ["the cat"], 1, GREEDY), running=1, waiting=0)
    limited = Sampling(**{**vars(GREEDY), "timeout_s": 0.3})
    running, waiting = await asyncio.gather(
        made.replica.answer(CompletionCall("wide", ["why"], 1, limited)), made.replica.answer(CompletionCall("wide", ["it"], 1, limited))
    )
    assert {failed(each).status for each in (running, waiting)} == {504}
    assert len(made.source.begun) == 2


async def test_an_engine_that_is_gone_is_told_to_everyone_and_the_replica_is_given_up(made: Served) -> None:
    held(made)
    await made.replica.check_health()
    tasks = [await pending(made.replica, CompletionCall("wide", ["a", "b", "c"], 1, GREEDY), running=2, waiting=1)]
    made.source.lost = True
    made.engine.streams._loop.call_soon_threadsafe(made.source.going.set)
    assert isinstance(failed(await tasks[0]), LostEngineError)
    assert isinstance(failed(await made.replica.answer(CompletionCall("wide", ["d"], 1, GREEDY))), LostEngineError)
    with pytest.raises(LostEngineError):
        await made.replica.check_health()


async def test_when_it_stops_whoever_waits_is_told(made: Served) -> None:
    held(made)
    task = await pending(made.replica, CompletionCall("wide", ["a", "b", "c"], 1, GREEDY), running=2, waiting=1)
    await asyncio.to_thread(made.replica.stop)
    assert isinstance(failed(await task), StoppingError)


def test_tenants_share_by_tokens(made: Served) -> None:
    """One with many requests does not keep another waiting for all of them."""
    held(made)
    base = made.engine.base
    busy = [row(base, [5, 6, 7, 8], tenant=Tenant("busy"), max_tokens=4, ends=False) for _ in range(6)]
    other = row(base, [9, 10], tenant=Tenant("other"), max_tokens=4, ends=False)
    told = [recorder(each) for each in [*busy, other]]
    made.engine.add(base, busy)
    made.engine.add(base, [other])
    made.engine.streams._loop.call_soon_threadsafe(made.source.going.set)
    deadline = time.monotonic() + 60
    while not all(each.ended for each in told) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(each.ended for each in told)
    assert made.source.begun.index(other) == 2  # behind the two that were running already
    assert made.engine.measures.completion_tokens == 7 * 4
