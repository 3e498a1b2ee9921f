"""Several Ray nodes: one is drained and dies, the run goes on with what is left, and takes up the node that joins."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hone.run_folder import attempts, read_events
from hone.storage import Home
from tests.disturbed import Training, assert_proven, assert_same_losses, last_step, wait_for, write_rows
from tests.integration.test_training import recipe
from training.launch import fit, prepare_job

pytestmark = [
    pytest.mark.skipif(not os.environ.get("HONE_TEST_HEAVY"), reason="takes five minutes: make test-heavy"),
    pytest.mark.timeout(1200),
]

STEPS = 4000
TRAIN = {"max_steps": STEPS, "num_train_epochs": 5000, "save_steps": STEPS // 2, "eval_steps": STEPS}
"""No checkpoint is due before half of the run is over."""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that runs nothing, and two nodes of a CPU each."""
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.nodes = [made.add_node(num_cpus=1), made.add_node(num_cpus=1)]
    ray.init(address=made.address, log_to_driver=False, logging_level="warning")
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_node_is_taken_away_and_another_comes(llama: Path, tmp_path: Path, home: Home, cluster: Any) -> None:
    scaling = {"num_workers": [1, 2], "resize_every_s": 5, "max_failures": 5}
    chosen = recipe(llama, write_rows(tmp_path), train=TRAIN, scaling=scaling)
    quiet = prepare_job(chosen, home=home, run_id="quiet")
    fit(quiet)
    training = Training(prepare_job(chosen, home=home, run_id="r1"))
    folder = training.job.folder
    training.start()
    wait_for(lambda: training.error or last_step(folder) >= 40)
    drain(cluster.nodes[1], address=cluster.address)
    wait_for(lambda: training.error or any(event["event"] == "checkpoint" for event in read_events(folder)))
    os.kill(raylet_of(cluster.nodes[1]), signal.SIGKILL)
    wait_for(lambda: training.error or (len(attempts(folder)) > 1 and last_step(folder) > attempts(folder)[1].step + 40))
    cluster.add_node(num_cpus=1)
    training.join(timeout=400)
    assert training.error is None
    begun = attempts(folder)
    assert [attempt.world_size for attempt in begun[:2]] == [2, 1]
    assert 40 <= begun[1].step < STEPS // 2, "what was saved when the node was to go"
    assert begun[-1].world_size == 2
    assert_same_losses(folder, quiet.folder, until=attempts(folder)[1].step + 50)
    assert_proven(folder, steps=STEPS)


def drain(node: Any, *, address: str) -> None:
    """Tell Ray that a node is about to be taken away, as a cloud's notice does."""
    about = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken away", "--deadline-remaining-seconds", "60"]
    argv = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address, "--node-id", node.node_id, *about]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


def raylet_of(node: Any) -> int:
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid
