"""How a model is shown tools and how it writes calls of them, read off its chat template.

A template that shows tools and writes calls is asked for one, and what stands round the function's name and arguments is the form in
which the model learnt to call, or will learn it (`hone.chat` trains on what the template writes). Every other template gets Hermes' tags,
the most common form, and the tools as a text in the system turn (docs/decisions/0018).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hone.chat import Message, render
from hone.errors import DataError

PROBE, OTHER, PLAIN, ID = "probe_function", "other_function", "probe text", "probe0001"
ARGUMENTS = re.compile(r'\{\s*"probe_key"\s*:\s*1\s*\}')
USER: Message = {"role": "user", "content": "a"}


@dataclass(frozen=True)
class ToolForm:
    """How calls are written: opening, name, between, arguments (a JSON object), closing."""

    opening: str
    between: str
    closing: str
    glue: str | None
    """Between two calls of one answer; None where there is but one."""
    is_native: bool
    """Whether the template shows tools and writes calls by itself."""

    @property
    def trigger(self) -> str | None:
        """What begins a call and nothing else: the tag in the opening. None where a call looks like any JSON (Llama 3), so that it is one
        only where the answer begins with it."""
        tag = re.match(r"\s*(<[^<>]+>|\[[A-Z_]+\])", self.opening)
        return tag[0] if tag else None

    def shown(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> tuple[list[Message], Sequence[dict[str, Any]] | None]:
        """Messages and tools as the template is to be given them."""
        if self.is_native:
            return list(messages), tools or None
        spelled = _joined_results([_spelled(self, message) for message in messages])
        if not tools:
            return spelled, None
        has_system = spelled[0]["role"] in ("system", "developer")
        system = spelled[0] if has_system else {"role": "system", "content": ""}
        text = (system["content"] + "\n\n" if system["content"] else "") + _presented(self, tools)
        return [{**system, "content": text}, *spelled[has_system:]], None


HERMES = ToolForm('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n", is_native=False)
"""https://github.com/NousResearch/Hermes-Function-Calling; Qwen's templates have the same."""


def tool_form(tokenizer: Any) -> ToolForm:
    """The form of a tokenizer's template."""
    try:
        return _native(tokenizer) or HERMES
    except DataError:  # it refuses tools or calls
        return HERMES


def _native(tokenizer: Any) -> ToolForm | None:
    """None where the template does not show tools, or does not write calls in a form that a grammar can have: with an id in it, say."""
    prompt = _written(tokenizer)
    plain = _written(tokenizer, {"role": "assistant", "content": PLAIN})
    called = _written(tokenizer, _calls(PROBE))
    if PROBE not in prompt or not (plain.startswith(prompt) and called.startswith(prompt)):
        return None
    # What also stands round an answer that calls nothing (an empty block of thinking, the end of the turn) is no part of a call.
    before, _, after = plain[len(prompt) :].partition(PLAIN)

    def bare(text: str) -> str:
        return text[len(prompt) :].removeprefix(before).removesuffix(after)

    one = bare(called)
    opening, found, rest = one.partition(PROBE)
    place = ARGUMENTS.search(rest)
    if not (opening.strip() and found and place) or PROBE in rest or ID in one:
        return None
    closing = rest[place.end() :]
    if tokenizer.eos_token and tokenizer.eos_token in closing:
        return None
    return ToolForm(opening, rest[: place.start()], closing, _glue(tokenizer, one, bare), is_native=True)


def _glue(tokenizer: Any, one: str, bare: Any) -> str | None:
    try:
        both = bare(_written(tokenizer, _calls(PROBE, OTHER)))
    except DataError:
        return None
    other = one.replace(PROBE, OTHER)
    return both[len(one) : -len(other)] if both.startswith(one) and both.endswith(other) else None


def _written(tokenizer: Any, *answer: Message) -> str:
    parameters = {"type": "object", "properties": {"probe_key": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": name, "description": "", "parameters": parameters}} for name in (PROBE, OTHER)]
    return render(tokenizer, [USER, *answer], tools=tools, add_generation_prompt=not answer)


def _calls(*names: str) -> Message:
    calls = [{"id": ID, "type": "function", "function": {"name": name, "arguments": {"probe_key": 1}}} for name in names]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _presented(form: ToolForm, tools: Sequence[dict[str, Any]]) -> str:
    """What the model is told of tools that its template does not show. Of the same wording as our ChatML."""
    listed = "\n".join(_json(tool) for tool in tools)
    call = f"{form.opening}NAME{form.between}{{...}}{form.closing}"
    return f"You may call these functions:\n<tools>\n{listed}\n</tools>\nTo call one, write\n{call}"


def _spelled(form: ToolForm, message: Message) -> Message:
    """A message with its calls as text, or a result as a user's turn."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>", "result": True}
    calls = [
        f"{form.opening}{call['function']['name']}{form.between}{_json(call['function']['arguments'])}{form.closing}"
        for call in message.get("tool_calls") or []
    ]
    if not calls:
        return message
    parts = [message["content"]] * bool(message["content"]) + [(form.glue or "\n").join(calls)]
    return {"role": message["role"], "content": "\n".join(parts)}


def _joined_results(messages: Sequence[Message]) -> list[Message]:
    """Results that follow one another in one turn: templates without tools want the roles to alternate."""
    joined: list[Message] = []
    for message in messages:
        is_result = message.get("result", False)
        if is_result and joined and joined[-1].get("result"):
            joined[-1]["content"] += "\n" + message["content"]
        else:
            joined.append(dict(message))
    return [{key: value for key, value in message.items() if key != "result"} for message in joined]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
