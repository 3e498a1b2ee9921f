"""One optimiser step over the rows of a global batch, shared out over the workers."""

import time
from functools import partial
from typing import Any

import numpy as np
import torch

from models.tasks import Batch
from training.batches import Rows
from training.divergence import refuse_bad_loss
from training.evaluate import stacked
from training.forward import sum_over_workers
from training.optim import learning_rate
from training.start import Started


def take_step(run: Started, step: int, *, checkpoint: int) -> dict[str, Any]:
    """Learn from the rows of one step (from 0); its line in the metrics.

    Args:
        run: This worker's part of the run.
        step: Which one.
        checkpoint: The step of the newest checkpoint, to be told of if this goes wrong.

    Raises:
        RunFailedError: the loss is not a finite number.
    """
    began = time.perf_counter()
    recipe, engine, worker = run.job.recipe, run.engine, run.worker
    rows = run.plan.rows(step)
    portions = run.batcher.portions(rows, run.rows.lengths)
    n_targets = int(run.rows.n_targets[rows].sum())
    n_beside = int(run.rows.n_targets[_beside(run, rows)].sum())
    _draw_from(_seed(recipe.train.seed, step, worker.rank))
    lr = learning_rate(step, run.plan.total_steps, recipe.optim)
    run.groups.set_step(run.optimizer, step, lr)

    engine.train()
    take = partial(run.take, step)
    totals, names = torch.zeros(1, dtype=torch.float64), []
    losses: list[torch.Tensor] = []
    for n, portion in enumerate(portions, start=1):
        engine.set_gradient_accumulation_boundary(n == len(portions))
        beside: Batch | None = run.batcher.batch(take(_beside(run, portion))) if n_beside else None
        loss, sums, divergence = engine(run.batcher.batch(take(portion)), beside=beside)
        # DeepSpeed averages gradients over workers; together with this factor that makes the mean over the global batch's targets.
        wanted = loss * (worker.world_size / n_targets)
        if n_beside:
            wanted = wanted + divergence * (recipe.guard.kl_penalty * worker.world_size / n_beside)
        engine.backward(wanted, scale_wrt_gas=False)
        totals = totals + stacked(loss, {**sums, "kl": divergence})
        names = list(sums)
        losses.append(wanted.detach())
    totals = sum_over_workers(totals, device=engine.device, worker=worker).cpu()
    if not torch.isfinite(totals).all():
        suspects = [portion for portion, loss in zip(portions, losses, strict=True) if not torch.isfinite(loss)]
        refuse_bad_loss(run, suspects, step=step + 1, checkpoint=checkpoint)
    engine.step()
    if run.average:
        run.average.update(step + 1)
    return {
        "step": step + 1,
        "epoch": round((step + 1) / run.plan.steps_per_epoch, 4),
        **dict(zip(["loss", *names], (totals[:-1] / n_targets).tolist(), strict=True)),
        **({"kl": float(totals[-1]) / n_beside} if n_beside else {}),
        "learning_rate": lr,
        "grad_norm": float(engine.get_global_grad_norm() or 0.0),
        "rows": len(rows),
        **({"tokens": int(run.rows.lengths[rows].sum())} if run.batcher.reads_tokens else {}),
        "step_s": time.perf_counter() - began,
    }


def _beside(run: Started, rows: Rows) -> Rows:
    """Of these training rows those that are to be answered as the base answers them: what is mixed in from `retain`, or all of them."""
    if not run.job.recipe.guard.kl_penalty:
        return rows[:0]
    return rows[rows >= run.first_replayed] if run.job.data.retain_rows else rows


def _draw_from(seed: int) -> None:
    """Dropout draws from torch, and the masks of some speech models from numpy's old generator."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def _seed(seed: int, step: int, rank: int) -> int:
    """Dropout is drawn from (seed, step, rank), so that a resumed run draws what it would have drawn."""
    return (seed * 1_000_003 + step) * 65_537 + rank
