"""Which rows are held out for validation: a function of the rows and the seed alone."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def held_out(groups: Sequence[int], *, fraction: float, seed: int, strata: Sequence[str] | None = None) -> npt.NDArray[np.bool_]:
    """True for each row that is held out.

    Args:
        groups: Rows of the same number stay on one side: the same text twice, the same customer.
        fraction: Share of the rows to hold out, to the nearest row, or as near as whole groups come.
        strata: The share is taken of each stratum by itself (of each class, say); a group belongs to that of its first row.
    """
    numbers = np.unique(np.asarray(groups, dtype=np.uint64), return_inverse=True)[1]
    first = np.unique(numbers, return_index=True)[1]
    sizes = np.bincount(numbers)
    of_group = np.asarray(strata)[first] if strata is not None else np.zeros(len(first), dtype=np.int64)
    order = np.random.default_rng([seed, 1]).permutation(len(first))
    chosen = np.zeros(len(first), dtype=bool)
    for stratum in np.unique(of_group):
        members = order[of_group[order] == stratum]
        wanted = round(float(sizes[members].sum()) * fraction)
        before = np.cumsum(sizes[members]) - sizes[members]
        # A group is taken where that leaves fewer rows amiss than leaving it out.
        chosen[members[before + sizes[members] / 2 <= wanted]] = True
    return chosen[numbers]
