"""Who is let in: the keys of the store, kept in memory, so that no request with a known key waits for a database.

All keys are read anew every REFRESH_S, so a revoked key is refused at most so much later (and the time that reading takes). A key that is
not known may be new: whoever brings it waits for a reading that begins after that, of which there is one for all who wait, and not more
than one every UNKNOWN_S. While the store cannot be reached, what is known goes on being true for KEPT_S; after that nobody is let in.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Literal

from hone.keys import START, ApiKey, Keys, digest_of_key
from serving.callers import ANONYMOUS, Caller
from serving.errors import InvalidKeyError, UnavailableError

logger = logging.getLogger("ray.serve")

Auth = Literal["auto", "required", "off"]
"""`auto`: a key is needed once the store has any, and by whoever comes from another machine. `required`: always. `off`: never."""
REFRESH_S = 5.0
UNKNOWN_S = 1.0
KEPT_S = 3600.0


class StoreKeys:
    """Reads the keys of a store that may not be there yet."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._keys: Keys | None = None

    def __call__(self) -> list[ApiKey]:
        """Raises ResourceError where the store does not answer."""
        self._keys = self._keys or Keys(self._url)
        return self._keys.all()


class KeyRing:
    """The keys that are known. All of it on one event loop; reading them in a worker thread."""

    def __init__(self, load: Callable[[], Sequence[ApiKey]], *, auth: Auth = "auto") -> None:
        """`load` reads all keys; it may take long, and may fail."""
        self._load = load
        self._auth = auth
        self._keys: dict[str, ApiKey] = {}
        """By digest."""
        self._read_at = -float("inf")
        """When the store last answered, by `time.monotonic()`: before it was asked, so what it said is at least as new."""
        self._reading: asyncio.Task[None] | None = None
        self._failed = False

    async def keep_fresh(self) -> None:
        """Read the keys again and again, until cancelled."""
        while True:
            await self._refresh()
            await asyncio.sleep(REFRESH_S)

    async def caller(self, token: str | None, *, is_local: bool) -> Caller:
        """Who holds `token`; `is_local` says that the request comes from this machine.

        Raises:
            InvalidKeyError: nobody who is let in.
            UnavailableError: that cannot be known right now.
        """
        if self._read_at == -float("inf"):
            await self._refresh()
        key = None if token is None else await self._find(token)
        if key is not None and key.is_active(time.time()) and self._age <= KEPT_S:
            return Caller.of(key)
        if self._auth == "off":
            return ANONYMOUS
        if self._age > KEPT_S:
            raise UnavailableError("API keys cannot be checked: the store does not answer; try again shortly", None, "keys_unavailable")
        if self._auth == "auto" and is_local and not self._keys:
            return ANONYMOUS
        raise InvalidKeyError(self._why(token, key))

    @property
    def _age(self) -> float:
        return time.monotonic() - self._read_at

    async def _find(self, token: str) -> ApiKey | None:
        digest, came_at = digest_of_key(token), time.monotonic()
        while digest not in self._keys and token.startswith(START) and self._read_at < came_at and not self._failed:
            await asyncio.sleep(UNKNOWN_S - self._age)
            if self._read_at < came_at:
                await self._refresh()
        return self._keys.get(digest)

    async def _refresh(self) -> None:
        """Read the keys; whoever comes while that goes on waits for the same reading. A failure leaves what is known."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        await asyncio.shield(self._reading)

    async def _read(self) -> None:
        asked_at = time.monotonic()
        try:
            keys = await asyncio.to_thread(self._load)
        except Exception as error:  # whatever it is: a loop that ended here would never hear of a revoked key again
            if not self._failed:
                logger.warning("API keys cannot be read (%s); those that are known stay good for up to %d min", error, KEPT_S // 60)
            self._failed = True
            return
        self._keys, self._read_at, self._failed = {key.digest: key for key in keys}, asked_at, False

    def _why(self, token: str | None, key: ApiKey | None) -> str:
        if key is not None:
            return f"the API key {key.prefix}... is {key.state}; ask whoever runs this server for another"
        if not self._keys:
            return "this server answers other machines only with an API key, and has none yet; `hone keys create NAME` makes one"
        if token is None:
            return "no API key; send it as `Authorization: Bearer KEY`"
        return "the API key is not known here; `hone keys create NAME` makes one"
