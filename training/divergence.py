"""A loss that is not a number: which rows it comes from, said before anything else is computed with it."""

from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from hone.errors import RunFailedError
from training.batches import Rows
from training.forward import sum_over_workers
from training.places import listed, places_of
from training.start import Started

ROWS_TRIED = 64


def refuse_bad_loss(run: Started, suspects: list[Rows], *, step: int, checkpoint: int) -> NoReturn:
    """Find the rows among those of the portions whose loss was bad, and end the run. Every rank takes part.

    Raises:
        RunFailedError: always; it names step, rows and the last good checkpoint.
    """
    job, worker, rows = run.job, run.worker, run.rows
    numbers = np.unique(np.concatenate([*suspects, np.empty(0, dtype=np.int64)]))
    if worker.world_size > 1:
        everyone: list[Any] = [None] * worker.world_size
        dist.all_gather_object(everyone, numbers)
        numbers = np.unique(np.concatenate(everyone))
    bad = [n for n in numbers[:ROWS_TRIED].tolist() if not _is_finite(run, n)]
    named = listed(places_of(job.data, rows.numbers[np.asarray(bad or numbers, dtype=np.int64)]))
    which = f"on {named}" if bad else f"on some of {named} together"
    kept = f"the checkpoint of step {checkpoint} in {job.folder} is the last good one" if checkpoint else "no checkpoint was made before"
    raise RunFailedError(
        f"step {step}: the loss is not a finite number {which}; look at these rows, or lower optim.learning_rate or set "
        f"optim.max_grad_norm; {kept}"
    )


def rows_of(run: Started, step: int) -> str:
    """Where the rows of a step (from 0) stand in the data, the first few of them."""
    return listed(places_of(run.job.data, run.rows.numbers[run.plan.rows(step)]))


@torch.no_grad()
def _is_finite(run: Started, row: int) -> bool:
    loss, _, _ = run.engine(run.batcher.batch(run.rows.take(np.array([row]))))
    return bool(torch.isfinite(sum_over_workers(loss.detach(), device=run.engine.device, worker=run.worker)))
