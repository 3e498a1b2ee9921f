"""Prepared data: once for the same inputs, anew for any other, and never half."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hone.base_model import BaseModel, find_base_model
from hone.chat import CHATML
from hone.data.cache import Entry, entries
from hone.errors import DataError
from hone.recipe import Recipe, parse_recipe
from hone.storage import Home
from models.tasks.tokenizer import load_tokenizer
from training.data import prepare_data
from training.token_rows import TokenRows


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"what is {n}?", "completion": f"the number {n}"}) + "\n" for n in range(40)))
    return path


@pytest.fixture
def base(llama: Path, home: Home) -> BaseModel:
    return find_base_model(str(llama), home=home)


def recipe(base: BaseModel, rows: Path, **data: Any) -> Recipe:
    tree = {"name": "bot", "task": "chat", "base": str(base.folder), "data": {"train": str(rows), "validation_fraction": 0.25, **data}}
    return parse_recipe(tree, where="test")


def labelled(path: Path, *labels: str) -> Path:
    path.write_text("".join(json.dumps({"text": f"{path.stem} row {n}", "label": label}) + "\n" for n, label in enumerate(labels)))
    return path


def splits(home: Home) -> list[Entry]:
    return [entry for entry in entries(home) if entry.kind != "tokens"]


def test_the_targets_of_a_row_are_the_answers_tokens(base: BaseModel, rows: Path, home: Home) -> None:
    prepared = prepare_data(recipe(base, rows), base, home=home)
    assert (prepared.train_rows, prepared.validation_rows) == (30, 10)
    tokens = TokenRows(prepared, "train")
    first = tokens.take(tokens.lengths[:1] * 0)[0]
    said = load_tokenizer(base.folder).decode([token for token in first["labels"] if token >= 0])
    assert said.startswith("the number ")
    assert said.endswith("<|im_end|>")
    assert tokens.n_targets[0] == sum(token >= 0 for token in first["labels"])


def test_train_and_validation_share_no_row(base: BaseModel, rows: Path, home: Home) -> None:
    prepared = prepare_data(recipe(base, rows), base, home=home)
    train, validation = TokenRows(prepared, "train"), TokenRows(prepared, "validation")
    texts = [{tuple(r["input_ids"]) for r in part.take(part.lengths.argsort())} for part in (train, validation)]
    assert len(texts[0] | texts[1]) == 40


def test_the_same_inputs_are_prepared_once(base: BaseModel, rows: Path, home: Home) -> None:
    first = prepare_data(recipe(base, rows), base, home=home)
    made = first.shards[0].stat().st_mtime_ns
    assert prepare_data(recipe(base, rows), base, home=home) == first
    assert first.shards[0].stat().st_mtime_ns == made


@pytest.mark.parametrize("change", ["byte", "setting"])
def test_any_other_input_is_prepared_anew(base: BaseModel, rows: Path, home: Home, change: str) -> None:
    first = prepare_data(recipe(base, rows), base, home=home)
    if change == "byte":
        rows.write_text(rows.read_text().replace("what is 7", "what is 8"))
    second = prepare_data(recipe(base, rows, **({"max_length": 48} if change == "setting" else {})), base, home=home)
    assert second.folder != first.folder


def test_bad_rows_leave_nothing_behind(base: BaseModel, rows: Path, home: Home) -> None:
    rows.write_text(rows.read_text() + "{\n")
    with pytest.raises(DataError, match=r"rows.jsonl:41: not valid JSON"):
        prepare_data(recipe(base, rows), base, home=home)
    assert splits(home) == []


def test_rows_cut_before_their_answer_are_counted_and_left_out(base: BaseModel, tmp_path: Path, home: Home) -> None:
    rows = tmp_path / "long.jsonl"
    short, long = {"prompt": "hi", "completion": "x"}, {"prompt": "the cat " * 60, "completion": "sat"}
    rows.write_text("".join(json.dumps(row) + "\n" for row in (short, long, short, short)))
    prepared = prepare_data(recipe(base, rows, max_length=40, validation_fraction=0), base, home=home)
    assert (prepared.train_rows, prepared.cut_rows, prepared.dropped_rows, prepared.validation_rows) == (3, 0, 1, 0)


def test_a_file_with_nothing_left_to_learn_is_refused(base: BaseModel, tmp_path: Path, home: Home) -> None:
    rows = tmp_path / "long.jsonl"
    rows.write_text(json.dumps({"prompt": "the cat " * 60, "completion": "sat"}) + "\n")
    with pytest.raises(DataError, match=r"no row has anything to learn within data\.max_length 40"):
        prepare_data(recipe(base, rows, max_length=40, validation_fraction=0), base, home=home)
    assert splits(home) == []


def test_classes_that_training_never_names_are_refused(bert: Path, tmp_path: Path, home: Home) -> None:
    base = find_base_model(str(bert), home=home)
    train, validation = labelled(tmp_path / "t.jsonl", "a", "b"), labelled(tmp_path / "v.jsonl", "a", "c")
    chosen = recipe(base, train, validation=str(validation)).model_copy(update={"task": "text-classification"})
    with pytest.raises(DataError, match="validation has classes that training never names: 'c' in 1 rows; training names a, b"):
        prepare_data(chosen, base, home=home)


def test_one_class_is_not_enough(bert: Path, tmp_path: Path, home: Home) -> None:
    base = find_base_model(str(bert), home=home)
    chosen = recipe(base, labelled(tmp_path / "t.jsonl", *"aaaa")).model_copy(update={"task": "text-classification"})
    with pytest.raises(DataError, match="name only one class, 'a'"):
        prepare_data(chosen, base, home=home)


def test_several_files_of_several_formats_are_one_data_set(base: BaseModel, rows: Path, tmp_path: Path, home: Home) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.csv").write_text("instruction,output\nsay one,one\nsay two,two\n")
    prepared = prepare_data(recipe(base, rows, train=[str(rows), str(tmp_path / "more")], validation_fraction=0), base, home=home)
    assert prepared.train_rows == 42
    assert prepared.formats == ["prompt and completion", "Alpaca"]


def test_bad_rows_are_left_out_only_where_the_recipe_allows_as_many(base: BaseModel, rows: Path, home: Home) -> None:
    rows.write_text(rows.read_text() + "{\n")
    with pytest.raises(DataError, match=r"rows.jsonl:41: not valid JSON"):
        prepare_data(recipe(base, rows, max_bad_fraction=0.02), base, home=home)
    prepared = prepare_data(recipe(base, rows, max_bad_fraction=0.03), base, home=home)
    assert (prepared.bad_rows, prepared.train_rows + prepared.validation_rows) == (1, 40)


def test_an_assistants_message_of_weight_0_is_read_and_not_learnt(base: BaseModel, tmp_path: Path, home: Home) -> None:
    turns = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "not this", "weight": 0},
        {"role": "user", "content": "second"},
        {"role": "assistant", "content": "but this"},
    ]
    rows = tmp_path / "weights.jsonl"
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    prepared = prepare_data(recipe(base, rows, validation_fraction=0), base, home=home)
    tokens, tokenizer = TokenRows(prepared, "train").take(np.array([0]))[0], load_tokenizer(base.folder)
    assert "not this" in tokenizer.decode(tokens["input_ids"])
    assert tokenizer.decode([token for token in tokens["labels"] if token >= 0]).strip() == "but this<|im_end|>"


def test_validation_rows_that_stand_in_training_stop_a_run_unless_allowed(base: BaseModel, rows: Path, home: Home) -> None:
    leak = rows.with_name("leak.jsonl")
    leak.write_text("".join(rows.read_text().splitlines(keepends=True)[7:9]))
    with pytest.raises(DataError, match=r"rows of validation that also stand in training: 2 .*leak.jsonl:1 is .*rows.jsonl:8.; mend"):
        prepare_data(recipe(base, rows, validation=str(leak)), base, home=home)
    assert splits(home) == []
    assert prepare_data(recipe(base, rows, validation=str(leak), stop_on=[]), base, home=home).findings["leakage"] == 2


def test_a_row_that_stands_there_twice_is_held_out_with_its_twin(base: BaseModel, rows: Path, home: Home) -> None:
    rows.write_text(rows.read_text() * 2)
    prepared = prepare_data(recipe(base, rows, validation_fraction=0.5), base, home=home)
    train, validation = TokenRows(prepared, "train"), TokenRows(prepared, "validation")
    texts = [{tuple(r["input_ids"]) for r in part.take(part.lengths.argsort())} for part in (train, validation)]
    assert len(texts[0]) == len(texts[1]) == 20
    assert not texts[0] & texts[1]


def test_a_base_without_a_chat_template_is_said_to_get_chatml(base: BaseModel, rows: Path, tmp_path: Path, home: Home) -> None:
    said = prepare_data(recipe(base, rows), base, home=home).notes
    shutil.copytree(base.folder, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(CHATML)
    with_template = find_base_model(str(tmp_path / "base"), home=home)
    silent = prepare_data(recipe(with_template, rows), with_template, home=home).notes
    assert (said, silent) == (["the base has no chat template, so ChatML is used"], [])
