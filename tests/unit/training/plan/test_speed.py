"""Time and what is sent, and the choice that follows from them."""

import pytest

from training.plan.choose import Activations, Asked, best, choices
from training.plan.hardware import Cluster, load_hardware
from training.plan.memory import STAGES, Counts
from training.plan.speed import Work, portions_of, sent_a_step, speed
from training.plan.trace import Need

HARDWARE = load_hardware()
COUNTS = Counts(total=7_000_000_000, trained=7_000_000_000, bytes_each=2)
WORK = Work(steps=100, rows_a_step=64, cost_a_row=1000, flops_a_unit=6 * 7e9)
H100 = Cluster(nodes=1, per_node=8, kind="H100", memory=80 * 2**30)
ROOM = Activations({1: Need(2**30, 2**30), 8: Need(8 * 2**30, 8 * 2**30)})


def asked(**changes: object) -> Asked:
    made = {
        "counts": COUNTS,
        "work": WORK,
        "method": "full",
        "activations": ROOM,
        "global_batch_size": 64,
        "fullness": 1.0,
        "stages": STAGES,
        "micro_batch_size": None,
    }
    return Asked(**{**made, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(("stage", "elements"), [(0, 2), (1, 2), (2, 5), (3, 12)])
def test_what_is_sent_grows_with_the_stage_and_its_portions(stage: int, elements: int) -> None:
    sent = sent_a_step(COUNTS, stage, workers=8, portions=4)  # type: ignore[arg-type]
    assert sent == elements * COUNTS.total * 2 * 7 / 8
    assert sent_a_step(COUNTS, stage, workers=1, portions=4) == 0  # type: ignore[arg-type]


def test_time_is_work_over_the_share_of_the_peak_that_is_assumed() -> None:
    alone = speed(WORK, COUNTS, 0, workers=1, portions=1, cluster=H100, hardware=HARDWARE, method="full")
    assert alone.seconds == pytest.approx(100 * 64 * 1000 * 42e9 / (989e12 * 0.40))
    assert alone.accelerator_hours == pytest.approx(alone.seconds / 3600)
    eight = speed(WORK, COUNTS, 0, workers=8, portions=1, cluster=H100, hardware=HARDWARE, method="full")
    assert alone.seconds / 8 < eight.seconds < alone.seconds


def test_workers_that_share_rows_make_the_portions_of_fewer_and_send_slices_besides() -> None:
    sliced = Work(steps=100, rows_a_step=64, cost_a_row=1000, flops_a_unit=6 * 7e9, exchanged_a_unit=1e5)
    about = {"workers": [8], "cluster": H100, "hardware": HARDWARE, "stages": (2,)}
    alone = choices(asked(micro_batch_size=1), **about)[0]  # type: ignore[arg-type]
    shared = choices(asked(micro_batch_size=1, work=sliced, sequence_parallel_size=4), **about)[0]  # type: ignore[arg-type]
    assert alone.speed.sent_a_step == sent_a_step(COUNTS, 2, workers=8, portions=8)
    assert shared.speed.sent_a_step == sent_a_step(COUNTS, 2, workers=8, portions=32) + 64 * 1000 / 2 * 1e5
    assert shared.speed.seconds > alone.speed.seconds


def test_portions_are_as_many_as_rows_need() -> None:
    assert portions_of(64, workers=4, micro_batch_size=4, fullness=1.0) == 4
    assert portions_of(64, workers=4, micro_batch_size=4, fullness=0.3) == 2
    assert portions_of(1, workers=4, micro_batch_size=4, fullness=1.0) == 1


def test_seven_billion_parameters_need_their_state_sharded_over_eight() -> None:
    made = choices(asked(), workers=[8], cluster=H100, hardware=HARDWARE, stages=STAGES)
    assert [choice.fits for choice in made] == [False, True, True, True]
    chosen = best(made)
    assert chosen is not None
    assert chosen.stage in (1, 2)
    assert chosen.largest_micro_batch == chosen.micro_batch_size >= 4


def test_nothing_fits_one_of_them() -> None:
    assert best(choices(asked(), workers=[1], cluster=H100, hardware=HARDWARE, stages=STAGES)) is None


def test_a_stage_under_which_the_recipe_cannot_run_is_not_taken() -> None:
    tight = H100.model_copy(update={"memory": 20 * 2**30})
    frozen = Counts(total=14_000_000_000, trained=20_000_000, bytes_each=2)
    made = choices(asked(counts=frozen), workers=[8], cluster=tight, hardware=HARDWARE, stages=STAGES)
    assert [choice.fits for choice in made] == [False, False, False, True]
    made = choices(asked(counts=frozen, stages=(0, 1, 2)), workers=[8], cluster=tight, hardware=HARDWARE, stages=STAGES)
    assert best(made) is None


def test_between_two_sizes_that_were_traced_the_line_that_joins_them_counts() -> None:
    assert ROOM.of(4) == Need(4 * 2**30, 4 * 2**30)
    assert ROOM.of(16) == Need(16 * 2**30, 16 * 2**30)
