"""Adapters between the registry and the device: kept in memory and on disk within bounds, and never other weights than those asked for."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hone.registry import Registry, check_files
from hone.storage import Home
from serving.base import Engine, Served
from serving.catalog import BaseDescription, Catalog
from serving.disk import AdapterDisk
from serving.errors import AdapterRefusedError, UnknownModelError, UnreachableError
from serving.loading import AdapterLoader
from serving.memory import CPU, AdapterMemory, size_of
from serving.published import PublishedFiles
from tests.serving_fixtures import publish
from tests.unit.serving.conftest import Shelf

PLAIN = {"r": 2, "target_modules": ["q_proj"]}


def key(served: Served) -> tuple[str, str]:
    return served.name, served.digest


def test_memory_is_bounded_in_bytes_and_the_least_recently_used_leaves(everyone: dict[str, Served]) -> None:
    narrow, wide, mixed = (everyone[name] for name in ("narrow", "wide", "mixed"))
    memory = AdapterMemory(capacity=size_of(wide) + size_of(narrow))
    for served in (narrow, wide):
        memory.put(key(served), served)
    assert memory.get(key(narrow), CPU) is narrow
    memory.put(key(mixed), mixed)
    assert memory.get(key(wide), CPU) is None, "it was not used for longest, and there is no room for three"
    assert memory.get(key(narrow), CPU) is narrow
    assert memory.size == size_of(narrow) + size_of(mixed) <= memory.capacity
    memory.put(("huge@1", "digest"), replace(wide, weights=wide.weights))
    assert len(memory) == 2 or memory.size <= memory.capacity


def test_what_is_larger_than_all_the_room_is_not_kept(everyone: dict[str, Served]) -> None:
    memory = AdapterMemory(capacity=size_of(everyone["wide"]) - 1)
    memory.put(key(everyone["narrow"]), everyone["narrow"])
    memory.put(key(everyone["wide"]), everyone["wide"])
    assert memory.get(key(everyone["wide"]), CPU) is None
    assert memory.get(key(everyone["narrow"]), CPU) is everyone["narrow"]


def test_what_is_in_memory_is_loaded_without_its_files(chat_shelf: Shelf, engine: Engine, home: Home) -> None:
    manifest = publish(home, chat_shelf.base, "kept", seed=7, **PLAIN)
    registry = Registry(home)
    loader = AdapterLoader(registry, engine, memory=AdapterMemory(capacity=10**8))
    first = loader.load(manifest)
    shutil.rmtree(registry.path(manifest.ref))
    again = loader.load(manifest)
    assert again.weights is first.weights
    with pytest.raises(AdapterRefusedError, match="is missing"):
        AdapterLoader(registry, engine).load(manifest)


def test_what_left_memory_is_checked_again_before_it_answers(chat_shelf: Shelf, engine: Engine, home: Home) -> None:
    manifest = publish(home, chat_shelf.base, "spoilt", seed=7, **PLAIN)
    registry = Registry(home)
    loader = AdapterLoader(registry, engine, memory=AdapterMemory(capacity=0))
    loader.load(manifest)
    with (registry.path(manifest.ref) / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x07")
    with pytest.raises(AdapterRefusedError, match=r"adapter_model\.safetensors has changed"):
        loader.load(manifest)


def test_the_disk_answers_while_the_registry_is_away(chat_shelf: Shelf, engine: Engine, home: Home, tmp_path: Path) -> None:
    manifests = [publish(home, chat_shelf.base, "far", seed=seed, **PLAIN) for seed in (1, 2)]
    registry = Registry(home)
    disk = AdapterDisk(tmp_path / "disk", capacity=10**9)
    loaded = AdapterLoader(registry, engine, disk=disk).load(manifests[0])
    registry.root.rename(tmp_path / "away")
    fresh = AdapterLoader(registry, engine, disk=disk)
    again = fresh.load(manifests[0])
    assert loaded.weights is not None
    assert again.weights is not None
    for name, (a, b) in loaded.weights.layers.items():
        torch.testing.assert_close(again.weights.layers[name], (a, b))
    with pytest.raises(UnreachableError, match="registry cannot be read"):
        fresh.load(manifests[1])
    (tmp_path / "away").rename(registry.root)
    assert fresh.load(manifests[1]).name == "far@2"


def test_what_is_being_loaded_from_the_disk_stays_there(chat_shelf: Shelf, engine: Engine, home: Home, tmp_path: Path) -> None:
    manifests = [publish(home, chat_shelf.base, "held", seed=seed, **PLAIN) for seed in (1, 2)]
    registry = Registry(home)
    disk = AdapterDisk(tmp_path / "disk", capacity=0)
    published = PublishedFiles(registry, engine.base, disk=disk)

    def made(folder: Path) -> Served:
        with disk.folder(manifests[1], registry.path(manifests[1].ref)):
            pass
        check_files(folder, manifests[0])
        return engine.base

    assert published.read(manifests[0], made, lambda *_: None) is engine.base


def test_ids_mean_what_they_meant_while_the_registry_is_away(chat_shelf: Shelf, home: Home, tmp_path: Path) -> None:
    manifest = publish(home, chat_shelf.base, "known", seed=1, **PLAIN)
    publish(home, chat_shelf.base, "other", seed=1, **PLAIN)
    registry = Registry(home)
    registry.set_alias("prod", "known@1")
    catalog = Catalog(registry, BaseDescription(manifest.base, "chat", 256, 1, tasks=("chat",), mixed_tasks=("chat",)))
    found = catalog.find("prod")
    assert found is not None
    assert str(found.ref) == "known@1"
    registry.root.rename(tmp_path / "away")
    assert catalog.find("prod") == found
    assert catalog.find(manifest.base.name) is None, "the base is always there"
    with pytest.raises(UnreachableError):
        catalog.find("other")
    (tmp_path / "away").rename(registry.root)
    registry.remove_alias("prod")
    with pytest.raises(UnknownModelError):
        catalog.find("prod")
