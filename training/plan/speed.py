"""How long a run takes and what it costs. An estimate: it rests on the share of the peak that `hardware.yaml` assumes.

A portion's operators are counted on the real model (`trace.py`), so this much is no rule of thumb: a parameter that trains costs 6 a token
(2 forward, 2 for the gradient of its input, 2 for its own), a frozen one below an adapter 4, one below everything that trains 2, and
gradient checkpointing computes the forward pass again, another 2 for each; attention adds 4 x width for each pair of tokens forward and
2.5 times that backward (https://arxiv.org/abs/2205.14135, https://arxiv.org/abs/2205.05198).

What a rank sends, in elements, with P parameters of which T train (section 7 of https://arxiv.org/abs/1910.02054, for portions
instead of one batch, and for frozen weights, which are gathered but have no gradients):

    stage 0       2 T a step: a sum over the workers, at the end of it
    stage 1       2 T a step: gradients scattered, weights gathered
    stage 2       T a portion, whose gradients are scattered at once, and T a step
    stage 3       2 P and T a portion: weights gathered forward and backward, gradients scattered

times (N - 1) / N. Workers that share rows exchange queries, keys, values and answers besides, in each layer of each pass; the trace counts
how much. They are neighbours, and most often on one node. Nothing is assumed to overlap with computing. Validation, checkpoints, offloading
and the start of workers are not in it.
"""

import math
from dataclasses import dataclass

from training.plan.hardware import Cluster, Hardware
from training.plan.memory import Counts, Stage


@dataclass(frozen=True)
class Work:
    """What there is to do, whatever does it."""

    steps: int
    rows_a_step: float
    cost_a_row: float
    """Tokens of a row, on average, or 1 where rows are not tokens."""
    flops_a_unit: float
    """Floating point operations for each of them, forward and backward."""
    exchanged_a_unit: float = 0.0
    """Bytes that each of the workers that share a row sends to the others for each of them, forward and backward."""

    @property
    def units(self) -> float:
        return self.steps * self.rows_a_step * self.cost_a_row


@dataclass(frozen=True)
class Speed:
    """Of a whole run."""

    units_a_second: float
    seconds: float
    accelerator_hours: float
    sent_a_step: float
    """Bytes that one rank sends."""


def speed(
    work: Work,
    counts: Counts,
    stage: Stage,
    *,
    workers: int,
    portions: int,
    cluster: Cluster,
    hardware: Hardware,
    method: str,
    sequence_parallel_size: int = 1,
) -> Speed:
    """Time of a run on some of a cluster's accelerators.

    Args:
        work: What there is to do.
        counts: Parameters.
        stage: Of ZeRO.
        workers: How many accelerators.
        portions: Forward passes of a worker in a step.
        cluster: What they are.
        hardware: What is known and assumed of them.
        method: Of fine-tuning.
        sequence_parallel_size: How many of them share each row.
    """
    kind = hardware.kinds[cluster.kind]
    flops = work.rows_a_step * work.cost_a_row * work.flops_a_unit / workers
    computing = flops / (kind.tflops * 1e12 * hardware.utilisation[method])
    sent = sent_a_step(counts, stage, workers=workers, portions=portions)
    exchanged = work.rows_a_step * work.cost_a_row * sequence_parallel_size / workers * work.exchanged_a_unit
    sending = sent / link_gbs(workers, cluster, hardware) + exchanged / link_gbs(sequence_parallel_size, cluster, hardware)
    a_step = computing + sending / 1e9
    seconds = work.steps * a_step
    return Speed(work.rows_a_step * work.cost_a_row / a_step, seconds, seconds * workers / 3600, sent + exchanged)


def sent_a_step(counts: Counts, stage: Stage, *, workers: int, portions: int) -> float:
    """Bytes that one rank sends in a step."""
    trained, total = counts.trained, counts.total
    elements = {0: 2 * trained, 1: 2 * trained, 2: (portions + 1) * trained, 3: portions * (2 * total + trained)}[stage]
    return elements * counts.bytes_each * (workers - 1) / workers


def link_gbs(workers: int, cluster: Cluster, hardware: Hardware) -> float:
    """GB/s of one rank: within a node its own link, between nodes its share of the node's."""
    kind = hardware.kinds[cluster.kind]
    if workers <= cluster.per_node:
        return kind.link_gbs
    return min(kind.link_gbs, hardware.node_link_gbs / cluster.per_node)


def portions_of(rows_a_step: float, *, workers: int, micro_batch_size: int, fullness: float) -> int:
    """Forward passes of a worker (or of those that share rows) in a step; `fullness` is the mean length of a row as a share of the longest,
    where rows are packed."""
    return max(1, math.ceil(rows_a_step * fullness / (workers * micro_batch_size)))
