"""Recipes: what loads, what is refused, and what the refusal says."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from hone.errors import RecipeError
from hone.recipe import allowed_stages, load_recipe, parse_recipe, recipe_schema

MINIMAL: dict[str, Any] = {"name": "bot", "task": "chat", "base": "./base", "data": {"train": "rows.jsonl"}}
SHIPPED = sorted(Path(__file__).resolve().parents[3].glob("examples/**/recipe*.yaml"))


def write(folder: Path, tree: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree, sort_keys=False))
    return path


def refusal(folder: Path, tree: Any, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, tree), list(overrides))
    return caught.value.message


def test_paths_are_taken_from_the_recipes_own_folder(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert recipe.data.train == str(tmp_path / "rows.jsonl")
    assert recipe.base == str(tmp_path / "base")


def test_a_base_that_is_no_folder_stays_a_hub_name(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, {**MINIMAL, "base": "Qwen/Qwen3-0.6B"})).base == "Qwen/Qwen3-0.6B"


def test_a_typo_is_named_with_its_line_and_the_nearest_key(tmp_path: Path) -> None:
    text = "name: bot\ntask: chat\nbase: ./base\ndata:\n  train: rows.jsonl\noptim:\n  learing_rate: 1e-3\n"
    assert refusal(tmp_path, text) == (f"{tmp_path / 'recipe.yaml'}:7: optim.learing_rate: unknown key; did you mean optim.learning_rate?")


def test_a_key_in_the_wrong_section_is_sent_to_the_right_one(tmp_path: Path) -> None:
    assert "did you mean optim.learning_rate?" in refusal(tmp_path, {**MINIMAL, "learning_rate": 1})


def test_every_wrong_key_is_reported_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, {**MINIMAL, "optm": {}, "train": {"num_train_epochs": -1}})
    assert len(message.splitlines()) == 2
    assert "train.num_train_epochs" in message


def test_a_required_key_that_is_missing_is_named(tmp_path: Path) -> None:
    assert "data.train: required" in refusal(tmp_path, {**MINIMAL, "data": {}})


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "empty"), ("- a\n- b\n", "list"), ("name: [unclosed\n", "not valid YAML")],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_a_missing_recipe_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_overrides_are_yaml_values_in_dotted_keys(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), ["optim.learning_rate=2e-4", "method.type=full", "publish.alias=prod"])
    assert (recipe.optim.learning_rate, recipe.method.type, recipe.publish.alias) == (2e-4, "full", "prod")


def test_another_type_by_override_starts_its_section_afresh(tmp_path: Path) -> None:
    lora = {**MINIMAL, "method": {"type": "lora", "r": 4}}
    assert load_recipe(write(tmp_path, lora), ["method.type=full"]).method.type == "full"
    assert "method.r: does not go with the type chosen there" in refusal(tmp_path, {**MINIMAL, "method": {"type": "full", "r": 4}})
    assert "method.type is one of lora, full" in refusal(tmp_path, MINIMAL, "method.type=lorra")


def test_an_override_is_checked_like_the_file(tmp_path: Path) -> None:
    assert "did you mean zero.stage?" in refusal(tmp_path, MINIMAL, "zero.stag=2")
    assert "write KEY=VALUE" in refusal(tmp_path, MINIMAL, "zero.stage")


def test_a_global_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, {**MINIMAL, "train": {"global_batch_size": 8}, "scaling": {"num_workers": 3}})
    assert "use a multiple of 3" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scaling": {"num_workers": 3}}, "num_workers 3 is no multiple of scaling.sequence_parallel_size 2"),
        ({"scaling": {"num_workers": [2, 5]}}, "num_workers 5 is no multiple"),
        (
            {"scaling": {"num_workers": 6}},
            "does not divide among the 3 groups of scaling.sequence_parallel_size 2 workers; use a multiple of 3",
        ),
        ({"scaling": {"num_workers": [2, 40]}}, "less than a row for each of 20 groups"),
        ({"task": "preference"}, "for the tasks chat and completion, and this is preference"),
        ({"method": {"type": "prefix"}}, "with method prefix none are packed"),
        ({"train": {"packing": False}}, "train.packing is false"),
    ],
)
def test_what_cannot_share_a_sequence_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    tree = {**MINIMAL, **changes, "train": {"global_batch_size": 16, **changes.get("train", {})}}
    tree["scaling"] = {"num_workers": 4, "sequence_parallel_size": 2, **changes.get("scaling", {})}
    assert said in refusal(tmp_path, tree)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"zero": {"stage": 2, "offload_param": "nvme", "nvme_path": "/scratch"}}, "zero.offload_param needs zero.stage 3"),
        ({"zero": {"stage": 3, "offload_param": "nvme"}}, "zero.nvme_path, the folder on each machine's disk, go together"),
        (
            {"zero": {"stage": 3, "offload_param": "nvme", "nvme_path": "/scratch"}, "train": {"ema_decay": 0.99}},
            "train.ema_decay reads every weight after each step",
        ),
        ({"zero": {"offload_optimizer": "nvme", "nvme_path": "/scratch"}}, "needs zero.stage 3, and this is 2"),
        ({"zero": {"stage": 3, "offload_optimizer": "nvme"}}, "zero.nvme_path, the folder on each machine's disk, go together"),
        ({"zero": {"stage": 3, "nvme_path": "/scratch"}}, "zero.nvme_path, the folder on each machine's disk, go together"),
        (
            {
                "zero": {"stage": 3, "offload_optimizer": "nvme", "nvme_path": "/scratch"},
                "method": {"type": "full", "gradual_unfreezing": {"every_steps": 5}},
            },
            "method.gradual_unfreezing empties the state of what thaws, in memory",
        ),
        ({"zero": {"stage": 0}, "train": {"precision": "fp16"}}, "train.precision fp16 needs zero.stage 1, 2 or 3"),
    ],
)
def test_what_deepspeed_or_a_checkpoint_cannot_do_is_refused_with_the_reason(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(tmp_path, {**MINIMAL, **changes})


def test_fp16_leaves_the_plan_no_stage_without_zero(tmp_path: Path) -> None:
    tree = {**MINIMAL, "zero": {"stage": "auto"}, "train": {"precision": "fp16"}}
    assert allowed_stages(load_recipe(write(tmp_path, tree))) == [1, 2, 3]


def test_workers_that_share_sequences_count_as_one_for_the_global_batch(tmp_path: Path) -> None:
    tree = {**MINIMAL, "train": {"global_batch_size": 2}, "scaling": {"num_workers": 8, "sequence_parallel_size": 4}}
    assert load_recipe(write(tmp_path, tree)).scaling.most_groups == 2


def test_a_search_over_a_key_that_is_none_is_refused(tmp_path: Path) -> None:
    space = {"optim.learning_rat": {"type": "loguniform", "lower": 1e-5, "upper": 1e-3}}
    assert "did you mean optim.learning_rate?" in refusal(tmp_path, {**MINIMAL, "search": {"space": space}})


def test_a_resolved_recipe_survives_json() -> None:
    recipe = parse_recipe(MINIMAL, where="test")
    assert parse_recipe(recipe.model_dump(mode="json"), where="test") == recipe


def test_the_schema_accepts_a_recipe_and_refuses_a_typo() -> None:
    validator = jsonschema.Draft202012Validator(recipe_schema())
    validator.validate(MINIMAL)
    assert list(validator.iter_errors({**MINIMAL, "nmae": "x"}))


@pytest.mark.parametrize("path", SHIPPED, ids=[p.parent.name for p in SHIPPED])
def test_every_shipped_recipe_parses(path: Path) -> None:
    load_recipe(path)


def test_stage_and_portion_may_be_left_to_the_plan(tmp_path: Path) -> None:
    tree = {**MINIMAL, "zero": {"stage": "auto"}, "train": {"micro_batch_size": "auto"}}
    recipe = load_recipe(write(tmp_path, tree))
    assert (recipe.zero.stage, recipe.train.micro_batch_size) == ("auto", "auto")
    assert allowed_stages(recipe) == [0, 1, 2, 3]
    assert "micro_batch_size" in refusal(tmp_path, {**MINIMAL, "train": {"micro_batch_size": "some"}})


def test_auto_is_no_stage_that_a_method_cannot_run_under(tmp_path: Path) -> None:
    tree = {**MINIMAL, "zero": {"stage": "auto"}, "method": {"type": "lora", "use_dora": True}}
    assert allowed_stages(load_recipe(write(tmp_path, tree))) == [0, 1, 2]
    tree = {**MINIMAL, "zero": {"stage": "auto"}, "method": {"type": "full"}, "guard": {"kl_penalty": 0.1}}
    assert allowed_stages(load_recipe(write(tmp_path, tree))) == [0, 1, 2]
    assert "zero.stage 2" in refusal(tmp_path, tree, "zero.stage=3")
