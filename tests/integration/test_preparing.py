"""Data prepared over a real Ray: the same shards as without one, whatever happens to a worker."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from hone.base_model import BaseModel, find_base_model
from hone.data import parts
from hone.errors import DataError, ResourceError
from hone.recipe import parse_recipe
from hone.storage import Home, sha256_file
from training.data import prepare_data
from training.job import PreparedData

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def base(llama: Path, home: Home) -> BaseModel:
    return find_base_model(str(llama), home=home)


def prepare(base: BaseModel, train: Path, home: Home) -> PreparedData:
    data: dict[str, Any] = {"train": str(train), "near_duplicate_rows": 100}
    return prepare_data(parse_recipe({"name": "b", "task": "chat", "base": str(base.folder), "data": data}, where="test"), base, home=home)


def rows(path: Path, count: int) -> Path:
    said = [{"prompt": f"what is {n}?", "completion": f"it is {n} " + "and so on " * 20} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in said))
    return path


def test_many_workers_make_what_one_process_makes(base: BaseModel, tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    train = rows(tmp_path / "rows.jsonl", 2000)
    monkeypatch.setattr(parts, "PART_BYTES", (50_000, 50_000))
    over_ray = prepare(base, train, home)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    here = prepare(base, train, Home(tmp_path / "other"))
    assert len(over_ray.shards) == len(here.shards) > 5
    assert [sha256_file(shard) for shard in over_ray.shards] == [sha256_file(shard) for shard in here.shards]
    assert (over_ray.folder / "report.json").read_bytes() == (here.folder / "report.json").read_bytes()


def test_a_file_that_cannot_be_read_is_named_at_once(base: BaseModel, tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", (10, 10))
    rows(tmp_path / "good.jsonl", 10)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no footer")
    with pytest.raises(DataError, match=r"torn.parquet: cannot be read as parquet"):
        prepare(base, tmp_path, home)


def test_a_base_that_the_nodes_do_not_see_is_one_line(base: BaseModel, tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", (10, 10))
    monkeypatch.setattr("models.tasks.language.load_tokenizer", lambda _: None)
    there = tmp_path / "base"
    shutil.copytree(base.folder, there)
    elsewhere = find_base_model(str(there), home=home)
    shutil.rmtree(there)
    monkeypatch.setattr("training.token_cache.tokenizer_fingerprint", lambda _: "gone")
    with pytest.raises(ResourceError, match=r"node .* does not see .*base; all nodes must mount"):
        prepare(elsewhere, rows(tmp_path / "rows.jsonl", 5), home)


def test_a_killed_worker_is_replaced(base: BaseModel, tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", (200_000, 200_000))
    train = rows(tmp_path / "rows.jsonl", 20_000)
    killed: list[int] = []
    threading.Thread(target=_kill_one, args=(home, killed), daemon=True).start()
    prepared = prepare(base, train, home)
    assert len(killed) == 1
    assert prepared.train_rows + prepared.validation_rows == 20_000


def _kill_one(home: Home, killed: list[int]) -> None:
    """The first of our own workers that has begun to write a shard."""
    mine = psutil.Process()
    while not killed:
        for process in mine.children(recursive=True):
            try:
                opened = [file.path for file in process.open_files()]
            except psutil.Error:
                continue
            if process.pid != mine.pid and any(path.startswith(str(home.datasets)) and path.endswith(".arrow") for path in opened):
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)
                return
        time.sleep(0.02)
