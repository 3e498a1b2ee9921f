"""Holding out rows: the right share, whole groups, the same each time."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.split import held_out


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
