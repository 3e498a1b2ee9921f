"""The forward pass that training, evaluation and export share: which rows make a batch, and the model with its task round it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from hone.recipe import TrainSettings
from training import attention
from training.batches import Rows, deal, deal_packed
from training.tasks import Batch, Task
from training.worker import Worker


class TaskModule(torch.nn.Module):
    """A model and its task as one module, so that a forward pass of DeepSpeed's engine is the task's, hooks and all."""

    def __init__(self, model: Any, task: Task) -> None:
        super().__init__()
        self.model = model
        self._task = task

    def forward(self, batch: Batch, *, wants_outputs: bool = False) -> Any:
        """Summed loss and right answers, or (`wants_outputs`) what a served answer depends on."""
        return self._task.outputs(self.model, batch) if wants_outputs else self._task.loss(self.model, batch)


class Batcher:
    """Deals rows out to workers and makes tensors of them, packed where task and model can be."""

    def __init__(self, task: Task, settings: TrainSettings, worker: Worker, *, packed: bool, pad_token_id: int, device: Any) -> None:
        self.packed = packed
        self._task = task
        self._settings = settings
        self._worker = worker
        self._pad_token_id = pad_token_id
        self._device = device

    def portions(self, rows: Rows, lengths: Rows, *, scale: int = 1) -> list[Rows]:
        """This worker's share of `rows`, a portion for each forward pass; as many on every worker.

        Packed, a portion holds as many tokens as `micro_batch_size` rows of the data set's greatest length, so it takes no more memory
        than the worst padded one.

        Args:
            rows: Row numbers, over all workers.
            lengths: Tokens of each row of the data set.
            scale: How many times the rows of a training pass fit (evaluation holds no gradients).
        """
        rank, world_size = self._worker.rank, self._worker.world_size
        each = self._settings.micro_batch_size * scale
        if self.packed:
            return deal_packed(rows, lengths, rank=rank, world_size=world_size, capacity=each * int(lengths.max()))
        passes = -(-len(rows) // (world_size * each))
        return deal(rows, lengths, rank=rank, world_size=world_size, micro_batches=passes)

    def batches(self, take: Callable[[Rows], list[dict[str, Any]]], portions: list[Rows]) -> Iterator[Batch]:
        """Tensors of each portion, whose rows `take` gives."""
        for portion in portions:
            yield self.batch(take(portion))

    def batch(self, rows: list[dict[str, Any]]) -> Batch:
        """Tensors of some rows. Without any, of one that counts for nothing: ZeRO's collectives need every rank there."""
        rows = rows or [{"input_ids": [self._pad_token_id] * 2, "labels": [-100, -100]}]
        made = self._task.collate(rows, pad_token_id=self._pad_token_id, packed=self.packed)
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in made.items()}


def choose_packing(model: Any, task: Task, settings: TrainSettings) -> bool:
    """Whether rows are packed; if so the model's attention is set to one that keeps them apart."""
    if not (settings.packing and task.can_be_packed and attention.can_pack(model)):
        return False
    model.set_attn_implementation(attention.register())
    return True


def sum_over_workers(totals: torch.Tensor, *, device: Any, worker: Worker) -> torch.Tensor:
    """The same sums on every rank."""
    if worker.world_size > 1:
        totals = totals.to(device)
        dist.all_reduce(totals)
    return totals
