"""The home folder: where runs, prepared data sets, the registry and the store live, and how files there are written whole.

A cluster's nodes share one home (a mounted file system). Everything written here is written beside its final place and moved
there in one step, so a reader never sees half a file.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hone.errors import ResourceError

DEFAULT_HOME = ".hone"
MIN_FREE_BYTES = 256 * 2**20


class Home:
    """Folders of one hone installation, made when first asked for."""

    def __init__(self, root: str | Path | None = None) -> None:
        """Open the home at `root`, else `$HONE_HOME`, else `./.hone`.

        Raises:
            ResourceError: `root` is an object store URI.
        """
        chosen = str(root or os.environ.get("HONE_HOME") or DEFAULT_HOME)
        if "://" in chosen:
            raise ResourceError(f"home {chosen!r} is an object store; this version needs a folder that all nodes mount")
        self.root = Path(chosen).expanduser().resolve()

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def datasets(self) -> Path:
        return self.root / "datasets"

    @property
    def registry(self) -> Path:
        return self.root / "registry"

    @property
    def store_url(self) -> str:
        """SQLAlchemy URL of the store: `$HONE_STORE`, else a SQLite file in the home."""
        return os.environ.get("HONE_STORE") or f"sqlite:///{self.root / 'store.sqlite3'}"

    def ready(self, *, needed_bytes: int = MIN_FREE_BYTES) -> None:
        """Make the home and prove that it can take `needed_bytes`.

        Raises:
            ResourceError: not writable, or too little disk left.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise ResourceError(
                f"{self.root}: cannot write here ({error.strerror}); choose another home with --home or HONE_HOME"
            ) from error
        free = shutil.disk_usage(self.root).free
        if free < needed_bytes:
            raise ResourceError(
                f"{self.root}: {free / 2**20:.0f} MiB of disk left and {needed_bytes / 2**20:.0f} MiB are needed; "
                "free some room or choose another home with --home or HONE_HOME"
            )


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: a reader sees the old text or the new, never a part."""
    _write_whole(path, [text])


def write_new(path: Path, text: str) -> bool:
    """Write a file in one step where there is none of that name; whether there was none."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    write_text(beside, text)
    try:
        os.link(beside, path)
    except FileExistsError:
        return False
    finally:
        beside.unlink()
    return True


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """Write lines in one step, without holding them all; how many there were."""
    count = 0

    def ended() -> Iterator[str]:
        nonlocal count
        for count, line in enumerate(lines, start=1):  # noqa: B007 - told to the caller
            yield line + "\n"

    _write_whole(path, ended())
    return count


def _write_whole(path: Path, parts: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step, indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Fill a folder beside `final`; it takes that name only when the block ends well, and vanishes otherwise.

    Where another process made `final` first, its folder stays and this one is dropped.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}."))
    try:
        yield staging
        staging.chmod(0o755)
        try:
            os.rename(staging, final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """Hex SHA-256 of a JSON value, the same whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
