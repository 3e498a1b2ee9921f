"""Whatever a user gets wrong is said in one line, with exit code 1, before anything is started."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.cluster.conftest import Hone

CLOSED = "http://127.0.0.1:9"
"""The discard port, where nothing listens."""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml: no such recipe file"),
        (["train", "recipe.yaml", "optim.learning_rat=1"], "did you mean optim.learning_rate?"),
        (["train", "recipe.yaml", "optim"], "write KEY=VALUE"),
        (["train", "recipe.yaml", "--home", "s3://bucket/home"], "object store"),
        (["tune", "recipe.yaml"], "no search: section"),
        (["submit", "recipe.yaml", "--address", CLOSED, "--tune"], "no search: section"),
        (["submit", "recipe.yaml", "--address", CLOSED], f"{CLOSED}: no Ray dashboard answers there"),
        (["submit", "recipe.yaml", "--address", "ray://127.0.0.1:10001"], "give the URL of the Ray dashboard"),
        (["submit", "recipe.yaml", "--address", CLOSED, "--working-dir", "elsewhere"], "is not below the working directory"),
        (["submit", "recipe.yaml", "data.train=../t.jsonl", "--address", CLOSED], "data.train: ../t.jsonl leads out of"),
        (["jobs", "list", "--address", CLOSED], "no Ray dashboard answers there"),
        (["jobs", "logs", "nothing"], "no job 'nothing'"),
        (["jobs", "stop", "nothing"], "no job 'nothing'"),
        (["adapters", "show", "nobody"], "no adapter or alias 'nobody'"),
        (["adapters", "rm", "NOT A NAME"], "is not an adapter reference"),
        (["adapters", "rm", "bot"], "name the version to remove"),
        (["adapters", "alias", "prod"], "give either a TARGET to point it at, or --rm"),
        (["adapters", "alias", "prod", "--rm"], "no alias 'prod'"),
        (["recipe", "init", "recipe.yaml"], "is already there"),
        (["recipe", "show", "nowhere.yaml"], "no such recipe file"),
        (["serve", "--base", "./nowhere"], "no such base model folder"),
        (["serve"], "--base MODEL"),
        (["serve", "--recipe", "nowhere.yaml"], "no such recipe file"),
        (["serve", "--base", "./nowhere", "--host", "0.0.0.0"], "hone keys create"),
        (["serve", "--base", "./nowhere", "--address", CLOSED], "no Ray dashboard answers there"),
        (["demo", "--base", "./nowhere"], "no such base model folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(hone: Hone, recipe_file: Path, arguments: list[str], said: str) -> None:
    done = hone(*arguments)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("hone: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert recipe_file.parent.joinpath("recipe.yaml").read_text().startswith("name: small")


def test_each_wrong_key_of_a_recipe_has_its_own_line(hone: Hone, recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text() + "optim:\n  learning_rat: 1\ntrain:\n  seeed: 2\n")
    done = hone("train", "recipe.yaml")
    assert done.returncode == 1
    assert [line.partition(": ")[0] for line in done.stderr.splitlines()] == ["hone", "recipe.yaml:9"]
    assert "recipe.yaml:7: optim.learning_rat: unknown key" in done.stderr


def test_a_port_in_use_is_said_before_anything_starts(hone: Hone) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for command in (["serve", "--base", "./nowhere"], ["demo"]):
            done = hone(*command, "--port", str(port))
            assert (done.returncode, done.stderr) == (
                1,
                f"hone: port {port} on 127.0.0.1: already in use; choose another port with --port\n",
            )


def test_a_token_file_that_is_not_there_is_one_line(hone: Hone) -> None:
    done = hone("jobs", "list", "--address", CLOSED, RAY_AUTH_TOKEN_PATH="/nowhere/token")
    assert done.returncode == 1
    assert done.stderr == "hone: RAY_AUTH_TOKEN_PATH /nowhere/token: cannot be read (No such file or directory)\n"


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    line = f"{sys.executable} -m cluster.cli recipe schema | head -n 1"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("{\n", "")
