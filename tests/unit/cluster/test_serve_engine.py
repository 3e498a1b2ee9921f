"""What `hone serve` takes from options and a recipe; and an engine is refused before anything is started where it cannot run."""

import importlib.util
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
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


def test_adapters_are_kept_where_the_recipe_or_an_option_says(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_file.write_text(recipe_file.read_text() + "serving: {adapter_disk: kept, adapter_disk_bytes: 1000}\n")
    by_recipe = ServingSettings(adapter_disk=str(recipe_file.parent / "kept"), adapter_disk_bytes=1000)
    assert _what(None, recipe_file, None)[1] == by_recipe
    monkeypatch.chdir("/usr")
    for said, meant in (("/var/cache/hone", "/var/cache/hone"), ("lib/hone", "/usr/lib/hone"), ("~/kept", str(Path.home() / "kept"))):
        assert _what(None, recipe_file, None, Path(said))[1] == by_recipe.model_copy(update={"adapter_disk": meant})
    assert _what("b", None, None, Path("/kept"))[1] == ServingSettings(adapter_disk="/kept")


@pytest.mark.parametrize(("key", "value"), [("adapter_disk", "''"), ("adapter_disk_bytes", "-1")])
def test_a_folder_without_a_name_and_less_than_no_bytes_are_refused(hone: Hone, recipe_file: Path, key: str, value: str) -> None:
    recipe_file.write_text(recipe_file.read_text() + f"serving: {{{key}: {value}}}\n")
    done = hone("serve", "--recipe", "recipe.yaml")
    assert done.returncode == 1
    assert f"serving.{key}" in done.stderr


def test_a_folder_of_another_machine_is_named_by_its_whole_path(hone: Hone) -> None:
    done = hone("serve", "--base", "b", "--address", "http://127.0.0.1:9", "--adapter-disk", "kept")
    assert done.returncode == 1
    assert "--adapter-disk kept: with --address" in done.stderr


def test_the_option_is_what_the_application_is_told(monkeypatch: pytest.MonkeyPatch, recipe_file: Path) -> None:
    sent: list[ServingSettings] = []
    monkeypatch.setattr("cluster.cli_serve._serve_on_cluster", lambda *_, serving, **__: sent.append(serving))
    recipe_file.write_text(recipe_file.read_text() + "serving: {adapter_disk_bytes: 1000}\n")
    options = ["--recipe", str(recipe_file), "--address", "http://127.0.0.1:9", "--adapter-disk", "/kept"]
    assert CliRunner().invoke(app, ["serve", *options]).exit_code == 0
    assert sent == [ServingSettings(adapter_disk="/kept", adapter_disk_bytes=1000)]


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field` is deprecated")
def test_every_key_of_the_section_is_an_argument_of_the_application_with_the_same_default() -> None:
    from serving.app import ServeArgs

    arguments = ServeArgs.model_fields
    assert {name: field.default for name, field in ServingSettings.model_fields.items()} == {
        name: arguments[name].default for name in ServingSettings.model_fields
    }
