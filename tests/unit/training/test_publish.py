"""A run's own alias: moved to what it published, unless the gate of its recipe is against it."""

import json
from pathlib import Path
from typing import Any

import pytest

from hone.manifest import AdapterManifest, BaseModelId
from hone.promotion import promote
from hone.recipe import parse_recipe
from hone.registry import Registry
from hone.run_folder import read_events
from hone.storage import Home
from tests.manifests import Describe, prepared_data, weights
from training.job import Job
from training.publish import move_alias


@pytest.fixture
def registry(home: Home, tmp_path: Path) -> Registry:
    registry = Registry(home)
    registry.publish(weights(tmp_path / "first"), "bot", describe=Describe("bot"))
    promote(registry, "prod", "bot@1")
    return registry


def finished(folder: Path, publish: dict[str, Any]) -> Job:
    """A run whose recipe says so of publishing."""
    folder.mkdir()
    tree = {"name": "bot", "task": "chat", "base": "b", "data": {"train": "t", "validation_fraction": 0.1}, "publish": publish}
    return Job(
        run_id="bot-run",
        folder=folder,
        recipe=parse_recipe(tree, where="recipe.yaml"),
        base_folder=folder,
        base_id=BaseModelId(name="tiny", fingerprint="f" * 64),
        data=prepared_data(),
        use_gpu=False,
        resources_per_worker={},
    )


def published(registry: Registry, folder: Path, job: Job) -> AdapterManifest:
    """What it leaves in the registry; its loss is 1.0."""
    (weights(folder) / "recipe.json").write_text(job.recipe.model_dump_json())
    return registry.publish(folder, "bot", describe=Describe("bot"))


def test_a_run_moves_its_alias_and_says_that_it_did(registry: Registry, home: Home, tmp_path: Path) -> None:
    job = finished(tmp_path / "run", {"alias": "prod"})
    assert move_alias(job, published(registry, tmp_path / "second", job), home=home) == ""
    alias = registry.alias("prod")
    assert alias is not None
    assert (alias.current.main.version, alias.current.by, alias.number) == ("bot@2", "run bot-run", 2)


def test_a_run_whose_gate_is_against_it_publishes_and_leaves_the_alias(registry: Registry, home: Home, tmp_path: Path) -> None:
    job = finished(tmp_path / "run", {"alias": "prod", "gate": {"metrics": {"eval_loss": {"at_most": 0.1}}}})
    manifest = published(registry, tmp_path / "second", job)
    why = move_alias(job, manifest, home=home)
    assert why.startswith("bot@2: eval_loss was not measured; 'prod' goes on meaning bot@1.")
    assert registry.aliases() == {"prod": "bot@1"}
    assert registry.resolve("bot").version == 2
    [event] = read_events(job.folder)
    assert (event["event"], event["alias"], event["why"]) == ("gate_refused", "prod", why)
    assert json.loads((registry.path(manifest.ref) / "recipe.json").read_text())["publish"]["gate"]


def test_a_run_without_an_alias_moves_none(registry: Registry, home: Home, tmp_path: Path) -> None:
    job = finished(tmp_path / "run", {})
    assert move_alias(job, published(registry, tmp_path / "second", job), home=home) == ""
    assert registry.aliases() == {"prod": "bot@1"}
