"""What the engine measures of itself: plain numbers that its thread adds to, and anyone may copy.

A histogram here is a list of counts, so that one more value costs a binary search and no lock. Whoever copies while the thread goes on may
see a value in a count that is not in its sum yet; the next copy has both.
"""

from bisect import bisect_left
from dataclasses import dataclass, field

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
"""Upper bounds: about two to an octave of ten, from a token on a small model to an answer on a busy one."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass
class Histogram:
    """How often values fell at or below each of the bounds, and past the last."""

    bounds: tuple[float, ...] = SECONDS
    counts: list[int] = field(default_factory=list)
    """Not cumulative; one more than there are bounds."""
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def add(self, other: "Histogram") -> None:
        """Count the values of another one with the same bounds, too."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum

    def copy(self) -> "Histogram":
        return Histogram(self.bounds, list(self.counts), self.sum)


def _rows() -> Histogram:
    return Histogram(ROWS)


@dataclass
class Measures:
    """Of one model's thread, since its start."""

    time_to_first_token: Histogram = field(default_factory=Histogram)
    """From when the replica had the request: loading its adapter and tokenising are in it."""
    time_between_tokens: Histogram = field(default_factory=Histogram)
    queue_wait: Histogram = field(default_factory=Histogram)
    """Of rows, and of texts to classify, until the model begins with them."""
    batch_rows: Histogram = field(default_factory=_rows)
    """Rows that one pass gave a token each."""
    classify_rows: Histogram = field(default_factory=_rows)
    """Inputs that one pass classified, or made vectors of."""
    prompt_tokens: int = 0
    """Of rows that the model has begun with, those that were kept from earlier prompts included."""
    cached_tokens: int = 0
    completion_tokens: int = 0
