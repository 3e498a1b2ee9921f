"""Model ids: never the base for a name that is not the base's."""

from pathlib import Path

import pytest

from hone.base_model import find_base_model
from hone.registry import Registry
from hone.storage import Home
from serving.catalog import BaseDescription, Catalog
from serving.errors import UnknownModelError
from tests.serving_fixtures import publish
from tests.tiny import make_llama


def catalog_of(home: Home, base: Path) -> Catalog:
    found = find_base_model(str(base), home=home)
    return Catalog(Registry(home), BaseDescription(found.id, "chat", 256, 1, tasks=("chat",), mixed_tasks=("chat",)))


@pytest.fixture
def catalog(home: Home, llama: Path) -> Catalog:
    for seed in (1, 2):
        publish(home, llama, "bot", seed=seed, r=2, target_modules=["q_proj"])
    Registry(home).set_alias("prod", "bot@1")
    return catalog_of(home, llama)


def test_versions_names_aliases_and_the_base_are_found(catalog: Catalog, llama: Path) -> None:
    found = {name: catalog.find(name) for name in ("bot@1", "bot@2", "bot", "prod", str(llama), llama.name)}
    assert {name: str(manifest.ref) if manifest else None for name, manifest in found.items()} == {
        "bot@1": "bot@1",
        "bot@2": "bot@2",
        "bot": "bot@2",
        "prod": "bot@1",
        str(llama): None,
        llama.name: None,
    }


@pytest.mark.parametrize(
    "name",
    [
        "bot@3",
        "Bot",
        "nobody",
        "",
        "bot@",
        "bot@01",
        "bot@1@1",
        "../bot/1",
        "/etc/passwd",
        ".aliases/prod",
        "a" * 5000,
        "bot\0",
        "prod@1",
        "🎉",
    ],
)
def test_any_other_name_is_unknown(catalog: Catalog, name: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        catalog.find(name)
    assert caught.value.status == 404
    assert caught.value.code == "model_not_found"
    assert len(caught.value.message) < 400


def test_the_list_holds_what_is_served_with_its_lineage(catalog: Catalog, llama: Path, home: Home, tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other", seed=1)
    publish(home, other, "stranger", seed=1, r=2, target_modules=["q_proj"])
    cards = {card["id"]: card for card in catalog.cards()}
    assert list(cards) == [str(llama), llama.name, "bot@1", "bot@2", "prod"]
    assert cards["prod"]["adapter"] == "bot@1"
    assert cards["bot@2"]["lineage"]["run_id"] == "run-2"
    with pytest.raises(UnknownModelError, match=r"stranger@1 is an adapter of .*other.* and this server serves"):
        catalog.find("stranger")


def test_a_removed_version_is_unknown_at_once(catalog: Catalog, home: Home) -> None:
    registry = Registry(home)
    registry.remove(registry.resolve("bot@2").ref)
    assert str(catalog.find("bot").ref) == "bot@1"  # type: ignore[union-attr]
    with pytest.raises(UnknownModelError):
        catalog.find("bot@2")
