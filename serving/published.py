"""A published adapter's files, for any engine: digests first, and in the end the proof that it answers here as it did where it was
trained."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from hone.base_model import PROCESSOR_FILE
from hone.errors import CorruptAdapterError, HoneError
from hone.manifest import TOLD, AdapterManifest
from hone.registry import Registry, check_files
from hone.storage import digest_of
from serving.base import Served, end_ids
from serving.disk import AdapterDisk
from serving.errors import AdapterRefusedError, RequestError, UnreachableError
from serving.kinds import generates, load_processor

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
GOLDEN_FILE = "golden.safetensors"
NOT_PROCESSOR = (WEIGHTS_FILE, CONFIG_FILE, GOLDEN_FILE, *TOLD)


def read_tensors(folder: Path, name: str, manifest: AdapterManifest) -> dict[str, Tensor]:
    """A file's tensors by name, in order. Read and not mapped: what was checked must not change with its file, nor end the process with it.

    Raises:
        CorruptAdapterError: it is not the file that was published.
    """
    content = (folder / name).read_bytes()
    if sha256(content).hexdigest() != manifest.files[name].sha256:
        raise CorruptAdapterError(f"{manifest.ref}: {name} has changed while it was read; try again, or restore its files")
    return dict(sorted(load(content).items()))


class PublishedFiles:
    """Adapters of one base in the registry. Thread safe."""

    def __init__(self, registry: Registry, base: Served, *, disk: AdapterDisk | None = None) -> None:
        """`disk` keeps files, where the registry is on another machine."""
        self._registry = registry
        self._base = base
        self._disk = disk
        self._proven: set[str] = set()
        """Digests of what has answered here as recorded: the same files do so again."""
        self._processors: WeakValueDictionary[str, Any] = WeakValueDictionary()
        """By digest of their files: versions trained on one base share one."""

    def read(
        self,
        manifest: AdapterManifest,
        make: Callable[[Path], Served],
        prove: Callable[[Served, Mapping[str, Tensor]], None],
    ) -> Served:
        """One adapter, checked.

        Args:
            manifest: Which.
            make: From its folder to what answers for it.
            prove: Compares what that answers with the recorded outputs.

        Raises:
            AdapterRefusedError: its files are damaged, it needs what the engine does not do, or its outputs are not the recorded ones.
            UnreachableError: the registry cannot be read.
        """
        try:
            with ExitStack() as held:
                folder = self._folder(manifest, held)
                served = make(folder)
                if manifest.digest not in self._proven:
                    prove(served, read_tensors(folder, GOLDEN_FILE, manifest))
                    self._proven.add(manifest.digest)
        except RequestError:
            raise
        except CorruptAdapterError as error:
            raise AdapterRefusedError(error.message, "model") from None
        except (HoneError, ValueError, KeyError, OSError, SafetensorError) as error:
            raise AdapterRefusedError(f"{manifest.ref} cannot be served: {error}", "model") from error
        return served

    def served(self, folder: Path, manifest: AdapterManifest, **ways: Any) -> Served:
        """What answers for it, by what an engine has made of its weights.

        Raises:
            ValueError: its manifest lacks what its task needs.
        """
        if not generates(manifest.task) and not manifest.labels and manifest.problem_type != "regression":
            raise ValueError("its manifest names no labels")
        processor = self._processor(folder, manifest)
        made = {"max_context": self._base.max_context, **ways}
        return Served(
            name=str(manifest.ref),
            digest=manifest.digest,
            task=manifest.task,
            processor=processor,
            end_ids=end_ids(manifest.task, processor, made.get("model")),
            labels=tuple(manifest.labels or ()),
            problem_type=manifest.problem_type,
            **made,
        )

    def _folder(self, manifest: AdapterManifest, held: ExitStack) -> Path:
        """Its folder, every digest checked. On this machine's disk it stays until `held` is closed."""
        folder = self._registry.path(manifest.ref)
        try:
            if self._disk is not None:
                return held.enter_context(self._disk.folder(manifest, folder))
            check_files(folder, manifest)
        except (CorruptAdapterError, OSError) as error:
            if isinstance(error, CorruptAdapterError) and self._registry.is_there:
                raise
            raise UnreachableError(f"{manifest.ref} is not in memory, and the registry cannot be read now; try again", "model") from error
        return folder

    def _processor(self, folder: Path, manifest: AdapterManifest) -> Any:
        files = {name: entry.sha256 for name, entry in manifest.files.items() if not any(fnmatchcase(name, no) for no in NOT_PROCESSOR)}
        if not files.keys() & {"tokenizer_config.json", PROCESSOR_FILE}:
            return self._base.processor
        key = digest_of(files)
        processor = self._processors.get(key)
        if processor is None:
            processor = self._processors[key] = load_processor(manifest.task, folder)
        return processor
