"""Hosts on a network of their own: one loses its cable, another its raylet; both come back, and the losses do not show it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hone.run_folder import attempts
from hone.storage import Home
from tests.disturbed import Training, assert_proven, assert_same_losses, last_step, wait_for, write_rows
from tests.hosts import HERE, Hosts, why_not
from tests.integration.test_training import recipe
from training.launch import fit, prepare_job

pytestmark = [
    pytest.mark.skipif(not os.environ.get("HONE_TEST_HEAVY"), reason="takes several minutes: make test-heavy"),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
    pytest.mark.timeout(1500),
]

STEPS = 3000
NODES = {"one": 11, "two": 12}


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    """A head that runs nothing, and two hosts of a CPU each."""
    import ray

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    with Hosts(tmp_path) as made:
        for count, (name, number) in enumerate(NODES.items(), start=1):
            made.add(name, number)
            made.start_node(name, number)
            wait_for(lambda count=count: nodes_of(made) == count, timeout_s=120)  # type: ignore[misc]  # two at once take the same sockets
        yield made
        ray.shutdown()


def nodes_of(hosts: Hosts) -> int:
    """How many nodes with a CPU there are; this process becomes a driver of theirs."""
    import ray

    try:
        ray.init(hosts.address, _node_ip_address=HERE, ignore_reinit_error=True, log_to_driver=False, logging_level="error")
    except ConnectionError:
        return 0
    return int(ray.cluster_resources().get("CPU", 0))


def test_a_host_is_cut_off_and_comes_back_and_a_raylet_is_killed(llama: Path, tmp_path: Path, home: Home, hosts: Hosts) -> None:
    train = {"max_steps": STEPS, "num_train_epochs": 5000, "save_steps": 100, "eval_steps": STEPS}
    scaling = {"num_workers": [1, 2], "resize_every_s": 5, "max_failures": 8}
    chosen = recipe(llama, write_rows(tmp_path), train=train, scaling=scaling)
    quiet = prepare_job(chosen, home=home, run_id="quiet")
    fit(quiet)
    training = Training(prepare_job(chosen, home=home, run_id="r1"))
    folder = training.job.folder
    training.start()

    def goes_on(*, steps: int) -> bool:
        return bool(training.error) or last_step(folder) >= steps

    wait_for(lambda: goes_on(steps=120))
    hosts.cut_off("two")
    wait_for(lambda: training.error or (len(attempts(folder)) > 1 and last_step(folder) > attempts(folder)[-1].step + 40), timeout_s=240)
    assert attempts(folder)[-1].world_size == 1
    hosts.join_again("two")
    hosts.wait_ended("two")
    hosts.start_node("two", NODES["two"])
    wait_for(lambda: training.error or attempts(folder)[-1].world_size == 2, timeout_s=240)
    begun = len(attempts(folder))
    wait_for(lambda: goes_on(steps=attempts(folder)[-1].step + 120))
    [raylet] = hosts.pids("one", "raylet/raylet ")
    os.kill(raylet, signal.SIGKILL)
    wait_for(lambda: training.error or len(attempts(folder)) > begun, timeout_s=240)
    hosts.wait_ended("one")
    hosts.start_node("one", NODES["one"])
    training.join(timeout=600)
    assert training.error is None
    assert_same_losses(folder, quiet.folder, until=attempts(folder)[1].step + 50)
    assert_proven(folder, steps=STEPS)
