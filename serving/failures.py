"""One place where errors become answers."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serving.errors import RequestError, error_body


def answer_errors(app: FastAPI) -> None:
    """Every error of an application in OpenAI's shape."""

    @app.exception_handler(RequestError)
    async def request_error(_: Request, error: RequestError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        message, param = _explain(error.errors()[0])
        return JSONResponse(error_body(message, kind="invalid_request_error", param=param), 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = {
            400: "the body cannot be read as JSON in UTF-8",
            404: f"no route {request.method} {request.url.path}",
            405: f"{request.method} is not for {request.url.path}",
        }
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        body = error_body(message.get(error.status_code, str(error.detail)), kind=kind)
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        message = f"the server failed on this request ({type(error).__name__}); its log says why"
        return JSONResponse(error_body(message, kind="server_error", code="internal_error"), 500)


def _explain(error: Any) -> tuple[str, str | None]:
    """Message and `param` (`messages[0].content`) of one of pydantic's errors."""
    if error["type"] == "json_invalid":
        return f"the body is not valid JSON: {error.get('ctx', {}).get('error', error['msg'])}", None
    path = ""
    for part in error["loc"][1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    if not path:
        message = error["msg"].removeprefix("Value error, ")
        return (message if error["type"] == "value_error" else "the body must be a JSON object, sent as application/json"), None
    message = f"{path} is required" if error["type"] == "missing" else f"{path}: {error['msg'].removeprefix('Value error, ')}"
    return message, path
