"""The loss scale of fp16: gradients are taken of the loss times this, so that small ones do not vanish, and divided by it before the step.

DeepSpeed halves it where gradients overflow, does not move the weights then, and doubles it after many steps without. A step is a function
of its number (decision 0002), so such a step is done again with the lower scale, until its rows have been learnt from.
"""

from typing import Any

import torch

FIRST_POWER = 16
"""Of two: the scale of the first step."""
DOUBLED_AFTER = 1000
"""Steps without an overflow."""
LOWEST = 1.0
"""Gradients that overflow without being scaled are no matter of the scale."""
PARTS = ("cur_scale", "cur_iter", "last_overflow_iter")
"""What DeepSpeed goes by."""


def fp16_config() -> dict[str, Any]:
    """DeepSpeed's section `fp16` (https://www.deepspeed.ai/docs/config-json/#fp16-training-options). One overflow is enough to halve: the
    same step would overflow again."""
    return {
        "enabled": True,
        "loss_scale": 0,  # dynamic
        "initial_scale_power": FIRST_POWER,
        "loss_scale_window": DOUBLED_AFTER,
        "hysteresis": 1,
        "min_loss_scale": LOWEST,
    }


class LossScale:
    """That of DeepSpeed's optimiser, to be saved and taken up again."""

    def __init__(self, optimizer: Any) -> None:
        self._kept: Any = getattr(optimizer, "loss_scale_config", None) or getattr(optimizer, "loss_scaler", None)
        self._taken = torch.zeros(len(PARTS), dtype=torch.float64)

    @property
    def is_used(self) -> bool:
        """Whether the run is in fp16."""
        return bool(getattr(self._kept, "dynamic", False) or getattr(self._kept, "dynamic_loss_scale", False))

    @property
    def value(self) -> float:
        """By how much the next loss is multiplied."""
        return float(self._kept.cur_scale)

    @property
    def is_lowest(self) -> bool:
        return self.value <= LOWEST

    def values(self) -> torch.Tensor:
        """As they are now, in a tensor that `take_up` reads again: [3]."""
        self._taken.copy_(torch.tensor([float(getattr(self._kept, name)) for name in PARTS]))
        return self._taken

    def take_up(self) -> None:
        """Go on with what was put into the tensor."""
        scale, *counts = self._taken.tolist()
        for name, value in zip(PARTS, (scale, *map(int, counts)), strict=True):
            setattr(self._kept, name, value)
