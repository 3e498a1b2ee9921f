"""Everything that a worker needs before its first step: model, DeepSpeed's engine, rows, and what is measured."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from hone.methods import METHODS as METHOD_FACTS
from models.methods import METHODS
from models.tasks import TASKS, Inputs
from training.augmented import augmented
from training.batches import BatchPlan, Rows, batch_plan
from training.checkpoints.pieces import TrainedState
from training.ema import MovingAverage
from training.evaluate import evaluate
from training.forward import Batcher, TaskModule, choose_packing
from training.job import Job
from training.model import build_model, choose_dtype, load_base
from training.nvme import prepare_swap, swap_of
from training.optim import Groups, make_optimizer
from training.retention import Retention
from training.sequence import sequence_group
from training.token_rows import TokenRows
from training.worker import Worker
from training.zero import deepspeed_config, fit_buckets, prepare_deepspeed, release_gathered


@dataclass(eq=False)
class Started:
    """One worker's part of a run."""

    job: Job
    worker: Worker
    engine: Any
    optimizer: Any
    groups: Groups
    batcher: Batcher
    plan: BatchPlan
    rows: TokenRows
    take: Callable[[int, Rows], list[dict[str, Any]]]
    """Training rows of a step by number, changed as the recipe says."""
    validation: TokenRows
    retention: Retention | None
    average: MovingAverage | None
    state: TrainedState
    """What a checkpoint holds."""
    first_replayed: int
    """Training rows from this number on come from `data.retain`."""

    @property
    def measures(self) -> bool:
        """Whether there is anything to measure but the training loss."""
        return bool(len(self.validation) or self.retention)

    def averaged(self) -> AbstractContextManager[None]:
        """A block in which the model has the weights that are measured and published."""
        return self.average.in_place() if self.average else nullcontext()

    def measure(self) -> dict[str, float]:
        """Validation and retention as the weights are now."""
        measured = evaluate(self.engine, self.validation, self.batcher, self.worker) if len(self.validation) else {}
        measured |= self.retention.measure() if self.retention else {}
        release_gathered(self.engine)
        return measured


def start(job: Job, worker: Worker) -> Started:
    """Build it all; the engine still answers as the base, or what the method makes of it before it has learnt anything."""
    recipe, task, method = job.recipe, TASKS[job.recipe.task], METHODS[job.recipe.method.type]
    deepspeed = prepare_deepspeed(use_gpu=job.use_gpu)
    prepare_swap(job, worker)
    group = sequence_group(worker, size=recipe.scaling.sequence_parallel_size)
    device = torch.device("cuda", worker.local_rank) if job.use_gpu else torch.device("cpu")
    dtype = choose_dtype(recipe, use_gpu=job.use_gpu)

    rows = TokenRows(job.data, "train")
    plan = batch_plan(recipe, job.data.sources)
    config = deepspeed_config(recipe, dtype=dtype, use_gpu=job.use_gpu, swap=swap_of(job, worker))
    model, heads = build_model(job, dtype=dtype, zero3=config if recipe.zero.stage == 3 else None, rank=worker.rank)
    packed = choose_packing(model, task, recipe.train, group)
    assert packed or group.size == 1, "prepare_job has refused what cannot be cut"
    inputs = inputs_of(job)
    batcher = Batcher(task, recipe.train, group, packed=packed, inputs=inputs, device=device)
    keeps_base = METHOD_FACTS[recipe.method.type].keeps_base
    reference = None
    if recipe.guard.kl_penalty and not keeps_base:
        reference = load_base(job, dtype=dtype)[0].to(device).eval().requires_grad_(False)
        if packed:
            choose_packing(reference, task, recipe.train, group)
    optimizer, groups = make_optimizer(model, recipe, heads=heads, steps_per_epoch=plan.steps_per_epoch)
    fit_buckets(config, groups.trained_parameters)
    module = TaskModule(model, task, method, train=recipe.train, beta=recipe.preference.beta, reference=reference)
    engine, optimizer, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)

    average = MovingAverage(groups.trainable, decay=recipe.train.ema_decay) if recipe.train.ema_decay else None
    retained = TokenRows(job.data, "retain")
    return Started(
        job=job,
        worker=worker,
        engine=engine,
        optimizer=optimizer,
        groups=groups,
        batcher=batcher,
        plan=plan,
        rows=rows,
        take=augmented(rows, job, inputs),
        validation=TokenRows(job.data, "validation"),
        retention=Retention(
            engine,
            retained,
            batcher,
            worker,
            has_probabilities=recipe.task != "preference" and job.data.problem_type != "regression",
            keeps_base=keeps_base,
        )
        if len(retained)
        else None,
        average=average,
        state=TrainedState(optimizer, groups.named, model, average),
        first_replayed=sum(source.rows for source in job.data.sources if source.role != "retain"),
    )


def inputs_of(job: Job) -> Inputs:
    """What turns the job's rows into tensors."""
    task = TASKS[job.recipe.task]
    reads_tokens = task.unit == "tokens"
    return Inputs(job.data.pad_token_id, None if reads_tokens else task.load_processor(job.base_folder))
