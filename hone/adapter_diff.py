"""What differs between two published versions: what they were made of, how well they do, what they take."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hone.manifest import RECIPE_FILE, AdapterManifest
from hone.registry import Registry
from hone.release_gate import Candidate, Figure

ABSENT = None


@dataclass(frozen=True)
class Difference:
    """One thing, as each of the two has it."""

    name: str
    a: Any
    b: Any

    @property
    def change(self) -> float | None:
        """From a to b, where both are numbers."""
        a, b = (each.value if isinstance(each, Figure) else each for each in (self.a, self.b))
        return b - a if _is_number(a) and _is_number(b) else None


@dataclass(frozen=True)
class AdapterDiff:
    """Two versions beside each other."""

    a: AdapterManifest
    b: AdapterManifest
    made_of: list[Difference]
    """Base, method, task, data and what else the manifests say; only what differs."""
    recipe: list[Difference]
    """By dotted key; only what differs."""
    metrics: list[Difference]
    """Every one that either has, equal or not; the values are figures."""
    sizes: list[Difference]
    """Bytes of each file, by name; only what differs, and the whole."""


def diff(registry: Registry, a: str, b: str) -> AdapterDiff:
    """Compare two adapters, each `name@version`, a name or an alias.

    Raises:
        UnknownAdapterError: one of them is not there.
    """
    first, second = (registry.resolve(each) for each in (a, b))
    folders = [registry.path(each.ref) for each in (first, second)]
    metrics = [Candidate(each, folder).figures() for each, folder in zip((first, second), folders, strict=True)]
    files = [{name: entry.bytes for name, entry in each.files.items()} for each in (first, second)]
    recipes = [_flat(_recipe(folder)) for folder in folders]
    return AdapterDiff(
        a=first,
        b=second,
        made_of=list(_differing(_facts(first), _facts(second))),
        recipe=list(_differing(*recipes)),
        metrics=list(_beside(*metrics)),
        sizes=[*_differing(*files), Difference("all files", sum(files[0].values()), sum(files[1].values()))],
    )


def _facts(manifest: AdapterManifest) -> dict[str, Any]:
    lineage = manifest.lineage
    return {
        "digest": manifest.digest,
        "base": manifest.base.name,
        "base revision": manifest.base.revision,
        "base fingerprint": manifest.base.fingerprint,
        "kind": manifest.kind,
        "task": manifest.task,
        "method": manifest.method,
        "served": manifest.served,
        "dtype": manifest.dtype,
        "labels": manifest.labels,
        "problem type": manifest.problem_type,
        "data digest": lineage.data_digest,
        "run": lineage.run_id,
        "trial": lineage.trial,
        "hone": lineage.hone_version,
        "published": manifest.created_at,
    }


def _recipe(folder: Path) -> Any:
    path = folder / RECIPE_FILE
    return json.loads(path.read_bytes()) if path.exists() else {}


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves by their dotted keys. A list is a leaf."""
    if not isinstance(value, dict) or (path and not value):
        return {path: value}
    return {key: leaf for name, inner in value.items() for key, leaf in _flat(inner, f"{path}.{name}".lstrip(".")).items()}


def _beside(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterable[Difference]:
    return (Difference(name, a.get(name, ABSENT), b.get(name, ABSENT)) for name in dict.fromkeys([*a, *b]))


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterable[Difference]:
    return (each for each in _beside(a, b) if each.a != each.b)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
