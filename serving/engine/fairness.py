"""Whose turn it is: requests of several tenants, each of which gets its share of the tokens while it has something waiting.

A virtual token counter (https://arxiv.org/abs/2401.00588): every token that the model reads or makes for a tenant adds 1 / weight to the
tenant's counter, and the next request taken is of the tenant whose counter is lowest. A tenant that had nothing to do begins no lower
than the lowest counter of those that are busy: what it did not use is not saved up. Within a tenant, first come, first served.
"""

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


@dataclass(frozen=True)
class Tenant:
    """On whose behalf a request runs."""

    name: str
    weight: float = 1.0
    """Its share beside those of the others."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"tenant {self.name!r}: weight is {self.weight}; it must be above 0")


EVERYONE = Tenant("everyone")
"""The one tenant where nobody is told apart."""


class Owned(Protocol):
    """What waits."""

    @property
    def tenant(self) -> Tenant: ...


T = TypeVar("T", bound=Owned)


class FairQueue(Generic[T]):
    """What waits, in the order in which it is to run."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}
        """By tenant; none is empty."""
        self._running: dict[str, int] = {}
        """Likewise, how many were popped and are not done; none is 0."""
        self._used: dict[str, float] = {}
        """Tokens by weight; also of tenants that have nothing here, as long as that puts them behind those that have."""

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[T]:
        return (item for items in self._waiting.values() for item in items)

    def extend(self, items: Iterable[T]) -> None:
        for item in items:
            name = item.tenant.name
            if name not in self._busy():
                self._used[name] = max(self._used.get(name, 0.0), self._least())
            self._waiting.setdefault(name, deque()).append(item)

    def peek(self, *, besides: Container[str] = ()) -> T | None:
        """What `pop` would give. Tenants named in `besides` sit out."""
        name = self._next(besides)
        return None if name is None else self._waiting[name][0]

    def pop(self, *, besides: Container[str] = ()) -> T:
        """Take the next item; it runs until `done`, or until it is put back."""
        name = self._next(besides)
        assert name is not None, "something waits, and its tenant does not sit out"
        item = self._waiting[name].popleft()
        self._running[name] = self._running.get(name, 0) + 1
        if not self._waiting[name]:
            del self._waiting[name]
        return item

    def put_back(self, items: Sequence[T]) -> None:
        """What was popped, in this order, and does not run after all waits where it did."""
        for item in reversed(items):
            self._waiting.setdefault(item.tenant.name, deque()).appendleft(item)
            self.done(item)

    def charge(self, tenant: Tenant, tokens: int) -> None:
        """Tokens that the model has read or made for a tenant with something running."""
        self._used[tenant.name] += tokens / tenant.weight

    def done(self, item: T) -> None:
        """What was popped has left."""
        name = item.tenant.name
        self._running[name] -= 1
        if not self._running[name]:
            del self._running[name]
            self._forget_idle()

    def remove(self, is_out: Callable[[T], bool]) -> list[T]:
        """Take out of the queue, and give back, what is not to run any more."""
        out = [item for item in self if is_out(item)]
        if out:
            left = {name: deque(item for item in items if not is_out(item)) for name, items in self._waiting.items()}
            self._waiting = {name: items for name, items in left.items() if items}
            self._forget_idle()
        return out

    def _next(self, besides: Container[str]) -> str | None:
        return min((name for name in self._waiting if name not in besides), key=self._used.__getitem__, default=None)

    def _busy(self) -> set[str]:
        return {*self._waiting, *self._running}

    def _least(self) -> float:
        return min((self._used[name] for name in self._busy()), default=0.0)

    def _forget_idle(self) -> None:
        """Tenants whose counter would be lifted when they come back. Without any that is busy, everyone begins anew."""
        busy, least = self._busy(), self._least()
        self._used = {name: used for name, used in self._used.items() if name in busy or (busy and used > least)}
