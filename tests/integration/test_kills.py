"""A run whose workers are killed again and again, at random moments and while a checkpoint is written, learns what it would have.

`make test-heavy` kills 20 times, `make test` twice.
"""

import os
import random
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from hone.run_folder import attempts, read_metrics
from hone.storage import Home
from tests.disturbed import assert_proven, losses_of, proof_of, write_rows
from tests.integration.test_training import recipe
from training.launch import fit, prepare_job

pytestmark = pytest.mark.usefixtures("local_ray")

IS_HEAVY = bool(os.environ.get("HONE_TEST_HEAVY"))
KILLS = 20 if IS_HEAVY else 2
STEPS = 60 + 30 * KILLS
TRAIN = {"max_steps": STEPS, "num_train_epochs": 500, "save_steps": 2, "eval_steps": STEPS}


class Killer(threading.Thread):
    """Kills a worker of each attempt; every other time just when a checkpoint has been begun."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        super().__init__(daemon=True)
        self._folder, self._random = folder, random.Random(seed)
        self.killed: list[tuple[int, bool]] = []
        """The attempt, and whether a checkpoint was being written."""

    def run(self) -> None:
        for number in range(1, KILLS + 1):
            while len(attempts(self._folder)) < number or not self._has_moved(number):
                time.sleep(0.005)
            is_writing = bool(number % 2) and self._wait_for_half_a_checkpoint()
            if not is_writing:
                time.sleep(self._random.uniform(0, 1))
            worker = self._random.choice(attempts(self._folder)[-1].workers)
            with suppress(ProcessLookupError):
                os.kill(int(worker.rpartition(":")[2]), signal.SIGKILL)
                self.killed.append((number, is_writing))

    def _has_moved(self, number: int) -> bool:
        began = attempts(self._folder)[number - 1].step
        return any(m["step"] > began + 2 for m in read_metrics(self._folder) if "loss" in m)

    def _wait_for_half_a_checkpoint(self) -> bool:
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            with suppress(FileNotFoundError):
                for folder in (self._folder / "checkpoints").iterdir():
                    if not (folder / "checkpoint.json").exists():
                        return True
        return False


@pytest.mark.parametrize("method", ["lora", "full"] if IS_HEAVY else ["full"])
def test_killed_again_and_again(llama: Path, tmp_path: Path, home: Home, method: str) -> None:
    rows = write_rows(tmp_path)
    chosen = recipe(llama, rows, train=TRAIN, method={"type": method}, zero={"stage": 3}, scaling={"max_failures": 2 * KILLS})
    quiet = prepare_job(chosen, home=home, run_id="quiet")
    fit(quiet)
    job = prepare_job(chosen, home=home, run_id="killed")
    killer = Killer(job.folder, seed=7)
    killer.start()
    fit(job)
    killer.join(timeout=1)
    assert len(killer.killed) == KILLS, "it was over before it could be killed so often"
    assert len(attempts(job.folder)) == KILLS + 1
    assert losses_of(job.folder) == pytest.approx(losses_of(quiet.folder), abs=1e-6)
    assert_proven(job.folder, steps=STEPS)
    assert proof_of(job.folder).repeated > 0
