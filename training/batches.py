"""Which rows a step sees, and how they are dealt out to workers.

The order is a function of (seed, epoch) alone: a step's rows are the same at any number of workers, and a resumed run goes on with
exactly the rows it has not seen.
"""

import bisect
import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from hone.recipe import Recipe
from training.job import SourceRows

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Mixed:
    """A source of rows, and how many of them an epoch sees."""

    rows: int
    per_epoch: int


@dataclass(frozen=True)
class BatchPlan:
    """Steps of a run, of `global_batch_size` rows each; the last step of an epoch takes what is left."""

    sources: tuple[Mixed, ...]
    """Their rows are numbered through, in this order."""
    global_batch_size: int
    epochs: float
    max_steps: int | None
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(sum(source.per_epoch for source in self.sources) / self.global_batch_size)

    @property
    def total_steps(self) -> int:
        steps = max(1, math.ceil(self.steps_per_epoch * self.epochs))
        return min(steps, self.max_steps) if self.max_steps else steps

    def rows(self, step: int) -> Rows:
        """Row numbers of one step (from 0), all workers together."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return _order(self, epoch)[place * self.global_batch_size : (place + 1) * self.global_batch_size]


def batch_plan(recipe: Recipe, sources: Sequence[SourceRows]) -> BatchPlan:
    """The steps of a recipe over these rows."""
    return BatchPlan(
        sources=tuple(Mixed(source.rows, source.per_epoch) for source in sources),
        global_batch_size=recipe.train.global_batch_size,
        epochs=recipe.train.num_train_epochs,
        max_steps=recipe.train.max_steps,
        seed=recipe.train.seed,
    )


@lru_cache(maxsize=2)
def _order(plan: BatchPlan, epoch: int) -> Rows:
    """All row numbers of an epoch."""
    drawn, first = [], 0
    for number, source in enumerate(plan.sources):
        drawn.append(first + _drawn(source, epoch, [plan.seed, number]))
        first += source.rows
    return np.random.default_rng([plan.seed, epoch]).permutation(np.concatenate(drawn))


def _drawn(source: Mixed, epoch: int, seed: list[int]) -> Rows:
    """What an epoch sees of a source: the next `per_epoch` rows of one shuffled round of all its rows after another."""
    if source.per_epoch in (0, source.rows):
        return np.arange(source.per_epoch)
    rounds, begin, end = [], epoch * source.per_epoch, (epoch + 1) * source.per_epoch
    for number in range(begin // source.rows, -(-end // source.rows)):
        start = number * source.rows
        shuffled = np.random.default_rng([*seed, 2, number]).permutation(source.rows)
        rounds.append(shuffled[max(begin - start, 0) : end - start])
    return np.concatenate(rounds)


def deal(rows: Rows, lengths: Rows, *, rank: int, world_size: int, micro_batches: int) -> list[Rows]:
    """One worker's share of `rows`, as `micro_batches` portions of like length, to be padded.

    Rows are dealt longest first, so workers get equal work and little is padding. Some portions are empty where there are too few rows;
    every worker still makes the same number of forward passes, as sharded weights require.

    Args:
        rows: Row numbers, over all workers.
        lengths: Tokens of each row of the data set.
    """
    by_length = _longest_first(rows, lengths)
    return [np.asarray(part, dtype=np.int64) for part in np.array_split(by_length[rank::world_size], micro_batches)]


def deal_packed(rows: Rows, lengths: Rows, *, rank: int, world_size: int, capacity: int) -> list[Rows]:
    """One worker's share of `rows`, as portions of at most `capacity` tokens, to be packed; every worker gets the same number of them.

    Longest first, each row goes where the fewest tokens are, so that all portions of all workers are alike; where that does not fit, into
    the fullest portion that still has room (best fit); where that does not either, there is one more portion a worker.

    Raises:
        ValueError: a row is longer than the capacity.
    """
    by_length = _longest_first(rows, lengths)
    sizes = lengths[by_length].tolist()
    if sizes and sizes[0] > capacity:
        raise ValueError(f"a row of {sizes[0]} tokens does not fit into {capacity}")
    portions = max(1, math.ceil(sum(sizes) / (capacity * world_size)))
    while True:
        for fit in (_level, _best):
            places = fit(sizes, portions * world_size, capacity)
            if places is not None:
                # Dealt in turn, so that no worker has all the longest ones.
                return [by_length[np.asarray(places) == portion * world_size + rank] for portion in range(portions)]
        portions += 1


def evaluation_batches(lengths: Rows, *, rank: int, world_size: int, batch_size: int) -> Iterator[Rows]:
    """One worker's share of a whole data set, in batches of like length, to be padded; every worker gets the same number of them."""
    share = math.ceil(len(lengths) / world_size)
    batches = math.ceil(share / batch_size)
    yield from deal(np.arange(len(lengths)), lengths, rank=rank, world_size=world_size, micro_batches=batches)


def _longest_first(rows: Rows, lengths: Rows) -> Rows:
    return rows[np.argsort(-lengths[rows], kind="stable")]


def _level(sizes: list[int], portions: int, capacity: int) -> list[int] | None:
    """The portion of each row, always the one with the fewest tokens; None where that is more than it holds."""
    loads = [(0, portion) for portion in range(portions)]
    places = []
    for size in sizes:
        load, portion = heapq.heappop(loads)
        if load + size > capacity:
            return None
        heapq.heappush(loads, (load + size, portion))
        places.append(portion)
    return places


def _best(sizes: list[int], portions: int, capacity: int) -> list[int] | None:
    """The portion of each row, always the fullest that has room; None where none has."""
    room = [(capacity, portion) for portion in range(portions)]  # sorted
    places = []
    for size in sizes:
        at = bisect.bisect_left(room, (size, -1))
        if at == len(room):
            return None
        left, portion = room.pop(at)
        bisect.insort(room, (left - size, portion))
        places.append(portion)
    return places
