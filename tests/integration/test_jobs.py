"""A recipe sent to a real Ray head: followed, stopped, refused, and remembered once the head is gone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.connect import LocalRay, local_ray, processes_in_session

Hone = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def ray() -> Iterator[LocalRay]:
    with local_ray() as head:
        yield head
        assert head.process.poll() is None or head.process.returncode == -signal.SIGKILL
    assert processes_in_session(head.pid) == []
    assert not head.folder.exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A recipe and its data in one folder, and the home."""
    made = tmp_path_factory.mktemp("work")
    rows = [
        {"messages": [{"role": "user", "content": f"what is {n} plus {n}?"}, {"role": "assistant", "content": f"it is {2 * n}"}]}
        for n in range(20)
    ]
    (made / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "recipe.yaml").write_text(f"""\
name: sent
task: chat
base: {llama}
data: {{train: train.jsonl, validation_fraction: 0.2, max_length: 64}}
method: {{type: lora, r: 4}}
train: {{max_steps: 4, num_train_epochs: 10, global_batch_size: 4, micro_batch_size: 4}}
""")
    return made


@pytest.fixture
def hone(folder: Path, ray: LocalRay) -> Hone:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(argv(*arguments), cwd=folder, env=environment(ray), capture_output=True, text=True, timeout=300, check=False)

    return run


def argv(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cluster.cli", *arguments]


def environment(ray: LocalRay) -> dict[str, str]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith("HONE_")} | ray.environment
    variables.pop("RAY_ADDRESS")  # the dashboard's URL is all that `hone submit` is given
    return variables


def listed(hone: Hone, job_id: str) -> dict[str, str]:
    jobs: list[dict[str, str]] = json.loads(hone("jobs", "list", "--json").stdout)
    return next(job for job in jobs if job["id"] == job_id)


def wait_for(met: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_submitted_recipe_is_followed_to_its_published_adapter(hone: Hone, ray: LocalRay) -> None:
    done = hone("submit", "recipe.yaml", "train.seed=3", "--address", ray.dashboard)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "published sent@1" in done.stdout
    job_id = done.stderr.split()[1]
    job = listed(hone, job_id)
    assert (job["status"], job["result"], job["address"]) == ("succeeded", "sent@1", ray.dashboard)
    shown = json.loads(hone("adapters", "show", "sent", "--json").stdout)
    assert shown["lineage"]["run_id"] == job_id
    assert "published sent@1" in hone("jobs", "logs", job_id).stdout


def test_a_job_that_fails_exits_1_with_its_own_reason(hone: Hone, ray: LocalRay) -> None:
    done = hone("submit", "recipe.yaml", "data.train=nowhere.jsonl", "--address", ray.dashboard)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "nowhere.jsonl: no such data file" in done.stdout
    job = listed(hone, done.stderr.split()[1])
    assert job["status"] == "failed"
    assert "nowhere.jsonl: no such data file" in job["result"]


def test_ctrl_c_leaves_the_job_running_and_stop_ends_it(hone: Hone, ray: LocalRay, folder: Path) -> None:
    long = ["submit", "recipe.yaml", "train.max_steps=100000", "train.num_train_epochs=100000", "--address", ray.dashboard]
    following = subprocess.Popen(argv(*long), cwd=folder, env=environment(ray), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert following.stderr is not None
    job_id = following.stderr.readline().split()[1]
    run_folder = folder / ".hone" / "runs" / job_id
    wait_for(lambda: (run_folder / "metrics.jsonl").exists())
    following.send_signal(signal.SIGINT)
    said = following.communicate(timeout=60)[1]
    assert following.returncode == 130
    assert f"hone jobs logs {job_id} --follow" in said
    assert f"hone jobs stop {job_id}" in said
    assert listed(hone, job_id)["status"] == "running"

    done = hone("jobs", "stop", job_id)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{job_id}: stopped")
    steps = (run_folder / "metrics.jsonl").stat().st_size
    time.sleep(2)
    assert (run_folder / "metrics.jsonl").stat().st_size == steps
    assert hone("jobs", "stop", job_id).stdout.startswith(f"{job_id}: stopped")


def test_the_plain_ray_way_works_too(ray: LocalRay, folder: Path, tmp_path: Path) -> None:
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", ray.dashboard, "--working-dir", str(folder)]
    # `python` is the cluster's own; this head was not started from an activated environment.
    path = json.dumps({"env_vars": {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}})
    entrypoint = ["python", "-m", "training", "recipe.yaml", "--home", str(tmp_path / "home")]
    done = subprocess.run(
        [*submit, "--runtime-env-json", path, "--", *entrypoint],
        env=environment(ray),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "published sent@1" in done.stdout


def test_once_the_head_is_killed_the_last_known_state_is_what_is_said(hone: Hone, ray: LocalRay) -> None:
    """Last in this file: it ends the head that the other tests use."""
    job_id = hone(
        "submit", "recipe.yaml", "train.max_steps=100000", "train.num_train_epochs=100000", "--address", ray.dashboard, "--no-follow"
    )
    job_id = job_id.stdout.strip()
    wait_for(lambda: listed(hone, job_id)["status"] == "running")
    for pid in processes_in_session(ray.pid):
        os.kill(pid, signal.SIGKILL)
    ray.process.wait(30)
    job = listed(hone, job_id)
    assert job["status"] == "running"
    assert "no Ray dashboard answers there" in job["note"]
    refused = hone("jobs", "stop", job_id)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "its last known state is running" in refused.stderr
