"""One optimiser step over the rows of a global batch, shared out over the workers."""

import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from hone.errors import RunFailedError
from hone.run_folder import tell
from models.tasks import Batch
from training.batches import Rows
from training.divergence import refuse_bad_loss
from training.evaluate import stacked
from training.forward import sum_over_workers
from training.ledger import Ledger
from training.optim import learning_rate
from training.start import Started
from training.zero import step_optimizer


@dataclass(frozen=True)
class Taken:
    """What a step came to, the same on every rank."""

    line: dict[str, Any]
    """Its line in the metrics."""
    loss: float
    noticed: bool
    """Whether a machine of some rank is about to be taken away."""
    times: dict[str, float]
    """Of this rank: `step_s`, of that `data_s` until rows were there, and `forward_s`."""


def take_step(run: Started, step: int, *, ledger: Ledger, checkpoint: int) -> Taken:
    """Learn from the rows of one step (from 0).

    Args:
        run: This worker's part of the run.
        step: Which one.
        ledger: Told which rows that were on this rank.
        checkpoint: The step of the newest checkpoint, to be told of if this goes wrong.

    Raises:
        RunFailedError: the loss is not a finite number, or gradients in fp16 overflow at any loss scale.
    """
    began = time.perf_counter()
    recipe, engine, worker = run.job.recipe, run.engine, run.worker
    rows = run.plan.rows(step)
    portions = run.batcher.portions(rows, run.rows.lengths)
    n_targets = int(run.rows.n_targets[rows].sum())
    n_beside = int(run.rows.n_targets[_beside(run, rows)].sum())
    seed = _seed(recipe.train.seed, step, worker.rank)
    lr = learning_rate(step, run.plan.total_steps, recipe.optim)
    run.groups.set_step(run.optimizer, step, lr)

    norm, overflows = None, 0
    while norm is None:
        _draw_from(seed)
        sums, losses, times = _learn(run, step, portions, n_targets=n_targets, n_beside=n_beside)
        summed = torch.tensor([*sums.values(), worker.noticed()], dtype=torch.float64)
        totals = sum_over_workers(summed, device=engine.device, worker=worker).cpu()
        if not torch.isfinite(totals).all():
            suspects = [portion for portion, loss in zip(portions, losses, strict=True) if not torch.isfinite(loss)]
            refuse_bad_loss(run, suspects, step=step + 1, checkpoint=checkpoint)
        norm = step_optimizer(engine)
        if norm is None:
            overflows += 1
            _tell_overflow(run, step + 1)
    if run.average:
        run.average.update(step + 1)
    *values, noticed = totals.tolist()
    means = {name: value / (n_beside if name == "kl" else n_targets) for name, value in zip(sums, values, strict=True)}
    ledger.write(step + 1, portions, loss=means["loss"], seed=seed)
    times["step_s"] = time.perf_counter() - began
    line = {
        "step": step + 1,
        "epoch": round((step + 1) / run.plan.steps_per_epoch, 4),
        **means,
        "learning_rate": lr,
        "grad_norm": norm,
        **({"loss_scale": run.state.loss_scale.value} if run.state.loss_scale.is_used else {}),
        **({"overflows": overflows} if overflows else {}),
        "rows": len(rows),
        **({"tokens": int(run.rows.lengths[rows].sum())} if run.batcher.reads_tokens else {}),
        **times,
    }
    return Taken(line, means["loss"], bool(noticed), times)


def _learn(
    run: Started, step: int, portions: list[Rows], *, n_targets: int, n_beside: int
) -> tuple[dict[str, float], list[torch.Tensor], dict[str, float]]:
    """Forward and backward over this rank's portions.

    Returns:
        Sums over them of the loss and what is measured beside it; the loss of each; and times. That of the forward passes is what
        launching them takes where the device works on its own.
    """
    engine, world_size, take = run.engine, run.worker.world_size, partial(run.take, step)
    engine.train()
    sums: dict[str, float] = defaultdict(float)
    losses: list[torch.Tensor] = []
    times = {"data_s": 0.0, "forward_s": 0.0}
    for n, portion in enumerate(portions, start=1):
        engine.set_gradient_accumulation_boundary(n == len(portions))
        began = time.perf_counter()
        beside: Batch | None = run.batcher.batch(take(_beside(run, portion))) if n_beside else None
        batch = run.batcher.batch(take(portion))
        there = time.perf_counter()
        loss, measured, divergence = engine(batch, beside=beside)
        times = {"data_s": times["data_s"] + there - began, "forward_s": times["forward_s"] + time.perf_counter() - there}
        # DeepSpeed averages gradients over workers; together with this factor that makes the mean over the global batch's targets.
        wanted = loss * (world_size / n_targets)
        if n_beside:
            wanted = wanted + divergence * (run.job.recipe.guard.kl_penalty * world_size / n_beside)
        engine.backward(wanted, scale_wrt_gas=False)
        named = {"loss": loss, **measured, **({"kl": divergence} if n_beside else {})}
        for name, value in zip(named, stacked(named.values()).tolist(), strict=True):
            sums[name] += value
        losses.append(wanted.detach())
    return sums, losses, times


def _tell_overflow(run: Started, step: int) -> None:
    """Write down that a step is to be done again. Raises RunFailedError where no lower loss scale is left to do it with."""
    scale = run.state.loss_scale
    if run.worker.rank == 0:
        tell(run.job.folder, "overflow", step=step, loss_scale=scale.value)
    if scale.is_lowest:
        raise RunFailedError(
            f"step {step}: gradients overflow in fp16 at every loss scale; set train.precision bf16 or fp32, or lower optim.learning_rate"
        )


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
