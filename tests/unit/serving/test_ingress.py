"""The routes over a replica in the same process: every answer and every error as OpenAI's client expects it."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from serving.calls import Event
from serving.errors import BusyError
from serving.gate import BODY_AT_MOST
from serving.ingress import make_app
from serving.replica import Replica
from tests.unit.serving.conftest import Shelf

USER = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def replica(chat_shelf: Shelf) -> Iterator[Replica]:
    replica = Replica(base=str(chat_shelf.base), home=str(chat_shelf.home.root), max_rows=4)
    yield replica
    replica.stop()


@pytest.fixture(scope="module")
def client(replica: Replica, chat_shelf: Shelf) -> Iterator[TestClient]:
    with TestClient(make_app(replica, chat_shelf.registry), raise_server_exceptions=False) as client:
        yield client


def error_of(response: Any) -> dict[str, Any]:
    body = response.json()
    assert list(body) == ["error"], body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return dict(body["error"])


def chat(client: TestClient, **changes: Any) -> Any:
    return client.post("/v1/chat/completions", json={"model": "wide", "messages": USER, "max_tokens": 4, "temperature": 0} | changes)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": "4"}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 9}, None),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "word " * 400}]}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 400}], "max_tokens": None}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 10**6}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].function"),
        ({"messages": [{"role": "assistant", "content": "x", "function_call": {"name": "f"}}]}, "messages"),
        ({"model": ""}, "model"),
        ({"model": 3}, "model"),
        ({"model": None}, "model"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"the": 1}}, "logit_bias"),
        ({"logit_bias": {"-5": 1}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"logit_bias": {str(n): 1 for n in range(2000)}}, "logit_bias"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": 10**310}, "top_k"),
        ({"max_tokens": 10**310}, "max_tokens"),
        ({"max_completion_tokens": 10**310}, "max_completion_tokens"),
        ({"min_p": 1.5}, "min_p"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ],
)
def test_a_bad_chat_request_is_a_400_that_names_the_parameter(client: TestClient, changes: dict[str, Any], param: str | None) -> None:
    response = chat(client, **changes)
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param
    assert chat(client).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "wide", "messages": [{"role": "user", "content": "\\ud800"}], "prompt": "\\ud800", "input": "\\ud800"}',
        b'{"model": "\\udfff", "messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x"}',
        b'{"model": "wide", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"model": "wide", "messages": [{"role": "user", "content": "x"}], "seed": 1' + b"0" * 5000 + b"}",
        b"[" * 100_000,
        b'{"model": ' * 5000,
    ],
    ids=["empty", "cut", "list", "null", "string", "bytes", "surrogate", "surrogate-model", "nan", "digits", "deep-lists", "deep-objects"],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/classify"])
def test_a_body_that_is_no_request_is_a_400(client: TestClient, path: str, body: bytes) -> None:
    response = client.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert error_of(response)["type"] == "invalid_request_error"
    assert chat(client).status_code == 200


def test_a_body_past_the_limit_is_refused(client: TestClient) -> None:
    response = client.post("/v1/chat/completions", content=b" " * (BODY_AT_MOST + 1), headers={"content-type": "application/json"})
    assert response.status_code == 413
    error_of(response)


@pytest.mark.parametrize("name", ["nobody", "wide@9", "gpt-4o", "../../etc/passwd", "wide@1@1", "🎉", "x" * 3000])
def test_an_unknown_model_is_a_404_and_never_the_base(client: TestClient, name: str) -> None:
    for stream in (False, True):
        response = chat(client, model=name, stream=stream)
        assert response.status_code == 404
        assert error_of(response)["code"] == "model_not_found"
        assert error_of(response)["param"] == "model"


def test_unknown_routes_and_methods_have_openais_shape(client: TestClient) -> None:
    assert client.get("/v1/nothing").status_code == 404
    error_of(client.get("/v1/nothing"))
    response = client.get("/v1/chat/completions")
    assert response.status_code == 405
    error_of(response)


@pytest.mark.parametrize("path", ["wide@9", "a%2Fb", "..%2F..%2Fetc", "%ff", "%00", "a/b/c"])
def test_an_unknown_model_is_not_retrieved(client: TestClient, path: str) -> None:
    response = client.get(f"/v1/models/{path}")
    assert response.status_code == 404
    error_of(response)


def test_parameters_that_change_nothing_are_accepted(client: TestClient) -> None:
    ignored = {"user": "u", "metadata": {"a": "b"}, "store": False, "logprobs": False, "tools": None, "response_format": {"type": "text"}}
    response = chat(client, **ignored, presence_penalty=0, n=1, parallel_tool_calls=True)
    assert response.status_code == 200, response.text


def test_an_answer_names_who_gave_it(client: TestClient, chat_shelf: Shelf) -> None:
    response = chat(client, model="narrow")
    assert response.headers["x-hone-adapter"] == f"narrow@1 {chat_shelf.manifests['narrow'].digest}"
    assert response.json()["model"] == "narrow@1"
    assert response.json()["system_fingerprint"] == f"fp_{chat_shelf.manifests['narrow'].digest[:16]}"
    base = chat(client, model=chat_shelf.base.name)
    assert base.headers["x-hone-adapter"].split() == [str(chat_shelf.base), chat_shelf.manifests["narrow"].base.fingerprint]
    assert base.json()["choices"][0]["message"]["content"] != response.json()["choices"][0]["message"]["content"]


def test_text_parts_are_one_text(client: TestClient) -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "there"}]
    whole = chat(client, messages=[{"role": "user", "content": "hello\nthere"}]).json()
    assert chat(client, messages=[{"role": "user", "content": parts}]).json()["choices"] == whole["choices"]


def events_of(response: Any) -> list[Any]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("stop", [None, "a"])
def test_streamed_pieces_add_up_to_the_whole_answer(client: TestClient, stop: str | None) -> None:
    whole = chat(client, max_tokens=40, n=2, seed=3, temperature=1, stop=stop).json()
    response = chat(client, max_tokens=40, n=2, seed=3, temperature=1, stop=stop, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-hone-adapter"].startswith("wide@1 ")
    *chunks, last = events_of(response)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert parts[0]["delta"]["role"] == "assistant"
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]


def test_completions_take_texts_and_tokens(client: TestClient) -> None:
    def texts(prompt: Any, **more: Any) -> list[str]:
        response = client.post("/v1/completions", json={"model": "mixed", "prompt": prompt, "temperature": 0, **more})
        assert response.status_code == 200, response.text
        assert [choice["index"] for choice in response.json()["choices"]] == list(range(len(response.json()["choices"])))
        return [choice["text"] for choice in response.json()["choices"]]

    one, other = texts("the cat"), texts("why does")
    assert texts(["the cat", "why does"]) == [*one, *other]
    assert texts(["the cat", "why does"], n=2) == [*one, *one, *other, *other]
    assert texts([[5, 6], [7]]) == [*texts([5, 6]), *texts([7])]


@pytest.mark.parametrize("prompt", ["", [], [[]], [1, "a"], [-1], [10**6], 5, None, [[1], ["a"]], ["a"] * 300])
def test_a_prompt_that_is_none_is_a_400(client: TestClient, prompt: Any) -> None:
    response = client.post("/v1/completions", json={"model": "mixed", "prompt": prompt})
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] in {"prompt", "prompt[0]"}


def test_a_chat_adapter_does_not_classify(client: TestClient) -> None:
    response = client.post("/v1/classify", json={"model": "wide", "input": "x"})
    assert response.status_code == 400
    assert error_of(response)["param"] == "model"


def test_classification_answers_with_the_adapters_labels(label_shelf: Shelf) -> None:
    replica = Replica(base=str(label_shelf.base), home=str(label_shelf.home.root))
    try:
        with TestClient(make_app(replica, label_shelf.registry)) as client:
            body = client.post("/v1/classify", json={"model": "topic", "input": ["the cat", "hello"]}).json()
            assert [row["index"] for row in body["data"]] == [0, 1]
            assert all(list(row["probs"]) == ["art", "news", "sport", "trade", "war"] for row in body["data"])
            assert all(row["label"] == max(row["probs"], key=row["probs"].get) and row["num_classes"] == 5 for row in body["data"])
            for bad in ({"model": "topic", "input": []}, {"model": "topic", "input": 3}, {"model": "topic", "input": "word " * 300}):
                assert client.post("/v1/classify", json=bad).status_code == 400
            assert client.post("/v1/classify", json={"model": label_shelf.base.name, "input": "x"}).status_code == 400
            assert client.post("/v1/chat/completions", json={"model": "topic", "messages": USER}).status_code == 400
            assert client.post("/v1/classify", json={"model": "nobody", "input": "x"}).status_code == 404
    finally:
        replica.stop()


class BusyBackend(Replica):
    """A replica that has no room."""

    def __init__(self) -> None:
        """Holds nothing."""

    async def answer(self, call: Any) -> list[Event]:  # noqa: ARG002
        raise BusyError("9 requests wait already; try again shortly")

    async def generate(self, call: Any) -> AsyncIterator[list[Event]]:  # noqa: ARG002
        raise BusyError("9 requests wait already; try again shortly")
        yield []


def test_a_busy_server_says_when_to_try_again(chat_shelf: Shelf) -> None:
    with TestClient(make_app(BusyBackend(), chat_shelf.registry)) as client:
        for stream in (False, True):
            response = chat(client, stream=stream)
            assert response.status_code == 429
            assert response.headers["retry-after"] == "1"
            assert error_of(response)["code"] == "server_busy"


def test_a_replica_that_is_stopping_is_a_503_that_is_sent_again(chat_shelf: Shelf) -> None:
    replica = Replica(base=str(chat_shelf.base), home=str(chat_shelf.home.root))
    replica.stop()
    with TestClient(make_app(replica, chat_shelf.registry)) as client:
        response = chat(client)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert error_of(response)["code"] == "draining"
