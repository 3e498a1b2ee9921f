"""`hone data check` as it is typed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

GOOD = [{"prompt": f"what is {n} times {n + 3}?", "completion": f"it is {n * (n + 3)}"} for n in range(30)]


def hone(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "cluster.cli", *map(str, args)], capture_output=True, text=True, check=False)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    return path


def test_good_rows_are_described(rows: Path) -> None:
    done = hone("data", "check", rows, "--near", 0)
    assert (done.returncode, done.stderr) == (0, "")
    assert "training: 30 rows in 1 file (30 prompt and completion)" in done.stdout
    assert "Nothing to remark." in done.stdout


def test_bad_rows_end_with_1_and_are_named(rows: Path) -> None:
    rows.write_text(rows.read_text() + '{"messages": []}\n')
    done = hone("data", "check", rows, "--near", 0)
    assert done.returncode == 1
    assert f'{rows}:31: "messages" is empty' in done.stdout


def test_json_names_what_stops_a_training(rows: Path) -> None:
    done = hone("data", "check", rows, "--validation", rows, "--near", 0, "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["stops"]) == (1, ["leakage"])
    assert report["train"]["rows"] == report["findings"][0]["count"] == 30


def test_a_redacted_copy_holds_no_private_data_and_replaces_no_file(rows: Path, tmp_path: Path) -> None:
    rows.write_text(json.dumps({"prompt": "who?", "completion": "ask a.b@example.org"}) + "\n")
    target = tmp_path / "clean.jsonl"
    assert hone("data", "check", rows, "--redact", target).returncode == 0
    assert json.loads(target.read_text())["messages"][1]["content"] == "ask [EMAIL]"
    again = hone("data", "check", rows, "--redact", target)
    assert (again.returncode, again.stderr) == (1, f"hone: {target}: is already there; name another file\n")


def test_a_recipe_is_checked_with_its_bases_tokens(rows: Path, llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: a\ntask: chat\nbase: {llama}\ndata: {{train: {rows.name}, max_length: 16, near_duplicate_rows: 0}}\n")
    done = hone("data", "check", recipe, "--home", tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert "tokens; median" in done.stdout
    assert "rows with nothing to learn within max_length: " in done.stdout


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = hone("data", "check", tmp_path / "none.jsonl")
    assert (done.returncode, done.stderr) == (1, f"hone: {tmp_path}/none.jsonl: no such data file\n")
