"""Adapters in a replica's memory: loaded once however many ask, pinned while requests run, the least recently used leaving first.

Keyed by `name@version` and digest, so what was loaded is never mistaken for other weights. All of it on the server's event loop.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from hone.manifest import AdapterManifest
from serving.base import Served
from serving.engine.measures import Histogram
from serving.engine.row import TOO_LATE
from serving.errors import AdapterRefusedError, DeadlineError, RequestError

REFUSED_FOR_S = 10.0
"""How long a refusal is repeated without reading the adapter again; then it is tried anew, for its folder may have been restored."""
PATIENCE_S = 5.0
"""How long one that needs room waits for an adapter that nobody uses, before the least recently used one gets no more requests. It bounds
how often adapters that all have requests change places; a copy of the base takes seconds to load."""

LOADS_AT_ONCE = 8

Key = tuple[str, str]


@dataclass(eq=False)
class _Resident:
    """One adapter, loaded or on its way."""

    loading: "asyncio.Task[Served]"
    pins: int = 0

    @property
    def has_failed(self) -> bool:
        """Whether it is not here and will not be."""
        return self.loading.done() and (self.loading.cancelled() or self.loading.exception() is not None)


class AdapterPool:
    """At most `capacity` adapters in memory."""

    def __init__(self, load: Callable[[AdapterManifest], Served], *, capacity: int, unload: Callable[[Served], None] | None = None) -> None:
        """`load` runs in a worker thread; it may take long and may raise RequestError. `unload` is told what was evicted, and returns at
        once."""
        self.capacity = capacity
        self._load = load
        self._unload = unload
        self._threads = ThreadPoolExecutor(LOADS_AT_ONCE, thread_name_prefix="adapters")
        """Their own: a load that a dead share holds up must not hold up what else threads do."""
        self._residents: OrderedDict[Key, _Resident] = OrderedDict()
        """Least recently used first."""
        self._refused: dict[Key, tuple[RequestError, float]] = {}
        self._released = asyncio.Condition()
        self._turn = asyncio.Lock()
        """Of those whose adapters are not here one at a time looks for room, in the order in which they came."""
        self._leaving: Key | None = None
        """Gets no more requests, so that it makes room."""
        self.load_seconds = Histogram()
        """Of loads that did well."""
        self.refused = 0
        """Loads that did not."""
        self.evicted = 0

    @property
    def resident(self) -> list[str]:
        """`name@version` of the adapters in memory, least recently used first."""
        return [name for name, _ in self._residents]

    @asynccontextmanager
    async def pinned(self, manifest: AdapterManifest, *, deadline: float = math.inf) -> AsyncIterator[Served]:
        """The adapter, loaded if need be, which stays in memory until the block ends. It is waited for until `deadline`, by
        `time.monotonic()`.

        Raises:
            RequestError: it cannot be served, or not in time; the message says why.
        """
        key = str(manifest.ref), manifest.digest
        self._raise_if_refused(key)
        async with _in_time(deadline):
            resident = await self._claim(key, manifest)
        try:
            async with _in_time(deadline):
                # Shielded: where one caller goes away while it loads, the others still get it.
                served = await asyncio.shield(resident.loading)
            yield served
        finally:
            await self._release(key, resident)

    async def _claim(self, key: Key, manifest: AdapterManifest) -> _Resident:
        """Pin the adapter, waiting for room while every resident one is in use."""
        if self._is_here(key):
            return self._pin(key)
        async with self._turn:
            if not self._is_here(key):
                await self._await_room()
                self._residents[key] = _Resident(asyncio.create_task(self._timed_load(manifest)))
            return self._pin(key)

    def _is_here(self, key: Key) -> bool:
        """Whether it may be pinned. A load that failed when nobody waited for it any more is forgotten."""
        resident = self._residents.get(key)
        if resident is not None and resident.has_failed and not resident.pins:
            del self._residents[key]
        return key in self._residents and key != self._leaving

    def _pin(self, key: Key) -> _Resident:
        resident = self._residents[key]
        resident.pins += 1
        self._residents.move_to_end(key)
        return resident

    async def _await_room(self) -> None:
        """Returns once one more fits. Where all are in use for long, one of them is let out."""
        lets_out = asyncio.get_running_loop().call_later(PATIENCE_S, self._let_out)
        try:
            async with self._released:
                await self._released.wait_for(self._make_room)
        finally:
            lets_out.cancel()
            self._leaving = None

    def _let_out(self) -> None:
        """The least recently used adapter gets no more requests."""
        self._leaving = next(iter(self._residents))

    async def _timed_load(self, manifest: AdapterManifest) -> Served:
        began = time.monotonic()
        try:
            served = await asyncio.get_running_loop().run_in_executor(self._threads, self._load, manifest)
        except Exception:
            self.refused += 1
            raise
        self.load_seconds.observe(time.monotonic() - began)
        return served

    def _make_room(self) -> bool:
        """Evict the least recently used adapters that nobody uses until one more fits."""
        while len(self._residents) >= self.capacity:
            idle = next((key for key, resident in self._residents.items() if resident.pins == 0), None)
            if idle is None:
                return False
            self._drop(self._residents.pop(idle))
        return True

    def _drop(self, resident: _Resident) -> None:
        self.evicted += 1
        unload = self._unload
        if unload is not None:  # perhaps later: what nobody waits for any more may still be on its way
            resident.loading.add_done_callback(lambda task: None if task.cancelled() or task.exception() else unload(task.result()))

    async def _release(self, key: Key, resident: _Resident) -> None:
        resident.pins -= 1
        loading = resident.loading
        if loading.done() and not loading.cancelled():
            error = loading.exception()
            if error is not None and self._residents.get(key) is resident:
                del self._residents[key]
                if isinstance(error, AdapterRefusedError):
                    self._refused[key] = error, time.monotonic()
        async with self._released:
            self._released.notify_all()

    def _raise_if_refused(self, key: Key) -> None:
        error, at = self._refused.get(key, (None, 0.0))
        if error is None:
            return
        if time.monotonic() - at < REFUSED_FOR_S:
            raise error
        del self._refused[key]


@asynccontextmanager
async def _in_time(deadline: float) -> AsyncIterator[None]:
    """The block may take until `deadline`, by `time.monotonic()`; past it a DeadlineError is raised out of it."""
    until = None if deadline == math.inf else asyncio.get_running_loop().time() + deadline - time.monotonic()
    scope = asyncio.timeout_at(until)
    try:
        async with scope:
            yield
    except TimeoutError:
        if scope.expired():
            raise DeadlineError(TOO_LATE) from None
        raise
