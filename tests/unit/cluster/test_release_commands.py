"""`hone adapters promote|rollback|history|diff` against a real registry."""

import json
from pathlib import Path

import pytest

from hone.registry import Registry
from hone.storage import Home
from tests.manifests import Describe
from tests.unit.cluster.conftest import Hone


def test_a_canary_is_promoted_shadowed_and_rolled_back(hone: Hone, published: Registry) -> None:
    assert hone("adapters", "promote", "prod", "bot@1").stdout == "prod -> bot@1\n"
    canary = hone("adapters", "promote", "prod", "bot@2", "--share", "10%", "--sticky", "--rollback-on", "5%:30", "--why", "try it")
    assert canary.stdout == "prod -> bot@1 90%, bot@2 10%, sticky, back past 5% errors of 20 or more in 30 s (was bot@1)\n", canary.stderr
    listed = hone("adapters", "list").stdout.splitlines()
    assert [line.rstrip().endswith(f"prod {share}") for line, share in zip(listed[1:], ("90%", "10%"), strict=True)] == [True, True]
    refused = hone("adapters", "promote", "prod", "bot@2", "--share", "10%", "--shadow", "bot@1:20%")
    assert (refused.returncode, "bot@1 answers itself" in refused.stderr) == (1, True)
    assert "prod -> bot@1, sticky, shadow bot@2 of 20%" in hone("adapters", "promote", "prod", "bot@1", "--shadow", "bot@2:20%").stdout
    back = hone("adapters", "rollback", "prod", "--to", "1", "--why", "enough")
    assert back.stdout.startswith("prod -> bot@1 (was bot@1, sticky"), back.stderr
    lines = hone("adapters", "history", "prod").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["STATE", "1", "2", "3", "4"]
    assert lines[2].rstrip().endswith("try it")
    assert lines[4].rstrip().endswith("back to state 1; enough")
    states = json.loads(hone("adapters", "history", "prod", "--json").stdout)["history"]
    assert [[target["weight"] for target in state["targets"]] for state in states] == [[1], [0.9, 0.1], [1], [1]]
    alias = published.alias("prod")
    assert alias is not None
    assert alias.current.by == states[-1]["by"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("promote", "prod", "bot@1", "--share", "ten"), "--share ten: give a share from 0.01% to 100%"),
        (("promote", "prod", "bot@1", "--share", "0"), "--share 0: give a share"),
        (("promote", "prod", "bot@1", "--rollback-on", "100%"), "--rollback-on 100%: give RATE"),
        (("promote", "prod", "bot@1", "--rollback-on", "5%:1:2:3"), "give RATE[:SECONDS[:REQUESTS]]"),
        (("promote", "prod", "bot@9"), "no adapter or alias 'bot@9'"),
        (("rollback", "prod"), "no alias 'prod'"),
        (("history", "prod"), "no alias 'prod'"),
    ],
)
@pytest.mark.usefixtures("published")
def test_a_mistake_is_told_in_a_line(hone: Hone, arguments: tuple[str, ...], said: str) -> None:
    done = hone("adapters", *arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_gate_holds_for_every_command_that_moves_and_force_is_noted(hone: Hone, tmp_path: Path) -> None:
    registry = Registry(Home(tmp_path / ".hone"))
    for n, loss in enumerate((0.5, 0.9)):
        _publish(registry, tmp_path / str(n), loss=loss, gate={"no_worse_than_alias": {"eval_loss": 0.1}}, rank=8 * (n + 1))
    assert hone("adapters", "alias", "prod", "bot@1").returncode == 0
    for command in (("promote", "prod", "bot@2"), ("promote", "prod", "bot@2", "--share", "5%"), ("alias", "prod", "bot@2")):
        refused = hone("adapters", *command)
        assert refused.returncode == 1
        said = (
            "bot@2: eval_loss 0.9 is worse than 0.5 of bot@1 by more than 0.1 (each on the validation rows of its own data); 'prod' goes on"
        )
        assert said in refused.stderr
    assert registry.aliases() == {"prod": "bot@1"}
    forced = hone("adapters", "promote", "prod", "bot@2", "--force")
    assert forced.stdout.splitlines()[0] == "prod -> bot@2 (was bot@1)"
    assert "forced: eval_loss 0.9 is worse than 0.5" in hone("adapters", "history", "prod").stdout


def test_a_diff_shows_what_two_versions_were_made_of_and_how_they_do(hone: Hone, tmp_path: Path) -> None:
    registry = Registry(Home(tmp_path / ".hone"))
    for n, loss in enumerate((0.5, 0.75)):
        _publish(registry, tmp_path / str(n), loss=loss, gate={}, rank=8 * (n + 1))
    found = json.loads(hone("adapters", "diff", "bot@1", "bot@2", "--json").stdout)
    assert (found["a"], found["b"]) == ("bot@1", "bot@2")
    assert [(each["name"], each["a"], each["b"]) for each in found["recipe"]] == [("method.r", 8, 16)]
    metrics = {each["name"]: each for each in found["metrics"]}
    assert metrics["eval_loss"] == {
        "name": "eval_loss",
        "a": {"value": 0.5, "low": None, "high": None},
        "b": {"value": 0.75, "low": None, "high": None},
        "change": 0.25,
    }
    assert metrics["eval_accuracy"]["b"] == {"value": 0.8, "low": 0.7, "high": 0.9}
    made_of = {each["name"] for each in found["made_of"]}
    assert {"digest", "data digest", "run"} <= made_of
    assert not {"base", "method", "task"} & made_of, "these are the same"
    assert {each["name"] for each in found["sizes"]} >= {"adapter_model.safetensors", "all files"}
    shown = hone("adapters", "diff", "bot@1", "bot@2").stdout
    rows = {tuple(line.split()) for line in shown.splitlines()}
    assert {("method.r", "8", "16", "+8"), ("eval_loss", "0.5", "0.75", "+0.25")} <= rows
    assert "0.8 [0.7, 0.9]" in shown


def _publish(registry: Registry, folder: Path, *, loss: float, gate: dict[str, object], rank: int) -> None:
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"w" * rank)
    recipe = {"name": "bot", "method": {"type": "lora", "r": rank}, "data": {"train": ["a.jsonl"]}, "publish": {"gate": gate}}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    evaluation = {"metrics": [{"name": "accuracy", "tuned": {"value": 0.8, "low": 0.7, "high": 0.9}}]}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    registry.publish(folder, "bot", describe=Describe("bot", metrics={"eval_loss": loss}, data_digest=f"{rank:064}"))
