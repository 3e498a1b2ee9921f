"""Chat rows as tokens: what counts in the loss is what the assistant says, and its end of turn."""

from pathlib import Path
from typing import Any

import pytest

from hone.chat import CHATML, encode_chat, encode_prompt, end_of_turn_ids, ensure_template
from hone.errors import DataError
from tests.tiny import make_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "why does it rain?"},
    {"role": "assistant", "content": "Clouds are heavy.\nVery."},
    {"role": "user", "content": "thank you ☂"},
    {"role": "assistant", "content": " Any time é"},
]
TEMPLATES = {
    "chatml": CHATML,
    "llama3": (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "gemma": (
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return make_tokenizer(tmp_path)


@pytest.mark.parametrize(("style", "closing"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>")])
def test_the_targets_spell_exactly_what_the_assistant_said(tokenizer: Any, style: str, closing: str) -> None:
    tokenizer.chat_template = TEMPLATES[style]
    chat = encode_chat(tokenizer, MESSAGES)
    said = tokenizer.decode([token for token, wanted in zip(chat.input_ids, chat.is_target, strict=True) if wanted])
    first, second = (MESSAGES[n]["content"] if style == "chatml" else MESSAGES[n]["content"].strip() for n in (2, 4))
    assert said == f"{first}{closing}{second}{closing}"


def test_training_and_serving_see_the_same_prompt_tokens(tokenizer: Any) -> None:
    ensure_template(tokenizer)
    whole, prompt = encode_chat(tokenizer, MESSAGES[:3]), encode_prompt(tokenizer, MESSAGES[:2])
    assert whole.input_ids[: len(prompt)] == prompt
    assert not any(whole.is_target[: len(prompt)])
    assert whole.is_target[len(prompt)]


def test_a_base_without_a_template_gets_chatml_that_ends_turns_with_a_token_it_knows(tokenizer: Any) -> None:
    assert ensure_template(tokenizer)
    assert not ensure_template(tokenizer)
    assert end_of_turn_ids(tokenizer) == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    with pytest.raises(DataError, match="rewrites earlier turns"):
        encode_chat(tokenizer, MESSAGES)


def test_what_a_template_refuses_is_said(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        encode_chat(tokenizer, MESSAGES)
