"""The files of aliases: `registry/.aliases/NAME.json`, read without a lock, changed under one.

A reader sees the state before a move or the one after it, as a file is replaced by one rename. Whoever moves an alias holds a lock on
`.NAME.lock` from reading the old state to renaming the new one, so that of two who move it at once the second builds on the first
(decision 0016: why the lock holds between machines, and where not).
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from hone.errors import CorruptAdapterError, RegistryError
from hone.releases import Alias
from hone.storage import write_json

LOCK_WAIT_S = 10.0
LOCK_LOOK_EVERY_S = 0.02

_Seen = tuple[int, int, int]


class Aliases:
    """A folder of aliases."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[str, tuple[_Seen, Alias]] = {}
        """What files held when they were last read, by which they are not read again for every request."""

    def names(self) -> list[str]:
        """Of all, in order."""
        return sorted(path.stem for path in self._folder.glob("*.json")) if self._folder.is_dir() else []

    def has(self, name: str) -> bool:
        return self._path(name).is_file()

    def read(self, name: str) -> Alias | None:
        """One by its name; None where there is none.

        Raises:
            CorruptAdapterError: its file does not hold an alias.
        """
        path = self._path(name)
        try:
            with path.open("rb") as file:  # and no look at the path: NFS promises the newest state to who opens a file, and to nobody else
                seen, known = _look(os.fstat(file.fileno())), self._read.get(name)
                if known and known[0] == seen:
                    return known[1]
                alias = Alias.model_validate_json(file.read())
        except FileNotFoundError:
            self._read.pop(name, None)
            return None
        except ValidationError as error:
            raise CorruptAdapterError(f"{path}: not an alias that this version reads ({error.errors()[0]['msg']})") from error
        self._read[name] = (seen, alias)
        return alias

    def write(self, name: str, alias: Alias) -> None:
        """Replace its file in one step. Only under its lock."""
        history = [state.model_dump(mode="json", exclude_none=True) for state in alias.history]
        # `target` is what versions of hone without weights go by.
        write_json(self._path(name), {"target": alias.current.main.version, "history": history})

    def remove(self, name: str) -> bool:
        """Forget one, and whether it was there. Its lock's file stays: a lock on a file without a name would exclude nobody."""
        try:
            self._path(name).unlink()
        except FileNotFoundError:
            return False
        return True

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Nobody else moves this alias inside the block.

        Raises:
            RegistryError: somebody has been at it for longer than a move takes, or the file system has no locks.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._folder / f".{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle, name)
            yield
        finally:
            os.close(handle)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"


def _lock(handle: int, name: str) -> None:
    until = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            # flock, as it excludes threads of one process too; Linux asks the server for it on NFS.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise RegistryError(f"alias {name!r} is being moved by another process for {LOCK_WAIT_S:.0f} s; try again") from None
            time.sleep(LOCK_LOOK_EVERY_S)
        except OSError as error:
            raise RegistryError(
                f"alias {name!r}: the registry's file system gives no locks ({error.strerror}); mount it with them"
            ) from None
        else:
            return


def _look(status: os.stat_result) -> _Seen:
    """What tells one file of that name from the next: each is a new one, and longer than the one before by a state."""
    return status.st_ino, status.st_mtime_ns, status.st_size
