"""The registry: immutable versions, whole or not at all, and aliases with a history."""

import json
import multiprocessing
from pathlib import Path

import pytest

from hone.errors import CorruptAdapterError, RegistryError, UnknownAdapterError
from hone.ids import AdapterRef
from hone.manifest import AdapterManifest, FileEntry
from hone.registry import Registry
from hone.storage import Home
from tests.manifests import Describe, weights


def publish(home: Home, folder: Path, name: str = "bot") -> AdapterManifest:
    return Registry(home).publish(folder, name, describe=Describe(name))


def test_versions_count_up_and_the_latest_answers_to_the_name(home: Home, tmp_path: Path) -> None:
    assert publish(home, weights(tmp_path / "a")).version == 1
    assert publish(home, weights(tmp_path / "b", 2.0)).version == 2
    registry = Registry(home)
    assert registry.resolve("bot").version == 2
    assert registry.resolve("bot@1").version == 1
    assert [str(m.ref) for m in registry.adapters()] == ["bot@1", "bot@2"]


def test_the_same_files_have_the_same_digest_and_others_another(home: Home, tmp_path: Path) -> None:
    first, same, other = (publish(home, weights(tmp_path / n, v)) for n, v in (("a", 1.0), ("b", 1.0), ("c", 2.0)))
    assert first.digest == same.digest != other.digest


def test_an_unknown_name_lists_what_there_is(home: Home, tmp_path: Path) -> None:
    publish(home, weights(tmp_path / "a"))
    for text in ("bot@2", "cat", "../../etc", "bot@0", ""):
        with pytest.raises(UnknownAdapterError, match="there is bot@1"):
            Registry(home).resolve(text)


def test_pickled_weights_are_never_published(home: Home, tmp_path: Path) -> None:
    folder = weights(tmp_path / "a")
    (folder / "extra.bin").write_bytes(b"x")
    with pytest.raises(RegistryError, match="only safetensors"):
        publish(home, folder)
    assert Registry(home).adapters() == []


def test_a_publisher_that_dies_half_way_leaves_no_version(home: Home, tmp_path: Path) -> None:
    def fail(_version: int, _files: dict[str, FileEntry]) -> AdapterManifest:
        raise RuntimeError("died before the manifest")

    with pytest.raises(RuntimeError, match="died"):
        Registry(home).publish(weights(tmp_path / "a"), "bot", describe=fail)
    assert Registry(home).adapters() == []
    assert list((home.registry / "bot").iterdir()) == []


@pytest.mark.parametrize("damage", ["changed", "missing", "added"])
def test_verify_names_every_damaged_file(home: Home, tmp_path: Path, damage: str) -> None:
    publish(home, weights(tmp_path / "a"))
    folder = home.registry / "bot" / "1"
    Registry(home).verify(AdapterRef("bot", 1))
    if damage == "changed":
        (folder / "adapter_config.json").write_text('{"r": 9}')
    elif damage == "missing":
        (folder / "adapter_config.json").unlink()
    else:
        (folder / "evil.py").write_text("")
    with pytest.raises(CorruptAdapterError, match=damage):
        Registry(home).verify(AdapterRef("bot", 1))


def test_an_alias_moves_in_one_step_and_keeps_its_history(home: Home, tmp_path: Path) -> None:
    publish(home, weights(tmp_path / "a"))
    publish(home, weights(tmp_path / "b"))
    registry = Registry(home)
    registry.set_alias("prod", "bot@1")
    registry.set_alias("prod", "bot")
    assert registry.resolve("prod").version == 2
    history = json.loads((home.registry / ".aliases" / "prod.json").read_text())["history"]
    assert [[target["version"] for target in state["targets"]] for state in history] == [["bot@1"], ["bot@2"]]


def test_names_and_aliases_do_not_shadow_each_other(home: Home, tmp_path: Path) -> None:
    publish(home, weights(tmp_path / "a"))
    registry = Registry(home)
    with pytest.raises(RegistryError, match="name of an adapter"):
        registry.set_alias("bot", "bot@1")
    registry.set_alias("prod", "bot@1")
    with pytest.raises(RegistryError, match="is an alias"):
        publish(home, weights(tmp_path / "b"), "prod")


def test_a_removed_version_is_gone_and_its_number_never_comes_back(home: Home, tmp_path: Path) -> None:
    publish(home, weights(tmp_path / "a"))
    registry = Registry(home)
    registry.set_alias("prod", "bot@1")
    with pytest.raises(RegistryError, match="alias 'prod' points at it"):
        registry.remove(AdapterRef("bot", 1))
    registry.remove_alias("prod")
    registry.remove(AdapterRef("bot", 1))
    with pytest.raises(UnknownAdapterError):
        registry.resolve("bot@1")
    assert publish(home, weights(tmp_path / "b")).version == 2


def test_publishers_at_the_same_time_get_versions_of_their_own(home: Home, tmp_path: Path) -> None:
    folders = [weights(tmp_path / str(n), float(n)) for n in range(4)]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_publish_twice, args=(home.root, folder)) for folder in folders]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    registry = Registry(home)
    assert [m.version for m in registry.adapters()] == list(range(1, 9))
    for manifest in registry.adapters():
        registry.verify(manifest.ref)


def _publish_twice(root: Path, folder: Path) -> None:
    for _ in range(2):
        publish(Home(root), folder)


def test_what_is_damaged_is_left_out_of_lists_and_named_when_it_is_asked_for(
    home: Home, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(home)
    for name in ("good", "bad"):
        registry.publish(weights(tmp_path / name), name, describe=Describe(name))
        registry.set_alias(f"{name}-alias", f"{name}@1")
    (registry.path(AdapterRef("bad", 1)) / "manifest.json").write_text("{")
    next(registry.root.glob(".aliases/good-alias*")).write_text("[]")
    assert [str(manifest.ref) for manifest in registry.adapters()] == ["good@1"]
    assert registry.aliases() == {"bad-alias": "bad@1"}
    assert [record.message for record in caplog.records if "left out" in record.message]
    for text in ("bad@1", "good-alias"):
        with pytest.raises(CorruptAdapterError, match=text.partition("@")[0]):
            registry.resolve(text)
