"""The forward pass that training, evaluation and export share: which rows make a batch, and the model with its task round it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from hone.recipe import TrainSettings
from models import attention
from models.methods import Method
from models.slices import slice_of
from models.tasks import Batch, Inputs, LossOptions, Task
from models.tasks.causal import CausalTask, learns_prompt, take_loss_in_head
from training import sequence
from training.batches import Rows, deal, deal_packed
from training.sequence import SequenceGroup
from training.worker import Worker


class TaskModule(torch.nn.Module):
    """A model and its task as one module, so that a forward pass of DeepSpeed's engine is the task's, hooks and all."""

    def __init__(self, model: Any, task: Task, method: Method, *, train: TrainSettings, beta: float, reference: Any = None) -> None:
        """`reference` is the base where the method does not keep it."""
        super().__init__()
        if isinstance(task, CausalTask):
            take_loss_in_head(model)
        self.model = model
        self._task = task
        self._method = method
        self._reference = [reference]  # in a list, so that its parameters are not this module's
        self._learning = LossOptions(label_smoothing=train.label_smoothing_factor, beta=beta, base=self._off)
        self._measuring = LossOptions(beta=beta, base=self._off)

    def forward(self, batch: Batch, *, wants: str = "loss", beside: Batch | None = None) -> Any:
        """What is asked for.

        Args:
            wants: `loss` for the summed loss, the sums of what else is measured, and the summed KL divergence from the base on `beside`;
                `log_probs` of each target and its row; `base_log_probs`, likewise; `outputs`, what a served answer depends on.
            beside: Rows that are to be answered as the base answers them.
        """
        if wants == "outputs":
            made: torch.Tensor = self._task.outputs(self.model, batch)
            return made
        if wants == "log_probs":
            return self._task.log_probs(self.model, batch)
        if wants == "base_log_probs":
            return self._base_log_probs(batch)
        summed, sums = self._task.loss(self.model, batch, self._learning if self.training else self._measuring)
        return summed, sums, self._divergence(beside) if beside is not None else summed.new_zeros(())

    def _divergence(self, batch: Batch) -> torch.Tensor:
        base, _ = self._base_log_probs(batch)
        now, _ = self._task.log_probs(self.model, batch)
        divergence: torch.Tensor = (base.exp() * (base - now)).sum()
        return divergence

    @torch.no_grad()
    def _base_log_probs(self, batch: Batch) -> Any:
        if self._reference[0] is not None:
            return self._task.log_probs(self._reference[0], batch)
        with self._off():
            return self._task.log_probs(self.model, batch)

    @contextmanager
    def _off(self) -> Iterator[None]:
        """The base, which drops nothing out."""
        was_training = self.model.training
        self.model.eval()
        try:
            with self._method.off(self.model):
                yield
        finally:
            self.model.train(was_training)


class Batcher:
    """Deals rows out to workers and makes tensors of them, packed where task and model can be, and cut where workers share them."""

    def __init__(self, task: Task, settings: TrainSettings, group: SequenceGroup, *, packed: bool, inputs: Inputs, device: Any) -> None:
        self.made = 0
        """Batches so far: a sign of progress."""
        self.packed = packed
        self.inputs = inputs
        self._task = task
        self._settings = settings
        self._group = group
        self._device = device

    @property
    def reads_tokens(self) -> bool:
        """Whether rows consist of tokens, and not of a picture or a sound."""
        return self._task.unit == "tokens"

    def portions(self, rows: Rows, lengths: Rows, *, scale: int = 1) -> list[Rows]:
        """This worker's (or its group's) share of `rows`, a portion for each forward pass; as many on every worker.

        Packed, a portion holds as many tokens as `micro_batch_size` rows of the data set's greatest length, so it takes no more memory
        than the worst padded one.

        Args:
            rows: Row numbers, over all workers.
            lengths: Tokens of each row of the data set.
            scale: How many times the rows of a training pass fit (evaluation holds no gradients).
        """
        rank, world_size = self._group.number, self._group.groups
        each = self._settings.portion * scale
        if self.packed:
            return deal_packed(rows, lengths, rank=rank, world_size=world_size, capacity=each * int(lengths.max()))
        passes = -(-len(rows) // (world_size * each))
        return deal(rows, lengths, rank=rank, world_size=world_size, micro_batches=passes)

    def batches(self, take: Callable[[Rows], list[dict[str, Any]]], portions: list[Rows]) -> Iterator[Batch]:
        """Tensors of each portion, whose rows `take` gives."""
        for portion in portions:
            yield self.batch(take(portion))

    def unpacked(self, rows: list[dict[str, Any]]) -> Batch:
        """Tensors of some rows as they are served: padded."""
        made: Batch = self._task.collate(rows, inputs=self.inputs, packed=False)
        return made

    def batch(self, rows: list[dict[str, Any]], *, whole: bool = False) -> Batch:
        """Tensors of some rows, or of this worker's slice of them unless they are wanted whole.

        Without any rows, of one that counts for nothing: ZeRO's collectives need every rank there.
        """
        rows = rows or [self._task.nothing(self.inputs)]
        self.made += 1
        made = self._task.collate(rows, inputs=self.inputs, packed=self.packed)
        if self._group.size > 1 and not whole:
            made = slice_of(made, number=self._group.rank, of=self._group.size, pad_token_id=self.inputs.pad_token_id)
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in made.items()}


def choose_packing(model: Any, task: Task, settings: TrainSettings, group: SequenceGroup | None = None) -> bool:
    """Whether rows are packed; if so the model's attention is set to one that keeps them apart, over slices where a group shares them."""
    if not (settings.packing and task.can_be_packed and attention.can_pack(model)) or learns_prompt(model):
        return False
    model.set_attn_implementation(sequence.register(group) if group and group.size > 1 else attention.register())
    return True


def sum_over_workers(totals: torch.Tensor, *, device: Any, worker: Worker) -> torch.Tensor:
    """The same sums on every rank."""
    if worker.world_size > 1:
        totals = totals.to(device)
        dist.all_reduce(totals)
    return totals
