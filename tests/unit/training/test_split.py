"""Holding out rows: the right share, whole groups, the same each time."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.split import folds, held_out


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5])
def test_the_share_is_exact_where_rows_are_single(fraction: float) -> None:
    assert held_out(range(1000), fraction=fraction, seed=3).sum() == round(1000 * fraction)


def test_the_seed_alone_decides() -> None:
    first, again, other = (held_out(range(200), fraction=0.2, seed=seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_each_stratum_gives_its_share() -> None:
    labels = ["rare"] * 20 + ["common"] * 980
    chosen = held_out(range(1000), fraction=0.1, seed=0, strata=labels)
    assert Counter(np.asarray(labels)[chosen]) == {"rare": 2, "common": 98}


@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.floats(0, 0.9), st.integers(0, 99))
def test_no_group_is_on_both_sides(groups: list[int], fraction: float, seed: int) -> None:
    chosen = held_out(groups, fraction=fraction, seed=seed)
    numbers = np.asarray(groups)
    assert not set(numbers[chosen]) & set(numbers[~chosen])
    assert abs(chosen.sum() - fraction * len(groups)) <= max(Counter(groups).values())


@pytest.mark.parametrize("k", [2, 5, 10])
def test_folds_are_alike_in_size_and_in_classes(k: int) -> None:
    labels = np.asarray(["rare"] * 20 + ["common"] * 983)
    fold_of = folds(range(1003), k=k, seed=0, strata=labels)
    sizes = np.bincount(fold_of, minlength=k)
    rare = np.bincount(fold_of[labels == "rare"], minlength=k)
    assert sizes.max() - sizes.min() <= 1
    assert rare.max() - rare.min() <= 1


@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(2, 6), st.integers(0, 99))
def test_each_group_is_in_one_fold_and_the_seed_decides_which(groups: list[int], k: int, seed: int) -> None:
    fold_of = folds(groups, k=k, seed=seed)
    assert all(len(set(fold_of[np.asarray(groups) == group])) == 1 for group in groups)
    assert (fold_of == folds(groups, k=k, seed=seed)).all()
    assert set(fold_of) <= set(range(k))
    assert np.bincount(fold_of, minlength=k).max() - len(groups) / k <= max(Counter(groups).values())


def test_a_group_that_is_too_large_does_not_end_the_search() -> None:
    groups = [0] * 30 + [1] * 10
    for seed in range(8):
        assert held_out(groups, fraction=0.25, seed=seed).tolist() == [False] * 30 + [True] * 10


def test_many_small_classes_hold_out_their_share_together_and_none_of_them_whole() -> None:
    strata = [f"class {n // 10}" for n in range(770)]
    chosen = held_out(range(770), fraction=0.05, seed=0, strata=strata)
    assert int(chosen.sum()) == 38  # of 38.5; each class alone would round to none
    assert max(Counter(np.asarray(strata)[chosen]).values()) == 1
    lonely = held_out(range(6), fraction=0.5, seed=0, strata=list("aabbcd"))
    assert not lonely[4:].any()
