"""Adapters in a replica's memory: loaded once however many ask, pinned while requests run, the least recently used leaving first.

Keyed by `name@version` and digest, so what was loaded is never mistaken for other weights. All of it on the server's event loop.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from hone.manifest import AdapterManifest
from serving.base import Served
from serving.engine.measures import Histogram
from serving.errors import AdapterRefusedError, RequestError

REFUSED_FOR_S = 10.0
"""How long a refusal is repeated without reading the adapter again; then it is tried anew, for its folder may have been restored."""

Key = tuple[str, str]


@dataclass(eq=False)
class _Resident:
    """One adapter, loaded or on its way."""

    loading: "asyncio.Task[Served]"
    pins: int = 0


class AdapterPool:
    """At most `capacity` adapters in memory."""

    def __init__(self, load: Callable[[AdapterManifest], Served], *, capacity: int, unload: Callable[[Served], None] | None = None) -> None:
        """`load` runs in a worker thread; it may take long and may raise RequestError. `unload` is told what was evicted, and returns at
        once."""
        self.capacity = capacity
        self._load = load
        self._unload = unload
        self._residents: OrderedDict[Key, _Resident] = OrderedDict()
        """Least recently used first."""
        self._refused: dict[Key, tuple[RequestError, float]] = {}
        self._released = asyncio.Condition()
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
    async def pinned(self, manifest: AdapterManifest) -> AsyncIterator[Served]:
        """The adapter, loaded if need be, which stays in memory until the block ends.

        Raises:
            RequestError: it cannot be served; the message says why.
        """
        key = str(manifest.ref), manifest.digest
        self._raise_if_refused(key)
        resident = await self._claim(key, manifest)
        try:
            # Shielded: where one caller goes away while it loads, the others still get it.
            yield await asyncio.shield(resident.loading)
        finally:
            await self._release(key, resident)

    async def _claim(self, key: Key, manifest: AdapterManifest) -> _Resident:
        """Pin the adapter, waiting for room while every resident one is in use."""
        while True:
            resident = self._residents.get(key)
            if resident is not None:
                break
            if self._make_room():
                task = asyncio.create_task(self._timed_load(manifest))
                resident = self._residents[key] = _Resident(task)
                break
            async with self._released:
                await self._released.wait()
        resident.pins += 1
        self._residents.move_to_end(key)
        return resident

    async def _timed_load(self, manifest: AdapterManifest) -> Served:
        began = time.monotonic()
        try:
            served = await asyncio.to_thread(self._load, manifest)
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
