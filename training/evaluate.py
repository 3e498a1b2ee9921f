"""Loss and what else is measured on a whole data set, shared out over the workers."""

from typing import Any

import numpy as np
import torch

from training.forward import Batcher, sum_over_workers
from training.token_rows import TokenRows
from training.worker import Worker


@torch.no_grad()
def evaluate(engine: Any, rows: TokenRows, batcher: Batcher, worker: Worker) -> dict[str, float]:
    """`eval_loss` and `eval_<metric>`, means over targets, the same on every rank."""
    engine.eval()
    names: list[str] = []
    totals = torch.zeros(1, dtype=torch.float64)
    for batch in batcher.batches(rows.take, batcher.portions(np.arange(len(rows)), rows.lengths, scale=2)):
        loss, sums, _ = engine(batch)
        names = list(sums)
        totals = totals + stacked(loss, sums)
    means = sum_over_workers(totals, device=engine.device, worker=worker).cpu() / int(rows.n_targets.sum())
    return dict(zip(["eval_loss", *(f"eval_{name}" for name in names)], means.tolist(), strict=True))


def stacked(loss: torch.Tensor, sums: dict[str, torch.Tensor]) -> torch.Tensor:
    """A loss and what was measured beside it as one float64 vector on the CPU."""
    return torch.stack([loss.detach().double(), *(value.detach().double() for value in sums.values())]).cpu()
