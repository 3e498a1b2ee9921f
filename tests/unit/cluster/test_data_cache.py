"""`hone data cache` as it is typed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hone.base_model import find_base_model
from hone.recipe import parse_recipe
from hone.storage import Home
from hone.store import Store
from training.data import prepare_data
from training.job import PreparedData


def hone(home: Home, *args: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "cluster.cli", "data", "cache", *map(str, args), "--home", str(home.root)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


@pytest.fixture
def prepared(llama: Path, tmp_path: Path, home: Home) -> PreparedData:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"what is {n}?", "completion": f"it is {n}"}) + "\n" for n in range(40)))
    tree = {"name": "bot", "task": "chat", "base": str(llama), "data": {"train": str(path)}}
    return prepare_data(parse_recipe(tree, where="test"), find_base_model(str(llama), home=home), home=home)


def test_it_lists_what_was_prepared_and_of_what(prepared: PreparedData, home: Home) -> None:
    assert hone(Home(home.root / "other"), "list").stdout == "nothing prepared yet\n"
    done = hone(home, "list")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {line.split()[1] for line in lines[1:3]} == {"tokens", "split"}
    assert all("rows.jsonl" in line and " 40 " in line for line in lines[1:3])
    listed = json.loads(hone(home, "list", "--json").stdout)
    assert {entry["folder"] for entry in listed} == {str(prepared.folder), str(prepared.shards[0].parent)}


def test_it_clears_all_or_one_and_says_what_is_not_there(prepared: PreparedData, home: Home) -> None:
    missing = hone(home, "clear", "abcdef")
    assert (missing.returncode, missing.stderr) == (1, "hone: abcdef: nothing prepared has that digest; see `hone data cache list`\n")
    assert hone(home, "clear", "--unused-for", 1).stderr == "nothing to remove\n"
    assert hone(home, "clear", prepared.folder.name[:10]).stdout.startswith("removed 1, ")
    assert (prepared.folder.exists(), prepared.shards[0].exists()) == (False, True)
    assert hone(home, "clear").stdout.startswith("removed 1, ")
    assert not prepared.shards[0].exists()


def test_what_was_used_since_a_running_job_began_is_kept(prepared: PreparedData, home: Home) -> None:
    store = Store(home.store_url)
    store.add_job("r1", kind="train", recipe="r.yaml", status="running")
    done = hone(home, "clear")
    assert "kept 2 that running jobs may read: r1" in done.stderr
    assert prepared.shards[0].exists()
    an_hour_ago = time.time() - 3600
    os.utime(prepared.folder, (an_hour_ago, an_hour_ago))
    assert "kept 1 that running jobs may read: r1" in hone(home, "clear").stderr
    assert not prepared.folder.exists()
    store.move_job("r1", "succeeded")
    store.close()
    assert hone(home, "clear").stdout.startswith("removed 1, ")
