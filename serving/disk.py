"""Published adapters on the machine's own disk, where the registry is on another: those that were used last, within a bound in bytes.

Replicas of one machine share the folder. An adapter appears in it by one rename, under its digest, so it is whole or not there; what
another replica removes while it is being read is copied again.
"""

import os
import shutil
import tempfile
from pathlib import Path

from hone.errors import CorruptAdapterError
from hone.manifest import MANIFEST_FILE, AdapterManifest
from hone.registry import check_files

DISK_BYTES = 50 * 10**9
"""By default."""


class AdapterDisk:
    """Adapters' folders by digest, the least recently used leaving first."""

    def __init__(self, root: Path, *, capacity: int) -> None:
        """`capacity` in bytes."""
        self.root = root
        self.capacity = capacity
        root.mkdir(parents=True, exist_ok=True)

    def folder(self, manifest: AdapterManifest, source: Path) -> Path:
        """Where the adapter's files are on this machine, every digest checked.

        Args:
            manifest: What is asked for.
            source: Its folder in the registry, to be copied where it is not here or no longer what it was.

        Raises:
            CorruptAdapterError: nor is it what it was in the registry.
            OSError: the registry cannot be read.
        """
        here = self.root / manifest.digest
        try:
            check_files(here, manifest)
        except CorruptAdapterError:
            self._copy(manifest, source, here)
            check_files(here, manifest)
        os.utime(here)  # when it was last used
        return here

    def _copy(self, manifest: AdapterManifest, source: Path, here: Path) -> None:
        staging = Path(tempfile.mkdtemp(dir=self.root, prefix=".staging-"))
        try:
            for name in manifest.files:
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, staging / name)
            check_files(staging, manifest)
            shutil.rmtree(here, ignore_errors=True)
            self._make_room(sum(entry.bytes for entry in manifest.files.values()))
            try:
                os.rename(staging, here)
            except OSError:
                if not here.exists():  # else another replica was quicker
                    raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _make_room(self, size: int) -> None:
        """Remove what was not used for longest, until so many bytes more fit."""
        held = []
        for folder in self.root.iterdir():
            if folder.name.startswith("."):
                continue
            try:
                held.append((folder.stat().st_mtime, _bytes_in(folder), folder))
            except FileNotFoundError:  # another replica has removed it
                continue
        used = sum(bytes_in for _, bytes_in, _ in held)
        for _, bytes_in, folder in sorted(held):
            if used + size <= self.capacity:
                return
            shutil.rmtree(folder, ignore_errors=True)
            used -= bytes_in


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
