"""A moving average of the weights that train, which is steadier than the last of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class MovingAverage:
    """In fp32, each rank of what it holds itself: whole parameters, or under ZeRO-3 its shards."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], *, decay: float) -> None:
        self._held = [getattr(parameter, "ds_tensor", parameter).data for parameter in parameters]
        self._is_sharded = any(hasattr(parameter, "ds_tensor") for parameter in parameters)
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

    def save(self, folder: Path, rank: int) -> None:
        """Write this rank's part; what all ranks hold alike, the first writes."""
        if rank and not self._is_sharded:
            return
        save_file({str(n): mean.contiguous() for n, mean in enumerate(self._mean)}, folder / f"average-{rank}.safetensors")

    def load(self, folder: Path, rank: int) -> None:
        """Read what `save` wrote."""
        known = load_file(folder / f"average-{rank if self._is_sharded else 0}.safetensors")
        for n, mean in enumerate(self._mean):
            mean.copy_(known[str(n)])
