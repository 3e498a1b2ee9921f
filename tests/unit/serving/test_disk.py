"""Adapters on a machine's own disk, which replicas share: within a bound, and never gone under the one who reads them."""

import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from unittest.mock import patch

import pytest

from hone.errors import CorruptAdapterError
from hone.manifest import AdapterManifest
from hone.registry import Registry, check_files
from hone.storage import Home
from serving.disk import STAGING, AdapterDisk
from tests.manifests import Describe, weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SPAWN = multiprocessing.get_context("spawn")

Adapter = tuple[AdapterManifest, Path]
Shelf = list[Adapter]


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    """Four adapters of one size, each with its folder in the registry."""
    registry = Registry(Home(tmp_path / "home"))
    names = ("a", "b", "c", "d")
    made = [registry.publish(weights(tmp_path / name, n), name, describe=Describe(name)) for n, name in enumerate(names)]
    return [(manifest, registry.path(manifest.ref)) for manifest in made]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "disk"


def room(shelf: Shelf, adapters: float) -> int:
    """Bytes of so many adapters."""
    return int(adapters * sum(entry.bytes for entry in shelf[0][0].files.values()))


def on(disk: AdapterDisk, shelf: Shelf) -> str:
    """Names of the adapters there."""
    return "".join(manifest.name for manifest, _ in shelf if (disk.root / manifest.digest).exists())


def staged(root: Path) -> list[Path]:
    return list(root.glob(f"{STAGING}*"))


def bring(disk: AdapterDisk, adapter: Adapter, *, used_at: float) -> None:
    with disk.folder(*adapter) as folder:
        pass
    os.utime(folder, (used_at, used_at))


def test_a_file_that_the_disk_spoilt_is_copied_again(shelf: Shelf, root: Path) -> None:
    disk = AdapterDisk(root, capacity=10**9)
    with disk.folder(*shelf[0]) as folder:
        good = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with disk.folder(*shelf[0]) as folder:
        assert (folder / WEIGHTS).read_bytes() == good


def test_what_the_registry_spoilt_is_refused_and_leaves_nothing(shelf: Shelf, root: Path) -> None:
    disk = AdapterDisk(root, capacity=10**9)
    (shelf[0][1] / WEIGHTS).write_bytes(b"other")
    with pytest.raises(CorruptAdapterError, match=f"{WEIGHTS} has changed"), disk.folder(*shelf[0]):
        pass
    assert list(root.iterdir()) == []


def test_the_least_recently_used_leaves(shelf: Shelf, root: Path) -> None:
    disk = AdapterDisk(root, capacity=room(shelf, 2.5))
    for at, adapter in enumerate(shelf[:2]):
        bring(disk, adapter, used_at=at)
    bring(disk, shelf[0], used_at=2)
    bring(disk, shelf[2], used_at=3)
    assert on(disk, shelf) == "ac"


def test_a_smaller_bound_holds_from_the_start(shelf: Shelf, root: Path) -> None:
    disk = AdapterDisk(root, capacity=10**9)
    for at, adapter in enumerate(shelf):
        bring(disk, adapter, used_at=at)
    AdapterDisk(root, capacity=room(shelf, 1.5))
    assert on(disk, shelf) == "d"


def test_what_else_is_in_the_folder_stays(shelf: Shelf, root: Path) -> None:
    (root / "photographs").mkdir(parents=True)
    (root / "photographs" / "one").write_bytes(b"0" * 10**6)
    bring(AdapterDisk(root, capacity=room(shelf, 1)), shelf[0], used_at=1)
    disk = AdapterDisk(root, capacity=room(shelf, 1))
    assert on(disk, shelf) == "a", "nor does it take the adapters' room"
    assert (root / "photographs" / "one").exists()


def test_nothing_leaves_for_what_an_unreachable_registry_has(shelf: Shelf, root: Path) -> None:
    disk = AdapterDisk(root, capacity=room(shelf, 1))
    bring(disk, shelf[0], used_at=0)
    shutil.rmtree(shelf[1][1])
    with pytest.raises(FileNotFoundError), disk.folder(*shelf[1]):
        pass
    assert on(disk, shelf) == "a"
    assert staged(root) == []


def test_of_two_who_copy_an_adapter_the_second_takes_what_the_first_brought(shelf: Shelf, root: Path) -> None:
    disk = AdapterDisk(root, capacity=10**9)
    copyfile = shutil.copyfile

    def slower(source: Path, target: Path) -> None:
        with patch("shutil.copyfile", copyfile), disk.folder(*shelf[0]) as folder:
            first.append(folder.stat().st_ino)
        copyfile(source, target)

    first: list[int] = []
    with patch("shutil.copyfile", slower), disk.folder(*shelf[0]) as folder:
        assert folder.stat().st_ino == first[0]
        assert staged(root) == []


def test_what_another_process_reads_stays_however_much_is_copied_in(shelf: Shelf, root: Path) -> None:
    disk = AdapterDisk(root, capacity=room(shelf, 1))
    with other(_read, disk, shelf[0]) as reader:
        for at, adapter in enumerate(shelf[1:3]):
            bring(disk, adapter, used_at=at)
        assert on(disk, shelf) == "ac", "b leaves for c, and a is being read"
    assert reader.exitcode == 0, "it found every file"
    bring(disk, shelf[3], used_at=3)
    assert on(disk, shelf) == "d"


def test_who_reads_finds_every_file_where_everyone_copies(shelf: Shelf, root: Path) -> None:
    disks = [AdapterDisk(root, capacity=room(shelf, 1)) for _ in range(4)]
    start = threading.Barrier(len(disks))

    def read_often(disk: AdapterDisk) -> None:
        start.wait()
        for turn in range(100):
            manifest, source = shelf[turn % len(shelf)]
            with disk.folder(manifest, source) as folder:
                check_files(folder, manifest)

    with ThreadPoolExecutor(len(disks)) as pool:
        list(pool.map(read_often, disks))
    assert len(on(AdapterDisk(root, capacity=disks[0].capacity), shelf)) == 1
    assert staged(root) == []


def test_what_a_killed_process_left_half_copied_goes(shelf: Shelf, root: Path) -> None:
    disk = AdapterDisk(root, capacity=10**9)
    for used_by in (lambda: AdapterDisk(root, capacity=10**9), lambda: bring(disk, shelf[1], used_at=1)):
        with other(_copy, disk, shelf[0], CONFIG) as copying:
            (half,) = staged(root)
            copying.kill()
            copying.join(60)
        assert [path.name for path in half.iterdir()] == [CONFIG]
        used_by()
        assert staged(root) == []
    assert on(disk, shelf) == "b"


def test_what_another_process_is_copying_counts_and_stays(shelf: Shelf, root: Path) -> None:
    disk = AdapterDisk(root, capacity=room(shelf, 2.5))
    bring(disk, shelf[0], used_at=0)
    with other(_copy, disk, shelf[2], WEIGHTS) as copying:
        bring(disk, shelf[1], used_at=1)
        assert on(disk, shelf) == "b", "a leaves, as there is no room for three"
        assert len(staged(root)) == 1
    assert copying.exitcode == 0
    assert on(disk, shelf) == "bc"


@contextmanager
def other(does: Callable[..., None], disk: AdapterDisk, adapter: Adapter, *more: str) -> Iterator[SpawnProcess]:
    """Another process, until it waits for the end of the block; at the end of which it has ended."""
    waits, go_on = SPAWN.Event(), SPAWN.Event()
    process = SPAWN.Process(target=does, args=(disk.root, disk.capacity, *adapter, waits, go_on, *more))
    process.start()
    try:
        assert waits.wait(60)
        yield process
    finally:
        if process.is_alive():  # else `set` waits for who was killed while it waited
            go_on.set()
        process.join(60)


def _read(root: Path, capacity: int, manifest: AdapterManifest, source: Path, waits: Event, go_on: Event) -> None:
    with AdapterDisk(root, capacity=capacity).folder(manifest, source) as folder:
        waits.set()
        assert go_on.wait(60)
        check_files(folder, manifest)


def _copy(root: Path, capacity: int, manifest: AdapterManifest, source: Path, waits: Event, go_on: Event, waits_after: str) -> None:
    copyfile = shutil.copyfile

    def waiting(source: Path, target: Path) -> None:
        copyfile(source, target)
        if target.name == waits_after:
            waits.set()
            assert go_on.wait(60)

    with patch("shutil.copyfile", waiting), AdapterDisk(root, capacity=capacity).folder(manifest, source):
        pass
