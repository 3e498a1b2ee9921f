"""Tools: how they are shown in each style of template, how calls are written, found and told, and what is refused."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest
from starlette.testclient import TestClient

from hone.chat import render
from hone.registry import Registry
from hone.storage import Home
from serving.base import Served
from serving.calls import Tools
from serving.engine.text import TextStream
from serving.grammar import Grammars
from serving.ingress import make_app
from serving.replica import Replica
from serving.tool_grammar import answer_grammar
from serving.tool_stream import CallPiece, ToolStream, joined
from serving.tools import HERMES, ToolForm, tool_form
from tests.chat_templates import STYLES
from tests.tiny import make_llama, make_tokenizer
from tests.unit.serving.test_structured import USER, streamed

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Zürich", 'a "b" {c}']}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
SCHEMAS = {"weather": WEATHER, "now": {"type": "object", "properties": {}, "additionalProperties": False}}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
HISTORY = [*USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": "wet"}
SPECIAL = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}<|call|>{{ call['function']['name'] }}<|args|>{{ call['function']['arguments'] | tojson }}"
    "{% endfor %}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
"""Marks calls by special tokens, as DeepSeek's and Mistral's newer templates do."""


def tokenizer_of(folder: Path, style: str) -> Any:
    if style != "special":
        return make_tokenizer(folder, chat_template=STYLES[style].template)
    tokenizer = make_tokenizer(folder, chat_template=SPECIAL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>", "<|args|>"]})
    return tokenizer


FORMS = {
    "chatml": ToolForm('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n", is_native=True),
    "qwen2.5": ToolForm('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n", is_native=True),
    "qwen3": ToolForm('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n", is_native=True),
    "llama3": ToolForm('{"name": "', '", "parameters": ', "}", None, is_native=True),
    "special": ToolForm("<|call|>", "<|args|>", "", "", is_native=True),
    "mistral": HERMES,  # it writes ids, which a model would have to make up
    "mistral-first": HERMES,
    "gemma": HERMES,
}


@pytest.mark.parametrize("style", FORMS)
def test_the_form_of_calls_is_the_templates(tmp_path: Path, style: str) -> None:
    assert tool_form(tokenizer_of(tmp_path, style)) == FORMS[style]


@pytest.mark.parametrize("style", ["mistral", "mistral-first", "gemma"])
def test_a_template_without_tools_shows_them_and_their_results_all_the_same(tmp_path: Path, style: str) -> None:
    tokenizer = tokenizer_of(tmp_path, style)
    calls = {"role": "assistant", "content": "", "tool_calls": [{**CALL, "function": {"name": "now", "arguments": {}}}] * 2}
    for system in ([], [{"role": "system", "content": "Be brief."}]):
        messages, tools = HERMES.shown([*system, *USER, calls, RESULT, {**RESULT, "content": "cold"}], TOOLS)
        text = render(tokenizer, messages, tools=tools, add_generation_prompt=True)
        for wanted in (
            "The weather.",
            '"name": "now"',
            "wet",
            "cold",
            'To call one, write\n<tool_call>\n{"name": "NAME", "arguments": {...}}',
        ):
            assert text.count(wanted) == 1 + (wanted == '"name": "now"') * 2, (wanted, text)
        assert text.count('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>') == 2
        assert ("Be brief." in text) == bool(system)


def text_of(form: ToolForm, *calls: tuple[str, str]) -> str:
    return (form.glue or "").join(f"{form.opening}{name}{form.between}{arguments}{form.closing}" for name, arguments in calls)


def pieces_of(stream: ToolStream, pieces: Sequence[str], reason: str = "stop") -> tuple[str, list[tuple[str | None, str]], str]:
    content, calls = "", []
    for piece in pieces:
        text, more = stream.push(piece)
        content += text
        calls += more
    rest, reason = stream.finish(reason)
    assert [call.id is None for call in calls] == [call.name is None for call in calls]
    return content + rest, [(call.name, call.arguments) for call in joined(calls)], reason


ARGUMENTS = ['{"city": "Bern"}', "{}", '{"a": "}\\"{", "b": [{"c": "\\\\"}]}', '{"city": "</tool_call> <tool_call>"}']


@pytest.mark.parametrize("form", set(FORMS.values()), ids=lambda form: form.opening.split("\n")[0])
@pytest.mark.parametrize("seed", range(20))
def test_calls_are_found_however_the_text_is_cut(form: ToolForm, seed: int) -> None:
    random = Random(seed)
    calls = [
        (random.choice(["weather", "now"]), random.choice(ARGUMENTS)) for _ in range(random.randint(1, 3 if form.glue is not None else 1))
    ]
    before = random.choice(["", "I look. <tool", "a < b\n\n"]) if form.trigger else ""
    must_call = not before and random.random() < 0.5
    text = before + text_of(form, *calls)
    cuts = sorted(random.sample(range(len(text)), k=random.randint(0, 12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert pieces_of(ToolStream(form, must_call=must_call), pieces) == (before.rstrip(), calls, "tool_calls")


@pytest.mark.parametrize("text", ["", "hello", "a <tool_cal", " blanks \n ", "x { y", "<", "\n"])
@pytest.mark.parametrize("form", set(FORMS.values()), ids=lambda form: form.opening.split("\n")[0])
def test_text_is_told_whole(form: ToolForm, text: str) -> None:
    assert pieces_of(ToolStream(form, must_call=False), list(text)) == (text, [], "stop")
    if form.trigger:
        json_text = f'{{"a": "{text} {form.trigger}"}}'
        assert pieces_of(ToolStream(form, must_call=False, must_follow=True), list(json_text)) == (json_text, [], "stop")


def test_a_call_that_is_cut_is_told_as_far_as_it_came() -> None:
    whole = text_of(HERMES, ("now", "{}"), ("weather", '{"city": "Bern"}'))
    cut = whole[: whole.index("Be") + 2]
    assert pieces_of(ToolStream(HERMES, must_call=True), [cut], "length") == ("", [("now", "{}"), ("weather", '{"city": "Be')], "length")
    assert pieces_of(ToolStream(HERMES, must_call=True), [cut], "stop")[2] == "stop", "a stop string cut it"
    assert pieces_of(ToolStream(HERMES, must_call=True), ["<tool_c"], "length") == ("", [], "length")


def served_by(tokenizer: Any) -> Served:
    return Served("test@1", "0", "chat", tokenizer, 256, end_ids=frozenset([tokenizer.eos_token_id]))


def written(served: Served, tools: Tools, schema: dict[str, Any] | None, seed: int) -> str | None:
    """What somebody writes who takes any allowed token, and in text mostly the beginnings of calls; None where it has no end."""
    random, tokenizer = Random(seed), served.processor
    grammar = answer_grammar(schema, tools, served.tool_form, tokenizer)
    [constraint] = Grammars().constraints(served, grammar, 1)
    stream = TextStream(tokenizer, shows_special=True)
    wish = tokenizer(random.choice([served.tool_form.opening, "the cat " + served.tool_form.opening, "hello"]))["input_ids"]
    text = ""
    for _ in range(300):
        allowed = constraint.allowed(len(tokenizer)).nonzero()[:, 0].tolist()
        assert allowed, constraint.error
        if wish and wish[0] in allowed:
            token = wish.pop(0)
        else:
            wish = []
            token = tokenizer.eos_token_id if tokenizer.eos_token_id in allowed else random.choice(allowed)
        if token == tokenizer.eos_token_id:
            return text + stream.finish()
        constraint.take(token)
        text += stream.push(token)
        if constraint.is_complete:
            return text + stream.finish()
    return None


@pytest.mark.parametrize("style", FORMS)
@pytest.mark.parametrize("choice", ["auto", "required", "weather"])
def test_whatever_the_grammar_lets_through_is_a_call_that_follows_its_schema(tmp_path: Path, style: str, choice: str) -> None:
    served = served_by(tokenizer_of(tmp_path, style))
    tools = Tools(TOOLS, choice)
    called = 0
    for seed in range(25):
        text = written(served, tools, None, seed)
        assert text is not None
        content, calls, reason = pieces_of(ToolStream(served.tool_form, must_call=tools.must_call), [text])
        assert reason == ("tool_calls" if calls else "stop")
        called += bool(calls)
        assert calls or choice == "auto"
        assert not content or choice == "auto"
        assert len(calls) < 2 or tools.many
        for name, arguments in calls:
            assert choice in ("auto", "required", name)
            jsonschema.validate(json.loads(arguments), SCHEMAS[str(name)])
    assert called > 5


def test_an_answer_with_tools_and_a_schema_is_one_or_the_other(tmp_path: Path) -> None:
    served = served_by(tokenizer_of(tmp_path, "chatml"))
    found = set()
    for seed in range(25):
        text = written(served, Tools(TOOLS), WEATHER, seed)
        assert text is not None
        content, calls, _ = pieces_of(ToolStream(served.tool_form, must_call=False, must_follow=True), [text])
        assert bool(content) != bool(calls)
        if content:
            jsonschema.validate(json.loads(content), WEATHER)
        found.add(bool(calls))
    assert found == {True, False}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A random model with room for prompts that show tools."""
    base = make_llama(tmp_path_factory.mktemp("long"), max_position_embeddings=1024)
    home = Home(tmp_path_factory.mktemp("home"))
    replica = Replica(base=str(base), home=str(home.root), max_rows=8)
    with TestClient(make_app(replica, Registry(home))) as client:
        client.headers["base"] = base.name
        yield client
    replica.stop()


def chat(client: TestClient, **body: Any) -> Any:
    asked = {"model": client.headers["base"], "messages": USER, "max_tokens": 300, "tools": TOOLS, **body}
    return client.post("/v1/chat/completions", json=asked)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=["required", "named"])
def test_a_random_model_calls_as_it_must(client: TestClient, choice: Any) -> None:
    response = chat(client, n=6, seed=3, temperature=1, tool_choice=choice, parallel_tool_calls=False)
    assert response.status_code == 200, response.text
    ids = []
    for answer in response.json()["choices"]:
        assert answer["finish_reason"] == "tool_calls"
        assert answer["message"]["content"] is None
        [call] = answer["message"]["tool_calls"]
        assert call["type"] == "function"
        name = call["function"]["name"]
        assert choice == "required" or name == "weather"
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[name])
        ids.append(call["id"])
    assert len(set(ids)) == 6
    assert all(len(each) == 9 and each.isalnum() for each in ids)


def test_streamed_calls_come_as_openai_sends_them(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.replica.PAUSE_S", 0.0)  # else most of a call may come together
    body = {"seed": 8, "temperature": 1.3, "n": 2, "tool_choice": "required"}
    whole = chat(client, **body).json()
    chunks = streamed(chat(client, **body, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert parts[0]["delta"]["role"] == "assistant"
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        deltas = [call for part in parts for call in part["delta"].get("tool_calls", [])]
        made: list[Any] = []
        for delta in deltas:
            if "id" in delta:
                assert delta["index"] == len(made)
                assert delta["type"] == "function"
                assert delta["function"]["arguments"] == ""
                made.append(delta["function"])
            else:
                assert set(delta) == {"index", "function"}
                assert set(delta["function"]) == {"arguments"}
                made[delta["index"]]["arguments"] += delta["function"]["arguments"]
        assert made == [call["function"] for call in choice["message"]["tool_calls"]]
        assert len(deltas) > len(made) + 3, "arguments come as they are made"
        assert not any(part["delta"].get("content") for part in parts)


class Forecast(pydantic.BaseModel):
    """The weather."""

    city: Literal["Bern", "Zürich"]
    days: Literal[1, 2, 3]


def openai_client(client: TestClient) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client, max_retries=0)


def test_openais_client_parses_answers_and_calls(client: TestClient) -> None:
    asked: dict[str, Any] = {"model": client.headers["base"], "messages": USER, "seed": 1, "max_tokens": 200}
    completions = openai_client(client).chat.completions
    parsed = completions.parse(**asked, response_format=Forecast).choices[0].message.parsed
    assert isinstance(parsed, Forecast)
    tool = openai.pydantic_function_tool(Forecast)
    calls = completions.parse(**asked, tools=[tool], tool_choice="required", parallel_tool_calls=False).choices[0].message.tool_calls
    assert calls
    assert [type(call.function.parsed_arguments) for call in calls] == [Forecast]
    with completions.stream(**asked, tools=[tool], tool_choice="required", parallel_tool_calls=False) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        assert [event.parsed_arguments for event in done] == [calls[0].function.parsed_arguments]
        [final] = stream.get_final_completion().choices
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls
    answer = {"role": "tool", "tool_call_id": final.message.tool_calls[0].id, "content": "wet"}
    asked["messages"] = [*USER, final.message.model_dump(exclude_none=True), answer]
    assert completions.create(**asked, tools=[tool]).choices[0].message


def test_calls_that_max_tokens_cuts_say_so(client: TestClient) -> None:
    [choice] = chat(client, temperature=0, tool_choice="required", max_tokens=30).json()["choices"]
    assert choice["finish_reason"] == "length"


def test_auto_may_answer_with_text(client: TestClient) -> None:
    body = chat(client, temperature=0, max_tokens=20).json()
    [choice] = body["choices"]
    assert choice["message"]["content"]
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] in ("stop", "length")


def test_a_model_that_may_call_nothing_is_not_shown_the_tools(client: TestClient) -> None:
    def used(**body: Any) -> int:
        return int(chat(client, max_tokens=1, **body).json()["usage"]["prompt_tokens"])

    assert used(tools=None) == used(tools=[]) == used(tool_choice="none") < used(tool_choice="auto")


def test_a_conversation_with_calls_and_results_goes_on(client: TestClient) -> None:
    for tools in (TOOLS, None):
        response = chat(client, messages=[*HISTORY, RESULT], tools=tools, max_tokens=5)
        assert response.status_code == 200, response.text
    counted = client.post("/tokenize", json={"model": client.headers["base"], "messages": [*HISTORY, RESULT]}).json()["count"]
    assert counted == response.json()["usage"]["prompt_tokens"]


def function(**more: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **more}}]


def named(name: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": "weather"}, "tools"),
        ({"tools": [3]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": function(name="a b")}, "tools[0].function.name"),
        ({"tools": function(name="")}, "tools[0].function.name"),
        ({"tools": function(name="x" * 65)}, "tools[0].function.name"),
        ({"tools": function() * 2}, "tools[1].function.name"),
        ({"tools": function() * 129}, "tools"),
        ({"tools": function(parameters=[])}, "tools[0].function.parameters"),
        ({"tools": function(parameters={"type": "string"})}, "tools[0].function.parameters"),
        ({"tools": function(parameters={"type": None})}, "tools[0].function.parameters"),
        ({"tools": function(parameters={"not": {}}, strict=True)}, "tools[0].function.parameters"),
        ({"tools": [*TOOLS, *function(parameters={"properties": {"a": {"type": "strin"}}})]}, "tools[2].function.parameters"),
        ({"tools": function(parameters={"$ref": "#/nowhere"})}, "tools[0].function.parameters"),
        ({"tools": function(parameters={"enum": ["x" * 70_000]})}, "tools[0].function.parameters"),
        ({"tools": [*function(parameters={"d": "x" * 40_000}), *function(name="g", parameters={"d": "x" * 40_000})]}, "tools"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": 3}, "tool_choice"),
        ({"tool_choice": {}}, "tool_choice"),
        ({"tool_choice": named("nobody")}, "tool_choice"),
        ({"tool_choice": named(None)}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": named("f"), "tools": None}, "tool_choice"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"messages": [*HISTORY, {"role": "tool", "content": "x"}]}, "messages[2].tool_call_id"),
        ({"messages": [*HISTORY, {**RESULT, "tool_call_id": 3}]}, "messages[2].tool_call_id"),
        ({"messages": [*HISTORY, {**RESULT, "tool_call_id": "other"}]}, "messages[2].tool_call_id"),
        ({"messages": [*USER, RESULT]}, "messages[1].tool_call_id"),
        ({"messages": [*HISTORY, {"role": "tool", "tool_call_id": "abcdefghi"}]}, "messages[2].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}]},
         "messages[0].tool_calls[0].function.arguments"),
        *(
            ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": wrong}}]}]}, param)
            for wrong, param in (
                ("{", "messages[0].tool_calls[0].function"),
                ("[]", "messages[0].tool_calls[0].function"),
                ("[" * 100_000, "messages[0].tool_calls[0].function"),
                ({}, "messages[0].tool_calls[0].function.arguments"),
            )
        ),
    ],
    ids=lambda value: str(value)[:70],
)  # fmt: skip
def test_a_bad_request_is_a_400_that_names_the_parameter(client: TestClient, changes: dict[str, Any], param: str) -> None:
    response = chat(client, **changes)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param, response.text


def test_what_cannot_be_enforced_is_let_be_where_a_tool_is_not_strict(client: TestClient) -> None:
    loose = {"type": "object", "properties": {"a": {"type": "boolean", "not": {"const": True}}}, "additionalProperties": False}
    response = chat(client, tools=function(parameters=loose), tool_choice="required", parallel_tool_calls=False, temperature=0)
    assert response.status_code == 200, response.text
    [call] = response.json()["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]).keys() <= {"a"}


def test_a_piece_of_a_call_has_an_id_once() -> None:
    stream = ToolStream(HERMES, must_call=True)
    _, pieces = stream.push(text_of(HERMES, ("now", "{}")))
    assert [(piece.name, piece.arguments) for piece in pieces] == [("now", ""), (None, "{}")]
    assert joined(pieces) == [CallPiece(0, pieces[0].id, "now", "{}")]
