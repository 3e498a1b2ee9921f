"""Which rows are held out for validation: a function of the rows and the seed alone."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Groups = Sequence[int] | npt.NDArray[np.uint64]
Strata = Sequence[str] | npt.NDArray[np.int64]


def held_out(groups: Groups, *, fraction: float, seed: int, strata: Strata | None = None) -> npt.NDArray[np.bool_]:
    """True for each row that is held out.

    Args:
        groups: Rows of the same number stay on one side: the same text twice, the same customer.
        fraction: Share of the rows to hold out, to the nearest row, or as near as whole groups come.
        strata: The share is taken of each stratum by itself (of each class, say); a group belongs to that of its first row.
    """
    numbers, sizes, order, of_group = _grouped(groups, seed, strata)
    chosen = np.zeros(len(sizes), dtype=bool)
    for stratum, wanted in enumerate(_shares(of_group, sizes, fraction)):
        members = order[of_group[order] == stratum]
        left = wanted
        for group, size in zip(members.tolist(), sizes[members].tolist(), strict=True):
            if size <= 2 * left:  # taking it leaves fewer rows amiss than leaving it out
                chosen[group] = True
                left -= size
            if left <= 0:
                break
    return chosen[numbers]


def _shares(of_group: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], fraction: float) -> list[int]:
    """How many rows of each stratum to hold out: its share, rounded so that all together are the share of the whole (largest remainder).
    Of a small class nothing may be held out, and of none all."""
    rows = np.bincount(of_group, weights=sizes)
    exact = rows * fraction
    shares = np.floor(exact)
    missing = round(float(exact.sum())) - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[: max(0, missing)]] += 1
    wanted: list[int] = np.minimum(shares, np.maximum(rows - 1, 0)).astype(int).tolist() if len(rows) > 1 else shares.astype(int).tolist()
    return wanted


def folds(groups: Groups, *, k: int, seed: int, strata: Strata | None = None) -> npt.NDArray[np.int64]:
    """The fold of each row, 0 to k - 1, of sizes as like as whole groups allow; groups and strata as for `held_out`."""
    numbers, sizes, order, of_group = _grouped(groups, seed, strata)
    fold_of = np.zeros(len(sizes), dtype=np.int64)
    totals = np.zeros(k, dtype=np.int64)
    for stratum in np.unique(of_group):
        members = order[of_group[order] == stratum]
        loads = np.zeros(k, dtype=np.int64)
        # The largest first, each where the fewest rows of its stratum are, and of those where the fewest rows are at all.
        for group in members[np.argsort(-sizes[members], kind="stable")]:
            fold = np.lexsort((totals, loads))[0]
            fold_of[group] = fold
            loads[fold] += sizes[group]
            totals[fold] += sizes[group]
    return fold_of[numbers]


def _grouped(groups: Groups, seed: int, strata: Strata | None) -> tuple[npt.NDArray[np.int64], ...]:
    """Each row's group; and of each group its size, a random order of all, and its stratum."""
    _, first, numbers, sizes = np.unique(np.asarray(groups, dtype=np.uint64), return_index=True, return_inverse=True, return_counts=True)
    of_group = np.unique(np.asarray(strata)[first], return_inverse=True)[1] if strata is not None else np.zeros(len(first), dtype=np.int64)
    return numbers, sizes, np.random.default_rng([seed, 1]).permutation(len(first)), of_group
