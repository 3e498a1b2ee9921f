"""The order of rows: every row once an epoch, the same at any number of workers."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.batches import BatchPlan, Mixed, deal, evaluation_batches

LENGTHS = np.random.default_rng(0).integers(1, 50, 103)


def plan(**changes: Any) -> BatchPlan:
    return BatchPlan(**{"sources": (Mixed(103, 103),), "global_batch_size": 16, "epochs": 2, "max_steps": None, "seed": 7, **changes})


def test_every_row_is_seen_once_an_epoch() -> None:
    steps = plan()
    assert steps.total_steps == 14
    for first in (0, 7):
        seen = np.concatenate([steps.rows(step) for step in range(first, first + 7)])
        assert sorted(seen) == list(range(103))


def test_epochs_and_seeds_differ_in_order() -> None:
    assert list(plan().rows(0)) != list(plan().rows(7))
    assert list(plan().rows(0)) != list(plan(seed=8).rows(0))


def test_max_steps_and_parts_of_epochs_end_a_run() -> None:
    assert plan(max_steps=5).total_steps == 5
    assert plan(epochs=0.5).total_steps == 4
    assert plan(epochs=0.001).total_steps == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("step", [0, 6])
def test_workers_share_out_exactly_the_steps_rows(world_size: int, step: int) -> None:
    rows = plan().rows(step)
    dealt = [deal(rows, LENGTHS, rank=rank, world_size=world_size, micro_batches=4) for rank in range(world_size)]
    assert sorted(np.concatenate([part for portions in dealt for part in portions])) == sorted(rows)
    assert {len(portions) for portions in dealt} == {4}


def test_workers_get_equal_work() -> None:
    rows = plan().rows(0)
    tokens = [sum(LENGTHS[part].sum() for part in deal(rows, LENGTHS, rank=r, world_size=2, micro_batches=2)) for r in range(2)]
    assert abs(tokens[0] - tokens[1]) <= LENGTHS.max()


def test_evaluation_sees_every_row_once_in_equally_many_batches() -> None:
    shares = [list(evaluation_batches(LENGTHS, rank=r, world_size=3, batch_size=8)) for r in range(3)]
    assert sorted(np.concatenate([part for share in shares for part in share])) == list(range(103))
    assert len({len(share) for share in shares}) == 1
    assert max(len(part) for share in shares for part in share) <= 8


def test_each_source_is_seen_as_often_as_its_weight_says() -> None:
    """100 rows once, 40 rows twice, 60 rows a third of the time: each third of them once before any comes again."""
    mixed = plan(sources=(Mixed(100, 100), Mixed(40, 80), Mixed(60, 20)), epochs=6)
    steps = mixed.steps_per_epoch
    assert steps == 13
    epochs = [np.concatenate([mixed.rows(step) for step in range(e * steps, (e + 1) * steps)]) for e in range(6)]
    for seen in epochs:
        times = np.bincount(seen, minlength=200)
        assert (times[:100] == 1).all()
        assert (times[100:140] == 2).all()
        assert times[140:].sum() == 20
    for first in (0, 3):
        assert (np.bincount(np.concatenate(epochs[first : first + 3]), minlength=200)[140:] == 1).all()


@given(st.integers(1, 30), st.integers(1, 90), st.integers(0, 5))
def test_over_epochs_no_row_is_ahead_of_another_by_more_than_one(rows: int, per_epoch: int, epoch: int) -> None:
    mixed = plan(sources=(Mixed(7, 7), Mixed(rows, per_epoch)), epochs=epoch + 1, global_batch_size=1000)
    seen = np.concatenate([mixed.rows(step) for step in range(epoch + 1)])
    times = np.bincount(seen[seen >= 7] - 7, minlength=rows)
    assert times.max() - times.min() <= 1
    assert len(seen) == (epoch + 1) * (7 + per_epoch)
