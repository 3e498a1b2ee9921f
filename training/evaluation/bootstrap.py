"""Intervals by the bootstrap: rows drawn with replacement, again and again, always the same for one seed.

What is resampled are rows, never the tokens or words in them, which are not independent. A metric is a function of sums over rows, so a
thousand resamples are one matrix product. Two models are compared on the same resamples: the interval of the difference is a paired one.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
RESAMPLES = 1000
LEVEL = 0.95
FEWEST_RESAMPLES, MOST_DRAWN = 200, 2 * 10**8
"""So many resamples there are even of a million rows; and about so many row numbers are drawn in all."""
DRAWN_AT_ONCE = 2**22
"""Row numbers that are held at once while resampling."""


class Bootstrap:
    """Resamples of some rows."""

    def __init__(self, rows: int, *, seed: int = 0, resamples: int = RESAMPLES) -> None:
        self.rows = rows
        self._seed = seed
        self._resamples = min(resamples, max(FEWEST_RESAMPLES, MOST_DRAWN // rows))

    def values(self, columns: Floats, of_sums: Callable[[Floats], Floats]) -> Floats:
        """A metric in each resample.

        Args:
            columns: What each row adds: [rows, sums].
            of_sums: The metric by the sums: [..., sums] to [...].
        """
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return np.concatenate([of_sums(counts @ columns) for counts in self._counts()])

    def _counts(self) -> Iterator[Floats]:
        """How often each row is in each resample, some resamples at once."""
        random = np.random.default_rng(self._seed)
        at_once = max(1, DRAWN_AT_ONCE // self.rows)
        for start in range(0, self._resamples, at_once):
            size = min(at_once, self._resamples - start)
            drawn = random.integers(self.rows, size=(size, self.rows)) + np.arange(size)[:, None] * self.rows
            yield np.bincount(drawn.ravel(), minlength=size * self.rows).reshape(size, self.rows).astype(np.float64)


def interval(values: Floats, *, level: float = LEVEL) -> tuple[float, float]:
    """The middle `level` of the resamples; NaN where none of them has a value."""
    known = values[np.isfinite(values)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high
