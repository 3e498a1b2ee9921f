"""The real command line in a process of its own, and a home with two published adapters."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hone.manifest import BaseModelId
from hone.registry import Registry
from hone.storage import Home
from tests.manifests import Describe

Hone = Callable[..., subprocess.CompletedProcess[str]]

RECIPE = """\
name: small
task: chat
base: ./base
data:
  train: train.jsonl
"""


@pytest.fixture
def hone(tmp_path: Path) -> Hone:
    """`hone(*arguments)`: run it in `tmp_path`, whose `.hone` is its home."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "HONE_"))}

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cluster.cli", *arguments],
            cwd=tmp_path,
            env={**environment, "COLUMNS": "120", **variables},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def published(tmp_path: Path) -> Registry:
    """bot@1 and bot@2 in the home of `hone`."""
    registry = Registry(Home(tmp_path / ".hone"))
    for accuracy in (0.5, 0.75):
        folder = tmp_path / f"weights-{accuracy}"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(f"weights {accuracy}".encode())
        base = BaseModelId(name="some/base", fingerprint="f" * 64)
        metrics = {"eval_accuracy": accuracy, "base_eval_accuracy": 0.25}
        describe = Describe("bot", base=base, metrics=metrics, created_at="2026-11-21T07:30:00+00:00")
        registry.publish(folder, "bot", describe=describe)
    return registry
