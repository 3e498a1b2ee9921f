"""Published adapters: immutable folders under `home/registry/NAME/VERSION`, and the aliases that point at them.

A version appears whole, by one rename of a staged folder whose manifest was written last. A removed version leaves
`removed.json` in its folder, so its number is never given to other weights (serving caches are keyed by it).
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from hone.aliases import Aliases
from hone.errors import CorruptAdapterError, RegistryError, UnknownAdapterError
from hone.ids import AdapterRef
from hone.manifest import MANIFEST_FILE, AdapterManifest, FileEntry
from hone.releases import Alias
from hone.storage import Home, sha256_file, write_json

logger = logging.getLogger("hone")
K = TypeVar("K")
V = TypeVar("V")
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
REMOVED_FILE = "removed.json"


class Registry:
    """Publish, resolve, list, verify, alias, remove."""

    def __init__(self, home: Home) -> None:
        self.root = home.registry
        self.alias_files = Aliases(self.root / ".aliases")

    def publish(self, folder: Path, name: str, *, describe: Callable[[int, dict[str, FileEntry]], AdapterManifest]) -> AdapterManifest:
        """Copy `folder` into the registry as the next version of `name`.

        Args:
            folder: The adapter's files, safetensors weights among them and no pickle.
            name: Adapter name.
            describe: Makes the manifest once the version and the file digests are known.

        Raises:
            RegistryError: pickle or no safetensors in the folder, or `name` is an alias.
        """
        name = AdapterRef.parse(name).name
        if self.alias_files.has(name):
            raise RegistryError(f"{name!r} is an alias; publish under another name or remove the alias first")
        _refuse_unsafe(folder)
        shelf = self.root / name
        shelf.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=shelf, prefix=".staging-"))
        try:
            shutil.copytree(folder, staging, dirs_exist_ok=True)
            files = {
                str(path.relative_to(staging)): FileEntry(sha256=sha256_file(path), bytes=path.stat().st_size)
                for path in sorted(staging.rglob("*"))
                if path.is_file()
            }
            staging.chmod(0o755)
            version = max((int(p.name) for p in shelf.iterdir() if p.name.isdigit()), default=0) + 1
            while True:
                manifest = describe(version, files)
                write_json(staging / MANIFEST_FILE, manifest.model_dump())
                try:
                    os.rename(staging, shelf / str(version))
                except OSError:
                    if not (shelf / str(version)).exists():
                        raise
                    version += 1  # another publisher took this number between our look and our rename
                else:
                    return manifest
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def path(self, ref: AdapterRef) -> Path:
        """Folder of one exact version."""
        return self.root / ref.name / str(ref.version)

    @property
    def is_there(self) -> bool:
        """Whether the folder can be read at all: a share that is not mounted has nothing in it, and nothing was removed."""
        return self.root.is_dir()

    def resolve(self, text: str) -> AdapterManifest:
        """The adapter that `name@version`, an alias, or `name` (its latest version) means right now; of an alias with several versions, the
        one that answers most.

        Raises:
            UnknownAdapterError: nothing of that name; the message lists what there is.
        """
        manifest = self.find(text)
        if manifest is None:
            raise UnknownAdapterError(self._unknown(text))
        return manifest

    def find(self, text: str) -> AdapterManifest | None:
        """Likewise, or None: without a look at what else there is."""
        try:
            ref = AdapterRef.parse(text)  # first of all: the text may come over HTTP, and below it becomes a path
        except RegistryError:
            return None
        alias = self.alias_files.read(ref.name) if ref.version is None else None
        if alias is not None:
            ref = AdapterRef.parse(alias.current.main.version)
        if ref.version is None:
            versions = self._versions(ref.name)
            if not versions:
                return None
            ref = AdapterRef(ref.name, versions[-1])
        return self._read(ref)

    def adapters(self) -> list[AdapterManifest]:
        """Every published version, by name and then version. One whose manifest is damaged is left out, and said in the log."""
        found = (_or_said(self._read, AdapterRef(name, version)) for name in self._names() for version in self._versions(name))
        return [manifest for manifest in found if manifest is not None]

    def verify(self, ref: AdapterRef) -> None:
        """Compare every file with the manifest.

        Raises:
            CorruptAdapterError: a file is missing, extra or changed; all of them are named.
        """
        folder = self.path(ref)
        try:
            check_files(folder, self.resolve(str(ref)))
        except CorruptAdapterError as error:
            raise CorruptAdapterError(f"{error.message} (they lie in {folder})") from None

    def alias(self, name: str) -> Alias | None:
        """An alias with its history, or None where the text is the name of none."""
        try:
            ref = AdapterRef.parse(name)
        except RegistryError:
            return None
        return self.alias_files.read(ref.name) if ref.version is None else None

    def set_alias(self, alias: str, target: str) -> AdapterManifest:
        """Let one version answer everything under an alias, as `hone.promotion.promote` does, and with the errors that it raises."""
        from hone.promotion import promote  # which stands on this class

        return self.resolve(promote(self, alias, target).current.main.version)

    def aliases(self) -> dict[str, str]:
        """Alias -> the `name@version` that answers most under it. One whose file is damaged is left out, and said in the log."""
        found = {name: _or_said(self.alias_files.read, name) for name in self.alias_files.names()}
        return {name: alias.current.main.version for name, alias in found.items() if alias is not None}

    def remove_alias(self, alias: str) -> None:
        """Forget an alias and its history. Raises UnknownAdapterError where there is none."""
        name = AdapterRef.parse(alias).name
        with self.alias_files.locked(name):
            is_gone = self.alias_files.remove(name)
        if not is_gone:
            raise UnknownAdapterError(f"no alias {alias!r}; there are: {', '.join(self.aliases()) or 'none'}")

    def remove(self, ref: AdapterRef) -> None:
        """Delete one version's files; its number stays taken.

        Raises:
            RegistryError: no version was named, or it answers under an alias. UnknownAdapterError: no such version.
        """
        if ref.version is None:
            raise RegistryError(f"{ref}: name the version to remove, such as {ref}@1; names are never removed as a whole")
        manifest = self.resolve(str(ref))
        states = {name: self.alias_files.read(name) for name in self.alias_files.names()}
        pointing = [name for name, alias in states.items() if alias and str(ref) in alias.current.versions]
        if pointing:
            raise RegistryError(f"{ref}: alias {pointing[0]!r} points at it; move or remove the alias first")
        folder = self.path(ref)
        write_json(folder / REMOVED_FILE, {"digest": manifest.digest, "at": datetime.now(UTC).isoformat(timespec="seconds")})
        (folder / MANIFEST_FILE).unlink()
        for path in folder.iterdir():
            if path.name != REMOVED_FILE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _read(self, ref: AdapterRef) -> AdapterManifest | None:
        path = self.path(ref) / MANIFEST_FILE
        try:
            return AdapterManifest.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise CorruptAdapterError(f"{path}: not a manifest this version reads ({error.error_count()} errors)") from error

    def _names(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return sorted(p.name for p in self.root.iterdir() if p.is_dir() and not p.name.startswith("."))

    def _versions(self, name: str) -> list[int]:
        shelf = self.root / name
        if not shelf.is_dir():
            return []
        return sorted(int(p.name) for p in shelf.iterdir() if p.name.isdigit() and (p / MANIFEST_FILE).is_file())

    def _unknown(self, text: str) -> str:
        known = [*self.aliases(), *(str(AdapterRef(n, v)) for n in self._names() for v in self._versions(n))]
        shown = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
        return f"no adapter or alias {text!r} in {self.root}; there is {shown or 'nothing published yet'}"


def _or_said(read: Callable[[K], V | None], key: K) -> V | None:
    """What is read, or None where it is damaged: one damaged file must not hide all others."""
    try:
        return read(key)
    except CorruptAdapterError as error:
        logger.warning("%s; it is left out of the list", error.message)
        return None


def check_files(folder: Path, manifest: AdapterManifest) -> None:
    """Compare every file of an adapter with its manifest.

    Raises:
        CorruptAdapterError: a file is missing, extra or changed; all of them are named.
    """
    wrong = [
        f"{name} is missing" if not (folder / name).is_file() else f"{name} has changed"
        for name, entry in manifest.files.items()
        if not (folder / name).is_file() or sha256_file(folder / name) != entry.sha256
    ]
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {MANIFEST_FILE}
    wrong += [f"{name} was added" for name in sorted(present - manifest.files.keys())]
    if wrong:
        raise CorruptAdapterError(f"{manifest.ref}: {'; '.join(wrong)}; restore its files, or publish a new version")


def _refuse_unsafe(folder: Path) -> None:
    files = [p for p in folder.rglob("*") if p.is_file()]
    pickles = [p.name for p in files if p.suffix in PICKLE_SUFFIXES]
    if pickles:
        raise RegistryError(f"{folder}: {pickles[0]} may hold pickled code; only safetensors weights are published")
    if not any(p.suffix == ".safetensors" and p.stat().st_size > 0 for p in files):
        raise RegistryError(f"{folder}: no .safetensors weights to publish")
