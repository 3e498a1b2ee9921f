"""Reads of the registry, which may be a share whose server is gone: whoever reads there then waits for as long as it is away.

They have threads of their own, so that nothing else of a process stands still with them, and are given up after a while.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn, TypeVar

from serving.errors import UnreachableError

logger = logging.getLogger("ray.serve")

AT_ONCE = 4
PATIENCE_S = 5.0
"""A manifest or an alias is read in milliseconds."""
LISTING_PATIENCE_S = 60.0
"""All manifests may be ten thousand."""

T = TypeVar("T")


class RegistryReads:
    """Reads of one kind."""

    def __init__(self, *, patience_s: float | None = None) -> None:
        self._patience_s = PATIENCE_S if patience_s is None else patience_s
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="registry")
        self._began: dict[object, float] = {}
        """When each read that is going on was begun."""
        self._is_said = False

    @property
    def is_hanging(self) -> bool:
        """Whether a read has taken too long, and has not come back. While one has, none is begun."""
        now = time.monotonic()
        hangs = any(now - began > self._patience_s for began in list(self._began.values()))
        if hangs and not self._is_said:
            logger.warning("the registry has not answered for %g s; until it does, what is known of it goes on", self._patience_s)
        self._is_said = hangs
        return hangs

    async def read(self, now: Callable[[], T], known: Callable[[], T], *, within_s: float | None = None) -> T:
        """What `now` reads; where that cannot be read, or not in time, what is `known` without it.

        Args:
            now: Runs in a thread.
            known: Reads nothing.
            within_s: Less patience, of a caller with less time.
        """
        if self.is_hanging:
            return known()
        reading = asyncio.get_running_loop().run_in_executor(self._threads, self._timed, now)
        reading.add_done_callback(lambda done: done.cancelled() or done.exception())  # where nobody waits for it any more
        await asyncio.wait([reading], timeout=self._patience_s if within_s is None else min(within_s, self._patience_s))
        try:
            return reading.result() if reading.done() else known()
        except OSError:
            return known()

    def _timed(self, now: Callable[[], T]) -> T:
        this = object()
        self._began[this] = time.monotonic()
        try:
            return now()
        finally:
            del self._began[this]


def nothing_known() -> NoReturn:
    """Raises UnreachableError, for what is nowhere but in the registry."""
    raise UnreachableError("the registry cannot be read now; try again")
