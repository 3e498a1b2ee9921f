"""The clock of the machine is set forward by a day in the middle of a run, and back: the run goes on as if nothing had happened.

The clock is that of every process of the run and its Ray (`tests/clock.c`), and not the machine's own, which others go by. What it does not
show is a wait for a moment of the wall clock that was under way when it was set.
"""

import os
import shutil
import struct
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from hone.run_folder import attempts, read_events
from hone.storage import Home
from tests.disturbed import assert_proven, last_step, losses_of, wait_for, write_rows
from tests.integration.test_training import tree
from training.checkpoints.files import find
from training.job import Job

pytestmark = [
    pytest.mark.skipif(not os.environ.get("HONE_TEST_HEAVY"), reason="takes two minutes: make test-heavy"),
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="the clock is a library for Linux that cc has to make"),
    pytest.mark.timeout(900),
]

STEPS = 240
TRAIN = {"max_steps": STEPS, "num_train_epochs": 500, "save_steps": 20, "eval_steps": STEPS}
DAY = timedelta(days=1)


def test_a_day_forward_and_back_changes_nothing(llama: Path, tmp_path: Path) -> None:
    recipe, clock = tmp_path / "recipe.yaml", Clock(tmp_path)
    recipe.write_text(yaml.safe_dump(tree(llama, write_rows(tmp_path), train=TRAIN, health={"stall_s": 20, "end_stalled_after_s": 5})))
    began = datetime.now(UTC)
    moved = train(Home(tmp_path / "moved"), recipe, clock=clock)
    folder = tmp_path / "moved" / "runs" / "r1"
    wait_for(lambda: moved.poll() is not None or last_step(folder) >= 50, timeout_s=400)
    clock.set_ahead(DAY)
    wait_for(lambda: moved.poll() is not None or last_step(folder) >= 130, timeout_s=400)
    clock.set_ahead(timedelta(0))
    assert moved.wait(400) == 0
    assert train(Home(tmp_path / "quiet"), recipe).wait(400) == 0

    events = read_events(folder)
    times = [datetime.fromisoformat(event["at"]) for event in events]
    assert max(times) > began + DAY, "the clock was not set, so this shows nothing"
    assert times[-1] < began + DAY / 2, "nor back"
    assert not {event["event"] for event in events} & {"stalled", "checkpoint_failed", "head_lost", "slow_rank"}
    assert len(attempts(folder)) == 1
    assert losses_of(folder) == losses_of(tmp_path / "quiet" / "runs" / "r1")
    assert_proven(folder, steps=STEPS)
    assert [int(name.split("-")[1]) for name in find(Job.load(folder).checkpoints)] == [STEPS - 20, STEPS - 40]


class Clock:
    """A wall clock that can be set, for processes that are started with its environment."""

    def __init__(self, folder: Path) -> None:
        library, self._file = folder / "clock.so", folder / "clock"
        source = Path(__file__).parents[1] / "clock.c"
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        self._file.write_bytes(struct.pack("q", 0))
        self.environment = {"LD_PRELOAD": str(library), "TEST_CLOCK": str(self._file)}

    def set_ahead(self, by: timedelta) -> None:
        """Of the machine's own. The file stays the same one: processes have it in their memory."""
        with self._file.open("r+b") as file:
            file.write(struct.pack("q", int(by.total_seconds())))


def train(home: Home, recipe: Path, *, clock: Clock | None = None) -> subprocess.Popen[bytes]:
    """A driver, with a Ray of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    argv = [sys.executable, "-m", "training", "--home", str(home.root), "--quiet", str(recipe), "--run-id", "r1"]
    return subprocess.Popen(argv, env={**environment, **(clock.environment if clock else {})})
