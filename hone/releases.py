"""What an alias means: which versions answer under its name, with what share of its requests each, and every state that it had.

A state is never changed. A move, a canary's larger share and a rollback each add one, so that the history says what was answered when,
by whose doing and why, and any state can be gone back to.
"""

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from hone.errors import RegistryError
from hone.ids import AdapterRef

PLACES = 6
"""Decimals of a weight."""


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Target(_State):
    """One version that answers."""

    version: str
    """`name@version`."""
    digest: str
    weight: float = Field(gt=0, le=1)
    """Share of the alias's requests."""

    @field_validator("version")
    @classmethod
    def _is_exact(cls, value: str) -> str:
        if AdapterRef.parse(value).version is None:
            raise ValueError(f"{value!r} names no version; write NAME@VERSION")
        return value


class Shadow(_State):
    """A version that is sent copies of requests, and whose answers nobody gets."""

    version: str
    digest: str
    share: float = Field(gt=0, le=1)
    """Of the alias's requests."""


class RollbackPolicy(_State):
    """When a version that fails is taken back by the servers themselves."""

    error_rate: float = Field(gt=0, lt=1)
    """Share of a version's requests that may fail."""
    window_s: float = Field(default=60, gt=0)
    """Over which it is measured."""
    min_requests: int = Field(default=20, ge=1)
    """With fewer in the window nothing is done."""


class Release(_State):
    """One state of an alias."""

    targets: tuple[Target, ...] = Field(min_length=1)
    """Whose weights come to 1."""
    sticky: bool = False
    """Whether a user always gets the same version, as long as the weights stay."""
    shadow: Shadow | None = None
    rollback: RollbackPolicy | None = None
    at: str
    """When it began."""
    by: str = ""
    why: str = ""
    forced: tuple[str, ...] = ()
    """What the gate had against it."""
    restores: int | None = None
    """Number of the earlier state that this one goes back to."""

    @model_validator(mode="before")
    @classmethod
    def _read_first_format(cls, value: Any) -> Any:
        """Aliases had one target and no more before they had weights."""
        if isinstance(value, dict) and "target" in value and "targets" not in value:
            return {"targets": [{"version": value["target"], "digest": value["digest"], "weight": 1.0}], "at": value["at"]}
        return value

    @model_validator(mode="after")
    def _comes_to_one(self) -> "Release":
        if not math.isclose(total := sum(each.weight for each in self.targets), 1, abs_tol=10**-PLACES):
            raise ValueError(f"the weights come to {total:g} and not to 1")
        if len({each.version for each in self.targets}) < len(self.targets):
            raise ValueError("a version is named twice")
        return self

    @property
    def main(self) -> Target:
        """The version that answers most, the first of several alike."""
        return max(self.targets, key=lambda each: each.weight)

    @property
    def versions(self) -> list[str]:
        """Every version that it names, the shadow's too."""
        return [*(each.version for each in self.targets), *([self.shadow.version] if self.shadow else [])]

    def answers_as(self, other: "Release") -> bool:
        """Whether requests are answered the same in both, whoever made them when and why."""
        return all(getattr(self, name) == getattr(other, name) for name in ("targets", "sticky", "shadow", "rollback"))

    def weight_of(self, version: str) -> float:
        """Its share of the requests, 0 where it does not answer."""
        return next((each.weight for each in self.targets if each.version == version), 0.0)

    def pick(self, chance: random.Random, *, alias: str = "", user: str | None = None) -> Target:
        """The version for one request: by chance, or always the same for a user where the alias is sticky."""
        if len(self.targets) == 1:
            return self.targets[0]
        if self.sticky and user:
            return max(self.targets, key=lambda each: _claim(alias, user, each))
        return chance.choices(self.targets, [each.weight for each in self.targets])[0]

    def says(self) -> str:
        """In a line: `bot@3 90%, bot@4 10%, sticky, shadow bot@5 of 20%, back past 5% errors of 20 in 60 s`."""
        parts = [f"{each.version} {percent(each.weight)}" if len(self.targets) > 1 else each.version for each in self.targets]
        parts += ["sticky"] if self.sticky else []
        parts += [f"shadow {self.shadow.version} of {percent(self.shadow.share)}"] if self.shadow else []
        if self.rollback:
            policy = self.rollback
            parts.append(f"back past {percent(policy.error_rate)} errors of {policy.min_requests} or more in {policy.window_s:g} s")
        return ", ".join(parts)


class Alias(_State):
    """Every state that an alias had, the present one last. They are numbered from 1."""

    model_config = ConfigDict(extra="ignore")

    history: tuple[Release, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _restores_what_was(self) -> "Alias":
        for number, state in enumerate(self.history, start=1):
            if state.restores is not None and not 1 <= state.restores < number:
                raise ValueError(f"state {number} restores state {state.restores}, which was not before it")
        return self

    @property
    def number(self) -> int:
        """Of the present state."""
        return len(self.history)

    @property
    def current(self) -> Release:
        return self.history[-1]

    def state(self, number: int) -> Release:
        """One state by its number.

        Raises:
            RegistryError: it never had so many.
        """
        if not 1 <= number <= self.number:
            raise RegistryError(f"no state {number}; there are 1 to {self.number}, and `hone adapters history` lists them")
        return self.history[number - 1]

    def earlier(self) -> Iterator[int]:
        """Numbers of the states that going back leads through, the nearest first. What was once rolled back from is not among them:
        before a state that restores another is what was before that other. Nor are those next to each other that answer the same: going
        back is to change something."""
        number, after = self.number, self.current
        while True:
            while (restored := self.history[number - 1].restores) is not None:
                number = restored
            number -= 1
            if number < 1:
                return
            if not self.history[number - 1].answers_as(after):
                yield number
            after = self.history[number - 1]

    def then(self, state: Release) -> "Alias":
        """With one state more."""
        return Alias(history=(*self.history, state))


def shared_out(before: Sequence[Target], version: str, digest: str, share: float) -> tuple[Target, ...]:
    """Give a version a share of the requests; the others keep theirs in proportion.

    Raises:
        RegistryError: nobody is left to answer the rest.
    """
    if share == 1:
        return (Target(version=version, digest=digest, weight=1),)
    others = [each for each in before if each.version != version]
    if not others:
        raise RegistryError(f"{version} cannot have {percent(share)}: no other version answers the rest; leave the share out")
    whole = sum(each.weight for each in others)
    scaled = [each.model_copy(update={"weight": round(each.weight / whole * (1 - share), PLACES)}) for each in others]
    share = round(1 - sum(each.weight for each in scaled), PLACES)  # what rounding moved is the newcomer's
    return (*(each for each in scaled if each.weight > 0), Target(version=version, digest=digest, weight=share))


def percent(share: float) -> str:
    """0.1 as `10%`."""
    return f"{100 * share:.6g}%"


def _claim(alias: str, user: str, target: Target) -> float:
    """How strongly a version claims a user; the strongest claim has him.

    Weighted rendezvous hashing (Schindelhauer and Schomaker, "Weighted distributed hash tables", SPAA 2005): each version gets its weight
    of all users, and when weights change, users only move to a version whose weight rose.
    """
    hashed = hashlib.sha256("\0".join((alias, user, target.version)).encode()).digest()
    uniform = (int.from_bytes(hashed[:6]) + 0.5) / 2**48
    return -target.weight / math.log(uniform)
