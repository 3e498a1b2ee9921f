"""What becomes of a run when its processes die, freeze or run out of room: it goes on, and its ledger proves it."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from hone.registry import Registry
from hone.run_folder import FAILURE_FILE, attempts, read_events, read_metrics
from hone.storage import Home
from tests.disturbed import assert_proven, last_step, losses_of, wait_for, write_rows
from tests.integration.test_training import recipe, tree
from training.job import Job
from training.launch import fit, prepare_job

STEPS = 40
TRAIN = {"max_steps": STEPS, "num_train_epochs": 20, "save_steps": 5, "eval_steps": STEPS}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path)


@pytest.fixture
def quiet_losses(llama: Path, rows: Path, tmp_path: Path) -> dict[int, float]:
    """Of the run that nothing happens to."""
    job = prepare_job(recipe(llama, rows, train=TRAIN), home=Home(tmp_path / "quiet"), run_id="quiet")
    fit(job)
    return losses_of(job.folder)


def after_step(folder: Path, step: int, do: Callable[[int], None], *, rank: int) -> threading.Thread:
    """Do something to the process of a rank of the first attempt, once so many steps are done."""

    def watch() -> None:
        wait_for(lambda: last_step(folder) >= step)
        do(int(attempts(folder)[0].workers[rank].rpartition(":")[2]))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.usefixtures("local_ray")
def test_a_frozen_worker_is_named_with_every_stack_and_the_run_goes_on(
    llama: Path, rows: Path, home: Home, quiet_losses: dict[int, float]
) -> None:
    health = {"stall_s": 8, "end_stalled_after_s": 2}
    job = prepare_job(recipe(llama, rows, train=TRAIN, health=health, scaling={"max_failures": 5}), home=home, run_id="r1")
    after_step(job.folder, 12, lambda pid: os.kill(pid, signal.SIGSTOP), rank=1)
    fit(job)
    stalled = next(event for event in read_events(job.folder) if event["event"] == "stalled" and "no sign of life" in event["why"])
    assert (stalled["rank"], stalled["worker"]) == (1, attempts(job.folder)[0].workers[1])
    stacks = Path(stalled["stacks"]).read_text()
    assert "rank 0 on" in stacks
    assert "rank 1 on" in stacks
    assert "take_step" in stacks
    assert losses_of(job.folder) == pytest.approx(quiet_losses, abs=1e-6)
    assert_proven(job.folder, steps=STEPS)


LIMITS = """
import resource, sys, threading, time

def limit():
    while "training.loop" not in sys.modules or "deepspeed" not in sys.modules:
        time.sleep(0.05)
    time.sleep(2)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 1500 * 2**20, resource.RLIM_INFINITY))

if any("default_worker" in part for part in sys.orig_argv):
    threading.Thread(target=limit, daemon=True).start()
"""


def test_a_pass_that_does_not_fit_is_made_in_smaller_portions(bert: Path, tmp_path: Path, home: Home) -> None:
    """Worker processes get 1.5 GB beside what they have when they begin to learn, and all rows at once would take more."""
    rows, site = tmp_path / "rows.jsonl", tmp_path / "site"
    rows.write_text("".join(json.dumps({"text": f"{n} " + "good day " * 100, "label": f"c{n % 3}"}) + "\n" for n in range(512)))
    site.mkdir()
    (site / "sitecustomize.py").write_text(LIMITS)
    train = {"max_steps": 2, "global_batch_size": 512, "micro_batch_size": 512, "precision": "fp32", "dropout": 0.1}
    content = tree(
        bert,
        rows,
        task="text-classification",
        train=train,
        data={"max_length": 200, "validation_fraction": 0.0},
        scaling={"num_workers": 1},
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    argv = [sys.executable, "-m", "training", "--home", str(home.root), str(tmp_path / "recipe.yaml"), "--run-id", "r1"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    path = os.pathsep.join([str(site), *filter(None, [environment.get("PYTHONPATH")])])
    assert subprocess.run(argv, env={**environment, "PYTHONPATH": path}, timeout=500, check=False).returncode == 0
    folder = home.runs / "r1"
    made = [event["micro_batch_size"] for event in read_events(folder) if event["event"] == "out_of_memory"]
    assert made == [256, 128, 64, 32, 16][: len(made)]
    assert made
    assert [m["rows"] for m in read_metrics(folder) if "rows" in m] == [512, 512]
    assert Job.load(folder).recipe.train.micro_batch_size == made[-1]


def test_a_killed_driver_s_run_is_taken_up_by_another_with_fewer_workers(llama: Path, rows: Path, home: Home, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(tree(llama, rows, train={**TRAIN, "num_train_epochs": 60, "max_steps": 200, "save_steps": 10, "eval_steps": 200}))
    )
    argv = [sys.executable, "-m", "training", "--home", str(home.root), "--quiet"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen([*argv, str(path), "--run-id", "r1"], env=environment)
    folder = home.runs / "r1"
    wait_for(lambda: last_step(folder) >= 25)
    driver.kill()
    driver.wait()
    assert not (folder / "result.json").exists()

    again = [*argv, "--resume", "r1", "scaling.num_workers=1"]
    assert subprocess.run([*again, "train.seed=3"], env=environment, check=False).returncode == 1
    done = subprocess.run(again, env=environment, timeout=300, check=False)
    assert done.returncode == 0
    first, second = attempts(folder)
    assert (first.world_size, second.world_size) == (2, 1)
    assert second.step >= 20
    assert str(Registry(home).resolve("bot").ref) == "bot@1"
    assert sorted(losses_of(folder)) == list(range(1, 201))
    assert subprocess.run([*again], env=environment, check=False).returncode == 1, "it is done"
    proof = subprocess.run([sys.executable, "-m", "training.proof", "r1", "--home", str(home.root)], stdout=subprocess.PIPE, check=False)
    assert proof.returncode == 0
    assert json.loads(proof.stdout)["steps"] == 200


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 KiB."""
    if os.geteuid():
        pytest.skip("only root can mount a small file system")
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", folder], check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.usefixtures("local_ray")
def test_a_full_disk_costs_the_checkpoint_and_not_the_run(
    llama: Path, rows: Path, home: Home, small_disk: Path, quiet_losses: dict[int, float]
) -> None:
    job = prepare_job(recipe(llama, rows, train=TRAIN, checkpoints={"uri": str(small_disk)}), home=home, run_id="r1")
    fit(job)
    failed = [event for event in read_events(job.folder) if event["event"] == "checkpoint_failed"]
    assert [event["step"] for event in failed] == list(range(5, STEPS, 5))
    assert "No space left" in failed[0]["why"]
    assert losses_of(job.folder) == pytest.approx(quiet_losses, abs=1e-6)
    assert not (job.folder / FAILURE_FILE).exists()
    assert job.export_folder.is_dir()
