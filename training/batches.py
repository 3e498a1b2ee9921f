"""Which rows a step sees, and how they are dealt out to workers.

The order is a function of (seed, epoch) alone: a step's rows are the same at any number of workers, and a resumed run goes on with
exactly the rows it has not seen.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BatchPlan:
    """Steps of a run over `n_rows` rows, `global_batch_size` of them a step; the last step of an epoch takes what is left."""

    n_rows: int
    global_batch_size: int
    epochs: float
    max_steps: int | None
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.n_rows / self.global_batch_size)

    @property
    def total_steps(self) -> int:
        steps = max(1, math.ceil(self.steps_per_epoch * self.epochs))
        return min(steps, self.max_steps) if self.max_steps else steps

    def rows(self, step: int) -> Rows:
        """Row numbers of one step (from 0), all workers together."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.n_rows)
        return order[place * self.global_batch_size : (place + 1) * self.global_batch_size]


def deal(rows: Rows, lengths: Rows, *, rank: int, world_size: int, micro_batches: int) -> list[Rows]:
    """One worker's share of `rows`, as `micro_batches` portions of like length.

    Rows are dealt longest first, so workers get equal work and little is padding. Some portions are empty where there are too few rows;
    every worker still makes the same number of forward passes, as sharded weights require.

    Args:
        rows: Row numbers, over all workers.
        lengths: Tokens of each row of the data set.
    """
    by_length = rows[np.argsort(-lengths[rows], kind="stable")]
    return [np.asarray(part, dtype=np.int64) for part in np.array_split(by_length[rank::world_size], micro_batches)]


def evaluation_batches(lengths: Rows, *, rank: int, world_size: int, batch_size: int) -> Iterator[Rows]:
    """One worker's share of a whole data set, in batches of like length; every worker gets the same number of them."""
    share = math.ceil(len(lengths) / world_size)
    batches = math.ceil(share / batch_size)
    yield from deal(np.arange(len(lengths)), lengths, rank=rank, world_size=world_size, micro_batches=batches)
