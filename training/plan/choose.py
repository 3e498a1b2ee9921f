"""Every ZeRO stage side by side: what it needs, the largest portion that fits, and which to take."""

from collections.abc import Sequence
from dataclasses import dataclass

from training.plan.hardware import Cluster, Hardware
from training.plan.memory import NOTHING_MOVED, Counts, Memory, Offload, Stage, memory
from training.plan.speed import Speed, Work, portions_of, speed
from training.plan.trace import Need

USABLE = 0.9
"""Share of the memory that a plan fills: estimates are right to 15%, and the allocator of a GPU keeps some between what is used."""
AS_FAST = 1.02
"""Choices that differ by less are taken to be as fast; the one that needs less memory is better."""


@dataclass(frozen=True)
class Activations:
    """Bytes of a pass, for any number of rows in a portion.

    What a pass has in use at once is the greatest of sums that each grow with the rows, so between two sizes that were traced it lies
    below the line that joins them.
    """

    traced: dict[int, Need]
    """By rows of a portion: one row and the most there can be, at least."""

    def of(self, rows: int) -> Need:
        if rows in self.traced:
            return self.traced[rows]
        below = max((n for n in self.traced if n < rows), default=min(self.traced))
        above = min((n for n in self.traced if n > rows), default=max(self.traced))
        low, high = self.traced[below], self.traced[above]
        if below == above:
            return Need(low.live * rows // below, low.taken * rows // below)
        share = (rows - below) / (above - below)
        return Need(int(low.live + share * (high.live - low.live)), int(low.taken + share * (high.taken - low.taken)))


@dataclass(frozen=True)
class Asked:
    """What is to be planned."""

    counts: Counts
    work: Work
    method: str
    activations: Activations
    global_batch_size: int
    fullness: float
    stages: Sequence[Stage]
    """Those under which the recipe can run."""
    micro_batch_size: int | None
    """None for auto."""
    offload: Offload = NOTHING_MOVED
    sequence_parallel_size: int = 1
    """Workers that share each row, so that together they take the share of a step that one would."""

    def largest(self, workers: int) -> int:
        """Rows of a portion that takes all of a worker's (or its group's) share of a step."""
        return -(-self.global_batch_size // self.groups(workers))

    def groups(self, workers: int) -> int:
        """Among how many the rows of a step are shared out."""
        return workers // self.sequence_parallel_size


@dataclass(frozen=True)
class Choice:
    """One stage with one size of portion on some workers."""

    stage: Stage
    micro_batch_size: int
    workers: int
    memory: Memory
    available: int
    """Bytes for each worker."""
    host: int | None
    """Bytes of the machine's memory for each worker on a GPU; None where that is not known."""
    speed: Speed
    largest_micro_batch: int
    """The largest portion that fits, 0 where none does."""
    is_allowed: bool
    """Whether the recipe can run under this stage."""

    @property
    def fits(self) -> bool:
        return _fits(self.memory, self.available, self.host)


def choices(asked: Asked, *, workers: Sequence[int], cluster: Cluster, hardware: Hardware, stages: Sequence[Stage]) -> list[Choice]:
    """Each of the stages at each number of workers, with the recipe's portion, or where that is left open the largest that fits on all."""
    largest = {stage: _largest(asked, stage, workers=workers, cluster=cluster) for stage in stages}
    return [
        _choice(asked, stage, asked.micro_batch_size or largest[stage] or 1, n, cluster, hardware, largest=largest[stage])
        for n in workers
        for stage in stages
    ]


def best(made: Sequence[Choice]) -> Choice | None:
    """The fastest that fits on every number of workers, as it is on the first of them; that is the cheapest too. Of those as fast, the one
    with the largest portions, and of these the one that needs the least memory."""
    refused = {choice.stage for choice in made if not (choice.fits and choice.is_allowed)}
    fitting = [choice for choice in made if choice.stage not in refused and choice.workers == made[0].workers]
    if not fitting:
        return None
    fastest = min(choice.speed.seconds for choice in fitting)
    return min((c for c in fitting if c.speed.seconds <= AS_FAST * fastest), key=lambda c: (-c.micro_batch_size, c.memory.total))


def _choice(asked: Asked, stage: Stage, rows: int, workers: int, cluster: Cluster, hardware: Hardware, *, largest: int) -> Choice:
    portions = portions_of(asked.work.rows_a_step, workers=asked.groups(workers), micro_batch_size=rows, fullness=asked.fullness)
    how_fast = speed(
        asked.work,
        asked.counts,
        stage,
        workers=workers,
        portions=portions,
        cluster=cluster,
        hardware=hardware,
        method=asked.method,
        sequence_parallel_size=asked.sequence_parallel_size,
    )
    return Choice(
        stage=stage,
        micro_batch_size=rows,
        workers=workers,
        memory=_memory(asked, stage, rows, workers=workers, on_gpu=cluster.on_gpu),
        available=cluster.memory_of_each(workers),
        host=cluster.host_memory_of_each(workers),
        speed=how_fast,
        largest_micro_batch=largest,
        is_allowed=stage in asked.stages,
    )


def _largest(asked: Asked, stage: Stage, *, workers: Sequence[int], cluster: Cluster) -> int:
    """Powers of two, and at last the whole share of a worker where they are fewest."""
    most = max(asked.largest(n) for n in workers)
    sizes = sorted({*(2**n for n in range(most.bit_length()) if 2**n <= most), most})
    fitting = [
        rows
        for rows in sizes
        if all(
            _fits(
                _memory(asked, stage, rows, workers=n, on_gpu=cluster.on_gpu),
                cluster.memory_of_each(n),
                cluster.host_memory_of_each(n),
            )
            for n in workers
        )
    ]
    return max(fitting, default=0)


def _memory(asked: Asked, stage: Stage, rows: int, *, workers: int, on_gpu: bool) -> Memory:
    """With portions of so many rows, as far as a worker's share of a step has as many."""
    need = asked.activations.of(min(rows, asked.largest(workers)))
    return memory(asked.counts, stage, workers=workers, activations=need, on_gpu=on_gpu, offload=asked.offload)


def _fits(held: Memory, available: int, host: int | None) -> bool:
    return held.total <= USABLE * available and (host is None or held.host <= USABLE * host)
