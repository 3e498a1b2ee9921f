"""Chat rows as text and tokens, the same way in training and in serving.

Everything here takes the tokenizer as an argument, so the floor needs no transformers. A base without a template gets ChatML.

An assistant turn is found in the text that the template writes, in the first of these ways that holds:

1. By prefix. The conversation before the turn, with the generation prompt, begins the conversation up to and with the turn, and that
   begins the whole. Between them is what the model must write when served: the answer, its end-of-turn marker, and whatever the
   template puts first (Qwen3's empty `<think>` block).
2. By change. Templates rewrite what is past: Qwen3 drops the thinking of earlier turns, Mistral's moves the tools to the last question.
   So the conversation is written again with this turn's content changed to one character that stands nowhere in it: what stands in that
   character's place, and the end-of-turn marker after it, is the turn.
3. By change of a call. Tool calls are not dropped from the whole for this (Mistral's would refuse, Gemma 4's would drop their results
   too): the first function's name is changed, and the turn is its own text, as it is written when last, around that place.

Otherwise the row is refused. `{% generation %}` marks are not used: they cover what each author chose, and few templates have them.

Mistral's templates also show the system turn only before an answer that is still to be written. The last answer then stands after the
prompt that serving would show, so that it is not learnt without its system turn.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hone.errors import DataError

Message = dict[str, Any]
Span = tuple[int, int]

CHATML = (
    "{% if tools %}<|im_start|>system\nYou may call these functions:\n<tools>\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>\n"
    'To call one, write <tool_call>{"name": ..., "arguments": {...}}</tool_call>.<|im_end|>\n{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'tool' %}<tool_response>\n{{ message['content'] }}\n</tool_response>"
    "{% else %}{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ '\\n' if message['content'] or not loop.first }}"
    "<tool_call>\n{{ call['function'] | tojson }}\n</tool_call>{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md, with tools and calls in the tags of Hermes and Qwen."""


@dataclass(frozen=True)
class EncodedChat:
    """One conversation as tokens."""

    input_ids: npt.NDArray[np.int32]
    is_target: npt.NDArray[np.bool_]
    """Per token: whether it is the assistant's (its end-of-turn marker too), and so counts in the loss."""


def ensure_template(tokenizer: Any) -> bool:
    """Give the tokenizer ChatML where it has no chat template; say whether that was done.

    Where `<|im_end|>` is no token of the base's own, its end-of-sequence token closes each turn, so that the model can end a turn with
    one token that it knows.
    """
    if tokenizer.chat_template:
        return False
    known = "<|im_end|>" in tokenizer.get_vocab()
    tokenizer.chat_template = CHATML if known or not tokenizer.eos_token else CHATML.replace("<|im_end|>", tokenizer.eos_token)
    return True


def render(
    tokenizer: Any, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] | None = None, add_generation_prompt: bool = False
) -> str:
    """The conversation as the template writes it, and the tools that it may call.

    Raises:
        DataError: the template refuses it (roles out of order, say).
    """
    try:
        return str(tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt))
    except Exception as error:  # a template raises whatever its author chose
        raise DataError(f"the chat template refuses these messages: {error}") from None


def encode_prompt(tokenizer: Any, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] | None = None) -> list[int]:
    """Tokens of a conversation up to where the assistant's answer begins."""
    text = render(tokenizer, messages, tools=tools, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_chat(tokenizer: Any, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] | None = None) -> EncodedChat:
    """Tokens of a whole conversation, with the assistant's own marked; see `encode_chats`.

    Raises:
        DataError: the template refuses it, or the assistant's text cannot be located.
    """
    [encoded] = encode_chats(tokenizer, [{"messages": messages, "tools": tools}])
    if isinstance(encoded, DataError):
        raise encoded
    return encoded


def encode_chats(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> list[EncodedChat | DataError]:
    """Tokens of whole conversations, with the assistant's own marked; not those of a message whose `weight` is 0.

    Each text is tokenised once, as it will be when served; a token counts as a target if it begins inside an assistant turn. One that
    begins before the turn and reaches into it does not: when served, the prompt ends within it, so the model never writes it.

    Args:
        rows: `messages`, and `tools` where there are some.

    Returns:
        For each row its tokens, or what is wrong: the template refuses it, writes no tool calls, or rewrites so much that the assistant's
        text cannot be located.
    """
    located: list[tuple[str, list[Span]] | DataError] = []
    for row in rows:
        try:
            located.append(_assistant_spans(tokenizer, row["messages"], row.get("tools")))
        except DataError as error:
            located.append(error)
    texts = [found[0] for found in located if not isinstance(found, DataError)]
    encodings = iter(_encodings(tokenizer, texts))
    return [found if isinstance(found, DataError) else _marked(next(encodings), found[1]) for found in located]


def _encodings(tokenizer: Any, texts: Sequence[str]) -> Sequence[Any]:
    """Of each text an Encoding of the tokenizers library. Asked for directly: transformers would make lists of every offset."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    encodings: Sequence[Any] = backend.encode_batch(list(texts), add_special_tokens=False)
    return encodings


def _assistant_spans(tokenizer: Any, messages: Sequence[Message], tools: Any) -> tuple[str, list[Span]]:
    """The conversation as text, and where in it each turn to be learnt begins and ends."""
    chat = _Chat(tokenizer, messages, tools)
    text, spans = render(tokenizer, messages, tools=tools), []
    for n in reversed(range(len(messages))):  # the last one first, because it may settle the text
        is_last, is_learnt = n + 1 == len(messages), messages[n].get("weight", 1)
        if messages[n]["role"] != "assistant" or not (is_last or is_learnt):
            continue
        prompt = chat.prompt(n)
        if is_last and prompt is not None and not text.startswith(prompt) and _loses_system(chat, text):
            answer = text[_turn(chat, n, text, prompt)[0] :]
            chat, text = replace(chat, answer=answer), prompt + answer
        if is_learnt:
            a, b = _turn(chat, n, text, prompt)
            _check_calls_are_written(n, messages[n], text[a:b])
            spans.append((a, b))
    return text, spans


@dataclass(frozen=True)
class _Chat:
    """A conversation, and what its template makes of it and of its like; None is what the template refuses."""

    tokenizer: Any
    messages: Sequence[Message]
    tools: Any
    answer: str | None = None
    """The last turn as text, where it is to follow the prompt that serving would show, and not what the template makes of that."""

    def prompt(self, n: int) -> str | None:
        """What stands before message `n` when that is to be written."""
        return self._written(self.messages[:n], add_generation_prompt=True)

    def until(self, n: int) -> str | None:
        """The conversation as if message `n` were the last."""
        return self._written(self.messages[: n + 1])

    def changed(self, n: int, message: Message) -> str | None:
        """The whole with another message in the place of `n`."""
        like = replace(self, messages=[*self.messages[:n], message, *self.messages[n + 1 :]])
        last = len(self.messages) - 1
        if self.answer is None:
            return like.until(last)
        prompt = like.prompt(last)
        return None if prompt is None else prompt + self.answer

    def _written(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str | None:
        try:
            return render(self.tokenizer, messages, tools=self.tools, add_generation_prompt=add_generation_prompt)
        except DataError:
            return None


def _loses_system(chat: _Chat, text: str) -> bool:
    """Whether the system turn is in the prompt for the last answer but not in the whole, as in Mistral's own templates."""
    first, last = chat.messages[0], len(chat.messages) - 1
    if first["role"] not in ("system", "developer"):
        return False
    mark = _unused_character(text)
    marked = replace(chat, messages=[{**first, "content": mark}, *chat.messages[1:]])
    return mark in (marked.prompt(last) or "") and mark not in (marked.until(last) or mark)


def _turn(chat: _Chat, n: int, text: str, prompt: str | None) -> Span:
    """Where message `n` stands in the text, in the first of the ways that holds."""
    if span := _by_prefix(chat, n, text, prompt):
        return span
    span = _by_changed_call(chat, n, text) if chat.messages[n].get("tool_calls") else _by_change(chat, n, text)
    if span is None:
        raise DataError(f"messages[{n}]: the chat template rewrites earlier turns, so the assistant's tokens cannot be told apart")
    a, b = span
    if prompt is None:
        return a, b
    if text.startswith(prompt):
        return min(a, len(prompt)), b
    # Mistral's prompt leaves the space before an answer to the model, and a token may begin with it.
    return min(a, len(text[:a].rstrip()) + len(prompt) - len(prompt.rstrip())), b


def _by_prefix(chat: _Chat, n: int, text: str, prompt: str | None) -> Span | None:
    if prompt is None or not text.startswith(prompt):
        return None
    end = text if n + 1 == len(chat.messages) else chat.until(n)
    if end is None or not (text.startswith(end) and end.startswith(prompt)):
        return None
    return len(prompt), max(len(prompt), len(end.rstrip("\n")))


def _by_change(chat: _Chat, n: int, text: str) -> Span | None:
    """The content and calls of message `n`, and its end-of-turn marker."""
    mark = _unused_character(text)
    plain = {key: value for key, value in chat.messages[n].items() if key != "tool_calls"}
    found = _difference(text, chat.changed(n, {**plain, "content": mark}), mark)
    if found is None:
        return None
    closing = _closing(chat.tokenizer)
    ends = (closing.rstrip("\n"), closing.partition("\n")[0])  # the second where more is written after the last turn
    return found[0], found[1] + next((len(end) for end in ends if text.startswith(end, found[1])), 0)


def _by_changed_call(chat: _Chat, n: int, text: str) -> Span | None:
    """The turn as it is written when last, around the place that changes with the name of its first call."""
    message, mark = chat.messages[n], _unused_character(text)
    call, *others = message["tool_calls"]
    renamed = {**call, "function": {**call["function"], "name": mark}}
    changed, end = chat.changed(n, {**message, "tool_calls": [renamed, *others]}), chat.until(n)
    if changed is not None and mark not in changed:
        raise _no_calls(n)
    found = _difference(text, changed, mark)
    own = None if end is None else _by_change(_Chat(chat.tokenizer, chat.messages[: n + 1], chat.tools), n, end)
    if found is None or end is None or own is None:
        return None
    said = end[slice(*own)]
    places = [at for at in range(max(0, found[1] - len(said)), found[0] + 1) if text.startswith(said, at)]
    return (places[0], places[0] + len(said)) if len(places) == 1 else None


def _difference(text: str, changed: str | None, mark: str) -> Span | None:
    """What of the text stands in the place of the mark; None if more differs than that and blanks before it."""
    if changed is None or changed.count(mark) != 1:
        return None
    before, after = changed.split(mark)
    while not text.startswith(before) and before[-1].isspace():
        before = before[:-1]
    a, b = len(before), len(text) - len(after)
    return (a, b) if a <= b and text.startswith(before) and text.endswith(after) else None


def _unused_character(text: str) -> str:
    """One of Unicode's private-use characters, so that no text, template or tokenizer gives it a meaning."""
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)


def _check_calls_are_written(n: int, message: Message, said: str) -> None:
    """Not to learn silently to say nothing where a function should be called."""
    calls = message.get("tool_calls") or []
    beside_content = said.replace((message["content"] or "").strip(), "", 1) if calls else ""
    if not all(call["function"]["name"] in beside_content for call in calls):
        raise _no_calls(n)


def _no_calls(n: int) -> DataError:
    return DataError(f"messages[{n}]: the base's chat template does not write tool calls; leave them out, or take another base")


def _marked(encoding: Any, spans: list[Span]) -> EncodedChat:
    offsets = encoding.offsets  # of characters; they never fall
    is_target = np.zeros(len(offsets), dtype=bool)
    for a, b in spans:
        first, end = bisect_left(offsets, (a,)), bisect_left(offsets, (b,))
        is_target[first:end] = [stop > start for start, stop in offsets[first:end]]
    return EncodedChat(np.asarray(encoding.ids, dtype=np.int32), is_target)


def end_of_turn_ids(tokenizer: Any) -> set[int]:
    """Token ids that end an answer: the tokenizer's end of sequence, and what its template writes after an assistant's text."""
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    closing = _closing(tokenizer).lstrip()
    if closing:
        first = tokenizer(closing, add_special_tokens=False)["input_ids"][0]
        if first in tokenizer.all_special_ids or first in tokenizer.added_tokens_decoder:
            ids.add(first)
    return ids


def _closing(tokenizer: Any) -> str:
    """What the template writes after an assistant's text."""
    mark = _unused_character("")
    return render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]).rpartition(mark)[2]
