"""Tokens are made once, whoever wants them, and never read half."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hone.base_model import BaseModel, find_base_model
from hone.data import parts
from hone.data.cache import clear, entries
from hone.data.files import find_files
from hone.data.parts import Part, bundled
from hone.errors import DataError
from hone.recipe import Recipe, parse_recipe
from hone.storage import Home
from training.data import prepare_data
from training.token_rows import Shards, TokenRows

PREPARE = """
import sys
from hone.base_model import find_base_model
from hone.recipe import Recipe
from hone.storage import Home
from training.data import prepare_data
recipe, home = Recipe.model_validate_json(sys.argv[1]), Home(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
print(prepare_data(recipe, find_base_model(recipe.base, home=home), home=home).model_dump_json())
"""
LINE = json.dumps({"prompt": "what is it?", "completion": "it is a thing of " + "many words " * 20})


@pytest.fixture
def base(llama: Path, home: Home) -> BaseModel:
    return find_base_model(str(llama), home=home)


def rows(path: Path, count: int) -> Path:
    path.write_text("".join(LINE.replace("thing", f"thing {n}") + "\n" for n in range(count)))
    return path


def recipe(base: BaseModel, train: Path, **data: Any) -> Recipe:
    settings = {"train": str(train), "validation_fraction": 0.1, "near_duplicate_rows": 0, **data}
    return parse_recipe({"name": "bot", "task": "chat", "base": str(base.folder), "data": settings}, where="test")


def preparing(chosen: Recipe, home: Home) -> "subprocess.Popen[str]":
    """A process that prepares as soon as it is sent a line."""
    argv = [sys.executable, "-c", PREPARE, chosen.model_dump_json(), str(home.root)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes_that_want_the_same_make_it_once(base: BaseModel, tmp_path: Path, home: Home) -> None:
    chosen = recipe(base, rows(tmp_path / "rows.jsonl", 4000))
    both = [preparing(chosen, home) for _ in range(2)]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120) for process in both]
    assert said[0][0] == said[1][0], said
    assert sum("another process is preparing the same data" in err for _, err in said) == 1
    assert [(entry.kind, entry.rows) for entry in entries(home)] == [("split", 4000), ("tokens", 4000)]


def test_one_killed_half_way_leaves_nothing_that_is_read(base: BaseModel, tmp_path: Path, home: Home) -> None:
    chosen = recipe(base, rows(tmp_path / "rows.jsonl", 20_000))
    process = preparing(chosen, home)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    tokens = home.datasets / "tokens"
    while not any(path.stat().st_size for path in tokens.glob(".*/shard-*.arrow")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    [left] = entries(home)
    assert left.kind == "unfinished"
    assert left.bytes > 0
    prepared = prepare_data(chosen, base, home=home)
    assert len(Shards(prepared.shards)) == 20_000
    removed, kept = clear([left], in_use_since=math.inf)
    assert ([entry.kind for entry in removed], kept) == (["unfinished"], [])
    assert len(Shards(prepared.shards)) == 20_000


@pytest.mark.parametrize("change", ["data", "tokenizer", "template", "max_length", "columns", "name"])
def test_whatever_shapes_the_tokens_makes_new_ones(base: BaseModel, tmp_path: Path, home: Home, change: str) -> None:
    train = rows(tmp_path / "rows.jsonl", 30)
    first = prepare_data(recipe(base, train), base, home=home)
    settings: dict[str, Any] = {}
    if change == "data":
        content = bytearray(train.read_bytes())
        content[-10] ^= 1
        train.write_bytes(content)
    elif change == "name":
        train = train.rename(tmp_path / "other.jsonl")
    elif change in ("max_length", "columns"):
        settings = {"max_length": 100} if change == "max_length" else {"columns": {"prompt": "completion"}}
    else:
        folder = tmp_path / "base"
        shutil.copytree(base.folder, folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config |= (
            {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"} if change == "template" else {"add_prefix_space": True}
        )
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        base = find_base_model(str(folder), home=home)
    second = prepare_data(recipe(base, train, **settings), base, home=home)
    assert not set(first.shards) & set(second.shards)


def test_another_split_of_the_same_tokens_makes_no_new_ones(base: BaseModel, tmp_path: Path, home: Home) -> None:
    train = rows(tmp_path / "rows.jsonl", 30)
    first, second = (prepare_data(recipe(base, train, validation_fraction=share), base, home=home) for share in (0.1, 0.3))
    assert first.shards == second.shards
    assert (first.validation_rows, second.validation_rows) == (3, 9)


def test_a_file_in_many_parts_has_the_same_rows_and_places(
    base: BaseModel, tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = rows(tmp_path / "rows.jsonl", 300)
    train.write_text(train.read_text() + train.read_text().splitlines()[250] + "\n")
    chosen = recipe(base, train, validation_fraction=0)
    whole = prepare_data(chosen, base, home=home)
    monkeypatch.setattr(parts, "PART_BYTES", (5000, 5000))
    parted = prepare_data(chosen, base, home=Home(tmp_path / "other"))
    assert (len(whole.shards), len(parted.shards) > 10) == (1, True)
    one, many = (TokenRows(each, "train") for each in (whole, parted))
    assert len(one) == len(many) == 301
    assert all(
        (a["input_ids"] == b["input_ids"]).all()
        for a, b in zip(one.take(one.lengths.argsort()), many.take(one.lengths.argsort()), strict=True)
    )
    reports = [json.loads((each.folder / "report.json").read_text()) for each in (whole, parted)]
    assert reports[0] == reports[1]
    assert reports[1]["findings"][0]["where"] == [f"{train}:301 is {train}:251"]


def test_clearing_keeps_what_was_used_since_a_running_job_began(base: BaseModel, tmp_path: Path, home: Home) -> None:
    old, new = (prepare_data(recipe(base, rows(tmp_path / name, 30)), base, home=home) for name in ("a.jsonl", "b.jsonl"))
    for folder in (old.folder, old.shards[0].parent):
        os.utime(folder, (1000, 1000))
    removed, kept = clear(entries(home), in_use_since=2000)
    assert {entry.folder for entry in kept} == {new.folder, new.shards[0].parent}
    assert {entry.folder for entry in removed} == {old.folder, old.shards[0].parent}
    assert not old.folder.exists()


def test_clearing_goes_on_where_another_was_killed_or_was_faster(base: BaseModel, tmp_path: Path, home: Home) -> None:
    prepared = prepare_data(recipe(base, rows(tmp_path / "a.jsonl", 30)), base, home=home)
    found = entries(home)
    left = prepared.folder.with_name(f".{prepared.folder.name}.removed.x")
    shutil.copytree(prepared.folder, left)
    shutil.rmtree(prepared.shards[0].parent)
    removed, _ = clear(found, in_use_since=math.inf)
    assert [entry.folder for entry in removed] == [prepared.folder]
    os.utime(left, (1000, 1000))
    assert [entry.kind for entry in entries(home)] == ["unfinished"]


def test_a_file_that_is_written_to_meanwhile_makes_no_tokens(
    base: BaseModel, tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = rows(tmp_path / "rows.jsonl", 30)

    def written_to(*_: Any, **__: Any) -> list[list[Part]]:
        made = bundled(find_files(str(train)))
        rows(train, 31)
        return made

    monkeypatch.setattr("training.token_cache.bundled", written_to)
    with pytest.raises(DataError, match=r"rows.jsonl: was changed while it was read; start again"):
        prepare_data(recipe(base, train), base, home=home)
    assert entries(home) == []


def test_small_files_share_a_shard_and_keep_their_places(base: BaseModel, tmp_path: Path, home: Home) -> None:
    (tmp_path / "many").mkdir()
    for n in range(30):
        rows(tmp_path / "many" / f"{n:02}.jsonl", n + 1)
    prepared = prepare_data(recipe(base, tmp_path / "many", validation_fraction=0), base, home=home)
    assert len(prepared.shards) == 1
    assert prepared.train_rows == 465
    report = json.loads((prepared.folder / "report.json").read_text())
    assert report["train"]["files"] == 30
    first = report["findings"][0]["where"][0]
    assert first == f"{tmp_path}/many/01.jsonl:1 is {tmp_path}/many/00.jsonl:1"


def test_another_picture_under_the_same_name_is_noticed(vit: Path, tmp_path: Path, home: Home) -> None:
    from PIL import Image

    for n in range(8):
        Image.new("RGB", (16, 16), (n, 0, 0)).save(tmp_path / f"{n}.png")
    train = tmp_path / "rows.jsonl"
    train.write_text("".join(json.dumps({"image": f"{n}.png", "label": "ab"[n % 2]}) + "\n" for n in range(8)))
    tree = {"name": "p", "task": "image-classification", "base": str(vit), "data": {"train": str(train), "validation_fraction": 0}}
    chosen, found = parse_recipe(tree, where="test"), find_base_model(str(vit), home=home)
    first, again = (prepare_data(chosen, found, home=home) for _ in range(2))
    Image.new("RGB", (16, 16), (0, 200, 0)).save(tmp_path / "3.png")
    other = prepare_data(chosen, found, home=home)
    assert first.digest == again.digest != other.digest
    taken = TokenRows(other, "train").take(np.arange(8))
    assert max(np.frombuffer(row["content"], dtype=np.uint8).max() for row in taken) == 200
