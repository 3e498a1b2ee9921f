"""Chat rows as tokens: what counts in the loss is what the assistant says, and its end of turn; test_chat_templates.py has the styles."""

from pathlib import Path
from typing import Any

import pytest

from hone.chat import CHATML, EncodedChat, encode_chat, encode_chats, encode_prompt, end_of_turn_ids, ensure_template, render
from hone.errors import DataError
from tests.tiny import make_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "why does it rain?"},
    {"role": "assistant", "content": "Clouds are heavy.\nVery."},
    {"role": "user", "content": "thank you ☂"},
    {"role": "assistant", "content": " Any time é"},
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return make_tokenizer(tmp_path)


def said(tokenizer: Any, chat: EncodedChat) -> str:
    return str(tokenizer.decode(chat.input_ids[chat.is_target]))


def test_the_targets_spell_exactly_what_the_assistant_said(tokenizer: Any) -> None:
    ensure_template(tokenizer)
    assert said(tokenizer, encode_chat(tokenizer, MESSAGES)) == "Clouds are heavy.\nVery.<|im_end|> Any time é<|im_end|>"


def test_training_and_serving_see_the_same_prompt_tokens(tokenizer: Any) -> None:
    ensure_template(tokenizer)
    whole, prompt = encode_chat(tokenizer, MESSAGES[:3]), encode_prompt(tokenizer, MESSAGES[:2])
    assert whole.input_ids[: len(prompt)].tolist() == prompt
    assert not any(whole.is_target[: len(prompt)])
    assert whole.is_target[len(prompt)]


def test_a_base_without_a_template_gets_chatml_that_ends_turns_with_a_token_it_knows(tokenizer: Any) -> None:
    assert ensure_template(tokenizer)
    assert not ensure_template(tokenizer)
    assert end_of_turn_ids(tokenizer) == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_a_template_that_rewrites_earlier_turns_is_read_where_the_turns_can_be_told_apart(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    assert said(tokenizer, encode_chat(tokenizer, MESSAGES)) == "Clouds are heavy.\nVery.<|im_end|> Any time é<|im_end|>"


@pytest.mark.parametrize(
    "rewriting",
    [
        "{% for m in messages %}{{ m.content | length }} {% endfor %}" + CHATML,
        CHATML + "{{ '' if add_generation_prompt else messages[-1].content }}",
    ],
    ids=["counted", "repeated"],
)
def test_a_template_in_which_a_turn_changes_more_than_one_place_is_refused(tokenizer: Any, rewriting: str) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + rewriting
    with pytest.raises(DataError, match=r"messages\[4\]: the chat template rewrites earlier turns"):
        encode_chat(tokenizer, MESSAGES)


def test_one_that_cannot_be_read_does_not_hinder_the_others(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if messages[0].role == 'user' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    first, second = encode_chats(tokenizer, [{"messages": MESSAGES[1:]}, {"messages": MESSAGES}])
    assert isinstance(first, DataError)
    assert isinstance(second, EncodedChat)
    assert said(tokenizer, second) == "Clouds are heavy.\nVery.<|im_end|> Any time é<|im_end|>"


def test_a_plain_conversation_is_rendered_no_more_than_twice_for_each_turn(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_template(tokenizer)
    asked: list[int] = []
    write = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda messages, **settings: asked.append(1) or write(messages, **settings))
    encode_chat(tokenizer, MESSAGES)
    assert len(asked) == 4


def test_chatml_shows_the_tools_and_the_results_of_calls(tokenizer: Any) -> None:
    ensure_template(tokenizer)
    function = {"name": "weather", "arguments": {"city": "Zürich"}}
    messages = [
        *MESSAGES[:2],
        {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
        {"role": "tool", "content": "wet"},
    ]
    assert render(tokenizer, messages, tools=[{"type": "function"}], add_generation_prompt=True) == (
        "<|im_start|>system\nYou may call these functions:\n<tools>\n"
        '{"type": "function"}\n'
        "</tools>\n"
        'To call one, write <tool_call>{"name": ..., "arguments": {...}}</tool_call>.<|im_end|>\n'
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nwhy does it rain?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n<tool_response>\nwet\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_what_a_template_refuses_is_said(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        encode_chat(tokenizer, MESSAGES)
