"""Loss and accuracy on a whole data set, shared out over the workers."""

from typing import Any

import numpy as np
import torch

from training.forward import Batcher, sum_over_workers
from training.tasks import Task
from training.token_rows import TokenRows
from training.worker import Worker


@torch.no_grad()
def evaluate(engine: Any, rows: TokenRows, task: Task, batcher: Batcher, worker: Worker) -> dict[str, float]:
    """`eval_loss` (mean cross entropy over targets) and `eval_<accuracy_name>`, the same on every rank."""
    engine.eval()
    totals = torch.zeros(2, dtype=torch.float64)
    for batch in batcher.batches(rows.take, batcher.portions(np.arange(len(rows)), rows.lengths, scale=2)):
        loss, right = engine(batch)
        totals += torch.stack([loss, right]).to(totals)
    loss_sum, n_right = sum_over_workers(totals, device=engine.device, worker=worker).tolist()
    n_targets = int(rows.n_targets.sum())
    return {"eval_loss": loss_sum / n_targets, f"eval_{task.accuracy_name}": n_right / n_targets}
