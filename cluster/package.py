"""The folder that travels with a submitted job: the recipe and the data files beside it, as one zip.

Made here and not by Ray, because Ray leaves out whatever .gitignore names (data files often are) and finds out only after the upload
that the dashboard takes no more than 100 MiB.
"""

import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from hone.errors import RecipeError, ResourceError
from hone.recipe import parse_override

MAX_BYTES = 100 * 2**20
"""ray.dashboard's DASHBOARD_CLIENT_MAX_SIZE: a larger upload is refused with 413."""
LEFT_OUT = frozenset({".git", ".hone", ".venv", "venv", "node_modules", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache"})
PATH_KEYS = ("data.train", "data.validation", "data.retain", "base")


def pack(folder: Path, archive: Path, *, home: Path, limit: int = MAX_BYTES) -> list[Path]:
    """Zip what lies below `folder` into `archive`; the files that went in.

    Left out: version control, environments, caches, the home, and Python files (a `training.py` there would be run instead of hone's).

    Raises:
        ResourceError: the zip is larger than `limit` bytes; the largest files are named.
    """
    packed: list[Path] = []
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1, strict_timestamps=False) as file:
        for path in _files(folder, home):
            file.write(path, path.relative_to(folder))
            packed.append(path)
            if archive.stat().st_size > limit:
                raise ResourceError(_too_large(folder, home, limit))
    if archive.stat().st_size > limit:
        raise ResourceError(_too_large(folder, home, limit))
    return packed


def check_paths_travel(recipe: Path, overrides: Sequence[str], folder: Path) -> list[str]:
    """Absolute paths of the recipe that stay behind, so must exist on the cluster.

    Raises:
        RecipeError: a relative path leads out of `folder`, where the cluster would not find it.
    """
    tree = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    values: dict[str, Any] = {"base": tree.get("base"), **{f"data.{k}": v for k, v in (tree.get("data") or {}).items()}}
    values |= dict(parse_override(text) for text in overrides)
    staying = []
    for key, value in _paths(values):
        if "://" in value:
            continue
        target = (recipe.parent / Path(value).expanduser()).resolve()
        is_path = key != "base" or value.startswith((".", "/", "~")) or target.is_dir()
        if not is_path or target.is_relative_to(folder):
            continue
        if not Path(value).expanduser().is_absolute():
            raise RecipeError(
                f"{recipe}: {key}: {value} leads out of {folder}, which is all that travels to the cluster; "
                "give --working-dir a folder that holds it, or an absolute path that the cluster's nodes see"
            )
        staying.append(f"{key} {value}")
    return staying


def _paths(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every path that the recipe names, with its key."""
    mixed = [(f"data.mix[{n}].source", each.get("source")) for n, each in enumerate(values.get("data.mix") or []) if isinstance(each, dict)]
    for key, value in [*((key, values.get(key)) for key in PATH_KEYS), *mixed]:
        yield from ((key, path) for path in (value if isinstance(value, list) else [value]) if isinstance(path, str))


def _files(folder: Path, home: Path) -> Iterator[Path]:
    for top, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if name not in LEFT_OUT and Path(top, name).resolve() != home)
        for name in sorted(files):
            path = Path(top, name)
            if path.is_file() and path.suffix not in {".py", ".pyc"}:
                yield path


def _too_large(folder: Path, home: Path, limit: int) -> str:
    sizes = sorted(((path.stat().st_size, path) for path in _files(folder, home)), reverse=True)
    largest = ", ".join(f"{path.relative_to(folder)} ({size / 2**20:,.0f} MiB)" for size, path in sizes[:3])
    return (
        f"{folder}: more than {limit // 2**20} MiB as a zip, the most that Ray takes with a job; the largest files are {largest}. "
        "Put them on storage that the cluster's nodes mount and give their absolute paths, or choose a smaller --working-dir"
    )
