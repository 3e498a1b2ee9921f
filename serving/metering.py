"""Usage of one replica on its way to the store: added up in memory, written by a thread of its own, so that no request waits.

What ended within FLUSH_S before a replica is killed is lost, and so are the requests that were running; one that is stopped writes
everything first. While the store cannot be reached, the sums stay in memory, a handful of numbers by key, adapter and hour, and are
written when it is back.
"""

import logging
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sqlalchemy.exc import SQLAlchemyError

from hone.errors import ResourceError
from hone.usage import HOUR, Slot, Usage, Used, hour_of
from serving.callers import Caller
from serving.engine.measures import Histogram

logger = logging.getLogger("ray.serve")

FLUSH_S = 2.0
LAST_FLUSH_S = 10.0
"""How long stopping waits for the store."""


NAMED_AT_MOST = 256
"""Adapters, and keys, that have time series of their own. Those past it are `OTHERS`: the first that are called since the start are, where
some are called far more than others, nearly all of the traffic. `hone usage` has every one of them."""
OTHERS = "others"


@dataclass
class Sums:
    """What one adapter or one key came to since the start."""

    used: Used = field(default_factory=Used)
    first_tokens: Histogram = field(default_factory=Histogram)
    """Seconds from when the replica had a request to each of its answers' first token."""

    def add(self, used: Used, first_tokens: Sequence[float] = ()) -> None:
        self.used.add(used)
        for seconds in first_tokens:
            self.first_tokens.observe(seconds)

    def copy(self) -> "Sums":
        return Sums(replace(self.used), self.first_tokens.copy())


class Tally:
    """Sums by name, of a bounded number of names."""

    def __init__(self) -> None:
        self._sums: dict[str, Sums] = {}

    def add(self, name: str, used: Used, first_tokens: Sequence[float] = ()) -> None:
        if name not in self._sums and len(self._sums) >= NAMED_AT_MOST:
            name = OTHERS
        self._sums.setdefault(name, Sums()).add(used, first_tokens)

    def copy(self) -> dict[str, Sums]:
        return {name: sums.copy() for name, sums in self._sums.items()}


class Meter:
    """Counts by adapter and by key; writes them where there is a store."""

    def __init__(self, url: str | None = None) -> None:
        """`url` is the store's; without one nothing is written."""
        self.adapters = Tally()
        self.keys = Tally()
        self._url = url
        self._writer = uuid.uuid4().hex
        self._totals: dict[Slot, Used] = {}
        self._changed: set[Slot] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._store: Usage | None = None
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        if url is not None:
            self._thread.start()

    @property
    def unwritten(self) -> int:
        """Sums that are not in the store as they are here."""
        return len(self._changed)

    def add(self, caller: Caller, adapter: str, used: Used, first_tokens: Sequence[float] = ()) -> None:
        """A request of `caller` that `adapter` answered has ended; its answers' first tokens were there after so many seconds."""
        self.adapters.add(adapter, used, first_tokens)
        self.keys.add(caller.label, used, first_tokens)
        if self._url is None:
            return
        slot = Slot(hour_of(), caller.key, adapter)
        with self._lock:
            self._totals.setdefault(slot, Used()).add(used)
            self._changed.add(slot)

    def stop(self) -> None:
        """Write what there is, and end."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(LAST_FLUSH_S)

    def _run(self) -> None:
        while not self._stopping.wait(FLUSH_S):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        assert self._url is not None
        with self._lock:
            changed = {slot: replace(self._totals[slot]) for slot in self._changed}
            self._changed.clear()
            kept_from = hour_of() - HOUR  # an hour that has ended, in case the clock is set back
            self._totals = {slot: used for slot, used in self._totals.items() if slot in changed or slot.hour >= kept_from}
        if not changed:
            return
        try:
            self._store = self._store or Usage(self._url)
            self._store.write(self._writer, changed)
            self._failed = False
        except (ResourceError, SQLAlchemyError) as error:
            with self._lock:
                self._changed |= changed.keys()
            if not self._failed:
                logger.warning("usage cannot be written (%s); it is kept in memory until it can", str(error).splitlines()[0])
            self._failed = True
