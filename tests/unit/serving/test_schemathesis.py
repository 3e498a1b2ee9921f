"""Requests that schemathesis makes up from the OpenAPI document, sound ones and unsound ones: none is answered 500, and every answer is as
the document says. Of a decoder, of an encoder, and of a server that takes keys with limits."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from hone.keys import Keys
from hone.storage import Home
from serving.access import KeyRing
from serving.ingress import make_app
from serving.replica import Replica
from tests.unit.serving.conftest import Shelf

EXAMPLES = int(os.environ.get("HONE_TEST_EXAMPLES", "40"))
"""Of each route."""
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@dataclass(frozen=True)
class Offered:
    """A server's document, a model that it has, and what a request carries."""

    document: Any
    model: str
    headers: dict[str, str]


@pytest.fixture(scope="module", params=["decoder", "encoder", "keys"])
def offered(
    request: pytest.FixtureRequest, chat_shelf: Shelf, label_shelf: Shelf, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Offered]:
    shelf, model = (label_shelf, "tone@1") if request.param == "encoder" else (chat_shelf, "narrow@1")
    ring, headers = None, {}
    if request.param == "keys":
        keys = Keys(Home(tmp_path_factory.mktemp("keys")).store_url)
        token = keys.create("bot", scopes=["admin"], requests_per_minute=10_000, tokens_per_minute=200_000)[1]
        ring, headers = KeyRing(keys.all, auth="required"), {"authorization": f"Bearer {token}"}
    replica = Replica(base=str(shelf.base), home=str(shelf.home.root), max_rows=4, max_context=128 if model == "narrow@1" else None)
    app = make_app(replica, shelf.registry, ring)
    yield Offered(schemathesis.openapi.from_asgi("/openapi.json", app), model, headers)
    replica.stop()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["sound", "unsound"])
def test_no_request_fails_the_server(offered: Offered, mode: GenerationMode) -> None:
    operations = [each.ok() for each in offered.document.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/classify"}
    answered: Counter[int] = Counter()

    for operation in operations:

        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = offered.model  # of made-up names there is no model
                case.body.pop("timeout_s", None)  # which is answered 504, as it should be
            response = case.call_and_validate(checks=CHECKS, headers=offered.headers)
            answered[response.status_code] += 1

        if mode is GenerationMode.POSITIVE or operation.body:
            ask()
    assert sum(answered.values()) >= 100
    assert answered[200] if mode is GenerationMode.POSITIVE else answered[400], answered
