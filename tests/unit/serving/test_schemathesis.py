"""Requests that schemathesis makes up from the OpenAPI document, sound ones and unsound ones: none is answered 500, and every answer is as
the document says."""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from serving.ingress import make_app
from serving.replica import Replica
from tests.unit.serving.conftest import Shelf

EXAMPLES = int(os.environ.get("HONE_TEST_EXAMPLES", "40"))
"""Of each route."""
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def document(chat_shelf: Shelf) -> Iterator[Any]:
    replica = Replica(base=str(chat_shelf.base), home=str(chat_shelf.home.root), max_rows=4, max_context=128)
    yield schemathesis.openapi.from_asgi("/openapi.json", make_app(replica, chat_shelf.registry))
    replica.stop()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["sound", "unsound"])
def test_no_request_fails_the_server(document: Any, mode: GenerationMode) -> None:
    operations = [each.ok() for each in document.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/classify"}
    answered: Counter[int] = Counter()

    for operation in operations:

        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = "narrow@1"  # of made-up names there is no model
                case.body.pop("timeout_s", None)  # which is answered 504, as it should be
            response = case.call_and_validate(checks=CHECKS)
            answered[response.status_code] += 1

        if mode is GenerationMode.POSITIVE or operation.body:
            ask()
    assert sum(answered.values()) >= 100
    assert answered[200] if mode is GenerationMode.POSITIVE else answered[400], answered
