"""Keys, limits, usage and metrics over HTTP, in front of a replica in the same process."""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from hone.keys import Keys
from hone.storage import Home
from hone.usage import Usage, Used
from serving import metering
from serving.access import KeyRing
from serving.app import _serves_errors
from serving.calls import Event
from serving.engine.fairness import Tenant
from serving.ingress import make_app
from serving.metering import NAMED_AT_MOST, Meter, Tally
from serving.replica import Replica
from tests.unit.serving.conftest import Shelf

USER: Any = [{"role": "user", "content": "hello there"}]
Open = Callable[..., TestClient]


@pytest.fixture(scope="module")
def replica(chat_shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HONE_STORE", f"sqlite:///{tmp_path_factory.mktemp('usage') / 'usage.sqlite3'}")
        replica = Replica(base=str(chat_shelf.base), home=str(chat_shelf.home.root), max_rows=4, name="r1", is_metered=True)
    yield replica
    replica.stop()


@pytest.fixture
def keys(home: Home) -> Keys:
    return Keys(home.store_url)


@pytest.fixture
def open_(replica: Replica, chat_shelf: Shelf, keys: Keys) -> Iterator[Open]:
    """A server in front of the replica, as somebody at `address` meets it."""
    opened: list[TestClient] = []

    def make(*, address: str = "10.1.2.3", auth: Any = "auto", backend: Any = replica) -> TestClient:
        app = make_app(backend, chat_shelf.registry, KeyRing(keys.all, auth=auth))
        client = TestClient(app, client=(address, 5), raise_server_exceptions=False)
        opened.append(client.__enter__())
        return client

    yield make
    for client in opened:
        client.__exit__(None, None, None)


def with_key(client: TestClient, token: str) -> OpenAI:
    return OpenAI(base_url="http://testserver/v1", api_key=token, http_client=client, max_retries=0, _strict_response_validation=True)  # type: ignore[arg-type]


def ask(client: OpenAI, model: str = "wide", **options: Any) -> Any:
    return client.chat.completions.create(model=model, messages=USER, **{"max_tokens": 4, "temperature": 0, **options})


def refused(client: OpenAI, **options: Any) -> openai.RateLimitError:
    """The error of the first of many requests that is over the limit."""
    for _ in range(30):
        try:
            ask(client, **options)
        except openai.RateLimitError as error:
            return error
    pytest.fail("30 requests were not over the limit")


def error_of(response: Any) -> dict[str, Any]:
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return dict(response.json()["error"])


def test_a_key_opens_and_everything_else_is_401(open_: Open, keys: Keys) -> None:
    _, token = keys.create("bot")
    client = open_()
    assert ask(with_key(client, token)).model == "wide@1"
    assert [model.id for model in with_key(client, token).models.list()]
    for path in ("/v1/models", "/v1/models/wide", "/v1/nothing", "/metrics", "/"):
        for headers in ({}, {"authorization": "Bearer "}, {"authorization": f"Basic {token}"}, {"authorization": "Bearer sk-hone-x"}):
            response = client.get(path, headers=headers)
            assert response.status_code == 401, (path, headers)
            assert error_of(response)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
    response = client.post("/v1/chat/completions", content=b"{" * 100)
    assert response.status_code == 401, "nobody's body is looked at"
    with pytest.raises(openai.AuthenticationError):
        ask(with_key(client, "sk-hone-wrong"), stream=True)
    assert client.get("/healthz").json() == {"status": "ok"}, "that it is there, and nothing of who is in memory"


def test_on_this_machine_nothing_is_asked_before_there_are_keys(open_: Open, keys: Keys) -> None:
    for address in ("127.0.0.1", "::1"):
        client = open_(address=address)
        assert ask(with_key(client, "none")).model == "wide@1"
        assert "adapters" in client.get("/healthz").json()
        forwarded = client.get("/v1/models", headers={"x-forwarded-for": "10.0.0.1"})
        assert forwarded.status_code == 401, "a proxy on this machine speaks for others"
    response = open_(address="10.0.0.1").get("/v1/models")
    assert "hone keys create" in error_of(response)["message"]
    assert open_(auth="off").get("/v1/models").status_code == 200
    keys.create("bot")
    assert open_(address="127.0.0.1").get("/v1/models").status_code == 401


def test_a_key_calls_and_sees_its_adapters_alone(open_: Open, keys: Keys, chat_shelf: Shelf) -> None:
    chat_shelf.registry.set_alias("prod", "narrow@1")
    try:
        client = open_()
        seen = {}
        for name, adapters in {"one": ["wide@1"], "by-name": ["wide"], "alias": ["prod"], "pattern": ["n*"], "base": ["llama*"]}.items():
            opened = with_key(client, keys.create(name, adapters=adapters)[1])
            seen[name] = [model.id for model in opened.models.list()]
            called = set()
            for model in ("wide", "wide@1", "narrow", "prod", chat_shelf.base.name):
                headers = {"authorization": f"Bearer {opened.api_key}"}
                answers = [client.get(f"/v1/models/{model}", headers=headers)]
                for stream in (False, True):
                    body = {"model": model, "messages": USER, "max_tokens": 2, "stream": stream}
                    answers.append(client.post("/v1/chat/completions", headers=headers, json=body))
                (status,) = {answer.status_code for answer in answers}
                if status == 200:
                    called.add(model)
                    continue
                assert status == 403
                assert {error_of(answer)["code"] for answer in answers} == {"model_not_allowed"}
            seen[f"{name} calls"] = sorted(called)
        base = [str(chat_shelf.base), chat_shelf.base.name]
        assert seen["one"] == seen["by-name"] == ["wide@1"]
        assert seen["one calls"] == seen["by-name calls"] == ["wide", "wide@1"]
        assert (seen["alias"], seen["alias calls"]) == (["prod"], ["prod"])
        assert (seen["pattern"], seen["pattern calls"]) == (["narrow@1", "prod"], ["narrow", "prod"])
        assert seen["base"] == base
        with pytest.raises(openai.NotFoundError):
            ask(opened, "nobody")
    finally:
        chat_shelf.registry.remove_alias("prod")


def test_the_scopes_of_a_key_are_kept_to(open_: Open, keys: Keys) -> None:
    client = open_()
    tokens = {scope: {"authorization": f"Bearer {keys.create(scope, scopes=[scope])[1]}"} for scope in ("inference", "metrics", "admin")}
    reached = {scope: [client.get(path, headers=h).status_code for path in ("/v1/models", "/metrics")] for scope, h in tokens.items()}
    assert reached == {"inference": [200, 403], "metrics": [403, 200], "admin": [200, 200]}
    assert error_of(client.get("/metrics", headers=tokens["inference"]))["code"] == "insufficient_permissions"


def test_requests_past_the_limit_are_429_with_openais_headers(open_: Open, keys: Keys) -> None:
    client = with_key(open_(), keys.create("bot", requests_per_minute=2, tokens_per_minute=10_000)[1])
    answer = client.chat.completions.with_raw_response.create(model="wide", messages=USER, max_tokens=4)
    assert (answer.headers["x-ratelimit-limit-requests"], answer.headers["x-ratelimit-remaining-requests"]) == ("2", "1")
    assert answer.headers["x-ratelimit-limit-tokens"] == "10000"
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 10_000
    assert {"x-ratelimit-reset-requests", "x-ratelimit-reset-tokens"} <= set(answer.headers)
    assert list(ask(client, stream=True))
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client)
    assert (caught.value.type, caught.value.code) == ("requests", "rate_limit_exceeded")
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30


def test_tokens_are_reserved_and_what_was_not_used_comes_back(open_: Open, keys: Keys) -> None:
    client = with_key(open_(), keys.create("bot", tokens_per_minute=200)[1])
    for stream in (False, True, False, True):  # each may take about 100, and takes some 20
        answer = ask(client, max_tokens=90, stop=["a", "e", "i", "o"], stream=stream)
        if stream:
            list(answer)
    for model in ("nobody", "nobody", "nobody"):
        with pytest.raises(openai.NotFoundError):
            ask(client, model, max_tokens=90)
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client, max_tokens=100, n=2)
    assert caught.value.type == "tokens"
    assert caught.value.response.headers["x-should-retry"] == "false", "it would never fit"
    assert refused(client, max_tokens=60).response.headers["retry-after"]


def test_a_stream_that_is_left_is_settled_by_what_was_made(open_: Open, keys: Keys) -> None:
    short: dict[str, Any] = {"max_tokens": 120, "temperature": 1, "seed": 7}
    free = with_key(open_(), keys.create("free")[1])
    assert ask(free, **short).usage.total_tokens < 80, "of 120 and more that are reserved"
    client = with_key(open_(), keys.create("bot", tokens_per_minute=300)[1])
    for _ in range(3):
        with ask(client, stream=True, **short) as stream:
            next(iter(stream))
    assert refused(client, max_tokens=120).type == "tokens"


def test_a_keys_project_is_its_tenant_in_the_engine(open_: Open, keys: Keys, replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tenant] = []
    engine = type(replica._engine)
    add = engine.add

    def noted(self: Any, served: Any, rows: Any) -> None:
        seen.extend(row.tenant for row in rows)
        add(self, served, rows)

    monkeypatch.setattr(engine, "add", noted)
    client = open_()
    for name, project, weight in (("a", "acme", 3.0), ("b", "acme", 1.0), ("c", "other", 0.5)):
        ask(with_key(client, keys.create(name, project=project, weight=weight)[1]))
    assert seen == [Tenant("acme", 3.0), Tenant("acme", 1.0), Tenant("other", 0.5)]


def test_usage_is_in_the_store_by_key_and_adapter(open_: Open, keys: Keys, replica: Replica) -> None:
    made, token = keys.create("bot", project="acme")
    client = with_key(open_(), token)
    answers = [ask(client, name) for name in ("wide", "narrow", "wide")]
    usage = Usage(replica._meter._url or "")
    expected = {name: [a.usage for a in answers if a.model == name] for name in ("wide@1", "narrow@1")}

    def counted() -> dict[str, Used]:
        return {adapter: used for (key, adapter), used in usage.by("key", "adapter").items() if key == made.id}

    until(lambda: sum(used.requests for used in counted().values()) == 3)
    for name, used in counted().items():
        assert used.requests == len(expected[name])
        assert used.prompt_tokens == sum(each.prompt_tokens for each in expected[name])
        assert used.completion_tokens == sum(each.completion_tokens for each in expected[name])
    assert replica._meter.keys.copy()["acme/bot"].used.requests == 3


def test_metrics_agree_with_what_was_done(open_: Open, keys: Keys) -> None:
    client = open_()
    bot = with_key(client, keys.create("bot", project="metered")[1])
    reader = {"authorization": f"Bearer {keys.create('prometheus', scopes=['metrics'])[1]}"}

    def read() -> dict[tuple[str, ...], float]:
        response = client.get("/metrics", headers=reader)
        assert response.headers["content-type"].startswith("text/plain; version=")
        families = text_string_to_metric_families(response.text)
        return {(s.name, *(s.labels[k] for k in sorted(s.labels))): s.value for family in families for s in family.samples}

    before = read()
    made = [ask(bot, "wide", max_tokens=9).usage for _ in range(3)]
    with pytest.raises(openai.NotFoundError):
        ask(bot, "nobody")
    after = read()

    def grown(*series: str) -> float:
        return after[series] - before.get(series, 0)

    tokens = sum(each.completion_tokens for each in made)
    assert grown("hone_http_requests_total", "/v1/chat/completions", "200") == 3
    assert grown("hone_http_requests_total", "/v1/chat/completions", "404") == 1
    assert grown("hone_http_request_seconds_count", "/v1/chat/completions") == 4
    assert grown("hone_completion_tokens_total", "r1") == tokens
    assert grown("hone_prompt_tokens_total", "r1") == sum(each.prompt_tokens for each in made)
    assert grown("hone_answers_total", "r1") == 3
    assert grown("hone_time_to_first_token_seconds_count", "r1") == 3
    assert grown("hone_time_between_tokens_seconds_count", "r1") == tokens - 3
    assert grown("hone_queue_wait_seconds_count", "r1") == 3
    assert grown("hone_batch_rows_sum", "r1") == tokens - 3
    assert grown("hone_key_requests_total", "metered/bot", "r1") == 3
    assert grown("hone_key_tokens_total", "metered/bot", "completion", "r1") == tokens
    assert grown("hone_adapter_tokens_total", "wide@1", "completion", "r1") == tokens
    for what, name in (("adapter", "wide@1"), ("key", "metered/bot")):
        assert grown(f"hone_{what}_time_to_first_token_seconds_count", name, "r1") == 3
        assert 0 < grown(f"hone_{what}_time_to_first_token_seconds_sum", name, "r1") <= 3 * 60
    assert grown("hone_cached_tokens_total", "r1") == grown("hone_adapter_tokens_total", "wide@1", "cached", "r1")
    assert after["hone_adapter_load_seconds_count", "r1"] >= 1
    assert after["hone_adapters_resident", "r1"] >= 1
    assert (after["hone_slots", "r1"], after["hone_rows_running", "r1"], after["hone_replicas",]) == (4, 0, 1)
    assert after["hone_time_to_first_token_seconds_bucket", "+Inf", "r1"] == after["hone_time_to_first_token_seconds_count", "r1"]
    assert not [series for series in after if "nobody" in series], "names that requests make up are no labels"


def test_a_thousand_adapters_are_a_bounded_number_of_series() -> None:
    tally = Tally()
    for n in range(1000):
        tally.add(f"a{n}@1", Used(1, 2, 0, 3))
    tally.add("a0@1", Used(1))
    copy = tally.copy()
    assert len(copy) == NAMED_AT_MOST + 1
    assert copy["a0@1"].used == Used(2, 2, 0, 3)
    assert copy["others"].used.requests == 1000 - NAMED_AT_MOST


def test_usage_waits_in_memory_while_the_store_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "FLUSH_S", 0.02)
    folder = tmp_path / "store"
    folder.write_text("in the way")
    meter = Meter(f"sqlite:///{folder / 'usage.sqlite3'}")
    from serving.callers import ANONYMOUS

    for _ in range(3):
        meter.add(ANONYMOUS, "a@1", Used(1, 10, 0, 5))
        time.sleep(0.1)
    assert meter.unwritten == 1
    folder.unlink()
    until(lambda: meter.unwritten == 0)
    meter.add(ANONYMOUS, "a@1", Used(1, 10, 0, 5))
    meter.stop()
    assert Usage(f"sqlite:///{folder / 'usage.sqlite3'}").by("key", "adapter") == {("anonymous", "a@1"): Used(4, 40, 0, 20)}


class Lost(Replica):
    """A replica whose process is gone."""

    def __init__(self) -> None:
        """Holds nothing."""

    async def answer(self, call: Any) -> list[Event]:  # noqa: ARG002
        from ray.exceptions import ActorDiedError

        with _serves_errors():
            raise ActorDiedError
        return []

    async def generate(self, call: Any) -> AsyncIterator[list[Event]]:
        yield await self.answer(call)


def test_what_ray_raises_is_said_as_openai_says_it(open_: Open) -> None:
    client = open_(auth="off", backend=Lost())
    for stream in (False, True):
        body = {"model": "wide", "messages": USER, "stream": stream}
        response = client.post("/v1/chat/completions", json=body)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert error_of(response)["code"] == "replica_lost"


def test_the_openapi_document_says_what_is_true(open_: Open) -> None:
    document = open_(address="10.0.0.1").get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert {"400", "401", "403", "404", "429", "500", "503"} <= set(operation["responses"])
            assert "422" not in operation["responses"]
            assert ("security" in operation) == (path not in ("/healthz", "/openapi.json"))
    assert "HTTPValidationError" not in str(document)
    chat = document["components"]["schemas"]["ChatRequest"]
    assert set(chat["required"]) == {"model", "messages"}
    assert {each.get("type") for each in chat["properties"]["stop"]["anyOf"]} == {"string", "array", "null"}
    content = document["components"]["schemas"]["Message"]["properties"]["content"]
    assert {each["type"] for each in content["anyOf"]} == {"string", "array", "null"}, "null where an assistant calls tools"


def until(true: Callable[[], bool], *, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
