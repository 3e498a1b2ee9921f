"""A recipe, its base and its prepared data as a plan; and `auto` in a recipe made numbers.

A plan is made once for a run, when its job is prepared. From then on the recipe holds numbers, at whatever number of workers it goes on.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from hone.base_model import BaseModel as Base
from hone.errors import ResourceError
from hone.methods import METHODS as METHOD_FACTS
from hone.recipe import Recipe, allowed_stages, with_overrides
from models.methods import METHODS
from models.slices import slice_of
from models.tasks import TASKS, Head, Inputs, Task
from training.batches import batch_plan
from training.forward import TaskModule, choose_packing
from training.job import PreparedData
from training.model import DTYPES, build_on_meta
from training.plan.choose import USABLE, Activations, Asked, Choice, best, choices
from training.plan.hardware import Cluster, Hardware, Prices
from training.plan.memory import STAGES, Offload, count
from training.plan.speed import Work
from training.plan.trace import Traced, trace
from training.token_rows import TokenRows
from training.zero import kept_whole, sub_group_size

NO_BF16 = {"V100", "T4"}
MOST_TRACED = 64
"""Rows of the largest portion that is traced; what is beyond grows as it does up to there."""


class Option(BaseModel):
    """One choice, in figures."""

    model_config = ConfigDict(frozen=True)

    stage: int
    micro_batch_size: int
    workers: int
    bytes: dict[str, int]
    """Of one rank, by what they are for; `total` is their sum. Where it is on a GPU, `host` is what it takes of the machine's memory."""
    available: int
    host_available: int | None
    """Of the machine's memory, for a rank on a GPU; None where that is not known."""
    fits: bool
    is_allowed: bool
    """Whether the recipe can run under this stage at all."""
    largest_micro_batch_size: int
    units_a_second: float
    seconds: float
    accelerator_hours: float
    cost: float | None


class Plan(BaseModel):
    """What a recipe takes."""

    model_config = ConfigDict(frozen=True)

    name: str
    base: str
    task: str
    method: str
    precision: str
    cluster: str
    on_gpu: bool
    unit: str
    """What speed counts: tokens, samples, images."""
    parameters: int
    trained_parameters: int
    steps: int
    units: float
    currency: str
    workers: list[int]
    """The recipe's fewest, and where that is another number the most for which there is room."""
    stages: list[Option]
    """Each ZeRO stage on so many workers."""
    as_it_is: Option | None
    """What the recipe comes to, with `auto` decided; None where it does not fit."""
    others: list[Option]
    """The best choice at each number of workers that the cluster has room for."""
    recommended: Option | None
    reason: str
    advice: str
    """What to do where nothing fits as the recipe is; empty where something does."""


def make_plan(recipe: Recipe, base: Base, data: PreparedData, *, cluster: Cluster, hardware: Hardware, prices: Prices) -> Plan:
    """Estimate everything.

    Raises:
        ResourceError: the cluster has not as many workers as the recipe asks for.
    """
    size = recipe.scaling.sequence_parallel_size
    fewest, most = recipe.scaling.fewest, min(recipe.scaling.most, cluster.size - cluster.size % size)
    if fewest > cluster.size:
        raise ResourceError(
            f"scaling.num_workers {recipe.scaling.workers}: {cluster} has room for {cluster.size}; lower it, or plan for a larger cluster"
        )
    workers = sorted({fewest, most})
    asked = ask(recipe, base, data, on_gpu=cluster.on_gpu, dtype=dtype_on(recipe, cluster))
    price = prices.per_hour.get(cluster.kind)
    made = choices(asked, workers=workers, cluster=cluster, hardware=hardware, stages=STAGES)
    fitting = _others(recipe, asked, cluster, hardware) or _others(recipe, replace(asked, micro_batch_size=None), cluster, hardware)
    cheapest = min(fitting, key=lambda choice: choice.speed.accelerator_hours, default=None)
    taken = best(made) or next((choice for choice in fitting if choice.workers in workers), None) or cheapest
    as_it_is = best(_of_recipe(recipe, made))
    moved = None if taken else _offloaded(recipe, asked, workers, cluster, hardware)
    return Plan(
        name=recipe.name,
        base=recipe.base,
        task=recipe.task,
        method=recipe.method.type,
        precision=str(dtype_on(recipe, cluster)).removeprefix("torch."),
        cluster=str(cluster),
        on_gpu=cluster.on_gpu,
        unit=TASKS[recipe.task].unit,
        parameters=asked.counts.total,
        trained_parameters=asked.counts.trained,
        steps=asked.work.steps,
        units=asked.work.units,
        currency=prices.currency,
        workers=workers,
        stages=[_option(choice, price) for choice in made],
        as_it_is=_option(as_it_is, price) if as_it_is else None,
        others=[_option(choice, price) for choice in fitting],
        recommended=_option(taken, price) if taken else None,
        reason=_reason(taken, made),
        advice="" if as_it_is else _advice(recipe, _of_recipe(recipe, made), taken, moved),
    )


def settle(recipe: Recipe, plan: Plan) -> Recipe:
    """The recipe with numbers for `auto`.

    Raises:
        ResourceError: nothing fits.
    """
    if not recipe.is_open:
        return recipe
    if plan.as_it_is is None:
        raise ResourceError(plan.advice)
    return with_overrides(recipe, {"zero.stage": plan.as_it_is.stage, "train.micro_batch_size": plan.as_it_is.micro_batch_size})


def ask(recipe: Recipe, base: Base, data: PreparedData, *, on_gpu: bool, dtype: torch.dtype) -> Asked:
    """What there is to plan: the model counted, passes of several sizes traced, and the steps of the run."""
    task, method = TASKS[recipe.task], METHODS[recipe.method.type]
    model = build_on_meta(recipe, base, head=Head(data.labels, data.problem_type), dtype=dtype)
    packed = choose_packing(model, task, recipe.train)
    counts = count(model, dtype=dtype, kept_whole=kept_whole(recipe))
    needs_reference = bool(recipe.guard.kl_penalty) and not METHOD_FACTS[recipe.method.type].keeps_base
    copies = (counts.total * counts.bytes_each if needs_reference else 0) + (4 * counts.trained if recipe.train.ema_decay else 0)
    ahead = max(recipe.zero.stage3_max_live_parameters, recipe.zero.stage3_max_reuse_distance)
    gathered = 0 if recipe.zero.offload_param == "nvme" else ahead
    counts = replace(counts, copies=copies, most_gathered=gathered, saved_by_one=METHOD_FACTS[recipe.method.type].keeps_base)

    rows = TokenRows(data, "train")
    longest = int(np.argmax(rows.lengths))
    row = rows.take(np.array([longest]))[0]
    micro = None if recipe.train.micro_batch_size == "auto" else recipe.train.portion
    shared_by = recipe.scaling.sequence_parallel_size
    most = min(-(-recipe.train.global_batch_size // (recipe.scaling.fewest // shared_by)), MOST_TRACED)
    sizes = sorted({1, most, micro or 1})
    module = TaskModule(model, task, method, train=recipe.train, beta=recipe.preference.beta)
    tracer = _Tracer(module, task, row, _inputs(task, base, data), packed=packed, shared_by=shared_by, on_gpu=on_gpu)
    traced = tracer.of(sizes)
    plan = batch_plan(recipe, data.sources)
    rows_a_step = sum(source.per_epoch for source in plan.sources) / plan.steps_per_epoch
    mean, most_cost = float(rows.lengths.mean()), int(rows.lengths[longest])
    largest, units = traced[sizes[-1]].further, sizes[-1] * most_cost
    return Asked(
        counts=counts,
        work=Work(plan.total_steps, rows_a_step, mean, largest.flops * shared_by / units, largest.exchanged / units),
        method=recipe.method.type,
        activations=Activations({rows: each.further.need for rows, each in traced.items()}),
        global_batch_size=recipe.train.global_batch_size,
        fullness=mean / most_cost if packed else 1.0,
        stages=allowed_stages(recipe),
        micro_batch_size=micro,
        offload=_asked_offload(recipe),
        sequence_parallel_size=shared_by,
    )


def _asked_offload(recipe: Recipe) -> Offload:
    zero, at_once = recipe.zero, sub_group_size(recipe)
    return Offload(
        optimizer=bool(zero.offload_optimizer),
        param=bool(zero.offload_param),
        swapped_at_once=at_once if zero.offload_optimizer == "nvme" else 0,
        weights_at_once=at_once if zero.offload_param == "nvme" else 0,
    )


def dtype_on(recipe: Recipe, cluster: Cluster) -> torch.dtype:
    """The type that workers there will choose."""
    if recipe.train.precision == "auto":
        return torch.bfloat16 if cluster.on_gpu and cluster.kind not in NO_BF16 else torch.float32
    return DTYPES[recipe.train.precision]


class _Tracer:
    """Passes over portions of the data set's longest row, over and over; where several workers share them, over the slice that has the most
    targets, which the other workers wait for."""

    def __init__(
        self, module: TaskModule, task: Task, row: dict[str, Any], inputs: Inputs, *, packed: bool, shared_by: int, on_gpu: bool
    ) -> None:
        self._module, self._task, self._row, self._inputs = module, task, row, inputs
        self._packed, self._shared_by, self._on_gpu = packed, shared_by, on_gpu

    def of(self, sizes: Iterable[int]) -> dict[int, Traced]:
        """By rows of a portion."""
        return {rows: self._trace(rows) for rows in sizes}

    def _trace(self, rows: int) -> Traced:
        batch = self._task.collate([self._row] * rows, inputs=self._inputs, packed=self._packed)
        if self._shared_by > 1:
            cut = [slice_of(batch, number=n, of=self._shared_by, pad_token_id=self._inputs.pad_token_id) for n in range(self._shared_by)]
            batch = max(cut, key=lambda part: part["targets"].numel())
        return trace(self._module, batch, on_gpu=self._on_gpu)


def _inputs(task: Task, base: Base, data: PreparedData) -> Inputs:
    return Inputs(data.pad_token_id, None if task.unit == "tokens" else task.load_processor(base.folder))


def _of_recipe(recipe: Recipe, made: list[Choice]) -> list[Choice]:
    """Those that the recipe leaves open."""
    return [choice for choice in made if recipe.zero.stage in ("auto", choice.stage)]


def _others(recipe: Recipe, asked: Asked, cluster: Cluster, hardware: Hardware) -> list[Choice]:
    """The best choice at each number of workers at which any fits."""
    made = [best(choices(asked, workers=[n], cluster=cluster, hardware=hardware, stages=STAGES)) for n in _numbers(recipe, cluster)]
    return [choice for choice in made if choice]


def _offloaded(recipe: Recipe, asked: Asked, workers: list[int], cluster: Cluster, hardware: Hardware) -> Choice | None:
    """What would fit on GPUs with all that can be moved in the machine's memory."""
    if not cluster.on_gpu or 3 not in allowed_stages(recipe):
        return None
    moved = replace(asked, micro_batch_size=None, offload=Offload(optimizer=True, param=True), stages=(3,))
    return best(choices(moved, workers=workers, cluster=cluster, hardware=hardware, stages=(3,)))


def _numbers(recipe: Recipe, cluster: Cluster) -> list[int]:
    """Of workers: the recipe's, and powers of two (of those that share rows) among which the rows of a step divide; no more than there is
    room for."""
    batch, size = recipe.train.global_batch_size, recipe.scaling.sequence_parallel_size
    groups = cluster.size // size
    doubled = [size * 2**n for n in range(groups.bit_length()) if 2**n <= groups and batch % 2**n == 0]
    return sorted({recipe.scaling.fewest, min(recipe.scaling.most, groups * size), *doubled})


def _option(choice: Choice, price: float | None) -> Option:
    held = choice.memory
    names = ("weights", "gradients", "optimizer", "activations", "checkpoint", "allocator", "process", "total", "host")
    return Option(
        stage=choice.stage,
        micro_batch_size=choice.micro_batch_size,
        workers=choice.workers,
        bytes={name: getattr(held, name) for name in names},
        available=choice.available,
        host_available=choice.host,
        fits=choice.fits,
        is_allowed=choice.is_allowed,
        largest_micro_batch_size=choice.largest_micro_batch,
        units_a_second=choice.speed.units_a_second,
        seconds=choice.speed.seconds,
        accelerator_hours=choice.speed.accelerator_hours,
        cost=None if price is None else price * choice.speed.accelerator_hours,
    )


def _reason(taken: Choice | None, made: list[Choice]) -> str:
    if taken is None:
        return ""
    refused = {choice.stage for choice in made if choice.is_allowed and not choice.fits}
    alike = [choice for choice in made if choice.workers == taken.workers and choice.stage in refused]
    faster = [choice for choice in alike if choice.speed.seconds < taken.speed.seconds]
    if faster:
        return f"the fastest that fits; stage {faster[0].stage} sends less and does not fit"
    return "none that fits is faster, and of those as fast this needs the least memory"


def _advice(recipe: Recipe, made: list[Choice], other: Choice | None, moved: Choice | None) -> str:
    """One line that says what to do where the recipe does not fit: what else does, or with offloading, or what takes less."""
    least = min((choice for choice in made if choice.is_allowed and not choice.fits), key=lambda choice: choice.memory.total)
    on_host = least.memory.total <= USABLE * least.available
    needed, there = (least.memory.host, least.host or 0) if on_host else (least.memory.total, least.available)
    said = (
        f"does not fit: zero.stage {least.stage} with train.micro_batch_size {least.micro_batch_size} on {least.workers} "
        f"worker{'s' if least.workers > 1 else ''} needs {needed / 2**30:.1f} GiB{' of the machine' if on_host else ''} each, and of "
        f"{there / 2**30:.1f} it may fill {USABLE:.0%}"
    )
    if other:
        return (
            f"{said}; set scaling.num_workers {other.workers}, zero.stage {other.stage} and train.micro_batch_size {other.micro_batch_size}"
        )
    if moved:
        return (
            f"{said}; set zero.stage 3, zero.offload_optimizer true, zero.offload_param true and "
            f"train.micro_batch_size {moved.micro_batch_size}, which is slower"
        )
    if on_host:
        return f"{said}; use zero.stage 3, which reads weights in parts, no offloading, or machines with more memory"
    ways = ["more workers"]
    if not recipe.train.gradient_checkpointing and recipe.method.type != "prefix":
        ways.append("train.gradient_checkpointing true")
    if least.micro_batch_size > 1:
        ways.append("a lower train.micro_batch_size")
    ways.append("a lower data.max_length")
    if recipe.method.type in ("full", "freeze"):
        ways.append("method lora")
    return f"{said}; use {', '.join(ways[:-1])} or {ways[-1]}"
