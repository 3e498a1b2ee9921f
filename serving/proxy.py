"""Answers that Ray Serve's HTTP proxy gives by itself, before or after our ingress had a say, in OpenAI's shape.

Serve puts a list of middlewares into its proxies where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names what gives it; `hone serve` and the
Kubernetes manifests set that to `serving.proxy.middlewares`. Answers of applications are left alone: what is rewritten is text without a
shape, on paths with a /v1/ in them and on /tokenize.
"""

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import SOON_S, UnavailableError, error_body
from serving.priority import give_way

CODES = {404: "not_found", 408: "request_timeout", 429: "server_busy", 503: "server_unavailable"}


def middlewares() -> list[Middleware]:
    """What Serve asks for, once in each of its proxies."""
    give_way()
    return [Middleware(OpenAIErrors)]


class OpenAIErrors:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _is_openai(scope["path"]):
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        await self._app(scope, receive, answer.send)
        if answer.own is not None:
            await answer.own(scope, receive, send)
        elif not answer.has_begun:  # the ingress died, and Serve closes the connection without a word
            error = UnavailableError("what was to answer this request has gone; try again shortly")
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)


def _is_openai(path: str) -> bool:
    return "/v1/" in path or path.endswith("/tokenize")


class _Answer:
    """An answer on its way out, or our own instead of it."""

    def __init__(self, send: Send) -> None:
        self.has_begun = False
        self.own: JSONResponse | None = None
        self._send = send
        self._start: Message | None = None
        """Of an answer that is being replaced."""
        self._text = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            is_shapeless = not Headers(raw=message["headers"]).get("content-type", "").startswith("application/json")
            if message["status"] in CODES and is_shapeless:
                self._start = message
                return
        if self._start is None:
            await self._send(message)
            return
        self._text += message.get("body", b"")
        if not message.get("more_body", False):
            self.own = _shaped(self._start, self._text.decode(errors="replace").strip())


def _shaped(start: Message, text: str) -> JSONResponse:
    status = start["status"]
    kind = "rate_limit_error" if status == 429 else "server_error" if status in (408, 503) else "invalid_request_error"
    headers = {name: value for name, value in Headers(raw=start["headers"]).items() if name not in ("content-type", "content-length")}
    if status in (429, 503):
        headers.setdefault("retry-after", str(int(SOON_S)))
    elif status == 408:
        headers["x-should-retry"] = "false"  # the same request would take as long again
    return JSONResponse(error_body(text, kind=kind, code=CODES[status]), status, headers)
