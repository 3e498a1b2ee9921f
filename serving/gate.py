"""What every request passes before it reaches a route: who is asking, and afterwards what came of it, counted and logged."""

import asyncio
import contextlib
import ipaddress
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hone.keys import Scope as KeyScope
from serving.access import KeyRing
from serving.callers import ANONYMOUS, Caller
from serving.engine.measures import Histogram
from serving.errors import ForbiddenError, RequestError

logger = logging.getLogger("ray.serve")

MEASURES = frozenset({"/metrics", "/v1/releases"})
"""What tells of others' requests."""
OPEN = frozenset({"/healthz", "/openapi.json"})
"""Paths that need no key."""
GONE = 499
"""Counted where the client went away; nginx's number for it."""
VISIT = "hone.visit"
BODY_AT_MOST = 32 * 2**20
"""Bytes of a request."""


@dataclass
class Visit:
    """One request, from the gate to its route and back."""

    caller: Caller | None = ANONYMOUS
    """None: nobody who is let in, on a path that is open to all."""
    headers: dict[str, str] = field(default_factory=dict)
    """That go out with the answer, whatever it is."""


def visit_of(request: Request) -> Visit:
    visit = request.scope.get(VISIT)
    return visit if isinstance(visit, Visit) else Visit()


class Counts:
    """What has come in, since the start."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        """By route, and status."""
        self.seconds: dict[str, Histogram] = {}
        """By route: from the first byte of the request to the last of the answer."""
        self.in_flight = 0

    def ended(self, route: str, status: int, seconds: float) -> None:
        self.requests[route, str(status)] += 1
        self.seconds.setdefault(route, Histogram()).observe(seconds)


class Gate:
    """ASGI middleware. Without a key ring everyone is let in."""

    def __init__(self, app: ASGIApp, *, ring: KeyRing | None, counts: Counts, routes: frozenset[str]) -> None:
        """`routes` are the paths that are counted by themselves."""
        self._app = app
        self._ring = ring
        self._counts = counts
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        visit = scope[VISIT] = Visit()
        status, began = 500, time.monotonic()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(visit.headers)
            await send(message)

        self._counts.in_flight += 1
        try:
            if self._ring is not None:
                visit.caller = await self._caller(self._ring, scope, path)
            await self._app(scope, receive, noted)
        except RequestError as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, noted)
        except asyncio.CancelledError:
            status = GONE
            raise
        finally:
            self._counts.in_flight -= 1
            self._ended(visit, path, status, time.monotonic() - began)

    async def _caller(self, ring: KeyRing, scope: Scope, path: str) -> Caller | None:
        """Raises RequestError where the path is not open to whoever asks."""
        try:
            caller = await ring.caller(_token(scope), is_local=_is_local(scope))
        except RequestError:
            if path in OPEN:
                return None
            raise
        needed: KeyScope = "metrics" if path in MEASURES else "inference"
        if not caller.has(needed) and path not in OPEN:
            raise ForbiddenError(f"this key has no scope {needed!r}, which {path} needs")
        return caller

    def _ended(self, visit: Visit, path: str, status: int, seconds: float) -> None:
        route = path if path in self._routes else "/v1/models/{model}" if path.startswith("/v1/models/") else "other"
        self._counts.ended(route, status, seconds)
        if path.startswith("/v1/"):
            who = visit.caller.label if visit.caller else "nobody"
            logger.info("%s for %s: %d in %.3f s", route, who, status, seconds)


def _token(scope: Scope) -> str | None:
    """The bearer token of a request."""
    kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
    return token.strip() or None if kind.lower() == "bearer" else None


def _is_local(scope: Scope) -> bool:
    """Whether a request comes from this machine; where nobody can tell, it does not. A proxy that passes others' requests on says so."""
    client = scope.get("client")
    if not client or {"forwarded", "x-forwarded-for"} & set(Headers(scope=scope)):
        return False
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(client[0]).is_loopback
    return False


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
