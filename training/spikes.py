"""A loss far above those before it: often a few rows that are unlike the others."""

from typing import Any

STEPS_LOOKED_AT = 50
FEWEST = 20
"""Steps before which nothing is unusual."""


class LossWatch:
    """Notices a loss far above those before it."""

    def __init__(self, *, spread: float) -> None:
        """`spread`: how many times the usual distance from the median is far."""
        self._spread = spread
        self._losses: list[float] = []

    def spike(self, loss: float) -> dict[str, Any] | None:
        """What there is to say of a loss, if it is one."""
        before = sorted(self._losses)
        self._losses = [*self._losses[1 - STEPS_LOOKED_AT :], loss]
        if len(before) < FEWEST or not self._spread:
            return None
        median = before[len(before) // 2]
        usual = sorted(abs(value - median) for value in before)[len(before) // 2]
        if loss - median <= self._spread * max(usual, 0.01 * abs(median)):
            return None
        return {"loss": round(loss, 4), "median_before": round(median, 4)}
