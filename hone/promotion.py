"""Moving an alias: to a version that its gate lets pass, for all requests or a share of them, and back.

Each move reads the present state, decides, and writes the next one under the alias's lock.
"""

import getpass
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from hone.errors import GateError, RegistryError, UnknownAdapterError
from hone.ids import AdapterRef
from hone.manifest import AdapterManifest
from hone.registry import Registry
from hone.release_gate import Candidate, objections
from hone.releases import Alias, Release, RollbackPolicy, Shadow, shared_out

AsItWas = Literal["as it was"]
AS_IT_WAS: AsItWas = "as it was"


@dataclass(frozen=True)
class Wishes:
    """How an alias is to answer; what is not said stays as it is."""

    share: float = 1.0
    """Of the requests, for the promoted version; the others keep the rest in proportion."""
    sticky: bool | AsItWas = AS_IT_WAS
    shadow: tuple[str, float] | AsItWas | None = AS_IT_WAS
    """Version and share of the requests that it is sent copies of, or none."""
    rollback: RollbackPolicy | AsItWas | None = AS_IT_WAS


AS_BEFORE = Wishes()


def promote(
    registry: Registry, alias: str, version: str, *, wishes: Wishes = AS_BEFORE, force: bool = False, by: str | None = None, why: str = ""
) -> Alias:
    """Let a version answer under an alias, which is made where there is none. Where that changes nothing, nothing is written.

    Args:
        registry: Where both are.
        alias: Its name.
        version: `name@version`; what `name` or another alias means now is written down as such.
        wishes: With what share, and what else.
        force: Move whatever there is against it; that is kept in the history.
        by: Who does it; by default this user on this machine.
        why: For the history.

    Raises:
        GateError: the version's gate has something against it, or it is asked other questions than the alias. That stays where it is.
        UnknownAdapterError: no such version.
        RegistryError: the alias is the name of an adapter, or the versions cannot answer under one name.
    """
    name = _alias_name(registry, alias)
    manifest = registry.resolve(version)
    with registry.alias_files.locked(name):
        before = registry.alias_files.read(name)
        grows = before is None or wishes.share > before.current.weight_of(str(manifest.ref))
        gate = _objections(registry, manifest, before) if grows else []
        against = [*gate, *_unlike(registry, manifest, before, alias=name)]
        if against and not force:
            stays = f"{name!r} goes on meaning {before.current.says()}" if before else f"there is no {name!r} yet"
            raise GateError(
                f"{manifest.ref}: {'; '.join(against)}; {stays}. {'It is `publish.gate` of its recipe that says so; ' if gate else ''}"
                f"`hone adapters promote {name} {manifest.ref} --force` moves the alias anyway"
            )
        state = _promoted(registry, manifest, before.current if before else None, wishes)
        if before and state.answers_as(before.current):
            return before
        state = state.model_copy(update={"by": by or whoever(), "why": why, "forced": tuple(against)})
        return _write(registry, name, before, state)


def roll_back(registry: Registry, alias: str, *, to: int | None = None, by: str | None = None, why: str = "") -> Alias:
    """Bring back an earlier state of an alias: the one before the present, or the one of that number.

    Raises:
        UnknownAdapterError: no such alias, or a version of that state is gone. RegistryError: no such state.
    """

    def choose(before: Alias) -> int:
        if to is not None:
            before.state(to)
            return to
        number = next(before.earlier(), None)
        if number is None:
            raise RegistryError(f"alias {alias!r} has nothing to go back to before {before.current.says()}; name a state by --to")
        return number

    moved = _roll_back(registry, alias, choose, by=by or whoever(), why=why)
    assert moved is not None, "a state was chosen"
    return moved


def take_back(registry: Registry, alias: str, version: str, *, seen: int, by: str, why: str) -> Alias | None:
    """Go back to the last state in which a failing version did not answer; None where there is none, or the alias has moved on.

    Args:
        registry: Where it is.
        alias: Its name.
        version: The one that fails.
        seen: Number of the state in which it was seen to fail. Several servers may see it, and only the first of them moves the alias.
        by: Who saw it.
        why: For the history.

    Raises:
        RegistryError: the state cannot be brought back.
    """

    def choose(before: Alias) -> int | None:
        if before.number != seen:
            return None
        return next((n for n in before.earlier() if version not in {each.version for each in before.state(n).targets}), None)

    return _roll_back(registry, alias, choose, by=by, why=why)


def whoever() -> str:
    """This user on this machine."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _roll_back(registry: Registry, alias: str, choose: Callable[[Alias], int | None], *, by: str, why: str) -> Alias | None:
    name = AdapterRef.parse(alias).name
    with registry.alias_files.locked(name):
        before = registry.alias_files.read(name)
        if before is None:
            raise UnknownAdapterError(f"no alias {alias!r}; there are: {', '.join(registry.aliases()) or 'none'}")
        number = choose(before)
        if number is None:
            return None
        state = before.state(number)
        for target in state.targets:
            registry.resolve(target.version)
        shadow = state.shadow if state.shadow and _found(registry, state.shadow.version) else None
        now = {"at": _now(), "by": by, "why": why, "forced": (), "restores": number, "shadow": shadow}
        return _write(registry, name, before, state.model_copy(update=now))


def _alias_name(registry: Registry, alias: str) -> str:
    ref = AdapterRef.parse(alias)
    if ref.version is not None:
        raise RegistryError(f"{alias!r} is a version, and versions never change; give the alias a name such as prod")
    if (registry.root / ref.name).exists():
        raise RegistryError(f"{ref.name!r} is the name of an adapter; choose another name for the alias")
    return ref.name


def _objections(registry: Registry, manifest: AdapterManifest, before: Alias | None) -> list[str]:
    """The gate's, held against the version that answers most beside the new one."""
    others = [each for each in before.current.targets if each.version != str(manifest.ref)] if before else []
    main = max(others, key=lambda each: each.weight, default=None)
    present = _found(registry, main.version) if main else None
    found = Candidate(manifest, registry.path(manifest.ref))
    return objections(found, Candidate(present, registry.path(present.ref)) if present else None)


def _unlike(registry: Registry, manifest: AdapterManifest, before: Alias | None, *, alias: str) -> list[str]:
    """What would no longer be answered as those who call the alias expect it."""
    present = _found(registry, before.current.main.version) if before else None
    if present is None:
        return []
    try:
        _check_alike(manifest, present)
    except RegistryError as error:
        return [f"{error.message}, and who calls {alias!r} would be told so"]
    return []


def _promoted(registry: Registry, manifest: AdapterManifest, now: Release | None, wishes: Wishes) -> Release:
    ref = str(manifest.ref)
    targets = shared_out(now.targets if now else (), ref, manifest.digest, wishes.share)
    shadow = now.shadow if now else None
    if wishes.shadow is None:
        shadow = None
    elif wishes.shadow != AS_IT_WAS:
        version, share = wishes.shadow
        shadowed = registry.resolve(version)
        shadow = Shadow(version=str(shadowed.ref), digest=shadowed.digest, share=share)
    if shadow and shadow.version in {each.version for each in targets}:
        if wishes.shadow != AS_IT_WAS:
            raise RegistryError(f"{shadow.version} answers itself; a shadow is another version")
        shadow = None  # it answers now
    made = Release(
        targets=targets,
        sticky=(now is not None and now.sticky) if wishes.sticky == AS_IT_WAS else wishes.sticky,
        shadow=shadow,
        rollback=(now.rollback if now else None) if wishes.rollback == AS_IT_WAS else wishes.rollback,
        at=_now(),
    )
    for other in made.versions:
        _check_alike(manifest, registry.resolve(other))
    return made


def _check_alike(one: AdapterManifest, other: AdapterManifest) -> None:
    """Versions that share an alias are asked the same questions by the same servers."""
    if one.base.fingerprint != other.base.fingerprint:
        raise RegistryError(f"{one.ref} is of base {one.base.name} and {other.ref} of {other.base.name}; one alias is of one base")
    if one.task != other.task:
        raise RegistryError(f"{one.ref} is for {one.task} and {other.ref} for {other.task}; one alias is of one task")


def _write(registry: Registry, name: str, before: Alias | None, state: Release) -> Alias:
    after = before.then(state) if before else Alias(history=(state,))
    registry.alias_files.write(name, after)
    return after


def _found(registry: Registry, version: str) -> AdapterManifest | None:
    """A version, or None where it is gone."""
    try:
        return registry.resolve(version)
    except UnknownAdapterError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
