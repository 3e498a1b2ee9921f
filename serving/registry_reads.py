"""Reads of the registry, which may be a share whose server is gone: whoever reads there then waits for as long as it is away.

They have threads of their own, so that nothing else of a process stands still with them, and are given up after a while.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

from serving.errors import UnreachableError

logger = logging.getLogger("ray.serve")

AT_ONCE = 4
PATIENCE_S = 5.0
"""A read takes milliseconds."""

T = TypeVar("T")


class RegistryReads:
    """Of one process. On its event loop."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="registry")
        self._hanging = 0
        """Reads that were given up and have not come back. While there are any, none is begun."""

    async def read(self, now: Callable[[], T], known: Callable[[], T]) -> T:
        """What `now` reads; where that cannot be read, or not for `PATIENCE_S`, what is `known` without it."""
        if self._hanging:
            return known()
        reading = asyncio.get_running_loop().run_in_executor(self._threads, now)
        done, _ = await asyncio.wait([reading], timeout=PATIENCE_S)
        if not done:
            self._hanging += 1
            reading.add_done_callback(self._is_back)
            logger.warning("the registry has not answered for %g s; until it does, what is known of it goes on", PATIENCE_S)
            return known()
        try:
            return reading.result()
        except OSError:
            return known()

    def _is_back(self, reading: "asyncio.Future[Any]") -> None:
        self._hanging -= 1
        if not reading.cancelled():
            reading.exception()  # nobody waits for it any more


def nothing_known() -> NoReturn:
    """Raises UnreachableError, for what is nowhere but in the registry."""
    raise UnreachableError("the registry cannot be read now; try again")
