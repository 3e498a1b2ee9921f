"""Two workers that train many prepared jobs one after another, under DeepSpeed and without Ray.

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


def train_all(root: Path, jobs: Sequence[Job], *, timeout_s: float) -> None:
    """Train the jobs; `failure` of each says how it ended."""
    (root / "cases.json").write_text(json.dumps([str(job.folder) for job in jobs]))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-W", "ignore", "-m", "tests.zero_matrix", str(root)]
    workers = []
    for rank in range(2):
        with (root / f"worker-{rank}.log").open("wb") as log:
            environment = {**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            workers.append(subprocess.Popen(argv, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        for worker in workers:
            worker.wait(timeout=timeout_s)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()


def failure(job: Job) -> str:
    """Why a job did not end well; empty where it did."""
    for rank in range(2):
        said = job.folder / f"rank-{rank}.json"
        if not said.exists():
            return "the workers stopped before they came to this job"
        if json.loads(said.read_text()):
            return str(json.loads(said.read_text()))
    return ""


def main() -> None:
    """Train each job; a file `rank-N.json` in its folder says how it ended."""
    worker = TorchrunWorker()
    for case in json.loads((Path(sys.argv[1]) / "cases.json").read_text()):
        folder, said = Path(case), ""
        try:
            train(Job.load(folder), worker)
        except Exception:
            said = traceback.format_exc()
        (folder / f"rank-{worker.rank}.json").write_text(json.dumps(said))
        gc.collect()


if __name__ == "__main__":
    main()
