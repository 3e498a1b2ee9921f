"""The OpenAPI document: FastAPI's own, with the errors as they are really answered and the keys that are asked for."""

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error, as OpenAI writes it."""

    error: ErrorDetail


WHEN = {
    400: "Something in the request is wrong; `param` says what.",
    401: "No API key, or one that opens nothing.",
    403: "The key is not for this.",
    404: "No such model, or no such route.",
    413: "The body is too large.",
    429: "Too many requests: the server's, or those of the key; `retry-after` says when to come back.",
    500: "The server failed on this request.",
    503: "Nothing can answer right now; `retry-after` says when to come back.",
    504: "The request's own time limit passed.",
}


STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""For routes that answer with server-sent events where `stream` is true."""


def error_responses() -> dict[int | str, dict[str, Any]]:
    """For every route."""
    return {status: {"model": ErrorBody, "description": says} for status, says in WHEN.items()}


def document(app: FastAPI, *, open_paths: Collection[str]) -> None:
    """Give an application its document, at /openapi.json."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, description=ABOUT, routes=app.routes)
            made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, methods in made["paths"].items():
                for operation in methods.values():
                    operation["responses"].pop("422", None)  # FastAPI's own validation error, which is a 400 here
                    if path not in open_paths:
                        operation["security"] = [{"key": []}, {}]  # a server without keys asks for none
            schemas = made["components"]["schemas"]
            made["components"]["schemas"] = {k: v for k, v in schemas.items() if k not in ("HTTPValidationError", "ValidationError")}
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way


ABOUT = "OpenAI's inference routes over one base model and every published adapter of it."
