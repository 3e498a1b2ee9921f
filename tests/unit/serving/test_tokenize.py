"""/tokenize: what a model reads, as transformers' own tokenizer says it, of texts and of conversations."""

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient
from transformers import AutoTokenizer

from hone.chat import encode_prompt
from serving.ingress import make_app
from serving.kinds import load_processor
from serving.replica import Replica
from tests.unit.serving.conftest import Shelf
from tests.unit.serving.rooms import USER

TEXT = "why does it rain"


@pytest.fixture(scope="module")
def http(chat_shelf: Shelf) -> Iterator[TestClient]:
    replica = Replica(base=str(chat_shelf.base), home=str(chat_shelf.home.root))
    with TestClient(make_app(replica, chat_shelf.registry)) as client:
        yield client
    replica.stop()


def ask(http: TestClient, **body: Any) -> dict[str, Any]:
    answered = http.post("/tokenize", json={"model": "wide", **body})
    assert answered.status_code == 200, answered.text
    assert answered.headers["x-hone-adapter"].startswith("wide@1 ")
    found: dict[str, Any] = answered.json()
    return found


@pytest.mark.parametrize("special", [True, False])
def test_a_text_has_the_tokens_that_its_tokenizer_makes(http: TestClient, chat_shelf: Shelf, special: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_shelf.base)
    expected = tokenizer(TEXT, add_special_tokens=special)["input_ids"]
    found = ask(http, prompt=TEXT, add_special_tokens=special, return_token_strs=True)
    assert (found["tokens"], found["count"]) == (expected, len(expected))
    assert found["token_strs"] == tokenizer.convert_ids_to_tokens(expected)
    assert found["max_model_len"] > 0


def test_a_conversation_has_the_tokens_that_the_model_goes_on_from(http: TestClient, chat_shelf: Shelf) -> None:
    expected = encode_prompt(load_processor("chat", chat_shelf.base), USER)
    found = ask(http, messages=USER)
    assert found["tokens"] == expected
    assert found["token_strs"] is None
    answered = http.post("/v1/chat/completions", json={"model": "wide", "messages": USER, "max_tokens": 1})
    assert answered.json()["usage"]["prompt_tokens"] == found["count"]


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": USER}, {"prompt": 3}, {"messages": []}])
def test_what_is_no_text_and_no_conversation_is_refused(http: TestClient, body: dict[str, Any]) -> None:
    answered = http.post("/tokenize", json={"model": "wide", **body})
    assert answered.status_code == 400
    assert answered.json()["error"]["param"] in ("prompt", "messages")


def test_an_unknown_model_is_404(http: TestClient) -> None:
    assert http.post("/tokenize", json={"model": "nobody", "prompt": "a"}).status_code == 404
