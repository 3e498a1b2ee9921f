"""What travels with a submitted job."""

import os
import zipfile
from pathlib import Path

import pytest

from cluster.connect import auth_token
from cluster.dashboard import checked_address
from cluster.entrypoint import training_argv
from cluster.package import check_paths_travel, pack
from hone.errors import RecipeError, ResourceError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "work"
    for name in (".git/config", "recipe.yaml", "data/train.jsonl", "training.py", ".venv/x", "my-home/store.sqlite3", ".gitignore"):
        path = made / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("*.jsonl\n")
    return made


def test_data_travels_even_if_git_ignores_it_and_code_and_the_home_stay(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "job.zip"
    pack(folder, archive, home=folder / "my-home")
    assert sorted(zipfile.ZipFile(archive).namelist()) == [".gitignore", "data/train.jsonl", "recipe.yaml"]


def test_a_folder_that_is_too_large_names_its_largest_files(folder: Path, tmp_path: Path) -> None:
    (folder / "data" / "big.jsonl").write_bytes(os.urandom(3 * 2**20))
    with pytest.raises(ResourceError, match=r"more than 1 MiB as a zip.*largest files are data/big\.jsonl \(3 MiB\)"):
        pack(folder, tmp_path / "job.zip", home=folder / "my-home", limit=2**20)


def test_size_counts_as_zipped(folder: Path, tmp_path: Path) -> None:
    (folder / "data" / "big.jsonl").write_bytes(b'{"messages": []}\n' * 200_000)
    assert len(pack(folder, tmp_path / "job.zip", home=folder / "my-home", limit=2**20)) == 4


def test_paths_inside_travel_absolute_ones_stay_and_others_are_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "work" / "recipe.yaml"
    recipe.parent.mkdir()
    recipe.write_text("name: a\ntask: chat\nbase: org/model\ndata: {train: train.jsonl, validation: /mnt/v.jsonl}\n")
    assert check_paths_travel(recipe, [], recipe.parent) == ["data.validation /mnt/v.jsonl"]
    assert check_paths_travel(recipe, ["base=/mnt/base", "data.validation=v.jsonl"], recipe.parent) == ["base /mnt/base"]
    with pytest.raises(RecipeError, match=r"base: \.\./base leads out of .*--working-dir"):
        check_paths_travel(recipe, ["base=../base"], recipe.parent)
    assert check_paths_travel(recipe, ["base=../base", "data.validation=v.jsonl"], tmp_path) == []
    recipe.write_text("name: a\ntask: chat\nbase: o/m\ndata: {train: t.jsonl, retain: /mnt/r, mix: [{source: [/mnt/a, b.jsonl]}]}\n")
    assert check_paths_travel(recipe, [], recipe.parent) == ["data.retain /mnt/r", "data.mix[0].source /mnt/a"]


def test_the_command_line_has_one_word_for_each_argument() -> None:
    argv = training_argv("a b.yaml", ["name=x; rm -rf y"], is_search=True, run_id="r-1", python=("python",))
    assert argv == ["python", "-m", "training", "a b.yaml", "name=x; rm -rf y", "--search", "--run-id", "r-1"]


def test_a_dashboard_address_is_http_and_may_leave_that_out() -> None:
    assert checked_address("head:8265/") == "http://head:8265"
    assert checked_address("https://ray.example/prefix/") == "https://ray.example/prefix"
    with pytest.raises(ResourceError, match="give the URL of the Ray dashboard"):
        checked_address("file:///etc/passwd")


def test_a_token_comes_from_the_environment_and_then_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("from-file\n")
    named = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": str(file)}
    assert auth_token({**named, "RAY_AUTH_TOKEN": "direct"}) == "direct"
    assert auth_token(named) == "from-file"
    assert auth_token({**named, "RAY_AUTH_MODE": "disabled"}) is None
