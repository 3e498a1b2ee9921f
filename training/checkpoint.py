"""State to resume from: what trains and the optimiser, in DeepSpeed's own format, handed to Ray Train.

The learning rate, the order of rows and dropout are functions of the step, so the step and what the guard has seen are all that is saved
beside them.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from training.ema import MovingAverage
from training.guard import Guard
from training.worker import Worker

TAG = "state"


def save_checkpoint(
    engine: Any, worker: Worker, step: int, metrics: dict[str, float], *, guard: Guard, average: MovingAverage | None
) -> None:
    """Write this rank's part to a scratch folder and report it; Ray merges the ranks' parts into one checkpoint."""
    folder = Path(tempfile.mkdtemp(prefix="hone-checkpoint-"))
    try:
        state = {"step": step, "guard": guard.state()}
        engine.save_checkpoint(str(folder), tag=TAG, client_state=state, exclude_frozen_parameters=True)
        if average:
            average.save(folder, worker.rank)
        worker.report(metrics, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load_checkpoint(engine: Any, worker: Worker, average: MovingAverage | None) -> tuple[int, Guard]:
    """Restore the newest checkpoint; how many steps are already done (0 without one), and what the guard has seen."""
    with worker.latest_checkpoint() as folder:
        if folder is None:
            return 0, Guard()
        # Frozen weights are not in the checkpoint; they were just loaded from the base.
        _, state = engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        if average:
            average.load(folder, worker.rank)
        return int(state["step"]), Guard(**state["guard"])
