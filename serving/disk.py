"""Published adapters on the machine's own disk, where the registry is on another: those that were used last, within a bound in bytes.

Replicas of one machine share the folder. An adapter appears in it by one rename, under its digest, so it is whole or not there. Who copies
or reads an adapter shares a lock on its folder, and nobody removes a folder that he does not have alone. The lock is on the folder itself:
a copy takes it along into its place, and what a killed process held is free.
"""

import errno
import fcntl
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hone.errors import CorruptAdapterError
from hone.manifest import MANIFEST_FILE, AdapterManifest
from hone.recipe.serving import ServingSettings
from hone.registry import check_files

logger = logging.getLogger("ray.serve")

DISK_BYTES = ServingSettings().adapter_disk_bytes
"""By default."""
STAGING = ".staging-"
TRIES = 5
"""Others may remove or replace a folder in between."""


class AdapterDisk:
    """Adapters' folders by digest, the least recently used leaving first."""

    def __init__(self, root: Path, *, capacity: int) -> None:
        """`capacity` in bytes. What is being copied or read stays, though it be more."""
        self.root = root
        self.capacity = capacity
        root.mkdir(parents=True, exist_ok=True)
        self._make_room()  # of what a killed replica left, and for a bound that was larger before

    @contextmanager
    def folder(self, manifest: AdapterManifest, source: Path) -> Iterator[Path]:
        """Where the adapter's files are on this machine, every digest checked; nobody removes them inside the block.

        Args:
            manifest: What is asked for.
            source: Its folder in the registry, to be copied where it is not here or no longer what it was.

        Raises:
            CorruptAdapterError: nor is it what it was in the registry.
            OSError: the registry cannot be read.
        """
        here = self.root / manifest.digest
        for _ in range(TRIES):
            for place in (_found(manifest, here), self._copied(manifest, source, here)):
                with place as is_here:
                    if is_here:
                        with suppress(PermissionError):  # another user's copy is as good
                            os.utime(here)  # when it was last used
                        yield here
                        return
        logger.error("%s: %s is not what was published, and cannot be replaced; remove it", manifest.ref, here)
        raise CorruptAdapterError(
            f"{manifest.ref}: its copy on the server's disk is damaged and cannot be replaced; the server's log says more"
        )

    @contextmanager
    def _copied(self, manifest: AdapterManifest, source: Path, here: Path) -> Iterator[bool]:
        """Copy the adapter and hold it; not where another was quicker."""
        staging = Path(tempfile.mkdtemp(dir=self.root, prefix=STAGING))
        try:
            with _locked(staging, fcntl.LOCK_SH) as is_ours:  # else another took it for one that was left
                yield is_ours and self._fill(staging, manifest, source, here)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _fill(self, staging: Path, manifest: AdapterManifest, source: Path, here: Path) -> bool:
        """Bring the adapter to its place by way of `staging`; whether nobody else has."""
        for name in manifest.files:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, staging / name)
        check_files(staging, manifest)
        self._make_room()  # not before: while the registry is away, nothing should leave for what cannot come
        try:
            os.rename(staging, here)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # not `here.exists()`: it may have left again
                return False
            raise
        return True

    def _make_room(self) -> None:
        """Remove copies that nobody goes on with, and what was not used for longest, until the rest fits."""
        held = []
        for folder in filter(_is_ours, self.root.iterdir()):
            if folder.name.startswith(STAGING) and _remove(folder):
                continue
            with suppress(FileNotFoundError):  # another replica has removed it
                held.append((folder.stat().st_mtime, _bytes_in(folder), folder))
        used = sum(bytes_in for _, bytes_in, _ in held)
        for _, bytes_in, folder in sorted(held):
            if used <= self.capacity:
                return
            if _remove(folder):
                used -= bytes_in


def _is_ours(folder: Path) -> bool:
    """Whatever else is in there is left alone."""
    return folder.name.startswith(STAGING) or re.fullmatch(r"[0-9a-f]{64}", folder.name) is not None


@contextmanager
def _found(manifest: AdapterManifest, here: Path) -> Iterator[bool]:
    """Hold the adapter where it is here; what is no longer what it was is removed, once nobody reads it."""
    with _locked(here, fcntl.LOCK_SH) as is_there:
        is_whole = is_there and _is_whole(here, manifest)
        yield is_whole
    if is_there and not is_whole:
        _remove(here, waits=True)


def _is_whole(folder: Path, manifest: AdapterManifest) -> bool:
    try:
        check_files(folder, manifest)
    except CorruptAdapterError:
        return False
    return True


def _remove(folder: Path, *, waits: bool = False) -> bool:
    """Remove a folder that nobody copies or reads; whether it could be had alone."""
    with _locked(folder, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB) as is_ours:
        if is_ours:
            shutil.rmtree(folder, ignore_errors=True)
    return is_ours


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[bool]:
    """Lock a folder; whether it is there and could be locked."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        yield False
        return
    try:
        yield _is_locked(handle, folder, how)
    finally:
        os.close(handle)


def _is_locked(handle: int, folder: Path, how: int) -> bool:
    try:
        fcntl.flock(handle, how)  # flock, as it excludes threads of one process too
        return os.path.samestat(os.fstat(handle), folder.stat())
    except (BlockingIOError, FileNotFoundError):  # somebody holds it, or it went before it could be locked
        return False


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
