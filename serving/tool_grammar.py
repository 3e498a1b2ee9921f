"""The grammar of an answer: a JSON schema, calls of tools, or either.

Blanks between JSON's parts are at most one, after a comma or a colon, as templates and most programs write it: where a grammar lets blanks
go on for ever, so does a small model.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from serving.calls import Tools
from serving.errors import RequestError
from serving.grammar import Grammar, Part
from serving.tools import ToolForm

WRITTEN = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def answer_grammar(schema: dict[str, Any] | None, tools: Tools | None, form: ToolForm, tokenizer: Any) -> Grammar:
    """What an answer must be written as to a request that has a schema, tools, or both.

    Raises:
        RequestError: what is asked for cannot be told apart in the form of this model's calls.
    """
    answer = None if schema is None else _schema_part("object", schema, "response_format")
    if tools is None:
        assert answer is not None, "the caller has a schema or tools"
        return Grammar("response_format", [answer])
    if tools.choice != "auto":
        answer = None  # it calls, whatever it would answer
    if answer is not None and form.trigger is None:
        raise RequestError(
            "this model's calls look like any JSON, which response_format cannot be told from; leave out one of them, or set tool_choice",
            "response_format",
        )
    parts = [_arguments(n, tool) for n, tool in enumerate(tools.definitions)]
    called = [n for n, tool in enumerate(tools.definitions) if tools.choice in ("auto", "required", tool["function"]["name"])]
    rules = _rules(form, tools, called, answer=answer, special=_special(tokenizer))
    return Grammar("tools", [*(parts[n] for n in called), *([answer] if answer else [])], rules)


def _rules(form: ToolForm, tools: Tools, called: Sequence[int], *, answer: Part | None, special: dict[str, int]) -> str:
    trigger = form.trigger or ""
    rest, begin = form.opening[len(trigger) :], _terms(trigger, special)
    bodies = [
        f"body_{n}: {_terms(rest + tools.definitions[n]['function']['name'] + form.between, special)} arguments_{n} "
        f"{_terms(form.closing, special)}"
        for n in called
    ]
    lines = ["TEXT: /(.|\\n)*/", "body: " + " | ".join(f"body_{n}" for n in called), *bodies]
    more = f"({_terms(form.glue, special)} {begin} body)*" if form.glue is not None and tools.many else ""
    if tools.choice != "auto":
        start = f"{begin} body {more}"
    elif answer is not None:
        start = f"object | {begin} body {more}"
    elif not trigger:
        lines.append(f"OTHER: /[^{re.escape(form.opening[0])}](.|\\n)*/")
        start = f"OTHER? | body {more}"
    else:
        # A special token cannot be inside a lexeme; as text, the first trigger ends the lazy lexeme, so no text goes on past it.
        lines.append(f"head: TEXT {begin}" if trigger.strip() in special else f"head[lazy]: TEXT {begin}")
        start = f"TEXT | head body {more}"
    return "\n".join([f"answer: {start}", *lines])


def _terms(text: str, special: dict[str, int]) -> str:
    """A text as terms of the grammar: special tokens by their ids, and what is between them as it is."""
    if not text:
        return ""
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    pieces = [piece for piece in re.split(f"({pattern})", text) if piece] if pattern else [text]
    return " ".join(f"<[{special[piece]}]>" if piece in special else json.dumps(piece) for piece in pieces)


def _special(tokenizer: Any) -> dict[str, int]:
    return {str(token.content): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def _arguments(n: int, tool: dict[str, Any]) -> Part:
    """The arguments of a tool. What a schema asks for beyond what can be enforced is an error only where the tool is `strict`: elsewhere
    OpenAI enforces nothing at all."""
    function, param = tool["function"], f"tools[{n}].function.parameters"
    schema = function.get("parameters")
    schema = NO_ARGUMENTS if schema is None else {"type": "object", **schema}
    if schema["type"] != "object":
        raise RequestError(f"{param}: arguments are a JSON object, so the schema's type must be object", param)
    return _schema_part(f"arguments_{n}", schema, param, lenient=not function.get("strict"))


def _schema_part(name: str, schema: dict[str, Any], param: str, *, lenient: bool = False) -> Part:
    return Part(name, {**schema, "x-guidance": {**WRITTEN, "lenient": lenient}}, param)
