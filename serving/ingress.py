"""The routes: wire types in, calls to a backend, OpenAI's JSON and server-sent events out. Every error has OpenAI's shape.

In front of them is the gate (`serving.gate`), which knows who is asking. Tokens are reserved and settled here, where the request is known.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

import hone
from hone.registry import Registry
from serving.access import KeyRing
from serving.callers import Caller
from serving.calls import (
    Answer,
    Backend,
    Call,
    ChatCall,
    Classified,
    CompletionCall,
    Done,
    Embedded,
    Event,
    Failed,
    Number,
    Piece,
    Scores,
    Started,
)
from serving.document import STREAMED, document, error_responses
from serving.errors import BusyError, RequestError
from serving.failures import answer_errors
from serving.gate import OPEN, BodyLimit, Counts, Gate, visit_of
from serving.limits import Limits, Reservation, Spent, expected_tokens
from serving.metrics import CONTENT_TYPE, exposition
from serving.releases import Released, adapter_header
from serving.schemas import ChatRequest, ClassifyRequest, CompletionRequest, EmbeddingsRequest, GenerateRequest, TokenizeRequest
from serving.shapes import ChatShape, CompletionShape, Shape, embeddings_list

ROUTES = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/classify",
        "/v1/models",
        "/v1/releases",
        "/tokenize",
        "/healthz",
        "/metrics",
        "/openapi.json",
    }
)
"""Counted by themselves."""


def make_app(backend: Backend, registry: Registry, ring: KeyRing | None = None) -> FastAPI:
    """The HTTP application over a backend; the registry is read for the list of models. Without a key ring everyone is let in."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # The backend keeps what it was told, so that it can say what is served while no replica is there.
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(backend.describe())]
        if ring is not None:
            tasks.append(asyncio.create_task(ring.keep_fresh()))
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    counts, limits = Counts(), Limits()
    app = FastAPI(title="hone", version=hone.__version__, docs_url=None, redoc_url=None, lifespan=lifespan, responses=error_responses())
    app.add_middleware(BodyLimit)
    app.add_middleware(Gate, ring=ring, counts=counts, routes=ROUTES)  # the outermost: nobody's body is read for nothing
    answer_errors(app)
    document(app, open_paths=OPEN)
    backend = released = Released(backend, registry)
    released.add_route(app)

    _add_reading_routes(app, released, counts)

    @app.post("/v1/chat/completions", responses=STREAMED)
    async def chat(body: ChatRequest, request: Request) -> Any:
        """Answers to a conversation; server-sent events where `stream` is true."""
        shape = ChatShape(with_usage=body.with_usage, with_logprobs=bool(body.logprobs))
        call = replace(body.call(), caller=_caller(request))
        return await _generate(backend, body, call, shape, _reserve(limits, request, call))

    @app.post("/v1/completions", responses=STREAMED)
    async def completions(body: CompletionRequest, request: Request) -> Any:
        """Continuations of prompts; server-sent events where `stream` is true."""
        shape = CompletionShape(with_usage=body.with_usage, with_logprobs=body.logprobs is not None)
        call = replace(body.call(), caller=_caller(request))
        return await _generate(backend, body, call, shape, _reserve(limits, request, call))

    @app.post("/v1/classify")
    async def classify(body: ClassifyRequest, request: Request) -> Any:
        """What texts, pictures or sounds are classified as."""
        call = replace(body.call(), caller=_caller(request))
        result = await _settled(backend.classify(call), _reserve(limits, request, call))
        return JSONResponse(_classification(result), headers=adapter_header(result))

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingsRequest, request: Request) -> Any:
        """Vectors of texts."""
        call = replace(body.call(), caller=_caller(request))
        result = await _settled(backend.embed(call), _reserve(limits, request, call))
        return JSONResponse(embeddings_list(result, as_base64=body.encoding_format == "base64"), headers=adapter_header(result))

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> Any:
        """What a model reads a text or a conversation as; no model runs."""
        call = replace(body.call(), caller=_caller(request))
        _reserve(limits, request, call)
        result = await backend.tokenize(call)
        if isinstance(result, Failed):
            raise result.error
        strings = result.strings if body.return_token_strs else None
        found = {"count": len(result.tokens), "max_model_len": result.max_context, "tokens": result.tokens, "token_strs": strings}
        return JSONResponse(found, headers=adapter_header(result))

    return app


def _add_reading_routes(app: FastAPI, released: Released, counts: Counts) -> None:
    """Routes that ask no model."""

    @app.get("/healthz")
    async def healthz(request: Request) -> Any:
        """Whether requests are answered; to whoever may read metrics also how busy a replica is."""
        try:
            status = await released.status()
        except BusyError:
            return {"status": "busy"}
        caller = visit_of(request).caller
        return {"status": "ok", **(asdict(status) if caller and caller.has("metrics") else {})}

    @app.head("/healthz", include_in_schema=False)
    async def reachable() -> Response:
        """What some load balancers ask."""
        return Response()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Any:
        """Everything that is measured, as Prometheus reads it."""
        return Response(exposition(counts, await released.measured()), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models(request: Request) -> Any:
        """The models that the key may use."""
        return {"object": "list", "data": await released.cards(_caller(request))}

    @app.get("/v1/models/{model:path}")
    async def model(model: str, request: Request) -> Any:
        """One model."""
        return await released.card(model, _caller(request))


def _caller(request: Request) -> Caller:
    caller = visit_of(request).caller
    assert caller is not None, "the gate lets nobody else through to this route"
    return caller


def _reserve(limits: Limits, request: Request, call: Call) -> Reservation:
    reservation = limits.reserve(call.caller, expected_tokens(call))
    visit_of(request).headers.update(reservation.headers)
    return reservation


R = TypeVar("R", Classified, Embedded)


async def _settled(answer: Awaitable[R | Failed], reservation: Reservation) -> R:
    try:
        result = await answer
    except Exception:
        reservation.settle(0)
        raise
    reservation.settle(result.tokens)
    if isinstance(result, Failed):
        raise result.error
    return result


async def _generate(
    backend: Backend, body: GenerateRequest, call: ChatCall | CompletionCall, shape: Shape, reservation: Reservation
) -> Any:
    spent = Spent()
    try:
        if not body.stream:
            whole = await backend.answer(call)
            spent.note(whole)
            reservation.settle(spent.tokens)
            return _whole(whole, shape)
        events = backend.generate(call)
        # The first item is awaited here, while the status can still say what went wrong.
        first = await anext(events)
    except Exception:  # and not CancelledError: what a client that went away had reserved stays taken, for it may have been made
        reservation.settle(spent.tokens)
        raise
    started, *others = first
    if isinstance(started, Failed):
        reservation.settle(0)
        raise started.error
    assert isinstance(started, Started), "a backend says first whether it answers"
    spent.note([started])
    choices = call.n * (len(call.prompts) if isinstance(call, CompletionCall) else 1)
    return StreamingResponse(
        _stream(_noted(others, events, spent, reservation), started, shape, choices),
        media_type="text/event-stream",
        headers={**adapter_header(started), "cache-control": "no-cache", "x-accel-buffering": "no"},
    )


async def _noted(
    first: list[Event], events: AsyncIterator[list[Event]], spent: Spent, reservation: Reservation
) -> AsyncIterator[list[Event]]:
    """The events, and at their end, or when the client goes away, the settlement. A replica that dies ends them by an event too."""
    try:
        spent.note(first)
        yield first
        async for ready in events:
            spent.note(ready)
            yield ready
    except RequestError as error:
        yield [Failed(error)]
    finally:
        reservation.settle(spent.tokens)


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
    assert started is not None, "a backend says first whether it answers"
    done.sort(key=lambda each: each.choice)
    choices = [shape.choice(pieces.get(each.choice, Piece(each.choice, "")), each.reason) for each in done]
    body = {**_envelope(shape, started, shape.object), "choices": choices, "usage": _usage(started, sum(d.tokens for d in done))}
    return JSONResponse(body, headers=adapter_header(started))


async def _stream(events: AsyncIterator[list[Event]], started: Started, shape: Shape, choices: int) -> AsyncIterator[str]:
    """Server-sent events, those that are ready at once as one piece of text, for each is a message on its way to the client; an error after
    the headers is an `error` event, which OpenAI's client raises."""
    envelope = _envelope(shape, started, shape.chunk_object) | ({"usage": None} if shape.with_usage else {})
    made, left = 0, choices
    text = "".join(_sse({**envelope, "choices": [opening]}) for opening in filter(None, map(shape.opening, range(choices))))
    async for ready in events:
        for event in ready:
            match event:
                case Piece():
                    text += _sse({**envelope, "choices": [shape.delta(event)]})
                case Done(choice, reason, tokens):
                    made, left = made + tokens, left - 1
                    text += _sse({**envelope, "choices": [shape.closing(choice, reason)]})
                case Failed(error):
                    yield text + _sse(error.body)
                    return
        if not left:
            text += _sse({**envelope, "choices": [], "usage": _usage(started, made)}) if shape.with_usage else ""
            text += "data: [DONE]\n\n"
        yield text
        text = ""


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
