"""Loss on assistant tokens only, to the token: the unmasked tokens, decoded, in each style of template."""

from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hone.chat import EncodedChat, encode_chat, end_of_turn_ids, ensure_template, render
from hone.errors import DataError
from tests.chat_templates import STYLES, Message, Style
from tests.tiny import make_tokenizer

CLOSINGS = ["<|eot_id|>", "</s>", "<end_of_turn>"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "☂ or not",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": " why does it rain? "},
    {"role": "assistant", "content": "  Clouds are heavy.\nVery. \n"},
    {"role": "user", "content": "thank you ☂"},
    {"role": "assistant", "content": "Any time é 🌧️"},
]
SAID = {
    "chatml": ["  Clouds are heavy.\nVery. \n<|im_end|>", "Any time é 🌧️<|im_end|>"],
    "llama3": ["Clouds are heavy.\nVery.<|eot_id|>", "Any time é 🌧️<|eot_id|>"],
    "mistral": [" Clouds are heavy.\nVery.</s>", " Any time é 🌧️</s>"],
    "mistral-first": ["   Clouds are heavy.\nVery. \n</s>", " Any time é 🌧️</s>"],
    "gemma": ["Clouds are heavy.\nVery.<end_of_turn>", "Any time é 🌧️<end_of_turn>"],
    "qwen2.5": ["  Clouds are heavy.\nVery. \n<|im_end|>", "Any time é 🌧️<|im_end|>"],
    "qwen3": ["  Clouds are heavy.\nVery. \n<|im_end|>", "<think>\n\n</think>\n\nAny time é 🌧️<|im_end|>"],
}


def call(*cities: str, content: str = "") -> Message:
    calls = [
        {"id": f"callnum{n:02}", "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        for n, city in enumerate(cities)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result(text: str) -> Message:
    return {"role": "tool", "name": "weather", "tool_call_id": "callnum00", "content": text}


CALLED = [
    {"role": "user", "content": "rain?"},
    call("Zürich"),
    result("wet"),
    {"role": "assistant", "content": "Wet."},
    {"role": "user", "content": "and in Bern?"},
    call("Bern"),
    result("dry"),
    {"role": "assistant", "content": "Dry."},
]
TAGGED = '<tool_call>\n{{"name": "weather", "arguments": {{"city": "{}"}}}}\n</tool_call><|im_end|>'
JSON = '{{"name": "weather", "parameters": {{"city": "{}"}}}}<|eot_id|>'
LISTED = '[TOOL_CALLS] [{{"name": "weather", "arguments": {{"city": "{}"}}, "id": "callnum00"}}]</s>'
SAID_AND_CALLED = {
    "chatml": [TAGGED.format("Zürich"), "Wet.<|im_end|>", TAGGED.format("Bern"), "Dry.<|im_end|>"],
    "llama3": [JSON.format("Zürich"), "Wet.<|eot_id|>", JSON.format("Bern"), "Dry.<|eot_id|>"],
    "mistral": [LISTED.format("Zürich"), " Wet.</s>", LISTED.format("Bern"), " Dry.</s>"],
    "qwen2.5": [TAGGED.format("Zürich"), "Wet.<|im_end|>", TAGGED.format("Bern"), "Dry.<|im_end|>"],
    "qwen3": [TAGGED.format("Zürich"), "Wet.<|im_end|>", TAGGED.format("Bern"), "<think>\n\n</think>\n\nDry.<|im_end|>"],
}
WITHOUT_TOOLS = [name for name, style in STYLES.items() if style.call is None]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizer.add_tokens(CLOSINGS, special_tokens=True)
    return tokenizer


@pytest.fixture
def tokenizer(bare: Any) -> Any:
    bare.chat_template = None
    return bare


def said(tokenizer: Any, chat: EncodedChat) -> list[str]:
    """The text of each run of targets."""
    runs = groupby(zip(chat.input_ids.tolist(), chat.is_target.tolist(), strict=True), key=lambda token: token[1])
    return [tokenizer.decode([token for token, _ in run]) for is_target, run in runs if is_target]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("opening", [[], [SYSTEM], [{"role": "system", "content": ""}]], ids=["alone", "system", "empty system"])
def test_the_targets_of_several_turns_are_the_assistants_words_and_its_end_of_turn(
    tokenizer: Any, style: str, opening: list[Message]
) -> None:
    tokenizer.chat_template = STYLES[style].template
    assert said(tokenizer, encode_chat(tokenizer, [*opening, *TURNS])) == SAID[style]


@pytest.mark.parametrize("style", SAID_AND_CALLED)
@pytest.mark.parametrize("opening", [[], [SYSTEM]], ids=["alone", "system"])
def test_the_targets_with_tools_are_calls_and_answers_but_not_results(tokenizer: Any, style: str, opening: list[Message]) -> None:
    tokenizer.chat_template = STYLES[style].template
    assert said(tokenizer, encode_chat(tokenizer, [*opening, *CALLED], tools=TOOLS)) == SAID_AND_CALLED[style]


@pytest.mark.parametrize("style", ["chatml", "qwen2.5", "qwen3"])
def test_several_calls_below_some_words_are_one_turn(tokenizer: Any, style: str) -> None:
    tokenizer.chat_template = STYLES[style].template
    asked = [CALLED[0], call("Zürich", "Bern", content="Let me see"), result("wet"), result("dry"), *CALLED[3:]]
    first = said(tokenizer, encode_chat(tokenizer, asked, tools=TOOLS))[0]
    assert first == "Let me see\n" + TAGGED.format("Zürich").removesuffix("<|im_end|>") + "\n" + TAGGED.format("Bern")


@pytest.mark.parametrize("style", STYLES)
def test_a_weight_of_0_takes_its_own_turn_out_and_no_other(tokenizer: Any, style: str) -> None:
    tokenizer.chat_template = STYLES[style].template
    first, second = ([{**turn, "weight": int(n == kept)} if n % 2 else turn for n, turn in enumerate(TURNS)] for kept in (1, 3))
    assert said(tokenizer, encode_chat(tokenizer, [SYSTEM, *first])) == SAID[style][:1]
    assert said(tokenizer, encode_chat(tokenizer, [SYSTEM, *second])) == SAID[style][1:]


@pytest.mark.parametrize("style", STYLES)
def test_training_shows_the_last_answer_after_the_very_prompt_of_serving(tokenizer: Any, style: str) -> None:
    tokenizer.chat_template = STYLES[style].template
    prompt = render(tokenizer, [SYSTEM, *TURNS[:-1]], add_generation_prompt=True)
    whole = tokenizer.decode(encode_chat(tokenizer, [SYSTEM, *TURNS]).input_ids)
    assert "Be brief." in prompt
    assert whole.rstrip("\n") == prompt + SAID[style][-1]


@pytest.mark.parametrize("style", STYLES)
def test_the_end_of_turn_that_is_learnt_is_the_one_that_serving_stops_at(tokenizer: Any, style: str) -> None:
    tokenizer.chat_template = STYLES[style].template
    chat = encode_chat(tokenizer, TURNS)
    assert chat.input_ids[chat.is_target][-1] in end_of_turn_ids(tokenizer)


@pytest.mark.parametrize("style", WITHOUT_TOOLS)
@pytest.mark.parametrize("content", ["", "I ask for the weather"])
def test_calls_that_a_template_does_not_write_are_refused(tokenizer: Any, style: str, content: str) -> None:
    tokenizer.chat_template = STYLES[style].template
    with pytest.raises(DataError, match=r"messages\[3\]: the base's chat template does not write tool calls"):
        encode_chat(tokenizer, [*TURNS[:3], call("Bern", content=content)], tools=TOOLS)


@pytest.mark.parametrize("content", ["", "The weather in Bern:"])
def test_earlier_calls_that_a_rewriting_template_does_not_write_are_refused(tokenizer: Any, content: str) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    with pytest.raises(DataError, match=r"messages\[1\]: the base's chat template does not write tool calls"):
        encode_chat(tokenizer, [CALLED[0], call("Bern", content=content), *CALLED[2:4]])


def test_thinking_counts_where_the_template_writes_it_and_not_where_it_drops_it(tokenizer: Any) -> None:
    tokenizer.chat_template = STYLES["qwen3"].template
    thoughts = [{**turn, "content": f"<think>\nhm\n</think>\n\n{turn['content']}"} if n % 2 else turn for n, turn in enumerate(TURNS)]
    assert said(tokenizer, encode_chat(tokenizer, thoughts)) == [
        "  Clouds are heavy.\nVery. \n<|im_end|>",
        "<think>\nhm\n</think>\n\nAny time é 🌧️<|im_end|>",
    ]
    asked = [*CALLED[:4], CALLED[4], {**CALLED[5], "content": "<think>\nhm\n</think>\n\n"}, *CALLED[6:]]
    assert "hm" in said(tokenizer, encode_chat(tokenizer, asked, tools=TOOLS))[2]


def test_a_conversation_may_begin_with_the_assistant_where_the_template_takes_that(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + STYLES["chatml"].template
    assert said(tokenizer, encode_chat(tokenizer, [TURNS[3], TURNS[0]])) == SAID["chatml"][1:]


def test_a_template_that_ends_the_conversation_in_its_own_way_keeps_each_end_of_turn(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|eot_id|>\n{% endfor %}"
        "{{ '<|assistant|>\\n' if add_generation_prompt else '</s>' }}"
    )
    assert said(tokenizer, encode_chat(tokenizer, TURNS)) == [
        "  Clouds are heavy.\nVery. \n<|eot_id|>",
        "Any time é 🌧️<|eot_id|>\n</s>",
    ]


def test_what_a_template_puts_before_an_answer_counts_if_the_prompt_does_not_end_with_it(tokenizer: Any) -> None:
    """As GLM's: it drops what was thought in earlier turns, but not the tags."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
        "<think>{{ m.content.split('</think>')[0].split('<think>')[1] if loop.last }}</think>{% endif %}"
        "{{ m.content.split('</think>')[-1] }}{% endfor %}{{ '<|assistant|>' if add_generation_prompt }}"
    )
    first, second = ({"role": "assistant", "content": f"<think>hm</think>{text}"} for text in ("one", "two"))
    assert said(tokenizer, encode_chat(tokenizer, [TURNS[0], first, TURNS[2], second])) == [
        "<think></think>one",
        "<think>hm</think>two",
    ]


def test_thinking_that_a_prompt_opens_and_the_whole_does_not_show_is_not_left_open(tokenizer: Any) -> None:
    """As DeepSeek R1's."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}{{ '</s>' if m.role == 'assistant' }}{% endfor %}"
        "{{ '<|assistant|><think>\\n' if add_generation_prompt }}"
    )
    chat = encode_chat(tokenizer, [SYSTEM, *TURNS[2:]])
    assert said(tokenizer, chat) == ["Any time é 🌧️</s>"]
    assert tokenizer.decode(chat.input_ids) == render(tokenizer, [SYSTEM, *TURNS[2:]])


def test_results_that_a_template_writes_into_the_assistants_turn_are_not_learnt(tokenizer: Any) -> None:
    """As Gemma 4's: there the call's results stand between the call and the words of the same message."""
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages if m.role != 'tool' %}<{{ m.role }}>"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% set after = loop.index0 + 1 %}"
        "{% if after < messages | length %}[{{ messages[after].content }}]{% endif %}{% endif %}{{ m.content }}</s>{% endfor %}"
    )
    with pytest.raises(DataError, match="cannot be told apart"):
        encode_chat(tokenizer, [CALLED[0], call("Bern", content="So:"), *CALLED[2:4]])


TEXT = st.lists(
    st.one_of(
        st.sampled_from(["<|im_end|>", "<|im_start|>assistant\n", "</s>", "[/INST]", " [INST] ", "<end_of_turn>\n", "<|eot_id|>"]),
        st.sampled_from(["\n", " ", "é", "🌧️", "\ue000", "\ue001", "{{ x }}", "%}", "ok", "the cat", "<tool_call>", "\u2028"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    ),
    min_size=1,
    max_size=5,
).map("".join)
ANSWER = TEXT.filter(lambda text: bool(text.strip()))


@st.composite
def conversations(draw: st.DrawFn, style: Style) -> list[Message]:
    """Some exchanges, any with a call and its result before the answer where the style has those."""
    messages: list[Message] = draw(st.sampled_from([[], [SYSTEM], [{"role": "system", "content": ""}]]))
    for _ in range(draw(st.integers(1, 3))):
        messages = [*messages, {"role": "user", "content": draw(TEXT)}]
        if style.call and draw(st.booleans()):
            messages = [*messages, {**call(draw(TEXT)), "weight": draw(st.integers(0, 1))}, result(draw(TEXT))]
        messages = [*messages, {"role": "assistant", "content": draw(ANSWER), "weight": draw(st.integers(0, 1))}]
    return messages + draw(st.sampled_from([[], [{"role": "user", "content": "the cat"}]]))


@pytest.mark.parametrize("style", STYLES)
@settings(deadline=None)
@given(data=st.data())
def test_whatever_is_said_the_targets_spell_what_the_style_makes_of_it(bare: Any, style: str, data: st.DataObject) -> None:
    written = STYLES[style]
    bare.chat_template = written.template
    messages = data.draw(conversations(written))
    wanted = []
    for n, message in enumerate(messages):
        if message.get("weight"):
            write = written.call if "tool_calls" in message and written.call else written.answer
            wanted.append(write(message, n + 1 == len(messages)))
    assert said(bare, encode_chat(bare, messages, tools=TOOLS if written.call else None)) == wanted


def byte_level(*merges: tuple[str, str]) -> Any:
    """A tokenizer of bytes and of these merges, across words too; newlines are Ċ."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: n for n, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_token_that_begins_before_the_turn_is_the_prompts_and_one_that_ends_after_it_is_the_turns() -> None:
    tokenizer = byte_level(("Ċ", "y"), ("s", "Ċ"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}{{ 'assistant:\\n' if add_generation_prompt }}"
    )
    chat = encode_chat(tokenizer, [{"role": "user", "content": "why"}, {"role": "assistant", "content": "yes"}])
    assert said(tokenizer, chat) == ["es\n"]


def sentencepiece_like() -> Any:
    """Spaces as ▁, unknown characters as bytes, and no `<|im_end|>`: as Llama 2, Mistral and Gemma tokenise."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.\n", "▁w", "▁we"]
    vocab = {piece: n for n, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "w"), ("▁w", "e")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("opening", [[], [SYSTEM]], ids=["alone", "system"])
def test_the_space_before_an_answer_and_each_byte_of_a_character_count(opening: list[Message]) -> None:
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = STYLES["mistral"].template
    messages = [*opening, {"role": "user", "content": "a"}, {"role": "assistant", "content": "wet ☂"}, *TURNS[2:3]]
    chat = encode_chat(tokenizer, messages)
    assert said(tokenizer, chat) == [" wet ☂</s>"]
    assert tokenizer.convert_ids_to_tokens(chat.input_ids[chat.is_target]) == ["▁we", "t", "▁", "<0xE2>", "<0x98>", "<0x82>", "</s>"]


def test_a_base_that_has_no_template_ends_its_turns_with_its_own_end_of_sequence() -> None:
    tokenizer = sentencepiece_like()
    assert ensure_template(tokenizer)
    assert said(tokenizer, encode_chat(tokenizer, TURNS[2:])) == ["Any time é 🌧️</s>"]
    assert end_of_turn_ids(tokenizer) == {tokenizer.eos_token_id}
