"""`hone adapters` and `hone recipe` against a real registry and real files."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from hone.ids import AdapterRef
from hone.recipe import load_recipe
from hone.registry import Registry
from tests.unit.cluster.conftest import Hone


def test_a_list_shows_versions_results_and_aliases(hone: Hone, published: Registry) -> None:
    published.set_alias("prod", "bot@1")
    lines = hone("adapters", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ADAPTER", "bot@1", "bot@2"]
    assert "eval_accuracy 0.5 (base 0.25)" in lines[1]
    assert lines[1].split()[1:4] == ["chat", "lora", "mixed"]
    assert lines[1].rstrip().endswith("prod")
    assert "prod" not in lines[2]


@pytest.mark.usefixtures("published")
def test_a_narrow_terminal_loses_nothing(hone: Hone) -> None:
    listed = json.loads(hone("adapters", "list", "--json").stdout)
    assert [(a["ref"], a["aliases"]) for a in listed["adapters"]] == [("bot@1", []), ("bot@2", [])]
    narrow = hone("adapters", "list", COLUMNS="40", FORCE_COLOR="1", TERM="xterm").stdout
    assert "…" not in narrow


def test_show_tells_of_one_version_and_its_files(hone: Hone, published: Registry) -> None:
    shown = hone("adapters", "show", "bot").stdout
    assert "bot@2" in shown
    assert "some/base" in shown
    assert "in one batch with other adapters of the base, at /v1/chat/completions" in shown
    assert "adapter_model.safetensors" in shown
    as_json = json.loads(hone("adapters", "show", "bot@1", "--json").stdout)
    assert as_json["metrics"] == {"eval_accuracy": 0.5, "base_eval_accuracy": 0.25}
    assert as_json["folder"] == str(published.path(AdapterRef("bot", 1)))


def test_an_alias_is_set_moved_and_forgotten(hone: Hone, published: Registry) -> None:
    assert hone("adapters", "alias", "prod", "bot@1").stdout == "prod -> bot@1\n"
    assert hone("adapters", "alias", "prod", "bot@2").stdout == "prod -> bot@2 (was bot@1)\n"
    refused = hone("adapters", "rm", "bot@2")
    assert refused.returncode == 1
    assert "alias 'prod' points at it" in refused.stderr
    assert hone("adapters", "alias", "--rm", "prod").returncode == 0
    assert published.aliases() == {}
    assert hone("adapters", "rm", "bot@2").stdout == "bot@2: removed\n"
    assert [str(m.ref) for m in published.adapters()] == ["bot@1"]


def test_verify_names_the_file_that_changed(hone: Hone, published: Registry) -> None:
    assert "all 1 files are as published" in hone("adapters", "verify", "bot@1").stdout
    (published.path(AdapterRef("bot", 1)) / "adapter_model.safetensors").write_bytes(b"other")
    done = hone("adapters", "verify", "bot@1")
    assert done.returncode == 1
    assert "adapter_model.safetensors has changed" in done.stderr


def test_the_starter_recipe_is_a_valid_recipe_that_can_be_searched(hone: Hone, tmp_path: Path) -> None:
    assert hone("recipe", "init", "mine.yaml").returncode == 0
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.search is not None
    shown = yaml.safe_load(hone("recipe", "show", "mine.yaml", "method.r=4").stdout)
    assert shown["method"]["r"] == 4


def test_the_schema_accepts_the_starter_recipe(hone: Hone, tmp_path: Path) -> None:
    hone("recipe", "init", "mine.yaml")
    schema = json.loads(hone("recipe", "schema").stdout)
    jsonschema.validate(yaml.safe_load((tmp_path / "mine.yaml").read_text()), schema)


def test_the_doctor_speaks_json_and_fails_where_a_cluster_is_out_of_reach(hone: Hone) -> None:
    done = hone("doctor", "--json")
    findings = {f["name"]: f for f in json.loads(done.stdout)}
    assert done.returncode == 0
    assert {"python", "ray", "gpu", "memory", "home", "store", "port 8000", "ray token"} <= findings.keys()
    assert all(f["advice"] for f in findings.values() if f["level"] != "ok")
    beyond = hone("doctor", "--address", "http://127.0.0.1:9")
    assert beyond.returncode == 1
    assert "no Ray dashboard answers there" in " ".join(beyond.stdout.split())
