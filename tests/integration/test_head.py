"""The head of the Ray cluster is killed in the middle of a run: the driver says so and ends, and the run goes on with another Ray."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.runs import find_run
from hone.run_folder import attempts, read_events
from hone.storage import Home
from tests.disturbed import assert_proven, last_step, losses_of, wait_for, write_rows
from tests.integration.test_training import tree

pytestmark = [
    pytest.mark.skipif(not os.environ.get("HONE_TEST_HEAVY"), reason="takes four minutes: make test-heavy"),
    pytest.mark.timeout(1200),
]

STEPS = 400
TRAIN = {"max_steps": STEPS, "num_train_epochs": 500, "save_steps": 10, "eval_steps": STEPS}
KILLED = {"its control store": ["gcs_server"], "all of it": ["gcs_server", "raylet"]}


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray of this test's own, whose processes give up a head that is gone after 20 s instead of 60."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "20")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def chosen(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree(llama, write_rows(folder), train=TRAIN)))
    return path


@pytest.fixture(scope="module")
def quiet_losses(chosen: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Of the run that nothing happens to."""
    home = Home(tmp_path_factory.mktemp("quiet"))
    assert train(home, str(chosen), "--run-id", "quiet").wait(400) == 0
    return losses_of(home.runs / "quiet")


@pytest.mark.parametrize("killed", KILLED.values(), ids=KILLED)
def test_a_run_whose_head_is_killed_ends_with_a_reason_and_goes_on_with_another(
    chosen: Path, home: Home, head: Any, killed: list[str], quiet_losses: dict[int, float]
) -> None:
    folder = home.runs / "r1"
    driver = train(home, str(chosen), "--run-id", "r1", "--address", head.address, stderr=subprocess.PIPE)
    wait_for(lambda: driver.poll() is not None or last_step(folder) >= 25)
    for name in killed:
        os.kill(head.head_node.all_processes[name][0].process.pid, signal.SIGKILL)
    _, said = driver.communicate(timeout=120)
    assert driver.returncode == 1
    why = f"the Ray head at {head.address} has not answered for 15 s; `hone runs resume r1` goes on with it on another Ray"
    assert f"hone: {why}" in said.splitlines()
    run = find_run("r1", home=home)
    assert (run.status, run.result) == ("failed", why)
    assert run.events[-1]["event"] != "attempt"
    assert any(event["event"] == "head_lost" for event in run.events)

    assert train(home, "--resume", "r1").wait(400) == 0
    assert find_run("r1", home=home).status == "succeeded"
    assert len(attempts(folder)) == 2
    assert 20 <= attempts(folder)[1].step < STEPS, "what was saved before the head was gone, and what workers saved without it"
    assert not any(event["event"] == "stalled" for event in read_events(folder))
    assert losses_of(folder) == pytest.approx(quiet_losses, abs=1e-4)
    assert_proven(folder, steps=STEPS)
    assert subprocess.run([sys.executable, "-m", "cluster.cli", "runs", "verify", "r1", "--home", home.root], check=False).returncode == 0


def train(home: Home, *argv: str, stderr: int | None = None) -> subprocess.Popen[str]:
    """A driver as a process of its own, as `hone train` and `hone runs resume` start it."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "training", "--home", str(home.root), "--quiet", *argv]
    return subprocess.Popen(command, env=environment, stderr=stderr, text=True)
