"""Loss and what else is measured on a whole data set, shared out over the workers."""

from collections.abc import Iterable
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
        totals = totals + stacked([loss, *sums.values()])
    means = sum_over_workers(totals, device=engine.device, worker=worker).cpu() / int(rows.n_targets.sum())
    return dict(zip(["eval_loss", *(f"eval_{name}" for name in names)], means.tolist(), strict=True))


def stacked(values: Iterable[torch.Tensor]) -> torch.Tensor:
    """Scalars as one float64 vector on the CPU, fetched in one go."""
    return torch.stack([value.detach().double() for value in values]).cpu()
