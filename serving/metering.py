"""Usage of one replica on its way to the store: added up in memory, written by a thread of its own, so that no request waits.

What ended within FLUSH_S before a replica is killed is lost, and so are the requests that were running; one that is stopped writes
everything first. While the store cannot be reached, the sums stay in memory, a handful of numbers by key, adapter and hour, and are
written when it is back.
"""

import logging
import threading
import uuid

from sqlalchemy.exc import SQLAlchemyError

from hone.errors import ResourceError
from hone.usage import HOUR, Slot, Usage, Used, hour_of
from serving.callers import Caller

logger = logging.getLogger("ray.serve")

FLUSH_S = 2.0
LAST_FLUSH_S = 10.0
"""How long stopping waits for the store."""


NAMED_AT_MOST = 256
"""Adapters, and keys, that have time series of their own. Those past it are `OTHERS`: the first that are called since the start are, where
some are called far more than others, nearly all of the traffic. `hone usage` has every one of them."""
OTHERS = "others"


class Tally:
    """Usage by name, of a bounded number of names."""

    def __init__(self) -> None:
        self._used: dict[str, Used] = {}

    def add(self, name: str, used: Used) -> None:
        if name not in self._used and len(self._used) >= NAMED_AT_MOST:
            name = OTHERS
        self._used.setdefault(name, Used()).add(used)

    def copy(self) -> dict[str, Used]:
        return {name: Used(**vars(used)) for name, used in self._used.items()}


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

    def add(self, caller: Caller, adapter: str, used: Used) -> None:
        """A request of `caller` that `adapter` answered has ended."""
        self.adapters.add(adapter, used)
        self.keys.add(caller.label, used)
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
            changed = {slot: Used(**vars(self._totals[slot])) for slot in self._changed}
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
