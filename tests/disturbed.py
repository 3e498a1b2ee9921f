"""What the tests of survival share: rows, waiting for a moment of a run, and what must hold of it in the end."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hone.run_folder import read_metrics
from training.batches import batch_plan
from training.job import Job
from training.launch import fit
from training.proof import Proof, prove


def write_rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"what is {n}?", "completion": f"the number {n}"}) + "\n" for n in range(40)))
    return path


class Training(threading.Thread):
    """A run in the background."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            fit(self.job)
        except BaseException as error:
            self.error = error


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


def assert_same_losses(folder: Path, undisturbed: Path, *, until: int) -> None:
    """To 1e-4: every loss up to a step, and the last one.

    With another number of workers sums are rounded in another order. Over hundreds of steps that grows, with plain torch as well; both
    trainings then come to the same end.
    """
    found, expected = losses_of(folder), losses_of(undisturbed)
    assert found.keys() == expected.keys()
    assert max(abs(found[step] - expected[step]) for step in expected if step <= until) <= 1e-4
    assert abs(found[max(found)] - expected[max(found)]) <= 1e-4
