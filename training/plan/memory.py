"""What a rank holds at its highest, by ZeRO stage. Formulas, each with its source; sizes in bytes.

With P parameters of which T train, N workers, w bytes of the run's type (4 in fp32, 2 in bf16), and B the elements of a bucket,
min(T, 5e8), as `training.zero.fit_buckets` sets it:

    weights       stages 0 to 2: P w.  Stage 3: P w / N, and beside it what is gathered: parameters so small that they stay whole; the
                  module with the most weights; what is used again within R elements, 1e9, which between forward and
                  backward is the last R / 2; and what is fetched ahead, up to 5e7 elements within the rest of R.
    gradients     stages 0 and 1: T w.  Stages 2 and 3: T w / N.  On top, what is sent at once, B w: a flat copy at stage 0, a bucket at
                  the others. Stage 1 has the reduced part as well, T w / N; stage 3 the copies that are scattered, B w.
    optimiser     AdamW's two moments in fp32, 8 T, and the fp32 master weights, 4 T: whole at stage 0, a part of N at 1 to 3. In fp32 the
                  weights are their own masters at stage 0, and their own shards at 3; at 1 and 2 the master is a copy.
    activations   the most that a pass has in use at once (`trace.py`).
    checkpoint    the copy of weights and moments that is written while training goes on, 12 T: an adapter's, and all that trains at
                  stage 0, on rank 0, else a part of N. In the machine's memory.
    process       Python, torch, DeepSpeed, transformers; on a GPU the CUDA context, and NCCL's buffers.

With zero.offload_optimizer the optimiser's part, with masters at any precision, and the gradients' part of N, with an fp32 copy for the
step, are in the machine's memory; with zero.offload_param the shards of the weights are. From NVMe come, with offload_optimizer nvme, four
buffers in fp32 of a sub-group each, and a checkpoint is written from them; with offload_param nvme, buffers of the largest shard, one of a
sub-group's parameters (whole, by DeepSpeed's count) for what is written back, and nothing is gathered before it is needed.

Who holds what is section 5 of ZeRO (https://arxiv.org/abs/1910.02054); buckets and copies are DeepSpeed 0.19's
(runtime/zero/stage_1_and_2.py, stage3.py, partitioned_param_coordinator.py), and the reason why the paper's formulas alone fall short.
There is no key-value cache in training.

On a CPU what counts is the resident set, and glibc's malloc does not give back what lies between pieces that are still used. How much that
is has been measured, as a share of the activations and of the gradients that come and go (`benchmarks/plan_memory.py`).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from training.plan.trace import Need
from training.zero import WEIGHT_BUFFERS, bucket_elements, elements

Stage = Literal[0, 1, 2, 3]
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)

FETCHED_AHEAD = 50_000_000
"""Elements that stage 3 gathers before they are needed: `stage3_prefetch_bucket_size`."""
CPU_PROCESS = 550 * 2**20
"""Resident set of a worker with a model of 0.1 million parameters after two steps, glibc 2.36, torch 2.13, DeepSpeed 0.19.8."""
GPU_PROCESS = 1200 * 2**20
"""CUDA context, cuBLAS workspace and NCCL buffers; not measured here."""
HOST_PROCESS = 3 * 2**30
"""Resident set of a worker that trains on a GPU, CUDA's libraries included; not measured here."""

OF_LIVE, OF_TAKEN, OF_GRADIENTS = 0.25, 0.23, 0.4
"""Shares that glibc's malloc keeps: of what is in use, of all that was taken before, and of gradients that move into buckets."""
MATH_BUFFERS = 45 * 2**20
"""What matrix libraries keep for themselves once they have worked on matrices of any size."""
GATHERING = 2.1
"""How many times as much is kept under stage 3, where weights come and go as well."""


@dataclass(frozen=True)
class Counts:
    """Parameters, from the model with the method in it."""

    total: int
    trained: int
    bytes_each: int
    """Of weights and gradients."""
    copies: int = 0
    """Bytes of further weights that are whole on every rank: the base beside a model that changes, a moving average (in fp32)."""
    largest: int = 0
    """Elements of the module that has the most weights of its own."""
    kept_whole: int = 0
    """Elements of the parameters that stage 3 does not shard."""
    most_gathered: int = 1_000_000_000
    """Elements that stage 3 may hold gathered, as `zero.stage3_max_live_parameters` and `zero.stage3_max_reuse_distance` say."""
    saved_by_one: bool = False
    """Whether rank 0 takes the state of all for a checkpoint, as it does of adapters."""


@dataclass(frozen=True)
class Offload:
    """What is kept in the machine's memory; on a CPU that is the same, with copies more."""

    optimizer: bool = False
    param: bool = False
    swapped_at_once: int = 0
    """Elements whose optimiser state is in memory at once, where it is on NVMe."""
    weights_at_once: int = 0
    """Elements whose weights are written back at once, where weights are on NVMe."""


NOTHING_MOVED = Offload()


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, at its highest."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    checkpoint: int
    """The copy that is being written; on a GPU it is in the machine's memory."""
    allocator: int
    """Kept by malloc between what is used."""
    process: int
    host: int = 0
    """Of a rank on a GPU, in the machine's memory; not in the total."""

    @property
    def total(self) -> int:
        return sum((self.weights, self.gradients, self.optimizer, self.activations, self.checkpoint, self.allocator, self.process))


def count(model: Any, *, dtype: torch.dtype, kept_whole: int) -> Counts:
    """Parameters of a model with its method. DeepSpeed makes all of them of the run's type, also those that PEFT has made fp32.

    Args:
        model: Any, on any device.
        dtype: Of the run.
        kept_whole: Elements of the largest parameter that stage 3 does not shard.
    """
    parameters = list(model.parameters())
    return Counts(
        total=elements(parameters),
        trained=elements(parameter for parameter in parameters if parameter.requires_grad),
        bytes_each=dtype.itemsize,
        largest=max(elements(module.parameters(recurse=False)) for module in model.modules()),
        kept_whole=elements(parameter for parameter in parameters if parameter.numel() <= kept_whole),
    )


def memory(counts: Counts, stage: Stage, *, workers: int, activations: Need, on_gpu: bool, offload: Offload = NOTHING_MOVED) -> Memory:
    """What a rank holds: rank 0, where it holds more than others.

    Args:
        counts: Parameters.
        stage: Of ZeRO.
        workers: How many ranks share.
        activations: Of one portion, as traced.
        on_gpu: Whether it is a GPU's memory; else the resident set of a process.
        offload: What the recipe keeps in the machine's memory, as far as the stage can.
    """
    moves_optimizer, moves_param = offload.optimizer and stage > 0, offload.param and stage == 3
    weights, shards = _weights(counts, stage, workers=workers)
    gradients, part = _gradients(counts, stage, workers=workers)
    optimizer = _optimizer(counts, stage, workers=workers, is_copy=moves_optimizer)
    checkpoint = _checkpoint(counts, stage, workers=workers)
    rested = _weight_buffers(counts, offload, workers=workers) if moves_param and offload.weights_at_once else shards
    moved = (rested if moves_param else 0, _moved_gradients(counts, workers=workers) if moves_optimizer else 0)
    if moves_optimizer and offload.swapped_at_once:
        optimizer, moved = _swapped(counts, offload, workers=workers), (moved[0], _part(counts.trained, workers) * counts.bytes_each)
        checkpoint = checkpoint if counts.saved_by_one else 0
    if not on_gpu:
        return Memory(
            weights=weights + rested + counts.copies,
            gradients=gradients + (moved[1] or part),
            optimizer=optimizer,
            activations=activations.live,
            checkpoint=checkpoint,
            allocator=_kept_by_malloc(counts, stage, activations),
            process=CPU_PROCESS,
        )
    loading = counts.total * counts.bytes_each if stage < 3 else 0  # weights are read into the machine's memory first
    return Memory(
        weights=weights + (0 if moves_param else shards) + counts.copies,
        gradients=gradients + (0 if moves_optimizer else part),
        optimizer=0 if moves_optimizer else optimizer,
        activations=activations.live,
        checkpoint=0,
        allocator=0,
        process=GPU_PROCESS,
        host=HOST_PROCESS + max(loading, sum(moved) + (optimizer if moves_optimizer else 0) + checkpoint),
    )


def _weights(counts: Counts, stage: Stage, *, workers: int) -> tuple[int, int]:
    """(What passes work with, what is at rest)."""
    if stage < 3:
        return counts.total * counts.bytes_each, 0
    reused = counts.most_gathered // 2
    gathered = counts.kept_whole + counts.largest + reused + min(FETCHED_AHEAD, counts.most_gathered - reused)
    return min(counts.total, gathered) * counts.bytes_each, _part(counts.total, workers) * counts.bytes_each


def _gradients(counts: Counts, stage: Stage, *, workers: int) -> tuple[int, int]:
    """(What is made and sent, the part of N that is kept for the step)."""
    part, bucket = _part(counts.trained, workers), min(counts.trained, bucket_elements(counts.trained))
    made = {0: counts.trained + bucket, 1: counts.trained + bucket, 2: bucket, 3: 2 * bucket}[stage]
    return made * counts.bytes_each, (part if stage else 0) * counts.bytes_each


def _moved_gradients(counts: Counts, *, workers: int) -> int:
    """What portions have come to, in the run's type, and an fp32 copy for the step."""
    return _part(counts.trained, workers) * (counts.bytes_each + 4)


def _optimizer(counts: Counts, stage: Stage, *, workers: int, is_copy: bool) -> int:
    has_masters = counts.bytes_each < 4 or stage in (1, 2) or is_copy
    held = counts.trained if stage == 0 else _part(counts.trained, workers)
    return held * (12 if has_masters else 8)


def _swapped(counts: Counts, offload: Offload, *, workers: int) -> int:
    """DeepSpeed's four buffers. A sub-group ends with the parameter that fills it."""
    most = offload.swapped_at_once + _part(counts.largest, workers)
    return 4 * 4 * min(_part(counts.trained, workers), most)


def _weight_buffers(counts: Counts, offload: Offload, *, workers: int) -> int:
    """DeepSpeed's for shards that are read, and the one from which a sub-group's are written."""
    written = min(counts.trained, offload.weights_at_once * workers + counts.largest)
    return (WEIGHT_BUFFERS * _part(counts.largest, workers) + written) * counts.bytes_each


def _checkpoint(counts: Counts, stage: Stage, *, workers: int) -> int:
    is_whole = counts.saved_by_one or stage == 0
    return 12 * (counts.trained if is_whole else _part(counts.trained, workers))


def _kept_by_malloc(counts: Counts, stage: Stage, need: Need) -> int:
    """Fitted to workers of 5 to 126 million parameters (docs/decisions/0010)."""
    of_gradients = OF_GRADIENTS * counts.trained * counts.bytes_each if stage else 0.0
    kept = OF_LIVE * need.live + OF_TAKEN * need.taken + of_gradients + MATH_BUFFERS
    return int(kept * (GATHERING if stage == 3 else 1.0))


def _part(whole: int, workers: int) -> int:
    return -(-whole // workers)
