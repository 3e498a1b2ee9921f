"""One recipe in one process of its own, without Ray: what it reached, how long its steps took, and the memory it needed at most."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hone.ports import free_port
from hone.recipe import Recipe
from hone.run_folder import read_metrics
from hone.storage import Home
from training.job import Job
from training.launch import final_metrics, prepare_job
from training.resources import without_cluster


@dataclass(frozen=True)
class Ran:
    """A finished run."""

    job: Job
    metrics: dict[str, float]
    """Those of the weights that would be published; see `training.launch.final_metrics`."""
    lines: list[dict[str, Any]]
    """Every line of its metrics."""
    seconds: float
    """Of all steps together."""
    peak_mib: float
    """Resident memory of the process at its highest."""


def run_here(recipe: Recipe, *, home: Home, name: str) -> Ran:
    """Prepare the recipe's data in this process and train in another, on all cores or as many as OMP_NUM_THREADS says."""
    job = prepare_job(recipe, home=home, run_id=name, plan=without_cluster)
    peak = _train(job.folder)
    lines = read_metrics(job.folder)
    return Ran(job, final_metrics(job.folder), lines, sum(line.get("step_s", 0.0) for line in lines), peak)


def alone() -> dict[str, str]:
    """The environment of a process that is the only worker of its training, as torchrun would make it."""
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return {**os.environ, **group, "TQDM_DISABLE": "1"}


def _train(folder: Path) -> float:
    """MiB of resident memory, at most."""
    environment = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)} | alone()
    log = folder / "worker.log"
    with log.open("wb") as out:
        worker = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "training.torchrun", str(folder)], env=environment, stdout=out, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(worker.pid, 0)
    worker.returncode = os.waitstatus_to_exitcode(status)
    if worker.returncode:
        sys.exit(f"{folder}: the worker ended with {worker.returncode}:\n{log.read_text()[-3000:]}")
    return usage.ru_maxrss / 1024
