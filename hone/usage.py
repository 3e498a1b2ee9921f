"""What was used, by key, adapter and hour.

Each process that answers writes rows of its own, as totals and not as increments. So writers never wait for each other, and a write whose
outcome is unknown is simply done again.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import BigInteger, func, select
from sqlalchemy.orm import Mapped, mapped_column

from hone.database import Database, Table

HOUR = 3600
"""Seconds that one row is about."""
By = Literal["key", "adapter"]


@dataclass
class Used:
    """Requests, and their tokens."""

    requests: int = 0
    """That were accepted; those that ended early count, with the tokens that were made for them."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt tokens, those that were found read already."""
    completion_tokens: int = 0

    def add(self, other: "Used") -> None:
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.completion_tokens += other.completion_tokens


@dataclass(frozen=True)
class Slot:
    """What one row of a writer is about."""

    hour: int
    """Unix time of its beginning."""
    key: str
    """Id of the key; `anonymous` where there was none."""
    adapter: str
    """`name@version`, or the base's name."""


class _Row(Table):
    __tablename__ = "usage"

    writer: Mapped[str] = mapped_column(primary_key=True)
    hour: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    adapter: Mapped[str] = mapped_column(primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    cached_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)


class Usage(Database):
    """The usage of a store."""

    def write(self, writer: str, totals: Mapping[Slot, Used]) -> None:
        """Set the totals of a writer's rows, in one transaction. May be repeated."""
        with self._transaction() as session:
            for slot, used in totals.items():
                session.merge(_Row(writer=writer, **vars(slot), **vars(used)))

    def by(self, *columns: By, since: float = 0) -> dict[tuple[str, ...], Used]:
        """Sums from the hour of Unix time `since`, by key id, by adapter, or by both; the most completion tokens first."""
        groups = [getattr(_Row, column) for column in columns]
        sums = [func.sum(getattr(_Row, name)) for name in Used.__dataclass_fields__]
        asked = select(*groups, *sums).where(_Row.hour >= hour_of(since)).group_by(*groups)
        with self._transaction() as session:
            rows = [(tuple(row[: len(groups)]), Used(*map(int, row[len(groups) :]))) for row in session.execute(asked)]
        return dict(sorted(rows, key=lambda row: (-row[1].completion_tokens, -row[1].prompt_tokens, row[0])))


def hour_of(moment: float | None = None) -> int:
    """Unix time of the beginning of the hour of a Unix time; of now by default."""
    return int(time.time() if moment is None else moment) // HOUR * HOUR


def total(used: Iterable[Used]) -> Used:
    """All of it together."""
    result = Used()
    for each in used:
        result.add(each)
    return result
