"""The floor and the command line stay light: whatever is heavy is loaded by the command that needs it."""

import subprocess
import sys

import pytest

HEAVY = {"ray", "torch", "transformers", "fastapi", "peft", "deepspeed", "pyarrow"}


def loaded_by(statement: str) -> set[str]:
    """Heavy packages in sys.modules after `statement`, in an interpreter of its own."""
    script = f"import sys\n{statement}\nsys.stderr.write('loaded:' + ','.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return HEAVY & set(done.stderr.rpartition("loaded:")[2].split(","))


@pytest.mark.parametrize(
    "statement",
    [
        "import hone",
        "import hone.recipe, hone.data.rows, hone.registry, hone.store, hone.base_model, hone.chat",
        "import cluster.cli",
        "import cluster.jobs, cluster.deploy, cluster.connect, cluster.doctor, cluster.demo, cluster.package, cluster.child",
    ],
)
def test_importing_loads_nothing_heavy(statement: str) -> None:
    assert loaded_by(statement) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["jobs", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    statement = f"from cluster.cli import app\ntry:\n    app({arguments!r})\nexcept SystemExit as end:\n    assert not end.code"
    assert loaded_by(statement) == set()
