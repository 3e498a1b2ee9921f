"""Answers by a JSON schema: what a random model writes is valid every time, and nobody else's answer changes."""

import json
import sys
from collections.abc import Iterator
from random import Random
from typing import Any

import jsonschema
import llguidance
import llguidance.hf
import pytest
from starlette.testclient import TestClient

from serving.base import Engine, Served
from serving.engine.constraint import Constraint
from serving.engine.row import Ended
from serving.errors import RequestError
from serving.grammar import GRAMMARS, Grammar, Grammars, Part
from serving.ingress import make_app
from serving.replica import Replica
from serving.tool_grammar import WRITTEN
from tests.unit.serving.conftest import Shelf
from tests.unit.serving.rows import generation_of, prompt, recorder, reference, row, run, tokens_of

USER = [{"role": "user", "content": "hello there"}]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "mood": {"enum": ["good", "bad", "ölig"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        "inner": {"$ref": "#/$defs/inner"},
    },
    "required": ["mood", "age", "tags"],
    "additionalProperties": False,
    "$defs": {"inner": {"anyOf": [{"type": "null"}, {"type": "boolean"}]}},
}


def schema_format(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


@pytest.fixture(scope="module")
def replica(chat_shelf: Shelf) -> Iterator[Replica]:
    replica = Replica(base=str(chat_shelf.base), home=str(chat_shelf.home.root), max_rows=4)
    yield replica
    replica.stop()


@pytest.fixture(scope="module")
def client(replica: Replica, chat_shelf: Shelf) -> Iterator[TestClient]:
    with TestClient(make_app(replica, chat_shelf.registry)) as client:
        yield client


def chat(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/chat/completions", json={"model": "wide", "messages": USER, "max_tokens": 100, **body})


def answers(client: TestClient, **body: Any) -> list[tuple[str, str]]:
    response = chat(client, **body)
    assert response.status_code == 200, response.text
    return [(choice["message"]["content"], choice["finish_reason"]) for choice in response.json()["choices"]]


def streamed(response: Any) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"temperature": 1},
        {"temperature": 2, "top_p": 0.5},
        {"temperature": 1.5, "top_k": 3, "min_p": 0.1},
        {"temperature": 1, "frequency_penalty": 2, "presence_penalty": -2},
        {"temperature": 0, "logit_bias": {"5": 100, "2": 100}},
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["narrow", "wide"])
def test_every_answer_of_a_random_model_follows_the_schema(client: TestClient, sampling: dict[str, Any], model: str) -> None:
    for text, reason in answers(client, model=model, n=8, seed=1, response_format=schema_format(PERSON, strict=True), **sampling):
        assert reason == "stop"
        jsonschema.validate(json.loads(text), PERSON)


def test_answers_differ_where_the_schema_lets_them(client: TestClient) -> None:
    found = answers(client, n=8, seed=1, temperature=1, response_format=schema_format(PERSON))
    assert len({text for text, _ in found}) > 4
    assert answers(client, n=8, seed=1, temperature=1, response_format=schema_format(PERSON)) == found


def test_streamed_pieces_add_up_to_the_whole_answer_and_logprobs_to_its_text(client: TestClient) -> None:
    body = {"n": 2, "seed": 4, "temperature": 1, "response_format": schema_format(PERSON), "logprobs": True, "top_logprobs": 2}
    whole = chat(client, **body).json()
    chunks = streamed(chat(client, **body, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        text = "".join(part["delta"].get("content", "") for part in parts)
        assert text == choice["message"]["content"]
        jsonschema.validate(json.loads(text), PERSON)
        tokens = [bytes(token["bytes"]) for token in choice["logprobs"]["content"]]
        assert b"".join(tokens).decode() == text
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["stop"]


def test_a_json_object_is_one(client: TestClient) -> None:
    # A random model's strings do not end by themselves: it is made to like quotes and braces.
    likes = {str(token): 8 for token in range(3, 381)} | {"4": 30, "95": 30}
    for text, reason in answers(client, n=8, seed=2, temperature=1, response_format={"type": "json_object"}, logit_bias=likes):
        assert text.startswith("{")
        if reason == "stop":
            assert isinstance(json.loads(text), dict)


def test_an_answer_that_max_tokens_cuts_says_so(client: TestClient) -> None:
    [(whole, _)] = answers(client, temperature=0, response_format=schema_format(PERSON))
    [(cut, reason)] = answers(client, temperature=0, max_tokens=5, response_format=schema_format(PERSON))
    assert reason == "length"
    assert whole.startswith(cut)
    assert cut != whole


def test_a_stop_string_ends_a_constrained_answer(client: TestClient) -> None:
    [(text, reason)] = answers(client, temperature=0, stop='"age"', response_format=schema_format(PERSON))
    assert reason == "stop"
    assert text.startswith('{"mood":')
    assert '"age"' not in text


def test_text_is_any_text(client: TestClient) -> None:
    assert answers(client, temperature=0, response_format={"type": "text"}) == answers(client, temperature=0)


def compiled(served: Served, schema: dict[str, Any]) -> Constraint:
    part = Part("answer", {**schema, "x-guidance": WRITTEN}, "response_format")
    [constraint] = Grammars().constraints(served, Grammar("response_format", [part]), 1)
    return constraint


def test_greedy_answers_beside_constrained_ones_are_those_of_generate(
    engine: Engine, everyone: dict[str, Served], chat_shelf: Shelf
) -> None:
    random = Random(5)
    names = ["narrow", "wide", "base", "mixed"]
    free = [row(everyone[name], prompt(random, 10), ends=False) for name in names]
    bound = [row(everyone[name], prompt(random, 7), max_tokens=80, constraint=compiled(everyone[name], PERSON)) for name in names]
    told = [recorder(each) for each in bound]
    run(generation_of(engine, max_rows=8), [each for pair in zip(free, bound, strict=True) for each in pair])
    for name, each in zip(names, free, strict=True):
        assert tokens_of(each) == reference(chat_shelf, name, list(each.prompt), end_ids=frozenset()), name
    for each in told:
        jsonschema.validate(json.loads(each.text), PERSON)
        assert each.ended == Ended("stop", each.ended.tokens if each.ended else 0)


class Failing:
    """A matcher that gives up after some tokens, as llguidance does where a grammar gets too complex on the way."""

    def __init__(self, after: int) -> None:
        self._left = after

    def compute_bitmask(self) -> bytes:
        return b"\xff" * 64

    def consume_token(self, token: int, /) -> bool:  # noqa: ARG002
        self._left -= 1
        return self._left > 0

    def is_stopped(self) -> bool:
        return self._left <= 0

    def get_error(self) -> str:
        return "" if self._left > 0 else "lexer too complex"


def test_a_grammar_that_fails_on_the_way_ends_its_own_answer_alone(engine: Engine, everyone: dict[str, Served], chat_shelf: Shelf) -> None:
    random = Random(6)
    other = row(everyone["wide"], prompt(random, 10), ends=False)
    failing = row(everyone["wide"], prompt(random, 10), ends=False, constraint=Constraint(Failing(3)))
    told = recorder(failing)
    run(generation_of(engine), [failing, other])
    [error] = [event for event in told.events if isinstance(event, RequestError)]
    assert "lexer too complex" in error.message
    assert error.status == 400
    assert len(failing.made) == 3
    assert tokens_of(other) == reference(chat_shelf, "wide", list(other.prompt), end_ids=frozenset())


def test_an_engine_that_knows_one_end_of_text_is_told_the_others(everyone: dict[str, Served]) -> None:
    """As vLLM's llguidance does, whose tokenizer's end of text is not always what ends a turn."""
    tokenizer = everyone["wide"].processor
    turn = next(token for token in tokenizer.all_special_ids if token != tokenizer.eos_token_id)
    grammar = Grammar("response_format", [Part("object", {"type": "boolean"}, "response_format")])
    matcher = llguidance.LLMatcher(llguidance.hf.from_tokenizer(tokenizer), llguidance.grammar_from("grammar", grammar.text(ends=[turn])))
    there = Constraint(matcher)
    for token in tokenizer("true")["input_ids"]:
        assert turn not in there.allowed(len(tokenizer)).nonzero()
        assert there.take(token)
    assert set(there.allowed(len(tokenizer)).nonzero()[:, 0].tolist()) == {turn, tokenizer.eos_token_id}
    assert not there.take(tokenizer("x")["input_ids"][0])


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("value", "param", "says"),
    [
        ("json", "response_format", ""),
        ({}, "response_format.type", "required"),
        ({"type": "xml"}, "response_format.type", "json_schema"),
        ({"type": "json_schema"}, "response_format.json_schema", "json_schema"),
        ({"type": "json_object", "json_schema": {"name": "a"}}, "response_format.json_schema", "type"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, "response_format.json_schema.name", "required"),
        ({"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}, "response_format.json_schema.name", "pattern"),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": []}}, "response_format.json_schema.schema", "dict"),
        (schema_format({"not": {"type": "string"}}), "response_format", "not"),
        (schema_format({"type": "array", "uniqueItems": True}), "response_format", "uniqueItems"),
        (schema_format({"type": "object", "properties": {"a": {"if": {}, "then": {}}}}), "response_format", "if, then"),
        (schema_format({"type": "strin"}), "response_format", "strin"),
        (schema_format({"$ref": "#/$defs/none"}), "response_format", "/$defs/none"),
        (schema_format({"$ref": "http://127.0.0.1:9/x"}), "response_format", "127.0.0.1"),
        (schema_format({"$ref": "file:///etc/passwd"}), "response_format", "file"),
        (schema_format({"type": "string", "pattern": "(?=a)"}), "response_format", "look"),
        (schema_format({"type": "string", "format": "nonsense"}), "response_format", "nonsense"),
        (schema_format({"enum": []}), "response_format", "schema"),
        (schema_format({"properties": 3}), "response_format", ""),
        (schema_format({"not": {}, "x-guidance": {"lenient": True}}), "response_format", "not"),
        (schema_format(deep(70)), "response_format.json_schema.schema", "inside one another"),
        (schema_format({"enum": ["x" * 70_000]}), "response_format.json_schema.schema", "bytes"),
    ],
    ids=lambda value: str(value)[:60],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_format_that_cannot_be_followed_is_a_400_that_says_what(
    client: TestClient, value: Any, param: str, says: str, stream: bool
) -> None:
    response = chat(client, response_format=value, stream=stream)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert says in error["message"], error


def test_a_schema_deeper_than_pythons_stack_is_a_400(client: TestClient) -> None:
    body = json.dumps({"model": "wide", "messages": USER, "response_format": schema_format({"items": "HERE"})})
    body = body.replace('"HERE"', '{"items":' * 900 + "{}" + "}" * 900)
    response = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "response_format.json_schema.schema"


def test_completions_take_no_format(client: TestClient) -> None:
    response = client.post("/v1/completions", json={"model": "wide", "prompt": "x", "response_format": {"type": "json_object"}})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "response_format"


def test_without_the_library_a_400_names_the_extra(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)  # how Python itself marks a module that cannot be imported
    tools = [{"type": "function", "function": {"name": "f"}}]
    for param, body in (("response_format", {"response_format": {"type": "json_object"}}), ("tools", {"tools": tools})):
        response = chat(client, **body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == param
        assert "pip install 'hone[grammar]'" in error["message"]
    assert chat(client).status_code == 200
    assert chat(client, tools=tools, tool_choice="none", response_format={"type": "text"}).status_code == 200


def test_compiled_grammars_are_kept_and_not_for_ever(everyone: dict[str, Served]) -> None:
    grammars = Grammars()

    def ask(number: int, name: str = "wide") -> None:
        part = Part("answer", {"const": number}, "response_format")
        grammars.constraints(everyone[name], Grammar("response_format", [part]), 2)

    ask(0)
    ask(0, "narrow")  # it has the same tokenizer
    assert (len(grammars._tokenizers), len(grammars._compiled)) == (1, 1)
    for number in range(GRAMMARS + 20):
        ask(number)
    assert len(grammars._compiled) == GRAMMARS
