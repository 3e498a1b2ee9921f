"""What Serve's proxies answer by themselves, in OpenAI's shape; what applications answer, untouched."""

from typing import Any

import pytest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from serving.proxy import OpenAIErrors, middlewares


def get(answer: Any, path: str = "/v1/models") -> Any:
    return TestClient(OpenAIErrors(answer)).get(path)


@pytest.mark.parametrize(
    ("status", "kind", "code", "header"),
    [
        (404, "invalid_request_error", "not_found", None),
        (408, "server_error", "request_timeout", ("x-should-retry", "false")),
        (429, "rate_limit_error", "server_busy", ("retry-after", "1")),
        (503, "server_error", "server_unavailable", ("retry-after", "1")),
    ],
)
def test_a_text_of_serve_becomes_openais_json(status: int, kind: str, code: str, header: tuple[str, str] | None) -> None:
    response = get(PlainTextResponse("Request 7 was dropped.", status), "/encoder/v1/classify")
    assert response.status_code == status
    assert response.json() == {"error": {"message": "Request 7 was dropped.", "type": kind, "param": None, "code": code}}
    if header:
        assert response.headers[header[0]] == header[1]


def test_what_serve_says_of_when_to_come_back_is_kept() -> None:
    assert get(PlainTextResponse("busy", 429, headers={"retry-after": "7", "x-other": "kept"})).headers["retry-after"] == "7"


def test_an_ingress_that_died_without_a_word_is_a_503() -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        """Says nothing."""

    response = get(silent)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["error"]["code"] == "server_unavailable"


@pytest.mark.parametrize(
    ("answer", "path"),
    [
        (JSONResponse({"error": {"message": "mine"}}, 429), "/v1/models"),
        (PlainTextResponse("hello", 200), "/v1/models"),
        (PlainTextResponse("not found", 404), "/other/page"),
        (PlainTextResponse("teapot", 418), "/v1/models"),
        (Response(b"\x00\xff", 200, media_type="application/octet-stream"), "/v1/x"),
    ],
)
def test_what_applications_answer_is_left_as_it_is(answer: Response, path: str) -> None:
    response = get(answer, path)
    assert (response.status_code, response.content) == (answer.status_code, answer.body)


def test_streams_pass_piece_by_piece() -> None:
    async def pieces() -> Any:
        for n in range(3):
            yield f"data: {n}\n\n"

    assert get(StreamingResponse(pieces(), media_type="text/event-stream")).text == "data: 0\n\ndata: 1\n\ndata: 2\n\n"


def test_serve_gets_a_list_of_middlewares() -> None:
    from ray.serve._private.http_util import validate_http_proxy_callback_return

    assert [each.cls for each in validate_http_proxy_callback_return(middlewares())] == [OpenAIErrors]
