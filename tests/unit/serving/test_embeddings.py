"""/v1/embeddings by OpenAI's client: the mean of an encoder's last hidden states, the base's and each adapter's, in one batch.

The client is not strict here: it asks for base64 by itself, for which it has no type.
"""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from starlette.testclient import TestClient
from transformers import AutoModel, AutoTokenizer

from serving.ingress import make_app
from serving.replica import Replica
from tests.unit.serving.conftest import LABELS, Shelf

TEXTS = ["the cat sat on a mat", "why", "seven small birds sang over green hills"]


@pytest.fixture(scope="module")
def client(label_shelf: Shelf) -> Iterator[OpenAI]:
    yield from serving(label_shelf)


def serving(shelf: Shelf) -> Iterator[OpenAI]:
    replica = Replica(base=str(shelf.base), home=str(shelf.home.root))
    with TestClient(make_app(replica, shelf.registry)) as http:
        yield OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0)
    replica.stop()


def mean_hidden(model: Any, shelf: Shelf, text: str) -> torch.Tensor:
    with torch.no_grad():
        hidden = model(**AutoTokenizer.from_pretrained(shelf.base)(text, return_tensors="pt")).last_hidden_state[0]
    return torch.nn.functional.normalize(hidden.mean(0), dim=-1)


@pytest.mark.parametrize("encoding", ["float", None])
def test_vectors_are_those_of_the_plain_trunk_of_each_adapter(client: OpenAI, label_shelf: Shelf, encoding: Any) -> None:
    trunks = {name: label_shelf.peft[name].base_model.model.bert for name in LABELS}
    trunks[label_shelf.base.name] = AutoModel.from_pretrained(label_shelf.base).eval()
    found = {}
    for name, trunk in trunks.items():
        answer = client.embeddings.create(model=name, input=TEXTS, **({"encoding_format": encoding} if encoding else {}))
        assert (answer.object, answer.data[0].object) == ("list", "embedding")
        assert [each.index for each in answer.data] == [0, 1, 2]
        assert answer.usage.total_tokens > 3
        for each, text in zip(answer.data, TEXTS, strict=True):
            torch.testing.assert_close(torch.tensor(each.embedding), mean_hidden(trunk, label_shelf, text), rtol=1e-4, atol=1e-5)
        found[name] = tuple(answer.data[0].embedding)
    assert len(set(found.values())) == len(trunks)


def test_token_ids_are_taken_and_bad_inputs_refused(client: OpenAI, label_shelf: Shelf) -> None:
    ids = AutoTokenizer.from_pretrained(label_shelf.base)(TEXTS[0])["input_ids"]
    by_text, by_ids = (client.embeddings.create(model="tone", input=given).data[0].embedding for given in (TEXTS[0], [ids]))
    assert by_ids == pytest.approx(by_text, abs=1e-6)
    bad: list[Any] = ["", [], [[]], [1, "a"], "word " * 300, [[10**6]]]
    for given in bad:
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(model="tone", input=given)
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="tone", input="x", dimensions=4)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="nobody", input="x")


def test_what_is_no_encoder_says_so(chat_shelf: Shelf) -> None:
    for client in serving(chat_shelf):
        for name in ("wide", chat_shelf.base.name):
            with pytest.raises(openai.BadRequestError, match="call an encoder"):
                client.embeddings.create(model=name, input="x")
