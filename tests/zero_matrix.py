"""Workers that train many prepared jobs one after another, under DeepSpeed and without Ray.

A run of Ray Train for each job would take minutes to start in all; what is tried this way is the loop. The workers are
`python -m tests.zero_matrix FOLDER`.
"""

import gc
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from hone.ports import free_port
from hone.recipe import Recipe
from hone.storage import Home
from training.job import Job
from training.launch import prepare_job
from training.loop import train
from training.resources import without_cluster
from training.worker import TorchrunWorker


def prepared(recipe: Recipe, folder: Path, *, home: Home) -> Job:
    """A job in a folder of its own, for workers without Ray."""
    return prepare_job(recipe, home=home, run_id=folder.name, folder=folder, plan=without_cluster)


class Gone(Exception):
    """This worker's machine was taken away."""


class Doomed(TorchrunWorker):
    """Has notice at step `last - 1` of what it does that its machine goes after the next one."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self._left = last

    def noticed(self) -> bool:
        self._left -= 1
        if self._left < 0:
            raise Gone
        return self._left <= 1


def train_all(
    root: Path,
    jobs: Sequence[Job],
    *,
    timeout_s: float,
    workers: int = 2,
    steps: int | Sequence[int] = 0,
    main: str = "tests.zero_matrix",
) -> None:
    """Train the jobs; `failure` of each says how it ended.

    Args:
        root: Where the workers are told of them.
        jobs: What to train.
        timeout_s: For all of them.
        workers: How many.
        steps: After so many the workers of each job are gone, with one step's notice; by default they stay to the end. One for all jobs,
            or one for each.
        main: The module that workers run.
    """
    each = [steps] * len(jobs) if isinstance(steps, int) else list(steps)
    (root / "cases.json").write_text(json.dumps({"folders": [str(job.folder) for job in jobs], "steps": each}))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(workers), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-W", "ignore", "-m", main, str(root)]
    started = []
    for rank in range(workers):
        with (root / f"worker-{rank}.log").open("wb") as log:
            environment = {**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(subprocess.Popen(argv, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        for worker in started:
            worker.wait(timeout=timeout_s)
    finally:
        for worker in started:
            if worker.poll() is None:
                worker.kill()
                worker.wait()


def failure(job: Job, *, workers: int = 2) -> str:
    """Why a job did not end well; empty where it did."""
    for rank in range(workers):
        said = job.folder / f"rank-{rank}.json"
        if not said.exists():
            return "the workers stopped before they came to this job"
        if json.loads(said.read_text()):
            return str(json.loads(said.read_text()))
    return ""


def main() -> None:
    """Train each job; a file `rank-N.json` in its folder says how it ended."""
    told = json.loads((Path(sys.argv[1]) / "cases.json").read_text())
    for case, steps in zip(told["folders"], told["steps"], strict=True):
        folder, said = Path(case), ""
        worker = Doomed(steps) if steps else TorchrunWorker()
        try:
            train(Job.load(folder), worker)
        except Gone:
            pass
        except Exception:
            said = traceback.format_exc()
        (folder / f"rank-{worker.rank}.json").write_text(json.dumps(said))
        gc.collect()


if __name__ == "__main__":
    main()
