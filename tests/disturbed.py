"""What the tests of survival share: rows, waiting for a moment of a run, and what must hold of it in the end."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hone.run_folder import read_metrics
from training.batches import batch_plan
from training.job import Job
from training.proof import Proof, prove


def write_rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"what is {n}?", "completion": f"the number {n}"}) + "\n" for n in range(40)))
    return path


def wait_for(condition: Callable[[], Any], *, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def last_step(folder: Path) -> int:
    return max((m["step"] for m in read_metrics(folder)), default=0)


def losses_of(folder: Path) -> dict[int, float]:
    return {m["step"]: m["loss"] for m in read_metrics(folder) if "loss" in m}


def proof_of(folder: Path) -> Proof:
    job = Job.load(folder)
    return prove(folder, batch_plan(job.recipe, job.data.sources), job.recipe)


def assert_proven(folder: Path, *, steps: int) -> None:
    proof = proof_of(folder)
    assert (proof.wrong, proof.steps) == ([], steps)
