"""Conversations as OpenAI writes them: checked message by message, and made of what other houses write."""

from typing import Any

from hone.data.readers import parse_json
from hone.data.values import checked_text
from hone.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"}
SHAREGPT_ROLES |= {"bing": "assistant", "bard": "assistant", "tool": "tool", "observation": "tool", "function_response": "tool"}

Message = dict[str, Any]


def conversation(value: Any, key: str = "messages", *, needs_target: bool = True) -> list[Message]:
    """A checked list of messages: role and content, and where they stand there `weight`, `name`, `tool_calls`, `tool_call_id`.

    Args:
        value: The list, or JSON text of one (as CSV holds it).
        key: What to call it in errors.
        needs_target: It must hold something to learn: an assistant's message whose weight is not 0.

    Raises:
        DataError: what is wrong with it.
    """
    value = parse_json(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if not isinstance(value, list):
        raise DataError(f'no "{key}" list; a chat row is {{"messages": [{{"role": ..., "content": ...}}, ...]}}')
    if not value:
        raise DataError(f'"{key}" is empty; each row needs at least one assistant turn')
    checked = [_message(f"{key}[{n}]", message) for n, message in enumerate(value)]
    if needs_target:
        answers = [message for message in checked if message["role"] == "assistant"]
        if not answers:
            raise DataError('no message with role "assistant", so there is nothing to learn')
        if not any(message.get("weight", 1) for message in answers):
            raise DataError("every assistant message has weight 0, so there is nothing to learn")
    return checked


def exchange(prompt: Any, answer: Any, *, keys: tuple[str, str], system: Any = None) -> list[Message]:
    """A question and its answer as a conversation."""
    opening = [{"role": "system", "content": checked_text(system, "system")}] if isinstance(system, str) and system.strip() else []
    texts = [checked_text(value, key) for value, key in zip((prompt, answer), keys, strict=True)]
    return [*opening, {"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]


def from_sharegpt(turns: Any) -> list[Message]:
    """`{"from": "human", "value": ...}` turns, or turns with role and content under the name `conversations`."""
    turns = parse_json(turns) if isinstance(turns, str) and turns.lstrip().startswith("[") else turns
    if not isinstance(turns, list):
        raise DataError('"conversations" must be a list of turns')
    if all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return conversation(turns, "conversations")
    made = []
    for n, turn in enumerate(turns):
        who = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(who, str) or who not in SHAREGPT_ROLES:
            raise DataError(f"conversations[{n}].from is {who!r}; use one of {', '.join(SHAREGPT_ROLES)}")
        made.append({"role": SHAREGPT_ROLES[who], "content": turn.get("value")})
    return conversation(made, "conversations")


def _message(where: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{where} is not an object")
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"{where}.role is {role!r}; use one of {', '.join(ROLES)}")
    made: Message = {"role": role, "content": _content(where, message)}
    if message.get("weight") is not None:
        made["weight"] = _weight(where, role, message["weight"])
    if message.get("tool_calls"):
        made["tool_calls"] = _tool_calls(where, role, message["tool_calls"])
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            made[key] = checked_text(message[key], f"{where}.{key}")
    return made


def _content(where: str, message: Message) -> str:
    role, content = message["role"], message.get("content")
    if message.get("function_call"):
        raise DataError(f"{where}.function_call is of an older API; write tool_calls")
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list):
        content = "".join(_part(f"{where}.content[{n}]", part) for n, part in enumerate(content))
    if not isinstance(content, str):
        raise DataError(f"{where}.content must be a text, not {type(content).__name__}")
    if role == "assistant" and not content.strip() and not message.get("tool_calls"):
        raise DataError(f"{where}.content is empty; an assistant turn must say something")
    return checked_text(content, f"{where}.content", may_be_empty=True)


def _part(where: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise DataError(f"{where} is {kind!r}; only text can be learnt from")
    return str(part["text"])


def _weight(where: str, role: str, weight: Any) -> int:
    if role != "assistant":
        raise DataError(f"{where}.weight is for assistant messages, and this is {role}")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"{where}.weight is {weight!r}; it is 0 (not learnt) or 1")
    return int(weight)


def _tool_calls(where: str, role: str, calls: Any) -> list[dict[str, Any]]:
    if role != "assistant" or not isinstance(calls, list):
        raise DataError(f"{where}.tool_calls must be a list, in an assistant message")
    made = []
    for n, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f'{where}.tool_calls[{n}] is not {{"function": {{"name": ..., "arguments": ...}}}}')
        arguments = function.get("arguments", {})
        parsed = parse_json(arguments or "{}") if isinstance(arguments, str) else arguments
        if not isinstance(parsed, dict):
            raise DataError(f"{where}.tool_calls[{n}].function.arguments is not a JSON object")
        # Templates of the field write arguments by `tojson`, and so want them parsed.
        kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        made.append({**kept, "type": "function", "function": {"name": checked_text(function["name"], where), "arguments": parsed}})
    return made
