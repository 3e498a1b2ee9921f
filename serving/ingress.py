"""The routes: wire types in, calls to a backend, OpenAI's JSON and server-sent events out. Every error has OpenAI's shape."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hone.registry import Registry
from serving.calls import Answer, Backend, ChatCall, Classified, CompletionCall, Done, Event, Failed, Number, Piece, Scores, Started
from serving.catalog import Catalog
from serving.errors import RequestError
from serving.schemas import ChatRequest, ClassifyRequest, CompletionRequest, EmbeddingsRequest, GenerateRequest
from serving.shapes import ChatShape, CompletionShape, Shape, embeddings_list

BODY_AT_MOST = 32 * 2**20
"""Bytes of a request."""
RETRY_AFTER_S = 1


class BusyError(RequestError):
    """More requests wait than the server holds; raised by backends."""

    status = 429
    type = "rate_limit_error"
    default_code = "server_busy"


def make_app(backend: Backend, registry: Registry) -> FastAPI:
    """The HTTP application over a backend; the registry is read for the list of models."""
    app = FastAPI(title="hone", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimit)
    _answer_errors(app)

    async def catalog() -> Catalog:
        return Catalog(registry, await backend.describe())

    @app.get("/healthz")
    async def healthz() -> Any:
        try:
            status = await backend.status()
        except BusyError:
            return {"status": "busy"}
        return {"status": "ok", **asdict(status)}

    @app.get("/v1/models")
    async def models() -> Any:
        found = await catalog()
        return {"object": "list", "data": found.cards()}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Any:
        return (await catalog()).card(model)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest) -> Any:
        shape = ChatShape(with_usage=body.with_usage, with_logprobs=bool(body.logprobs))
        return await _generate(backend, body, body.call(), shape)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest) -> Any:
        shape = CompletionShape(with_usage=body.with_usage, with_logprobs=body.logprobs is not None)
        return await _generate(backend, body, body.call(), shape)

    @app.post("/v1/classify")
    async def classify(body: ClassifyRequest) -> Any:
        result = await backend.classify(body.call())
        if isinstance(result, Failed):
            raise result.error
        return JSONResponse(_classification(result), headers={"x-hone-adapter": result.served})

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingsRequest) -> Any:
        result = await backend.embed(body.call())
        if isinstance(result, Failed):
            raise result.error
        return JSONResponse(embeddings_list(result, as_base64=body.encoding_format == "base64"), headers={"x-hone-adapter": result.served})

    return app


async def _generate(backend: Backend, body: GenerateRequest, call: ChatCall | CompletionCall, shape: Shape) -> Any:
    if not body.stream:
        return _whole(await backend.answer(call), shape)
    events = backend.generate(call)
    # The first item is awaited here, while the status can still say what went wrong.
    started = (await anext(events))[0]
    if isinstance(started, Failed):
        raise started.error
    assert isinstance(started, Started), "a backend says first whether it accepts"
    choices = call.n * (len(call.prompts) if isinstance(call, CompletionCall) else 1)
    return StreamingResponse(
        _stream(events, started, shape, choices),
        media_type="text/event-stream",
        headers={"x-hone-adapter": started.served, "cache-control": "no-cache", "x-accel-buffering": "no"},
    )


def _whole(events: list[Event], shape: Shape) -> JSONResponse:
    """One JSON answer of all events of a request."""
    pieces: dict[int, Piece] = {}
    done: list[Done] = []
    started: Started | None = None
    for event in events:
        match event:
            case Failed(error):
                raise error
            case Started():
                started = event
            case Piece(choice):
                pieces[choice] = event
            case Done():
                done.append(event)
    assert started is not None, "a backend says first whether it accepts"
    done.sort(key=lambda each: each.choice)
    choices = [shape.choice(pieces.get(each.choice, Piece(each.choice, "")), each.reason) for each in done]
    body = {**_envelope(shape, started, shape.object), "choices": choices, "usage": _usage(started, sum(d.tokens for d in done))}
    return JSONResponse(body, headers={"x-hone-adapter": started.served})


async def _stream(events: AsyncIterator[list[Event]], started: Started, shape: Shape, choices: int) -> AsyncIterator[str]:
    """Server-sent events; an error after the headers is an `error` event, which OpenAI's client raises."""
    envelope = _envelope(shape, started, shape.chunk_object) | ({"usage": None} if shape.with_usage else {})
    made = 0
    for opening in filter(None, map(shape.opening, range(choices))):
        yield _sse({**envelope, "choices": [opening]})
    async for ready in events:
        for event in ready:
            match event:
                case Piece():
                    yield _sse({**envelope, "choices": [shape.delta(event)]})
                case Done(choice, reason, tokens):
                    made += tokens
                    yield _sse({**envelope, "choices": [shape.closing(choice, reason)]})
                case Failed(error):
                    yield _sse(_error_body(error.message, error.type, error.param, error.code))
                    return
    if shape.with_usage:
        yield _sse({**envelope, "choices": [], "usage": _usage(started, made)})
    yield "data: [DONE]\n\n"


def _envelope(shape: Shape, started: Started, kind: str) -> dict[str, Any]:
    return {
        "id": shape.id,
        "object": kind,
        "created": int(time.time()),
        "model": started.served,
        "system_fingerprint": f"fp_{started.digest[:16]}",
    }


def _usage(started: Started, made: int) -> dict[str, int]:
    return {"prompt_tokens": started.prompt_tokens, "completion_tokens": made, "total_tokens": started.prompt_tokens + made}


def _classification(result: Classified) -> dict[str, Any]:
    data = [{"index": index, **_answered(result, answer)} for index, answer in enumerate(result.answers)]
    usage = {"prompt_tokens": result.tokens, "total_tokens": result.tokens}
    head = {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": result.served}
    return {**head, "data": data, "usage": usage}


def _answered(result: Classified, answer: Answer) -> dict[str, Any]:
    match answer:
        case Number(value):
            return {"value": value}
        case Scores(probabilities):
            probs = dict(zip(result.labels, probabilities, strict=True))
            if result.problem_type == "multi_label_classification":
                return {"labels": [label for label, p in probs.items() if p > 0.5], "probs": probs, "num_classes": len(probs)}
            return {"label": max(probs, key=probs.__getitem__), "probs": probs, "num_classes": len(probs)}
        case words:
            return {"tokens": [asdict(word) for word in words]}


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _error_body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _answer_errors(app: FastAPI) -> None:
    """One place where errors become answers."""

    @app.exception_handler(RequestError)
    async def request_error(_: Request, error: RequestError) -> JSONResponse:
        headers = {}
        if isinstance(error, BusyError):
            headers = {"retry-after": str(RETRY_AFTER_S)}
        elif error.status >= 500:
            headers = {"x-should-retry": "false"}  # the same request would fail again; OpenAI's client would send it three times
        return JSONResponse(_error_body(error.message, error.type, error.param, error.code), error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        message, param = _explain(error.errors()[0])
        return JSONResponse(_error_body(message, "invalid_request_error", param, None), 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = {404: f"no route {request.method} {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        body = _error_body(message.get(error.status_code, str(error.detail)), kind, None, None)
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        message = f"the server failed on this request ({type(error).__name__}); its log says why"
        return JSONResponse(_error_body(message, "server_error", None, "internal_error"), 500)


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


class BodyLimit:
    """Refuses a body past BODY_AT_MOST while it comes in, and not after it has filled the memory."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, self._counted(receive) if scope["type"] == "http" else receive, send)

    def _counted(self, receive: Receive) -> Callable[[], Awaitable[Message]]:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > BODY_AT_MOST:
                raise HTTPException(413, f"the body is past {BODY_AT_MOST // 2**20} MiB; send less")
            return message

        return counted
