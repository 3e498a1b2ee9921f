"""Groups, folds, and several sources of rows in one data set."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hone.base_model import BaseModel, find_base_model
from hone.errors import DataError, RecipeError
from hone.recipe import Recipe, load_recipe, parse_recipe, with_overrides
from hone.storage import Home
from models.tasks.tokenizer import load_tokenizer
from training.batches import batch_plan
from training.data import prepare_data
from training.job import PreparedData
from training.token_rows import TokenRows


@pytest.fixture
def base(llama: Path, home: Home) -> BaseModel:
    return find_base_model(str(llama), home=home)


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(n: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"number {n}?", "completion": f"it is {n}", **more}


def recipe(base: BaseModel, train: Path, **data: Any) -> Recipe:
    tree = {"name": "bot", "task": "chat", "base": str(base.folder), "data": {"train": str(train), "validation_fraction": 0.25, **data}}
    return parse_recipe(tree, where="test")


def numbers(prepared: PreparedData, part: str, base: BaseModel) -> list[int]:
    """Which numbers the rows of a part ask for."""
    rows, tokenizer = TokenRows(prepared, part), load_tokenizer(base.folder)
    said = [tokenizer.decode([token for token in row["labels"] if token >= 0]) for row in rows.take(np.arange(len(rows)))]
    return [int(text.removeprefix("it is ").removesuffix("<|im_end|>")) for text in said]


def test_no_group_is_on_both_sides(base: BaseModel, tmp_path: Path, home: Home) -> None:
    train = written(tmp_path / "a.jsonl", *[asked(n, customer=f"c{n % 8}") for n in range(80)])
    prepared = prepare_data(recipe(base, train, group_by="customer"), base, home=home)
    sides = [{n % 8 for n in numbers(prepared, part, base)} for part in ("train", "validation")]
    assert (len(sides[0]), len(sides[1])) == (6, 2)
    assert not sides[0] & sides[1]


def test_a_row_without_its_group_is_a_bad_row(base: BaseModel, tmp_path: Path, home: Home) -> None:
    train = written(tmp_path / "a.jsonl", asked(1, customer="x"), asked(2))
    with pytest.raises(DataError, match=r"a.jsonl:2: no 'customer', which data.group_by groups rows by \(there are: prompt, completion\)"):
        prepare_data(recipe(base, train, group_by="customer"), base, home=home)


def test_each_row_validates_in_exactly_one_fold(base: BaseModel, tmp_path: Path, home: Home) -> None:
    train = written(tmp_path / "a.jsonl", *[asked(n) for n in range(23)])
    prepared = [prepare_data(recipe(base, train, folds=4, fold=fold), base, home=home) for fold in range(4)]
    held = [numbers(each, "validation", base) for each in prepared]
    assert sorted(n for fold in held for n in fold) == list(range(23))
    assert {len(fold) for fold in held} == {5, 6}
    assert all(not set(fold) & set(numbers(each, "train", base)) for fold, each in zip(held, prepared, strict=True))
    assert len({shard for each in prepared for shard in each.shards}) == 1, "all folds read the same tokens"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"folds": 3, "fold": 3}, "data.fold 3 is not one of data.folds 3"),
        ({"folds": 3, "validation": "v.jsonl"}, "data.folds splits the training rows"),
        ({"augment": {"text": {}}}, "data.augment.text is for the task text-classification"),
        ({"mix": [{"source": "b.jsonl", "wieght": 2}]}, r"data.mix.0.wieght: unknown key; did you mean data.mix.weight\?"),
    ],
)
def test_settings_that_cannot_be_are_refused(base: BaseModel, tmp_path: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(base, tmp_path / "a.jsonl", **data)


def test_sources_are_mixed_by_weight_and_retain_takes_its_share(base: BaseModel, tmp_path: Path, home: Home) -> None:
    train = written(tmp_path / "a.jsonl", *[asked(n) for n in range(40)])
    other = written(tmp_path / "b.jsonl", *[{"q": f"number {n}?", "a": f"it is {n}"} for n in range(100, 160)])
    general = written(tmp_path / "c.jsonl", *[asked(n) for n in range(200, 210)])
    mix = [{"source": str(other), "weight": 0.5, "columns": {"prompt": "q", "completion": "a"}}]
    prepared = prepare_data(recipe(base, train, mix=mix, retain=str(general), retain_fraction=0.2), base, home=home)
    assert [(s.role, s.rows, s.per_epoch) for s in prepared.sources] == [
        ("train", 30, 30),
        ("mix", 60, 30),
        ("retain", 5, 15),
    ]  # five of its rows only measure
    assert [n // 100 for n in numbers(prepared, "train", base)] == [0] * 30 + [1] * 60 + [2] * 5
    assert {n // 100 for n in numbers(prepared, "validation", base)} == {0}


def test_a_row_held_out_is_not_learnt_from_another_source(base: BaseModel, tmp_path: Path, home: Home) -> None:
    train = written(tmp_path / "a.jsonl", *[asked(n) for n in range(40)])
    same = written(tmp_path / "b.jsonl", *[asked(n) for n in range(20, 60)])
    prepared = prepare_data(recipe(base, train, mix=[{"source": str(same)}]), base, home=home)
    held, learnt = numbers(prepared, "validation", base), numbers(prepared, "train", base)
    assert len(held) == 10
    assert not set(held) & set(learnt)
    assert set(held) | set(learnt) == set(range(60))


def test_a_source_with_nothing_to_learn_is_named(base: BaseModel, tmp_path: Path, home: Home) -> None:
    train = written(tmp_path / "a.jsonl", *[asked(n) for n in range(40)])
    long = written(tmp_path / "long.jsonl", {"prompt": "the cat " * 90, "completion": "sat"})
    with pytest.raises(DataError, match=r"long.jsonl: no row has anything to learn within data.max_length 48 tokens"):
        prepare_data(recipe(base, train, retain=str(long), max_length=48), base, home=home)


def test_paths_of_all_sources_are_relative_to_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: a\ntask: chat\nbase: b\ndata: {train: t.jsonl, retain: [r.jsonl], mix: [{source: m/*.jsonl}]}\n")
    data = load_recipe(path).data
    assert (data.train, data.retain, data.mix[0].source) == (
        str(tmp_path / "t.jsonl"),
        [str(tmp_path / "r.jsonl")],
        str(tmp_path / "m/*.jsonl"),
    )


@pytest.mark.parametrize(("share", "per_epoch"), [(0.0, 0), (0.001, 1)])
def test_a_share_of_nothing_is_none_and_a_small_one_at_least_a_row(
    base: BaseModel, tmp_path: Path, home: Home, share: float, per_epoch: int
) -> None:
    train = written(tmp_path / "a.jsonl", *[asked(n) for n in range(8)])
    general = written(tmp_path / "c.jsonl", *[asked(n) for n in range(200, 210)])
    chosen = recipe(base, train, retain=str(general), retain_fraction=share, validation_fraction=0)
    prepared = prepare_data(chosen, base, home=home)
    plan = batch_plan(chosen, prepared.sources)
    assert prepared.sources[1].per_epoch == per_epoch
    assert (plan.rows(0) >= 8).sum() == per_epoch


def test_groups_of_a_validation_file_are_not_learnt(base: BaseModel, tmp_path: Path, home: Home) -> None:
    train = written(tmp_path / "a.jsonl", *[asked(n, customer=n % 8) for n in range(40)])
    held = written(tmp_path / "v.jsonl", *[asked(n, customer=str(n % 2)) for n in range(100, 110)])
    prepared = prepare_data(recipe(base, train, validation=str(held), group_by="customer"), base, home=home)
    assert {n % 8 for n in numbers(prepared, "train", base)} == {2, 3, 4, 5, 6, 7}
    assert "10 training rows left out, because they or their group also validate" in prepared.notes


def test_validation_rows_with_nothing_left_after_filtering_are_refused(base: BaseModel, tmp_path: Path, home: Home) -> None:
    long = {"prompt": "the cat " * 90, "completion": "sat"}
    train = written(tmp_path / "a.jsonl", *[asked(n, customer="a") for n in range(30)], *[{**long, "customer": "b"}] * 10)
    for seed in range(5):
        chosen = recipe(base, train, group_by="customer", validation_fraction=0.25, max_length=48)
        chosen = with_overrides(chosen, {"train.seed": seed})
        with pytest.raises(DataError, match="no row that was held out has anything to learn"):
            prepare_data(chosen, base, home=home)


def test_nothing_but_bad_rows_of_classes_is_said_row_by_row(bert: Path, tmp_path: Path, home: Home) -> None:
    base = find_base_model(str(bert), home=home)
    train = tmp_path / "t.jsonl"
    train.write_text("{\n" * 300 + "".join(json.dumps({"text": f"row {n}", "label": "ab"[n % 2]}) + "\n" for n in range(300)))
    settings = {"train": str(train), "validation_fraction": 0, "max_bad_fraction": 0.6}
    tree = {"name": "a", "task": "text-classification", "base": str(bert), "data": settings}
    prepared = prepare_data(parse_recipe(tree, where="test"), base, home=home)
    assert (prepared.bad_rows, prepared.train_rows) == (300, 300)
    with pytest.raises(DataError, match=r"t.jsonl:1: not valid JSON"):
        prepare_data(parse_recipe({**tree, "data": {**settings, "max_bad_fraction": 0}}, where="test"), base, home=home)
