"""Sequence parallelism (DeepSpeed Ulysses, https://arxiv.org/abs/2309.14509): which workers share the rows of a pass, and their attention.

Workers 0 to N-1 make the first group, the next N the second, and so on. A group takes a share of a step's rows as one worker would, and
each of its workers a slice of their packed sequence. In attention, slices of all heads are exchanged for all of the sequence of some heads,
by DeepSpeed's own layer, and back again.

DeepSpeed's engine is told nothing of the groups. To ZeRO all workers are alike: it shards over all of them and takes the mean of their
gradients, and a step's loss is scaled for just that (decisions 0002 and 0013).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from models.attention import packed_attention
from training.failures import UnevenWorkersError
from training.worker import Worker

NAME = "hone_packed_ulysses"


@dataclass(frozen=True, eq=False)
class SequenceGroup:
    """This worker's place: which rows it sees, and which slice of them."""

    number: int
    """Of the group: it takes this share of the rows."""
    groups: int
    """Shares that there are."""
    rank: int = 0
    """In the group: the worker takes this slice."""
    size: int = 1
    """Slices that there are."""
    process_group: Any = None
    """Of torch, where there is more than one slice."""


def sequence_group(worker: Worker, *, size: int) -> SequenceGroup:
    """Make the groups of so many workers. Every rank takes part.

    Raises:
        UnevenWorkersError: some workers would be left over.
    """
    if worker.world_size % size:
        raise UnevenWorkersError(f"{worker.world_size} workers are no multiple of scaling.sequence_parallel_size {size}")
    number, rank = divmod(worker.rank, size)
    if size == 1:
        return SequenceGroup(number, worker.world_size)
    made = [dist.new_group(list(range(first, first + size))) for first in range(0, worker.world_size, size)]
    return SequenceGroup(number, worker.world_size // size, rank, size, made[number])


def register(group: SequenceGroup) -> str:
    """Make attention over slices known to transformers, in place of that of an earlier run in this process; its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, SlicedAttention(group))
    return NAME


class SlicedAttention:
    """Packed attention over a sequence of which each worker of a group has a slice."""

    def __init__(self, group: SequenceGroup) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        self._size = group.size
        self._exchanged = DistributedAttention(_attend, group.process_group, scatter_idx=2, gather_idx=1)

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        cu_seq_lens_q: torch.Tensor,
        **settings: Any,
    ) -> tuple[torch.Tensor, None]:
        """As `models.attention.packed_attention`, with a slice of the sequence in and out; bounds are those of all of it.

        A sequence that is here whole is attended to here, as the golden outputs of an export are.
        """
        if int(cu_seq_lens_q[-1]) == query.shape[2]:
            return packed_attention(module, query, key, value, attention_mask, cu_seq_lens_q=cu_seq_lens_q, **settings)
        times = copies(query.shape[1], key.shape[1], self._size)
        parts = (query, key.repeat_interleave(times, 1), value.repeat_interleave(times, 1))
        made: torch.Tensor = self._exchanged(
            *(part.transpose(1, 2) for part in parts), 0, module=module, cu_seq_lens_q=cu_seq_lens_q, **settings
        )
        return made, None


def copies(heads: int, key_value_heads: int, size: int) -> int:
    """How often each key-value head is laid down, so that every worker of a group gets as many, and those of its own query heads.

    Args:
        heads: Of queries; a multiple of the other two.
        key_value_heads: As the model has them.
        size: Workers in a group.
    """
    shared_by = heads // key_value_heads
    return next(n for n in range(1, shared_by + 1) if shared_by % n == 0 and key_value_heads * n % size == 0)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, module: torch.nn.Module, **settings: Any) -> torch.Tensor:
    """Attention to all tokens of the heads that are here: [1, tokens, heads, width] each, in and out."""
    return packed_attention(module, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), None, **settings)[0]
