"""What preparing data has left in the home: shards of tokens, and splits that say which of their rows train. All of it can be made anew."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hone.storage import Home

SHARDS_FILE = "shards.json"
SUMMARY_FILE = "prepared.json"


@dataclass(frozen=True)
class Entry:
    """One prepared thing."""

    kind: str
    """tokens, split, or unfinished: what a process that was killed has left, which nobody reads."""
    folder: Path
    what: str
    """The data it was made of."""
    rows: int
    bytes: int
    used_at: float
    """Seconds since 1970: when a run last took it."""

    @property
    def digest(self) -> str:
        return self.folder.name.lstrip(".")


def token_folder(home: Home, digest: str) -> Path:
    """Where the tokens of that digest are or will be."""
    return home.datasets / "tokens" / digest[:32]


def split_folder(home: Home, digest: str) -> Path:
    """Where the split of that digest is or will be."""
    return home.datasets / digest[:32]


def token_lock(home: Home, digest: str) -> FileLock:
    """What the process that makes these tokens holds; it goes when that process does."""
    folder = token_folder(home, digest)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.parent / f".{folder.name}.lock", mode=0o666)


def mark_used(folder: Path) -> None:
    """Somebody takes it now. A folder of another user keeps its time."""
    with suppress(PermissionError):
        os.utime(folder)


def entries(home: Home) -> list[Entry]:
    """Everything there, the last used first."""
    found = [entry for make in (_tokens, _splits, _unfinished) for entry in make(home)]
    return sorted(found, key=lambda entry: -entry.used_at)


def clear(chosen: Iterable[Entry], *, in_use_since: float) -> tuple[list[Entry], list[Entry]]:
    """Remove entries.

    Args:
        chosen: From `entries`.
        in_use_since: Seconds since 1970. What was used since then stays: a job that has run that long may read it.

    Returns:
        What was removed, and what was kept.
    """
    removed, kept = [], []
    for entry in chosen:
        if entry.used_at >= in_use_since:
            kept.append(entry)
            continue
        # Out of the way in one step, so that nobody finds half of it; then removed.
        doomed = Path(tempfile.mkdtemp(dir=entry.folder.parent, prefix=f".{entry.digest}.removed."))
        try:
            os.replace(entry.folder, doomed)
        except FileNotFoundError:  # another has removed it
            doomed.rmdir()
            continue
        shutil.rmtree(doomed)
        removed.append(entry)
    return removed, kept


def _tokens(home: Home) -> Iterator[Entry]:
    for path in (home.datasets / "tokens").glob(f"[!.]*/{SHARDS_FILE}"):
        with suppress(FileNotFoundError):  # removed meanwhile, as may happen to each of them
            files, rows = (_json(path)[name] for name in ("files", "rows"))
            yield _entry("tokens", path.parent, f"{files[0]}{f' and {len(files) - 1} more' if len(files) > 1 else ''}", rows)


def _splits(home: Home) -> Iterator[Entry]:
    for path in home.datasets.glob(f"[!.]*/{SUMMARY_FILE}"):
        with suppress(FileNotFoundError):
            made = _json(path)
            names = ", ".join(each["name"] for each in made.get("sources", []))
            yield _entry("split", path.parent, names, made["train_rows"] + made["validation_rows"])


def _unfinished(home: Home) -> Iterator[Entry]:
    for folder in [*home.datasets.glob(".*"), *(home.datasets / "tokens").glob(".*")]:
        with suppress(FileNotFoundError):
            if folder.is_dir() and not _is_being_made(folder):
                yield _entry("unfinished", folder, "", 0)


def _is_being_made(staging: Path) -> bool:
    """Whether a process holds the lock of what this folder is to become. A split is made in a moment, and has none."""
    lock = staging.parent / f".{staging.name.split('.')[1]}.lock"
    if not lock.exists():
        return time.time() - staging.stat().st_mtime < 60
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def _entry(kind: str, folder: Path, what: str, rows: int) -> Entry:
    size = sum(path.stat().st_size for path in folder.iterdir())
    return Entry(kind, folder, what, rows, size, folder.stat().st_mtime)


def _json(path: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return made
