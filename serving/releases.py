"""What an alias means for each request: which of its versions answers, what is sent to its shadow, and whether it goes back by itself.

Stands between the routes and a backend, and is a backend itself: the calls that it hands on name exact versions. Every ingress process
counts the failures of its own requests, and the first that sees a version past the alias's policy moves the alias.
"""

import asyncio
import logging
import random
import socket
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

from fastapi import FastAPI

from hone.errors import CorruptAdapterError, HoneError
from hone.promotion import take_back
from hone.registry import Registry
from hone.releases import Alias, Release, percent
from serving.callers import Caller
from serving.calls import (
    Backend,
    Call,
    ChatCall,
    Classified,
    ClassifyCall,
    CompletionCall,
    EmbedCall,
    Embedded,
    Event,
    Failed,
    Status,
    TokenizeCall,
    Tokenized,
)
from serving.catalog import BaseDescription, Catalog
from serving.error_window import ErrorWindow
from serving.errors import REPLICA_LOST, DeadlineError, RequestError, StoppingError, UnavailableError
from serving.measured import Measured
from serving.registry_reads import LISTING_PATIENCE_S, RegistryReads, nothing_known
from serving.shadow import Shadows, failure

logger = logging.getLogger("ray.serve")
REMEMBERED = 10_000
"""Aliases that are known while the registry cannot be read."""

PLAIN = "/@:+,~!$&'()*;=[]"
"""What stays as it is in a header, beside letters, digits and _.-"""

C = TypeVar("C", bound=Call)
R = TypeVar("R")


class Served(Protocol):
    """An answer, or its beginning."""

    @property
    def served(self) -> str: ...

    @property
    def digest(self) -> str: ...


def adapter_header(answer: Served) -> dict[str, str]:
    """`x-hone-adapter: NAME@VERSION DIGEST` of who answers. A base's name is a path or the like, and is percent-encoded where a header
    holds no such character."""
    return {"x-hone-adapter": f"{quote(answer.served, safe=PLAIN)} {answer.digest}"}


@dataclass(frozen=True)
class Picked:
    """The version that a request for an alias fell to."""

    alias: str
    number: int
    """Of the alias's state."""
    release: Release
    version: str


@dataclass
class _Counts:
    """Of one version's requests under an alias, since this process began."""

    requests: int = 0
    errors: int = 0


@dataclass
class _Watch:
    """What is counted of one state of an alias."""

    number: int
    windows: dict[str, ErrorWindow] = field(default_factory=dict)
    """By version."""
    settled: set[str] = field(default_factory=set)
    """Versions that were taken back, or that there is nothing to take back to."""


class Released:
    """A backend whose callers name aliases, over one that is asked for versions."""

    def __init__(self, backend: Backend, registry: Registry, *, chance: random.Random | None = None) -> None:
        self._backend, self._registry = backend, registry
        self._chance = chance or random.Random()
        self._shadows = Shadows(backend)
        self._known: OrderedDict[str, Alias] = OrderedDict()
        self._watches: dict[str, _Watch] = {}
        self._counts: dict[str, dict[str, _Counts]] = {}
        self._moves: set[asyncio.Task[None]] = set()
        self._reads, self._listings = RegistryReads(), RegistryReads(patience_s=LISTING_PATIENCE_S)
        self._catalog: Catalog | None = None

    def add_route(self, app: FastAPI) -> None:
        """GET /v1/releases: what this process has counted."""

        @app.get("/v1/releases")
        async def releases() -> Any:
            return self.report()

    def report(self) -> dict[str, Any]:
        """Requests and errors by alias and version, and what came of the shadows' copies."""
        return {
            "aliases": {alias: {version: asdict(each) for version, each in found.items()} for alias, found in self._counts.items()},
            "shadows": {version: asdict(each) for version, each in self._shadows.counts.items()},
        }

    async def describe(self) -> BaseDescription:
        return await self._backend.describe()

    async def status(self) -> Status:
        return await self._backend.status()

    async def catalog(self) -> Catalog:
        """What may be called by name; the same each time, since it remembers what there was while the registry is away."""
        if self._catalog is None:
            self._catalog = Catalog(self._registry, await self._backend.describe())
        return self._catalog

    async def cards(self, caller: Caller) -> list[dict[str, Any]]:
        """See `Catalog.cards`. Raises UnreachableError where the registry cannot be read."""
        catalog = await self.catalog()
        return await self._listings.read(partial(catalog.cards, caller), nothing_known)

    async def card(self, model: str, caller: Caller) -> dict[str, Any]:
        """See `Catalog.card`."""
        catalog = await self.catalog()
        return await self._reads.read(partial(catalog.card, model, caller), nothing_known)

    async def measured(self) -> list[Measured]:
        return await self._backend.measured()

    async def generate(self, call: ChatCall | CompletionCall) -> AsyncIterator[list[Event]]:
        """See `Backend.generate`."""
        picked = await self._pick(call)
        with self._counted(picked, call) as ended:
            events = self._backend.generate(_to(call, picked))
            try:
                async for ready in events:
                    if error := failure(ready):
                        ended(error)
                    yield ready
                ended(None)
            finally:
                if isinstance(events, AsyncGenerator):
                    await events.aclose()  # a caller who left is told to the backend now, and not when memory is tidied

    async def answer(self, call: ChatCall | CompletionCall) -> list[Event]:
        """See `Backend.answer`."""
        return await self._ask(call, self._backend.answer)

    async def classify(self, call: ClassifyCall) -> Classified | Failed:
        """See `Backend.classify`."""
        return await self._ask(call, self._backend.classify)

    async def embed(self, call: EmbedCall) -> Embedded | Failed:
        """See `Backend.embed`."""
        return await self._ask(call, self._backend.embed)

    async def tokenize(self, call: TokenizeCall) -> Tokenized | Failed:
        """See `Backend.tokenize`. Nothing of it is counted or sent to a shadow: no version is tried by it."""
        return await self._backend.tokenize(_to(call, await self._pick(call)))

    async def _ask(self, call: C, ask: Callable[[C], Awaitable[R]]) -> R:
        picked = await self._pick(call)
        with self._counted(picked, call) as ended:
            result = await ask(_to(call, picked))
            ended(failure(result))
            return result

    async def _pick(self, call: Call) -> Picked | None:
        """The version for a request; None where its model is no alias."""
        if "@" in call.model:
            return None
        alias = await self._reads.read(partial(self._alias, call.model), partial(self._known.get, call.model))
        if alias is None or await self._is_base(call.model):
            return None
        release = alias.current
        target = release.pick(self._chance, alias=call.model, user=call.user)
        return Picked(call.model, alias.number, release, target.version)

    def _alias(self, name: str) -> Alias | None:
        """By the registry, or by what it said before while it is not there."""
        try:
            alias = self._registry.alias(name)
        except CorruptAdapterError:
            return None  # the backend says what is wrong with it
        if alias is not None:
            self._known[name] = alias
            self._known.move_to_end(name)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        elif not self._registry.is_there:
            return self._known.get(name)
        else:
            self._known.pop(name, None)
        return alias

    async def _is_base(self, name: str) -> bool:
        """Whether the base answers to it, as it does where the alias of that name is of another base."""
        catalog = await self.catalog()
        return name in catalog.base.names and await self._reads.read(partial(catalog.find, name), partial(catalog.known, name)) is None

    @contextmanager
    def _counted(self, picked: Picked | None, call: Call) -> Iterator[Callable[[Exception | None], None]]:
        """What is called once a request has failed or is complete. Of a caller who leaves before, nothing is counted."""
        is_counted = picked is None

        def ended(error: Exception | None) -> None:
            nonlocal is_counted
            if picked is not None and not is_counted:
                is_counted = True
                self._count(picked, error)
                if error is None:
                    self._shadow(picked.release, call)

        try:
            yield ended
        except Exception as error:
            ended(error)
            raise

    def _shadow(self, release: Release, call: Call) -> None:
        if release.shadow and self._chance.random() < release.shadow.share:
            self._shadows.send(call, release.shadow.version)

    def _count(self, picked: Picked, error: Exception | None) -> None:
        is_error = error is not None and is_of_the_version(error)
        counts = self._counts.setdefault(picked.alias, {}).setdefault(picked.version, _Counts())
        counts.requests += 1
        counts.errors += is_error
        if error is not None and not is_error:
            return  # it says nothing of the version, and many of them would hide one that always fails
        policy = picked.release.rollback
        watch = self._watches.get(picked.alias)
        if watch is None or watch.number < picked.number:
            watch = self._watches[picked.alias] = _Watch(picked.number)
        if policy is None or watch.number != picked.number or picked.version in watch.settled:
            return
        now = time.monotonic()
        window = watch.windows.setdefault(picked.version, ErrorWindow(policy.window_s))
        window.add(is_error=is_error, now=now)
        requests, errors = window.counts(now)
        if requests < policy.min_requests or errors <= policy.error_rate * requests:
            return
        watch.settled.add(picked.version)
        why = f"{errors} of {requests} requests to {picked.version} failed in {policy.window_s:g} s, past {percent(policy.error_rate)}"
        task = asyncio.get_running_loop().create_task(self._take_back(picked, watch, f"{why}; the last: {error}" if error else why))
        self._moves.add(task)
        task.add_done_callback(self._moves.discard)

    async def _take_back(self, picked: Picked, watch: _Watch, why: str) -> None:
        """Move the alias; where that cannot be done now, go on counting from nothing."""
        by = f"server on {socket.gethostname()}"
        try:
            moved = await asyncio.to_thread(take_back, self._registry, picked.alias, picked.version, seen=picked.number, by=by, why=why)
        except (HoneError, OSError) as error:
            logger.error("alias %s stays as it is, though %s: it cannot be moved back (%s)", picked.alias, why, error)
            watch.windows.pop(picked.version, None)
            watch.settled.discard(picked.version)
            return
        if moved is None:
            logger.error("alias %s is not moved back, though %s: it has moved on, or no state before is without it", picked.alias, why)
        else:
            logger.warning("alias %s goes back to state %s, %s: %s", picked.alias, moved.current.restores, moved.current.says(), why)


def is_of_the_version(error: Exception) -> bool:
    """Whether an error speaks against the version, and is not the caller's mistake, a time limit of his own, or of the server: no replica
    there, one that stops, or no registry."""
    if isinstance(error, DeadlineError | StoppingError):
        return False
    if isinstance(error, UnavailableError):
        return error.code == REPLICA_LOST  # it may be what ended the replica
    return not isinstance(error, RequestError) or error.status >= 500


def _to(call: C, picked: Picked | None) -> C:
    return call if picked is None else replace(call, model=picked.version, alias=picked.alias)
