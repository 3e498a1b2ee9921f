"""API keys: who may ask a server for what, and how much of it.

A key is 256 random bits. It is shown once, and what is kept of it is its SHA-256 digest. A slow, salted hash (bcrypt, Argon2) protects
secrets that people choose, because those can be guessed; 256 random bits cannot be, at any speed, so a fast hash without a salt is as
safe, and lets a key be found by its digest. That is also what makes looking it up safe against timing: how long it takes depends on
the digest, of which whoever guesses controls no bit.
"""

import hashlib
import math
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from re import fullmatch
from typing import Literal, get_args

from sqlalchemy import JSON, BigInteger, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Mapped, mapped_column

from hone.database import Database, Table
from hone.errors import HoneError, ResourceError
from hone.ids import NAME_PATTERN

MOST = 10**12
"""Requests or tokens a minute; well inside what a store's integers hold."""
LAST_MOMENT = 253_402_300_799
"""The end of the year 9999, past which Python has no dates."""

Scope = Literal["inference", "metrics", "admin"]
"""`inference`: the /v1 routes. `metrics`: /metrics, and who is in memory. `admin`: everything."""
SCOPES: tuple[Scope, ...] = get_args(Scope)
START = "sk-hone-"
"""Every key begins so, which scanners for leaked secrets look for."""
SHOWN = len(START) + 6
"""Characters of a key that stay visible, to tell keys apart; the 36 bits that this gives away leave 220."""
DEFAULT_PROJECT = "default"
EVERY_MODEL = ("*",)


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key; the key itself is not."""

    id: str
    name: str
    project: str
    """Whose requests share a turn in the engine, and whose bill they are on."""
    prefix: str
    digest: str
    """Hex SHA-256 of the key."""
    scopes: tuple[Scope, ...]
    adapters: tuple[str, ...]
    """Patterns (`support-*`, `*@3`) of adapters, aliases and bases that it may call."""
    requests_per_minute: int | None
    tokens_per_minute: int | None
    created_at: int
    """Unix time in seconds, like those below."""
    expires_at: int | None
    revoked_at: int | None
    weight: float = 1.0
    """Its project's share of the engine's turns beside other projects: a token of its requests counts 1 / weight. Keys of one project may
    differ in it, and then spend the project's turns differently."""

    @property
    def label(self) -> str:
        """`project/name`, unique among the keys that are not revoked."""
        return f"{self.project}/{self.name}"

    @property
    def state(self) -> str:
        if self.revoked_at is not None:
            return "revoked"
        return "active" if self.is_active(time.time()) else "expired"

    def is_active(self, now: float) -> bool:
        """Whether it opens anything at Unix time `now`."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)

    def has(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes


class _Row(Table):
    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    project: Mapped[str]
    prefix: Mapped[str]
    digest: Mapped[str] = mapped_column(unique=True)
    scopes: Mapped[list[str]] = mapped_column(JSON)
    adapters: Mapped[list[str]] = mapped_column(JSON)
    requests_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    tokens_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[int | None] = mapped_column(BigInteger)
    revoked_at: Mapped[int | None] = mapped_column(BigInteger)
    weight: Mapped[float] = mapped_column(server_default=text("1"))

    def as_key(self) -> ApiKey:
        kept = {name: getattr(self, name) for name in ApiKey.__dataclass_fields__}
        return ApiKey(**{**kept, "scopes": tuple(self.scopes), "adapters": tuple(self.adapters)})


class Keys(Database):
    """The keys of a store. Nothing is ever deleted: usage refers to revoked keys too."""

    def create(
        self,
        name: str,
        *,
        project: str = DEFAULT_PROJECT,
        scopes: Sequence[str] = ("inference",),
        adapters: Sequence[str] = EVERY_MODEL,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        expires_at: float | None = None,
        weight: float = 1.0,
    ) -> tuple[ApiKey, str]:
        """Make a key; what is known of it, and the key itself, which nobody can show again.

        Raises:
            HoneError: a setting that makes no sense, or a name that an active key of the project has.
        """
        now = time.time()
        _check(name, project, scopes, adapters, [requests_per_minute, tokens_per_minute], expires_at, weight, now)
        token = START + secrets.token_urlsafe(32)
        with self._transaction() as session:
            taken = session.scalars(select(_Row).where(_Row.name == name, _Row.project == project))
            if any(row.as_key().is_active(now) for row in taken):
                raise HoneError(f"project {project!r} has an active key {name!r}; choose another name, or revoke it first")
            row = _Row(
                id=f"key_{secrets.token_hex(6)}",
                name=name,
                project=project,
                prefix=token[:SHOWN],
                digest=digest_of_key(token),
                scopes=list(dict.fromkeys(scopes)),
                adapters=list(dict.fromkeys(adapters)),
                requests_per_minute=requests_per_minute,
                tokens_per_minute=tokens_per_minute,
                created_at=int(now),
                expires_at=None if expires_at is None else int(expires_at),
                revoked_at=None,
                weight=weight,
            )
            session.add(row)
            return row.as_key(), token

    def all(self) -> list[ApiKey]:
        """Newest first, revoked and expired ones too.

        Raises:
            ResourceError: the store does not answer.
        """
        try:
            with self._transaction() as session:
                return [row.as_key() for row in session.scalars(select(_Row).order_by(_Row.created_at.desc(), _Row.id))]
        except SQLAlchemyError as error:
            raise ResourceError(f"the store does not answer ({type(error).__name__})") from error

    def revoke(self, which: str) -> ApiKey:
        """End a key, by its id, its visible beginning, its `project/name`, or its name where that says which.

        Raises:
            HoneError: no active key, or several, are meant by it.
        """
        with self._transaction() as session:
            rows = [row for row in session.scalars(select(_Row).where(_Row.revoked_at.is_(None)).with_for_update()) if _means(which, row)]
            if len(rows) != 1:
                found = ", ".join(f"{row.id} ({row.project}/{row.name})" for row in rows) or "none"
                raise HoneError(f"{which!r} is to name one key that is not revoked; it names {found}. `hone keys list` shows their ids")
            rows[0].revoked_at = int(time.time())
            return rows[0].as_key()


def digest_of_key(token: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(token.encode()).hexdigest()


def matches(patterns: Iterable[str], names: Iterable[str]) -> bool:
    """Whether one of the names is meant by one of the patterns; `*` in a pattern also stands for a slash."""
    names = list(names)
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _means(which: str, row: _Row) -> bool:
    return which in (row.id, row.prefix, row.name, f"{row.project}/{row.name}")


def _check(
    name: str,
    project: str,
    scopes: Sequence[str],
    adapters: Sequence[str],
    limits: Sequence[int | None],
    expires_at: float | None,
    weight: float,
    now: float,
) -> None:
    for what, given in (("name", name), ("project", project)):
        if not fullmatch(NAME_PATTERN, given):
            raise HoneError(f"{what} {given!r}: lower-case letters, digits, '.', '_' and '-', at most 64, such as support-bot")
    unknown = next((scope for scope in scopes if scope not in SCOPES), None)
    if unknown is not None or not scopes:
        raise HoneError(f"scope {unknown!r}: a key has some of {', '.join(SCOPES)}")
    if not adapters or not all(adapters):
        raise HoneError("adapters: at least one pattern, such as 'support-*'; '*' is all of them")
    if any(limit is not None and not 1 <= limit <= MOST for limit in limits):
        raise HoneError(f"limits are from 1 to {MOST:,} a minute; leave one out for no limit")
    if expires_at is not None and expires_at <= now:
        raise HoneError("the key would have expired already")
    if expires_at is not None and expires_at > LAST_MOMENT:
        raise HoneError("the key would expire after the year 9999; leave --expires out for one that never does")
    if not 0 < weight < math.inf:
        raise HoneError(f"weight {weight}: a number above 0, such as 2 for twice the share of a project whose keys have 1")
