"""Rows of each format as rows of their shape, and what is said of those that are not as they should be."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hone.data.formats import FORMATS, convert, media_path
from hone.errors import DataError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = {"messages": [USER, ANSWER]}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
PARSED = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("row", "name", "made"),
    [
        (CHAT, "OpenAI chat", CHAT),
        ({"messages": json.dumps([USER, ANSWER]), "id": 7}, "OpenAI chat", CHAT),
        ({"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]}, "OpenAI chat", None),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}, "OpenAI chat", CHAT),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [{"type": "function"}]},
            "OpenAI chat",
            {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [PARSED]}], "tools": [{"type": "function"}]},
        ),
        ({"prompt": "q", "completion": "a", "messages": None}, "prompt and completion", CHAT),
        ({"instruction": "q", "input": "", "output": "a"}, "Alpaca", CHAT),
        ({"instruction": "q", "input": "z", "output": "a"}, "Alpaca", {"messages": [{"role": "user", "content": "q\n\nz"}, ANSWER]}),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "ShareGPT", CHAT),
        ({"conversations": [USER, ANSWER]}, "ShareGPT", CHAT),
        ({"text": "t"}, "plain text", {"text": "t"}),
        ({"text": "t", "label": 3}, "text and label", {"text": "t", "label": "3"}),
        ({"text": "t", "labels": ["b", "a", "b"]}, "text and labels", {"text": "t", "labels": ["a", "b"]}),
        ({"text": "t", "number": "1.5"}, "text and number", {"text": "t", "number": 1.5}),
        ({"tokens": ["a", "b"], "labels": [0, "X"]}, "labelled tokens", {"tokens": ["a", "b"], "labels": ["0", "X"]}),
        ({"source": "s", "target": "t"}, "source and target", {"source": "s", "target": "t"}),
        ({"translation": {"en": "s", "de": "t"}}, "translation", {"source": "s", "target": "t"}),
        ({"image": {"bytes": b"x", "path": None}, "label": 1}, "image and label", {"image": b"x", "label": "1"}),
        ({"audio": b"x", "label": "one"}, "audio and label", {"audio": b"x", "label": "one"}),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            "preference triples",
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "b"}]},
        ),
        (
            {"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "b"}]},
            "preference triples",
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "b"}]},
        ),
    ],
)
def test_formats_are_recognised_by_their_columns(row: Any, name: str, made: Any) -> None:
    converted, found = convert(row)
    assert found.name == name
    assert converted == (made or row)


def test_columns_can_be_named() -> None:
    row = {"review": "fine", "stars": 4, "text": "not this"}
    assert convert(row, columns={"text": "review", "label": "stars"})[0] == {"text": "fine", "label": "4"}
    with pytest.raises(DataError, match=r"no column 'mark' .there are: review, stars, text"):
        convert(row, columns={"label": "mark"})


def test_a_shape_can_be_asked_for() -> None:
    row = {"text": "t", "label": "x", "prompt": "q", "completion": "a"}
    assert convert(row, shape="chat")[1].shape == "chat"
    assert convert(row, shape="labelled-text")[1].shape == "labelled-text"
    with pytest.raises(DataError, match=r"no columns that make a row .there are: text, lable.*text\+label"):
        convert({"text": "a", "lable": "b"}, shape="labelled-text")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, '"messages" is empty'),
        ({"messages": "hello"}, 'no "messages" list'),
        ({"messages": [USER]}, 'no message with role "assistant"'),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "every assistant message has weight 0"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, r"messages\[0\].weight is for assistant messages"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "it is 0 .not learnt. or 1"),
        ({"messages": [{"role": "bot", "content": "x"}]}, r"messages\[0\].role is 'bot'"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "must be a text, not NoneType"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "an assistant turn must say something"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "only text can be learnt from"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {}}]}]}, r"tool_calls\[0\] is not"),
        ({"messages": [USER, {**ANSWER, "content": "\ud800"}]}, "half of a surrogate pair"),
        ({"messages": [USER, {**ANSWER, "content": "caf\udce9"}]}, "holds the byte 0xe9, which is not UTF-8"),
        ({"prompt": "q", "completion": "a\0"}, "NUL character at 2"),
        ({"prompt": "", "completion": "x"}, "'prompt' must be a text"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, r"conversations\[0\].from is 'alien'"),
        ({"text": "t", "label": True}, "class name or number"),
        ({"text": "t", "label": 1.5}, "class name or number"),
        ({"text": "t", "labels": "a"}, "must be a list of class names"),
        ({"text": "t", "number": float("nan")}, "must be a number"),
        ({"tokens": ["a"], "labels": []}, "1 tokens and 0 labels"),
        ({"translation": {"en": "x"}}, "two languages"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
        ({"image": 3, "label": "x"}, "bytes of a file or a path"),
        ({"messages": [None, ANSWER]}, r"messages\[0\] is not an object"),
        ({"messages": [USER, {"role": "assistant", "content": [None]}]}, r"messages\[1\].content\[0\] is 'NoneType'"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [None]}]}, r"tool_calls\[0\] is not"),
        ({"conversations": [None]}, r"conversations\[0\].from is None"),
        ({"conversations": [{"from": []}]}, r"conversations\[0\].from is \[\]"),
        ({"tokens": ["a", None], "labels": ["x", "y"]}, r"tokens\[1\]' must be a text"),
        ({"text": None, "label": "x"}, "no columns that make a row"),
        ({"x": 1}, "no columns that make a row"),
        ({}, "no columns that make a row"),
    ],
)
def test_what_is_wrong_is_said(row: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        convert(row)


@pytest.mark.parametrize("path", ["../up.png", "/etc/passwd", "a/../../b.png"])
def test_a_path_that_climbs_out_is_refused(path: str) -> None:
    with pytest.raises(DataError, match="leads out of"):
        media_path(path, "/data/set", "image")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
column = st.sampled_from(sorted({name for f in FORMATS for name in f.needs} | {"tools", "system", "input"}))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(column, json_values, max_size=5))
def test_every_answer_is_a_row_or_a_named_error(row: dict[str, Any]) -> None:
    try:
        made, found = convert(row)
    except DataError:
        return
    assert made
    assert found in FORMATS
