"""`hone serve` by another engine: chosen by an option or a recipe, and refused before anything is started where it cannot run."""

import importlib.util
from pathlib import Path

import pytest

from cluster.cli_serve import _what
from hone.recipe.serving import ServingSettings, VllmSettings
from tests.unit.cluster.conftest import Hone

HAS_VLLM = importlib.util.find_spec("vllm") is not None
SECTION = "serving:\n  engine: vllm\n  vllm: {tensor_parallel_size: 2}\n"
BY_RECIPE = ServingSettings(engine="vllm", vllm=VllmSettings(tensor_parallel_size=2))


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed here, so nothing says that it is not")
@pytest.mark.parametrize("chosen", [["--engine", "vllm", "--base", "./nowhere"], ["--recipe", "recipe.yaml"]])
def test_without_the_package_it_says_what_to_install(hone: Hone, recipe_file: Path, chosen: list[str]) -> None:
    recipe_file.write_text(recipe_file.read_text() + SECTION)
    done = hone("serve", *chosen)
    assert done.returncode == 1
    assert done.stderr.startswith("hone: engine vllm: the package vllm is not installed here; pip install 'hone[vllm]'")
    assert done.stderr.count("\n") == 1
    assert not (recipe_file.parent / ".hone").exists()


def test_an_unknown_engine_is_refused(hone: Hone) -> None:
    done = hone("serve", "--base", "b", "--engine", "sglang")
    assert done.returncode == 2
    assert "'sglang' is not one of" in done.stderr


def test_the_recipe_says_what_is_served_and_options_say_otherwise(recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text() + SECTION)
    base, serving = _what(None, recipe_file, None)
    assert (base, serving) == (_what(None, recipe_file, "slots")[0], BY_RECIPE)
    assert _what("other", recipe_file, "slots") == ("other", BY_RECIPE.model_copy(update={"engine": "slots"}))
    assert _what("other", None, None) == ("other", ServingSettings())
