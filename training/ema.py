"""A moving average of the weights that train, which is steadier than the last of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from training.zero import shard


class MovingAverage:
    """In fp32, each rank of what it holds itself: whole parameters, or under ZeRO-3 its shards."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], *, decay: float) -> None:
        self._parameters = list(parameters)
        self._held = [getattr(parameter, "ds_tensor", parameter).data for parameter in parameters]
        self.is_sharded = any(hasattr(parameter, "ds_tensor") for parameter in parameters)
        self._decay = decay
        self._mean = [held.float().clone() for held in self._held]

    @torch.no_grad()
    def update(self, done: int) -> None:
        """Move towards the weights after `done` steps; faster at first, so that where they began does not stay in it."""
        share = 1 - min(self._decay, (1 + done) / (10 + done))
        for mean, held in zip(self._mean, self._held, strict=True):
            mean.lerp_(held.float(), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A block in which the model has the average for its weights."""
        kept = [held.clone() for held in self._held]
        for mean, held in zip(self._mean, self._held, strict=True):
            held.copy_(mean)
        try:
            yield
        finally:
            for held, before in zip(self._held, kept, strict=True):
                held.copy_(before)

    def parts(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Of each parameter, what is held here, flat and without padding, and where in the parameter it begins."""
        for parameter, mean in zip(self._parameters, self._mean, strict=True):
            start, numel = shard(parameter) if self.is_sharded else (0, mean.numel())
            yield start, mean.view(-1)[:numel]
