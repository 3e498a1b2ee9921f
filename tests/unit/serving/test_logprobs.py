"""Log probabilities and the other settings over the routes, in OpenAI's shapes, by OpenAI's client with strict validation."""

import itertools
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from starlette.testclient import TestClient

from hone.chat import encode_prompt
from serving.ingress import make_app
from serving.kinds import load_processor
from serving.replica import Replica
from tests.unit.serving.conftest import Shelf

USER: Any = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def replica(chat_shelf: Shelf) -> Iterator[Replica]:
    replica = Replica(base=str(chat_shelf.base), home=str(chat_shelf.home.root), max_rows=4, prefill_tokens=8)
    yield replica
    replica.stop()


@pytest.fixture(scope="module")
def http(replica: Replica, chat_shelf: Shelf) -> Iterator[TestClient]:
    with TestClient(make_app(replica, chat_shelf.registry)) as http:
        yield http


@pytest.fixture(scope="module")
def client(http: TestClient) -> OpenAI:
    return make_client(http, strict=True)


def make_client(http: TestClient, *, strict: bool) -> OpenAI:
    return OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0, _strict_response_validation=strict)


def chat(client: OpenAI, **changes: Any) -> Any:
    return client.chat.completions.create(**({"model": "wide", "messages": USER, "max_tokens": 12, "temperature": 0} | changes))


def test_chat_log_probabilities_are_the_models(client: OpenAI, chat_shelf: Shelf) -> None:
    [choice] = chat(client, logprobs=True, top_logprobs=3).choices
    content = choice.logprobs.content
    assert choice.logprobs.refusal is None
    assert b"".join(bytes(token.bytes) for token in content).decode(errors="replace").startswith(choice.message.content)
    ids = encode_prompt(load_processor("chat", chat_shelf.base), USER)
    for place in content:
        with torch.no_grad():
            scores = chat_shelf.peft["wide"](torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert [top.logprob for top in place.top_logprobs] == pytest.approx(scores.topk(3).values.tolist(), abs=1e-3)
        assert place.logprob == place.top_logprobs[0].logprob
        assert place.bytes == place.top_logprobs[0].bytes
        ids.append(int(scores.argmax()))


@pytest.mark.parametrize("changes", [{}, {"temperature": 1.4, "seed": 7, "n": 3}, {"stop": ["e"], "temperature": 1, "seed": 3}], ids=str)
def test_streamed_chat_log_probabilities_are_those_of_the_whole_answer(client: OpenAI, changes: dict[str, Any]) -> None:
    asked = {"logprobs": True, "top_logprobs": 2, "max_tokens": 24, **changes}
    whole = chat(client, **asked)
    chunks = [choice for chunk in chat(client, **asked, stream=True) for choice in chunk.choices]
    for choice in whole.choices:
        own = [chunk for chunk in chunks if chunk.index == choice.index]
        streamed = list(itertools.chain.from_iterable(chunk.logprobs.content for chunk in own if chunk.logprobs))
        assert [token.model_dump() for token in streamed] == [token.model_dump() for token in choice.logprobs.content]
        assert "".join(chunk.delta.content or "" for chunk in own) == choice.message.content
        told = b"".join(bytes(token.bytes) for token in choice.logprobs.content).decode(errors="replace")
        assert told.startswith(choice.message.content)


def test_no_log_probabilities_where_none_were_asked_for(client: OpenAI) -> None:
    assert chat(client).choices[0].logprobs is None
    assert all(choice.logprobs is None for chunk in chat(client, stream=True) for choice in chunk.choices)
    plain = chat(client, logprobs=True).choices[0]
    assert all(token.top_logprobs == [] for token in plain.logprobs.content)


def complete(client: OpenAI, **changes: Any) -> Any:
    asked = {"model": "mixed", "prompt": ["the cat", "why does"], "max_tokens": 10, "temperature": 0, "logprobs": 2}
    return client.completions.create(**(asked | changes))


def test_completions_have_log_probabilities_in_columns(client: OpenAI) -> None:
    for choice in complete(client).choices:
        columns = choice.logprobs
        assert len(columns.tokens) == len(columns.token_logprobs) == len(columns.top_logprobs) == len(columns.text_offset) > 0
        assert columns.text_offset[0] == 0
        for token, logprob, top in zip(columns.tokens, columns.token_logprobs, columns.top_logprobs, strict=True):
            assert len(top) == 2
            assert top[token] == logprob == max(top.values())
        for token, begins in zip(columns.tokens, columns.text_offset, strict=True):
            # Bytes that are no text are settled late, and what follows them is placed where they begin.
            assert choice.text[begins:].startswith(token) or "\N{REPLACEMENT CHARACTER}" in choice.text[: begins + 1]
    sampled = complete(client, temperature=2, seed=1, logprobs=0).choices[0].logprobs
    assert [list(top) for top in sampled.top_logprobs] == [[token] for token in sampled.tokens]
    assert complete(client, logprobs=None).choices[0].logprobs is None


def test_streamed_completions_have_the_same_columns(client: OpenAI, http: TestClient) -> None:
    whole = complete(client)
    # Not strict: a stream says `finish_reason: null` until its end, which is not in the client's types, though OpenAI sends it too.
    chunks = [choice for chunk in complete(make_client(http, strict=False), stream=True) for choice in chunk.choices]
    for choice in whole.choices:
        own = [chunk.logprobs for chunk in chunks if chunk.index == choice.index and chunk.logprobs]
        for column in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert list(itertools.chain.from_iterable(getattr(part, column) for part in own)) == getattr(choice.logprobs, column)


def test_biases_penalties_and_filters_arrive(client: OpenAI) -> None:
    plain = chat(client, max_tokens=30).choices[0].message.content
    assert chat(client, max_tokens=30, frequency_penalty=2, presence_penalty=2).choices[0].message.content != plain
    one = chat(client, logit_bias={"70": 100}, max_tokens=4, logprobs=True).choices[0].logprobs.content
    assert len({token.token for token in one}) == 1
    hot = {"temperature": 2, "seed": 1, "max_tokens": 30}
    assert chat(client, **hot).choices[0].message.content != plain
    for narrow in ({"top_k": 1}, {"min_p": 1.0}):
        assert chat(client, **hot, extra_body=narrow).choices[0].message.content == plain


def test_every_choice_has_a_text_of_its_own(client: OpenAI) -> None:
    answer = chat(client, n=8, temperature=1.5, seed=4)
    assert [choice.index for choice in answer.choices] == list(range(8))
    assert len({choice.message.content for choice in answer.choices}) > 4
    assert chat(client, n=8, temperature=1.5, seed=4).choices == answer.choices


def test_a_time_limit_that_passes_is_an_error_and_not_half_an_answer(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        chat(client, extra_body={"timeout_s": 1e-9})
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    assert caught.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.APIError, match="timeout_s passed"):
        list(chat(client, extra_body={"timeout_s": 1e-9}, stream=True))
    assert chat(client, extra_body={"timeout_s": 3600}).choices[0].finish_reason
