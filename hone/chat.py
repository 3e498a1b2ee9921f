"""Chat rows as text and tokens, the same way in training and in serving.

Everything here takes the tokenizer as an argument, so the floor needs no transformers. A base without a template gets ChatML.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hone.errors import DataError

Message = dict[str, Any]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md"""


@dataclass(frozen=True)
class EncodedChat:
    """One conversation as tokens."""

    input_ids: list[int]
    is_target: list[bool]
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


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Tokens of a conversation up to where the assistant's answer begins."""
    text = render(tokenizer, messages, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_chat(tokenizer: Any, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] | None = None) -> EncodedChat:
    """Tokens of a whole conversation, with the assistant's own marked; not those of a message whose `weight` is 0.

    The text is tokenised once, as it will be when served; a token counts as a target if it begins inside an assistant turn.

    Raises:
        DataError: the template rewrites earlier turns when later ones are added, so the assistant's text cannot be located.
    """
    text = render(tokenizer, messages, tools=tools)
    spans = []
    for n, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("weight", 1):
            start = render(tokenizer, messages[:n], tools=tools, add_generation_prompt=True)
            end = render(tokenizer, messages[: n + 1], tools=tools)
            if not (text.startswith(end) and end.startswith(start)):
                raise DataError("the chat template rewrites earlier turns, so the assistant's tokens cannot be told apart")
            spans.append((len(start), len(start) + len(end[len(start) :].rstrip("\n"))))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    return EncodedChat(list(encoded["input_ids"]), [end > start and any(a <= start < b for a, b in spans) for start, end in offsets])


def end_of_turn_ids(tokenizer: Any) -> set[int]:
    """Token ids that end an answer: the tokenizer's end of sequence, and what its template writes after an assistant's text."""
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    start, end = render(tokenizer, messages[:1], add_generation_prompt=True), render(tokenizer, messages)
    _, found, closing = end[len(start) :].rpartition("b")
    if found and closing.strip():
        first = tokenizer(closing.lstrip(), add_special_tokens=False)["input_ids"][0]
        if first in tokenizer.all_special_ids or first in tokenizer.added_tokens_decoder:
            ids.add(first)
    return ids
