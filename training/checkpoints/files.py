"""A checkpoint as files: parts of plain safetensors with their digests, and `checkpoint.json`, which is written last.

Nothing is renamed and nothing is written over, so a folder and an object store do alike. A folder without `checkpoint.json` is no
checkpoint; one with a part that is not what its digest says is a damaged one.

Parts are written here and not by safetensors' own `save_file`, which would make training wait (see training.safetensors_file); and the
digest is of what was meant to be written, so what the disk made of it is noticed.
"""

import hashlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from itertools import chain
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from hone.errors import HoneError
from hone.folder import Folder
from training.safetensors_file import header_of, read_header

FORMAT = 1
INDEX = "checkpoint.json"
BLOCK = 16 * 2**20


class DamagedCheckpointError(HoneError):
    """A checkpoint whose files are not what they were when they were written."""


class Part(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True)

    name: str
    size: int
    """Bytes."""
    sha256: str


class Checkpoint(BaseModel):
    """What `checkpoint.json` says."""

    model_config = ConfigDict(frozen=True)

    format: int = FORMAT
    step: int
    """Steps that were done when it was made."""
    attempt: int
    """Which start of the run made it; see training.ledger."""
    loss: float
    """Of that step."""
    world_size: int
    made_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    guard: dict[str, Any]
    """What the guard has seen; see training.guard."""
    metrics: dict[str, float] = {}
    adam_steps: dict[str, int]
    """How often AdamW has moved each parameter."""
    parts: list[Part]

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return folder_name(self.step, self.attempt)


def folder_name(step: int, attempt: int) -> str:
    """Names sort by step, then by attempt."""
    return f"step-{step:08d}-{attempt:04d}"


def write_part(folder: Folder, name: str, tensors: Mapping[str, torch.Tensor], values: Iterable[torch.Tensor] | None = None) -> Part:
    """Write tensors on the CPU as one safetensors file.

    Args:
        folder: Where to.
        name: Of the file.
        tensors: By name; of those on the meta device `values` has what is in them.
        values: One after another, as long as all of `tensors` and each of its size; by default `tensors` themselves.
    """
    digest, size = hashlib.sha256(), 0
    with folder.writer(name) as file:
        for block in chain([header_of(tensors)], map(_bytes_of, tensors.values() if values is None else values)):
            view = memoryview(block)
            for start in range(0, len(view), BLOCK):  # the lock of Python is free while a block is digested and written
                digest.update(view[start : start + BLOCK])
                file.write(view[start : start + BLOCK])
            size += len(view)
    return Part(name=name, size=size, sha256=digest.hexdigest())


def write_index(folder: Folder, checkpoint: Checkpoint) -> None:
    """Make it a checkpoint."""
    folder.write(INDEX, checkpoint.model_dump_json(indent=1).encode())


def read_index(folder: Folder) -> Checkpoint:
    """What is in it.

    Raises:
        DamagedCheckpointError: half an index, or one of another format.
    """
    try:
        known = Checkpoint.model_validate_json(folder.read(INDEX))
    except ValueError as error:
        raise DamagedCheckpointError(f"{folder}/{INDEX}: cannot be read ({str(error).splitlines()[0]})") from None
    if known.format != FORMAT:
        raise DamagedCheckpointError(f"{folder}/{INDEX}: has format {known.format}, and this version reads {FORMAT}")
    return known


def check_part(folder: Folder, part: Part) -> None:
    """Read a part through.

    Raises:
        DamagedCheckpointError: it is gone, shorter or longer, or some bit of it is another.
    """
    size = folder.size(part.name)
    if size != part.size:
        found = "is gone" if size is None else f"has {size:,} bytes"
        raise DamagedCheckpointError(f"{folder}/{part.name}: {found}, and {part.size:,} were written")
    digest = hashlib.sha256()
    with folder.reader(part.name) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    if digest.hexdigest() != part.sha256:
        raise DamagedCheckpointError(f"{folder}/{part.name}: its bytes have changed since it was written")


def find(root: Folder) -> list[str]:
    """Names of the folders that have an index, newest step first."""
    return [name for name in sorted(root.folders(), reverse=True) if name.startswith("step-") and root.below(name).size(INDEX) is not None]


def keep(root: Folder, *, last: int, best_step: int) -> None:
    """Remove all checkpoints but the newest `last` and that of `best_step`, and what was begun before the newest and never completed.

    The index goes first, so that none is half there.
    """
    known = find(root)
    kept = {*known[:last], *(name for name in known if _step_of(name) == best_step)}
    for name in root.folders():
        is_begun = name not in known and name.startswith("step-") and bool(known) and name < known[0]
        if is_begun or (name in known and name not in kept):
            if name in known:
                root.below(name).remove(INDEX)
            root.remove_folder(name)


def _step_of(name: str) -> int:
    return int(name.split("-")[1])


class PieceReader:
    """Reads any run of elements of any tensor, whichever parts it is spread over."""

    def __init__(self, folder: Folder, parts: list[Part], *, place: float = 0) -> None:
        """`place` is the reader's among all readers, from 0 to 1: parts are looked into from there on, and only until all is found. With
        as many ranks as wrote them, each finds its own first; a thousand that look into a thousand parts would open a million files."""
        self._folder = folder
        first = int(place * len(parts))
        self._unread = [part.name for part in [*parts[first : first + 1], *parts[:first][:1], *parts[first + 1 :], *parts[:first][1:]]]
        """The first part is the second one to look into: it has what all ranks share."""
        self._runs: dict[str, list[tuple[int, int, str, int, torch.dtype]]] = {}
        """Tensor -> (first element, one past the last, file, where in it, type) of each run."""
        self._opened: tuple[str, Any] = ("", None)
        """The file that was read last: pieces come in the order in which they were written, and to open one asks a store for its size."""

    def fill(self, tensor: str, start: int, values: torch.Tensor) -> None:
        """Put the elements from `start` on into `values`.

        Raises:
            DamagedCheckpointError: some of them are in no part.
        """
        filled, known = 0, 0
        while True:
            runs = self._runs.get(tensor, [])
            filled, known = filled + sum(self._copy(run, start, values) for run in runs[known:]), len(runs)
            if filled == values.numel() or not self._unread:
                break
            self._index(self._unread.pop(0))
        if filled != values.numel():
            raise DamagedCheckpointError(f"{self._folder}: has {filled} of {values.numel()} elements of {tensor} from {start} on")

    def _copy(self, run: tuple[int, int, str, int, torch.dtype], start: int, values: torch.Tensor) -> int:
        """Put what a run has of `values`, whose first element is `start`, into it; how many elements that are."""
        first, end, name, offset, dtype = run
        low, high = max(start, first), min(start + values.numel(), end)
        if low >= high:
            return 0
        width = dtype.itemsize
        file = self._file(name)
        file.seek(offset + (low - first) * width)
        found = torch.frombuffer(bytearray(file.read((high - low) * width)), dtype=dtype)
        values[low - start : high - start].copy_(found)
        return high - low

    def _file(self, name: str) -> Any:
        if name != self._opened[0]:
            self._opened = (name, self._folder.opened(name))
        return self._opened[1]

    def _index(self, name: str) -> None:
        with self._folder.opened(name) as file:
            entries = read_header(file)
        for key, entry in entries.items():
            tensor, _, start = key.rpartition("@")
            end = int(start) + entry.size // entry.dtype.itemsize
            self._runs.setdefault(tensor, []).append((int(start), end, name, entry.offset, entry.dtype))


def key_of(kind: str, name: str, start: int | None = None) -> str:
    """How a tensor, or a run of its elements, is called in the parts."""
    return f"{kind}/{name}" if start is None else f"{kind}/{name}@{start}"


def _bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy() if tensor.numel() else b""
