"""What every worker runs, top to bottom: model, DeepSpeed, steps, validation, checkpoints, export."""

import time
from collections.abc import Sequence
from functools import partial

import torch

from hone.recipe import Recipe
from training.augmented import augmented
from training.batches import BatchPlan, Mixed
from training.checkpoint import load_checkpoint, save_checkpoint
from training.evaluate import evaluate
from training.export import export
from training.forward import Batcher, TaskModule, choose_packing, sum_over_workers
from training.job import Job, SourceRows
from training.metrics import MetricsFile
from training.model import build_model, choose_dtype
from training.optim import learning_rate, make_optimizer, set_learning_rate
from training.tasks import TASKS
from training.token_rows import TokenRows
from training.worker import Worker
from training.zero import deepspeed_config, prepare_deepspeed, sharded_loading


def train(job: Job, worker: Worker) -> None:
    """Run a job on this worker, from its newest checkpoint if there is one, and leave the result in `job.export_folder`."""
    recipe, task = job.recipe, TASKS[job.recipe.task]
    deepspeed = prepare_deepspeed(use_gpu=job.use_gpu)
    device = torch.device("cuda", worker.local_rank) if job.use_gpu else torch.device("cpu")
    dtype = choose_dtype(recipe, use_gpu=job.use_gpu)

    rows, validation = TokenRows(job.data, "train"), TokenRows(job.data, "validation")
    take = augmented(rows, job, task)
    plan = batch_plan(recipe, job.data.sources)
    eval_steps = recipe.train.eval_steps or plan.steps_per_epoch
    save_steps = recipe.train.save_steps or eval_steps

    config = deepspeed_config(recipe, dtype=dtype)
    with sharded_loading(config):
        model = build_model(job, dtype=dtype, sharded=recipe.zero.stage == 3)
    packed = choose_packing(model, task, recipe.train)
    batcher = Batcher(task, recipe.train, worker, packed=packed, pad_token_id=job.data.pad_token_id, device=device)
    optimizer = make_optimizer(model, recipe.optim)
    engine, optimizer, _, _ = deepspeed.initialize(
        model=TaskModule(model, task), optimizer=optimizer, config=config, dist_init_required=False
    )

    first_step = load_checkpoint(engine, worker)
    metrics = MetricsFile(job.folder, rank=worker.rank, keep_steps=first_step, total_steps=plan.total_steps)
    if first_step == 0 and len(validation):
        metrics.write({"step": 0, **evaluate(engine, validation, task, batcher, worker)})

    for step in range(first_step, plan.total_steps):
        began = time.perf_counter()
        batch_rows = plan.rows(step)
        portions = batcher.portions(batch_rows, rows.lengths)
        n_targets = int(rows.n_targets[batch_rows].sum())
        torch.manual_seed(_step_seed(recipe.train.seed, step, worker.rank))
        lr = learning_rate(step, plan.total_steps, recipe.optim)
        set_learning_rate(optimizer, lr)

        engine.train()
        totals = torch.zeros(2, dtype=torch.float64)  # summed loss, right answers
        for n, batch in enumerate(batcher.batches(partial(take, step), portions), start=1):
            engine.set_gradient_accumulation_boundary(n == len(portions))
            loss, right = engine(batch)
            # DeepSpeed averages gradients over workers; together with this factor that makes the mean over the global batch's targets.
            engine.backward(loss * (worker.world_size / n_targets), scale_wrt_gas=False)
            totals += torch.stack([loss.detach(), right]).to(totals)
        engine.step()

        totals = sum_over_workers(totals, device=device, worker=worker)
        done = step + 1
        metrics.write(
            {
                "step": done,
                "epoch": round(done / plan.steps_per_epoch, 4),
                "loss": float(totals[0]) / n_targets,
                task.accuracy_name: float(totals[1]) / n_targets,
                "learning_rate": lr,
                "grad_norm": float(engine.get_global_grad_norm() or 0.0),
                "tokens": int(rows.lengths[batch_rows].sum()),
                "step_s": time.perf_counter() - began,
            }
        )
        is_last = done == plan.total_steps
        measured = evaluate(engine, validation, task, batcher, worker) if len(validation) and (is_last or done % eval_steps == 0) else {}
        if measured:
            metrics.write({"step": done, **measured})
        if not is_last and done % save_steps == 0:
            save_checkpoint(engine, worker, done, {"step": done, **measured})
        elif measured:
            worker.report({"step": done, **measured})

    export(engine, job, batcher, validation if len(validation) else rows, worker)
    metrics.close()


def batch_plan(recipe: Recipe, sources: Sequence[SourceRows]) -> BatchPlan:
    """The steps of a recipe over these rows."""
    return BatchPlan(
        sources=tuple(Mixed(source.rows, source.per_epoch) for source in sources),
        global_batch_size=recipe.train.global_batch_size,
        epochs=recipe.train.num_train_epochs,
        max_steps=recipe.train.max_steps,
        seed=recipe.train.seed,
    )


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Dropout is drawn from (seed, step, rank), so that a resumed run draws what it would have drawn."""
    return (seed * 1_000_003 + step) * 65_537 + rank
