"""The server as its users meet it: Ray Serve on a localhost port, driven by OpenAI's own client and by plain HTTP."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from ray import serve

from hone.ports import free_port
from hone.registry import Registry
from hone.storage import Home
from serving.app import ServeArgs, build
from tests.serving_fixtures import greedy_alone, publish, reload_peft

USER: Any = [{"role": "user", "content": "hello there, why does it rain?"}]
LABELS = {"tone": ["angry", "calm"], "topic": ["art", "news", "sport"]}


class Server:
    """A running application."""

    def __init__(self, home: Home, base: Path, port: int) -> None:
        self.home = home
        self.base = base
        self.port = port
        self.registry = Registry(home)

    @property
    def client(self) -> OpenAI:
        """Refuses answers that are not as OpenAI's types say."""
        return self.open(strict=True)

    def open(self, *, strict: bool) -> OpenAI:
        url = f"http://127.0.0.1:{self.port}/v1"
        return OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60, _strict_response_validation=strict)

    def http(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, str], Any]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            payload = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, payload, {"content-type": "application/json"})
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, json.loads(response.read())
        finally:
            connection.close()

    def chat(self, model: str, **options: Any) -> Any:
        settings: dict[str, Any] = {"temperature": 0, "max_tokens": 12} | options
        return self.client.chat.completions.create(model=model, messages=USER, **settings)

    def text(self, model: str, **options: Any) -> str:
        return str(self.chat(model, **options).choices[0].message.content)

    def status(self) -> dict[str, Any]:
        return dict(self.http("GET", "/healthz")[2])


def until(true: Callable[[], bool], *, seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def served(local_ray: None, llama: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:  # noqa: ARG001
    """A chat server and a classification server, two applications on one port."""
    port = free_port()
    home = Home(tmp_path_factory.mktemp("home"))
    publish(home, llama, "narrow", seed=1, r=2, target_modules=["q_proj", "v_proj"])
    publish(home, llama, "wide", seed=2, r=8, target_modules="all-linear")
    for n, (name, labels) in enumerate(LABELS.items()):
        publish(home, bert, name, seed=n, labels=labels, r=4, target_modules=["query", "value"])
    publish(home, llama, "broken", seed=3, shift=0.5, r=2, target_modules=["q_proj"])
    Registry(home).set_alias("prod", "wide@1")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(ServeArgs(base=str(llama), home=str(home.root), max_rows=4, max_queued=8)), name="chat", route_prefix="/")
    serve.run(build(ServeArgs(base=str(bert), home=str(home.root))), name="classify", route_prefix="/encoder")
    yield {"chat": Server(home, llama, port), "encoder": Server(home, bert, port)}
    serve.shutdown()


@pytest.fixture
def server(served: dict[str, Server]) -> Server:
    return served["chat"]


def test_the_client_lists_and_retrieves_models(server: Server) -> None:
    ids = [model.id for model in server.client.models.list()]
    assert ids == [str(server.base), server.base.name, "broken@1", "narrow@1", "wide@1", "prod"]
    for name in [*ids, "wide"]:
        model = server.client.models.retrieve(name)
        assert model.id == name
    assert server.client.models.retrieve("prod").to_dict()["adapter"] == "wide@1"


def test_chat_answers_as_transformers_does_with_that_adapter(server: Server) -> None:
    for name in ("narrow", "wide"):
        manifest = server.registry.resolve(name)
        model = reload_peft(server.home, server.base, manifest)
        from transformers import AutoTokenizer

        from hone.chat import encode_prompt, end_of_turn_ids, ensure_template

        tokenizer = AutoTokenizer.from_pretrained(server.base)
        ensure_template(tokenizer)
        ids = greedy_alone(model, encode_prompt(tokenizer, USER), tokens=30, end_ids=sorted(end_of_turn_ids(tokenizer)))
        answer = server.chat(name, max_tokens=30)
        assert answer.choices[0].message.content == tokenizer.decode(ids, skip_special_tokens=True).rstrip("�")
        assert answer.usage.completion_tokens == len(ids)
        assert answer.model == f"{name}@1"


def test_adapters_called_at_once_answer_as_each_alone(server: Server) -> None:
    names = ["narrow", "wide", "prod", server.base.name] * 2  # as many as may wait
    alone = {name: server.text(name, max_tokens=60) for name in set(names)}
    assert len({alone["narrow"], alone["wide"], alone[server.base.name]}) == 3
    with ThreadPoolExecutor(len(names)) as pool:
        together = list(pool.map(lambda name: server.text(name, max_tokens=60), names))
    assert together == [alone[name] for name in names]


def test_the_client_streams(server: Server) -> None:
    whole = server.chat("wide", max_tokens=40)
    chunks = list(server.chat("wide", max_tokens=40, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [whole.choices[0].finish_reason]


def test_completions_and_seeds(server: Server) -> None:
    def complete(seed: int) -> list[str]:
        answer = server.client.completions.create(model="narrow", prompt=["the cat", "why"], n=2, seed=seed, temperature=1, max_tokens=20)
        return [choice.text for choice in answer.choices]

    first = complete(1)
    assert len(first) == 4
    assert len(set(first)) == 4
    assert complete(1) == first
    assert complete(2) != first


def test_bad_requests_raise_the_right_errors_and_the_server_keeps_answering(server: Server) -> None:
    cases: list[tuple[type[openai.APIStatusError], dict[str, Any], str | None]] = [
        (openai.NotFoundError, {"model": "nobody"}, "model_not_found"),
        (openai.NotFoundError, {"model": "wide@7"}, "model_not_found"),
        (openai.BadRequestError, {"max_tokens": -5}, None),
        (openai.BadRequestError, {"max_tokens": 10**9}, "context_length_exceeded"),
        (openai.BadRequestError, {"temperature": "warm"}, None),
        (openai.BadRequestError, {"messages": []}, None),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": "word " * 500}]}, "context_length_exceeded"),
        (openai.BadRequestError, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported_parameter"),
        (openai.InternalServerError, {"model": "broken"}, "adapter_refused"),
    ]
    for stream in (False, True):
        for error, changes, code in cases:
            with pytest.raises(error) as caught:
                server.client.chat.completions.create(**{"model": "wide", "messages": USER, "stream": stream} | changes)
            assert caught.value.code == code
            assert caught.value.type
            assert caught.value.request_id
            assert server.text("wide", max_tokens=1) is not None


def test_malformed_bodies_and_routes_have_openais_shape(server: Server) -> None:
    for method, path, body, status in [
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"", 400),
        ("POST", "/v1/completions", [1], 400),
        ("POST", "/v1/nothing", {}, 404),
        ("GET", "/v1/models/a%2Fb", None, 404),
        ("DELETE", "/v1/chat/completions", None, 405),
    ]:
        got, headers, answer = server.http(method, path, body)
        assert (got, set(answer["error"])) == (status, {"message", "type", "param", "code"}), (path, answer)
        assert headers["x-request-id"]
    status, headers, _ = server.http("POST", "/v1/chat/completions", {"model": "prod", "messages": USER, "max_tokens": 2})
    assert (status, headers["x-hone-adapter"]) == (200, "wide@1")


def test_a_new_version_and_a_moved_alias_answer_without_a_restart(server: Server) -> None:
    before = server.text("wide", max_tokens=30)
    with pytest.raises(openai.NotFoundError):
        server.chat("wide@2")
    publish(server.home, server.base, "wide", seed=20, r=4, target_modules=["o_proj", "up_proj"])
    published = time.monotonic()
    answer = server.chat("wide@2", max_tokens=30)
    assert time.monotonic() - published < 30
    assert answer.model == "wide@2"
    assert answer.choices[0].message.content != before
    assert server.chat("wide").model == "wide@2"
    assert server.text("wide@1", max_tokens=30) == before
    assert server.chat("prod").model == "wide@1"
    server.registry.set_alias("prod", "wide@2")
    assert server.chat("prod").model == "wide@2"


def test_a_client_that_goes_away_frees_its_rows(server: Server) -> None:
    assert until(lambda: server.status()["running"] == 0)
    before = server.status()["completed"]
    many: dict[str, Any] = {"model": "narrow", "prompt": "the", "max_tokens": 250, "temperature": 1, "n": 16}
    # Streamed completions carry `finish_reason: null`, as OpenAI's own do, which the client's own types do not allow.
    with server.open(strict=False).completions.create(**many, stream=True) as stream:
        next(iter(stream))
        assert server.status()["running"], "pieces come while rows run"
    assert until(lambda: (server.status()["running"], server.status()["waiting"]) == (0, 0))
    with pytest.raises(openai.APITimeoutError):
        server.client.with_options(timeout=0.2).completions.create(**many)
    assert until(lambda: (server.status()["running"], server.status()["waiting"]) == (0, 0))
    assert server.status()["completed"] < before + 32, "rows of a client that has gone are not made to their end"
    assert server.text("narrow")


def test_more_requests_than_it_holds_are_told_to_come_back(server: Server) -> None:
    def ask(_: int) -> int:
        return server.http("POST", "/v1/completions", {"model": "narrow", "prompt": "the", "max_tokens": 200, "n": 4})[0]

    with ThreadPoolExecutor(40) as pool:
        statuses = list(pool.map(ask, range(40)))
    assert set(statuses) == {200, 429}
    assert server.text("wide")


def test_an_encoder_serves_each_adapters_own_classes(served: dict[str, Server]) -> None:
    server = served["encoder"]

    def classify(name: str) -> Any:
        return server.http("POST", "/encoder/v1/classify", {"model": name, "input": ["the cat sat", "good morning"]})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(classify, [*LABELS] * 4))
    for name, (status, headers, body) in zip([*LABELS] * 4, answers, strict=True):
        assert status == 200, body
        assert headers["x-hone-adapter"] == f"{name}@1"
        assert [list(row["probs"]) for row in body["data"]] == [LABELS[name]] * 2
        assert [sum(row["probs"].values()) for row in body["data"]] == pytest.approx([1, 1])
    status, _, body = server.http("POST", "/encoder/v1/classify", {"model": server.base.name, "input": "x"})
    assert (status, body["error"]["param"]) == (400, "model")
    status, _, body = server.http("POST", "/encoder/v1/classify", {"model": "wide", "input": "x"})
    assert status == 404
    assert "is an adapter of" in body["error"]["message"]
