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
        self._threads = ThreadPoolExecutor(max(capacity, 1), thread_name_prefix="adapters")
        """Their own, and as many as there is room for: what a dead share holds up must hold up nothing else."""
        self._residents: OrderedDict[Key, _Resident] = OrderedDict()
        """Least recently used first."""
        self._refused: dict[Key, tuple[RequestError, float]] = {}
        self._changed = asyncio.Condition()
        """Something was released, has come, or is to leave."""
        self._wanted: dict[Key, int] = {}
        """Those that requests wait for, in the order in which they were first wanted, and how many requests."""
        self._leaving: Key | None = None
        """Gets no more requests, so that it makes room."""
        self._full_since: float | None = None
        """When the first in line began to wait for room; it stays where he gives up, for whoever comes next."""
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
        """Pin the adapter. Where it is not here and every resident one is in use, it waits in line for room."""
        if not self._is_here(key):
            async with self._changed:
                self._wanted[key] = self._wanted.get(key, 0) + 1
                try:
                    while not self._is_here(key):
                        if self._is_next(key) and self._make_room():
                            self._begin_load(key, manifest)
                        else:
                            await self._wait(key)
                finally:
                    self._give_up(key)
        resident = self._residents[key]
        resident.pins += 1
        self._residents.move_to_end(key)
        return resident

    def _is_here(self, key: Key) -> bool:
        """Whether it may be pinned. A load that failed when nobody waited for it any more is forgotten."""
        resident = self._residents.get(key)
        if resident is not None and resident.has_failed and not resident.pins:
            del self._residents[key]
        return key in self._residents and key != self._leaving

    def _is_next(self, key: Key) -> bool:
        """Whether it is not here, and first in line."""
        return key == next((wanted for wanted in self._wanted if wanted not in self._residents), None)

    def _begin_load(self, key: Key, manifest: AdapterManifest) -> None:
        self._residents[key] = _Resident(asyncio.create_task(self._timed_load(manifest)))
        self._leaving = self._full_since = None
        self._changed.notify_all()

    async def _wait(self, key: Key) -> None:
        """Until something has changed. The first in line lets an adapter out where there was no room for long."""
        if self._leaving or not self._is_next(key):
            await self._changed.wait()
            return
        now = time.monotonic()
        self._full_since = self._full_since or now
        try:
            async with asyncio.timeout(max(0.0, self._full_since + PATIENCE_S - now)):
                await self._changed.wait()
        except TimeoutError:
            # One that is loaded, if there is: a load may hang with the registry, and so may those who wait for it.
            self._leaving = next((held for held, resident in self._residents.items() if resident.loading.done()), None)
            self._full_since = None

    def _give_up(self, key: Key) -> None:
        """One who wanted it has it, or waits no longer."""
        self._wanted[key] -= 1
        if not self._wanted[key]:
            del self._wanted[key]
        if all(wanted in self._residents for wanted in self._wanted):
            self._leaving = None  # nobody needs its room any more
        self._changed.notify_all()

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
        async with self._changed:
            self._changed.notify_all()

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
