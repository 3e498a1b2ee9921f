"""Releases over HTTP as OpenAI's client sees them: a real replica behind the routes, in this process."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from starlette.testclient import TestClient

from hone.promotion import Wishes, promote, roll_back
from hone.registry import Registry
from hone.releases import RollbackPolicy
from hone.storage import Home
from serving.ingress import make_app
from serving.replica import Replica
from tests.serving_fixtures import publish
from tests.unit.serving.conftest import Shelf

USER: Any = [{"role": "user", "content": "hello there"}]
ASK: dict[str, Any] = {"messages": USER, "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def registry(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """bot@1, bot@2, and bot@3, which does not answer as it was recorded."""
    home = Home(tmp_path_factory.mktemp("released"))
    for seed in (1, 2):
        publish(home, llama, "bot", seed=seed, r=4, target_modules="all-linear")
    publish(home, llama, "bot", seed=3, shift=1.0, r=4, target_modules="all-linear")
    return Registry(home)


@pytest.fixture(scope="module")
def http(registry: Registry, llama: Path) -> Iterator[TestClient]:
    replica = Replica(base=str(llama), home=str(registry.root.parent), max_rows=4)
    with TestClient(make_app(replica, registry), raise_server_exceptions=False) as client:
        yield client
    replica.stop()


@pytest.fixture(scope="module")
def client(http: TestClient) -> OpenAI:
    return OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0)  # type: ignore[arg-type]


def header(registry: Registry, version: str) -> str:
    return f"{version} {registry.resolve(version).digest}"


def test_a_canary_answers_its_share_and_every_answer_says_who_gave_it(client: OpenAI, registry: Registry) -> None:
    promote(registry, "prod", "bot@1")
    promote(registry, "prod", "bot@2", wishes=Wishes(share=0.5))
    texts: dict[str, set[str]] = {"bot@1": set(), "bot@2": set()}
    for turn in range(40):
        raw = client.chat.completions.with_raw_response.create(model="prod", **ASK)
        answer = raw.parse()
        assert raw.headers["x-hone-adapter"] == header(registry, answer.model)
        texts[answer.model].add(answer.choices[0].message.content or "")
        if turn > 10 and all(texts.values()):
            break
    assert [len(each) for each in texts.values()] == [1, 1]
    assert texts["bot@1"] != texts["bot@2"]
    for version, text in texts.items():
        assert {client.chat.completions.create(model=version, **ASK).choices[0].message.content} == text


def test_streams_name_version_and_digest_too(client: OpenAI, registry: Registry) -> None:
    promote(registry, "prod", "bot@2")
    with client.chat.completions.with_streaming_response.create(model="prod", stream=True, **ASK) as raw:
        assert raw.headers["x-hone-adapter"] == header(registry, "bot@2")
        assert {chunk.model for chunk in raw.parse()} == {"bot@2"}
    raw_text = client.completions.with_raw_response.create(model="prod", prompt="the", max_tokens=2)
    assert raw_text.headers["x-hone-adapter"] == header(registry, "bot@2")


@pytest.mark.parametrize("field", ["user", "safety_identifier"])
def test_a_sticky_alias_goes_by_the_requests_own_user(client: OpenAI, registry: Registry, field: str) -> None:
    promote(registry, "prod", "bot@1")
    promote(registry, "prod", "bot@2", wishes=Wishes(share=0.5, sticky=True))
    served = [{client.chat.completions.create(model="prod", **ASK, **{field: f"user-{n}"}).model for _ in range(3)} for n in range(8)]
    assert all(len(versions) == 1 for versions in served)
    assert set.union(*served) == {"bot@1", "bot@2"}
    promote(registry, "prod", "bot@1", wishes=Wishes(sticky=False))


def test_a_user_that_is_no_text_is_a_400(http: TestClient) -> None:
    response = http.post("/v1/chat/completions", json={"model": "prod", **ASK, "user": 5})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "user")


def test_a_promoted_version_answers_the_next_request_and_a_rollback_too(client: OpenAI, registry: Registry) -> None:
    promote(registry, "prod", "bot@1")
    assert client.chat.completions.create(model="prod", **ASK).model == "bot@1"
    promote(registry, "prod", "bot@2")
    assert client.chat.completions.create(model="prod", **ASK).model == "bot@2"
    roll_back(registry, "prod")
    assert client.chat.completions.create(model="prod", **ASK).model == "bot@1"


def test_a_version_that_answers_wrongly_is_taken_back_under_way(client: OpenAI, http: TestClient, registry: Registry) -> None:
    promote(registry, "prod", "bot@1")
    promote(registry, "prod", "bot@3", wishes=Wishes(rollback=RollbackPolicy(error_rate=0.2, min_requests=4)))
    for _ in range(4):
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="prod", **ASK)
        assert caught.value.code == "adapter_refused"
    give_up = time.monotonic() + 60
    while registry.resolve("prod").version == 3 and time.monotonic() < give_up:
        http.get("/healthz")
    state = registry.alias("prod").current  # type: ignore[union-attr]
    assert (state.main.version, state.by.split()[0]) == ("bot@1", "server")
    assert "4 of 4 requests to bot@3 failed" in state.why
    assert client.chat.completions.create(model="prod", **ASK).model == "bot@1"
    assert http.get("/v1/releases").json()["aliases"]["prod"]["bot@3"] == {"requests": 4, "errors": 4}


def test_a_shadow_that_fails_is_counted_and_not_heard(client: OpenAI, http: TestClient, registry: Registry) -> None:
    promote(registry, "prod", "bot@1", wishes=Wishes(shadow=("bot@3", 1.0), rollback=None))
    assert client.chat.completions.create(model="prod", **ASK).model == "bot@1"
    give_up = time.monotonic() + 60
    while not (counts := http.get("/v1/releases").json()["shadows"].get("bot@3", {})).get("requests") and time.monotonic() < give_up:
        pass
    assert (counts["requests"], counts["errors"]) == (1, 1)
    promote(registry, "prod", "bot@1", wishes=Wishes(shadow=None))


def test_classes_and_vectors_name_version_and_digest_too(label_shelf: Shelf) -> None:
    replica = Replica(base=str(label_shelf.base), home=str(label_shelf.home.root), max_rows=4)
    promote(label_shelf.registry, "current", "topic@1")
    try:
        with TestClient(make_app(replica, label_shelf.registry)) as http:
            expected = header(label_shelf.registry, "topic@1")
            for route in ("/v1/classify", "/v1/embeddings"):
                response = http.post(route, json={"model": "current", "input": "the cat", "user": "ann"})
                assert (response.status_code, response.headers["x-hone-adapter"]) == (200, expected), response.text
    finally:
        replica.stop()
        label_shelf.registry.remove_alias("current")
