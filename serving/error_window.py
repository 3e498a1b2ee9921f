"""How many of the last requests failed, over a window of time that slides."""

from collections import deque
from dataclasses import dataclass

SLICES = 20
"""That a window is made of; the oldest leaves as a whole."""


@dataclass
class _Slice:
    number: int
    requests: int = 0
    errors: int = 0


class ErrorWindow:
    """Counts of one version's requests. Bounded memory, however many there are."""

    def __init__(self, window_s: float) -> None:
        self._slice_s = window_s / SLICES
        self._slices: deque[_Slice] = deque(maxlen=SLICES)

    def add(self, *, is_error: bool, now: float) -> None:
        """Count one request that ended at `now`, seconds on a clock that never goes back."""
        number = int(now / self._slice_s)
        if not self._slices or self._slices[-1].number < number:
            self._slices.append(_Slice(number))
        self._slices[-1].requests += 1
        self._slices[-1].errors += is_error

    def counts(self, now: float) -> tuple[int, int]:
        """Requests and errors in the window."""
        oldest = int(now / self._slice_s) - SLICES
        inside = [each for each in self._slices if each.number > oldest]
        return sum(each.requests for each in inside), sum(each.errors for each in inside)
