"""Copies of requests for a version that nobody hears from: counted and thrown away.

A copy is sent once the real answer is complete, and nobody waits for it. At most so many are on their way at once, and what comes beyond
that is skipped, not queued. In the engine the copies are a tenant of little weight, so that real requests go first; the machine they share.
"""

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from typing import Any

from hone.keys import EVERY_MODEL
from serving.callers import Caller
from serving.calls import Backend, Call, ChatCall, ClassifyCall, CompletionCall, EmbedCall, Failed, TokenizeCall
from serving.engine.fairness import Tenant
from serving.errors import RequestError

AT_ONCE = 4
TIMEOUT_S = 60.0
CALLER = Caller("shadow", "hone/shadow", Tenant("hone shadow", weight=0.05), ("admin",), EVERY_MODEL)
"""Whom copies are metered for: not whoever sent the request."""


@dataclass
class ShadowCounts:
    """What came of a version's copies in this process."""

    requests: int = 0
    """That were answered or failed."""
    errors: int = 0
    """Of these, every failure: a request that the real version answered is no caller's mistake."""
    skipped: int = 0
    """Never sent, or turned away by a busy server."""
    seconds: float = 0.0
    """That the answered ones took together."""


class Shadows:
    """Sends copies."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._running: set[asyncio.Task[None]] = set()
        self.counts: dict[str, ShadowCounts] = {}
        """By `name@version`."""

    def send(self, call: Call, version: str) -> None:
        """Send a copy of a call to a version, or skip it; in neither case does this wait."""
        counts = self.counts.setdefault(version, ShadowCounts())
        if len(self._running) >= AT_ONCE:
            counts.skipped += 1
            return
        task = asyncio.get_running_loop().create_task(self._ask(replace(call, model=version, caller=CALLER), counts))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _ask(self, call: Call, counts: ShadowCounts) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                error = failure(await self._way(call))
        except RequestError as refused:
            error = refused
        except Exception as broken:  # whatever it is, it is what a shadow is there to find
            error = broken
        if isinstance(error, RequestError) and error.status == 429:
            counts.skipped += 1
            return
        counts.requests += 1
        if error is None:
            counts.seconds += time.monotonic() - began
        else:
            counts.errors += 1

    def _way(self, call: Call) -> Awaitable[Any]:
        match call:
            case ChatCall() | CompletionCall():
                return self._backend.answer(call)
            case ClassifyCall():
                return self._backend.classify(call)
            case EmbedCall():
                return self._backend.embed(call)
            case TokenizeCall():
                return self._backend.tokenize(call)


def failure(result: Any) -> Exception | None:
    """What went wrong in a backend's answer, a value or a list of events."""
    return next((each.error for each in (result if isinstance(result, list) else [result]) if isinstance(each, Failed)), None)
