"""The parts of a forward pass that training and evaluation share: tensors for a portion of rows, and sums over all workers."""

from typing import Any

import torch
import torch.distributed as dist

from training.batches import Rows
from training.data import TokenRows
from training.tasks import Batch, Task
from training.worker import Worker


def make_batch(rows: TokenRows, portion: Rows, task: Task, *, pad_token_id: int, device: Any) -> Batch:
    """Tensors of one forward pass. An empty portion becomes one row that counts for nothing: ZeRO's collectives need every rank there."""
    taken = rows.take(portion) if len(portion) else [{"input_ids": [pad_token_id] * 2, "labels": [-100, -100]}]
    return {name: tensor.to(device) for name, tensor in task.collate(taken, pad_token_id=pad_token_id).items()}


def sum_over_workers(totals: torch.Tensor, *, device: Any, worker: Worker) -> torch.Tensor:
    """The same sums on every rank."""
    if worker.world_size > 1:
        totals = totals.to(device)
        dist.all_reduce(totals)
    return totals
