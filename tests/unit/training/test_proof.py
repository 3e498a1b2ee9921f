"""The proof holds for what happened, whatever happened, and for nothing else."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from hone.recipe import Recipe, parse_recipe
from hone.run_folder import LEDGER_FOLDER, attempts
from training.batches import BatchPlan, Mixed
from training.ledger import Ledger, SupersededError, begin_attempt, lines
from training.proof import FIRST_STEPS, Proof, prove

PLAN = BatchPlan(sources=(Mixed(50, 50),), global_batch_size=8, epochs=3, max_steps=None, seed=4)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    tree = {"name": "bot", "task": "chat", "base": "base", "data": {"train": str(tmp_path)}, "train": {"precision": "fp32"}}
    return parse_recipe(tree, where="test")


def loss_of(step: int) -> float:
    return 3.0 / step


def do(folder: Path, *, after: int, steps: Iterable[int], workers: int, size: int = 1, loss: Callable[[int], float] = loss_of) -> None:
    """An attempt that goes on after a step and does these; so many workers share a sequence."""
    number = begin_attempt(folder, step=after, world_size=workers, sequence_parallel_size=size).number
    for rank in range(workers):
        with Ledger(folder, attempt=number, rank=rank) as ledger:
            for step in steps:
                ledger.write(step, [PLAN.rows(step - 1)[rank // size :: workers // size]], loss=loss(step), seed=step)


def proof_of(folder: Path, recipe: Recipe, **settings: Any) -> Proof:
    return prove(folder, PLAN, recipe, **settings)


def test_a_run_that_was_cut_off_twice_is_proven(tmp_path: Path, recipe: Recipe) -> None:
    do(tmp_path, after=0, steps=range(1, 9), workers=2)
    do(tmp_path, after=5, steps=range(6, 12), workers=1)
    do(tmp_path, after=10, steps=range(11, PLAN.total_steps + 1), workers=3)
    proof = proof_of(tmp_path, recipe)
    assert (proof.wrong, proof.steps, proof.rows, proof.repeated, proof.worst) == ([], PLAN.total_steps, 150, 4, 0.0)
    assert proof.last_loss == loss_of(PLAN.total_steps)


def test_a_last_step_that_not_all_ranks_wrote_is_not_done(tmp_path: Path, recipe: Recipe) -> None:
    do(tmp_path, after=0, steps=range(1, 9), workers=2)
    lines = tmp_path / LEDGER_FOLDER / "rows-0001-00001.jsonl"
    lines.write_text(lines.read_text()[:-10])
    assert (proof_of(tmp_path, recipe).wrong, proof_of(tmp_path, recipe).steps) == ([], 7)
    assert proof_of(tmp_path, recipe, up_to=8).wrong == ["the ledger ends at step 7, and 8 should be done"]


@pytest.mark.parametrize(
    ("steps", "after", "said"),
    [
        (range(8, 12), 6, "step 7: nothing is written of it"),
        (range(11, 12), 10, "attempt 2 began after step 10, and 8 were done before it"),
    ],
)
def test_a_step_left_out_is_found(tmp_path: Path, recipe: Recipe, steps: range, after: int, said: str) -> None:
    do(tmp_path, after=0, steps=range(1, 9), workers=2)
    do(tmp_path, after=after, steps=steps, workers=2)
    assert said in proof_of(tmp_path, recipe).wrong


def test_rows_that_are_not_those_of_the_step_are_found(tmp_path: Path, recipe: Recipe) -> None:
    do(tmp_path, after=0, steps=range(1, 9), workers=2)
    lines = tmp_path / LEDGER_FOLDER / "rows-0001-00000.jsonl"
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    told[3]["rows"][0] = told[3]["rows"][1]
    lines.write_text("".join(json.dumps(line) + "\n" for line in told))
    wrong = proof_of(tmp_path, recipe).wrong
    assert [line.split(":")[0] for line in wrong] == ["step 4", "step 4"]
    assert "1 rows" in wrong[0]
    assert "not due" in wrong[1]


def test_another_loss_the_second_time_is_found(tmp_path: Path, recipe: Recipe) -> None:
    do(tmp_path, after=0, steps=range(1, 9), workers=2)
    do(tmp_path, after=5, steps=range(6, 9), workers=2, loss=lambda step: loss_of(step) * 1.01)
    assert proof_of(tmp_path, recipe).worst == pytest.approx(0.01)
    assert "had another loss" in proof_of(tmp_path, recipe).wrong[0]


def test_losses_that_part_long_after_the_checkpoint_prove_nothing(tmp_path: Path, recipe: Recipe) -> None:
    def drifting(step: int) -> float:
        return loss_of(step) * (1 if step <= 3 + FIRST_STEPS else 1.3)

    do(tmp_path, after=0, steps=range(1, PLAN.total_steps + 1), workers=2)
    do(tmp_path, after=3, steps=range(4, PLAN.total_steps + 1), workers=1, loss=drifting)
    proof = proof_of(tmp_path, recipe)
    assert (proof.wrong, proof.worst, proof.steps) == ([], 0.0, PLAN.total_steps)
    assert proof.drift == pytest.approx(0.3)


def test_ranks_that_do_not_agree_are_found(tmp_path: Path, recipe: Recipe) -> None:
    do(tmp_path, after=0, steps=range(1, 4), workers=2)
    lines = tmp_path / LEDGER_FOLDER / "rows-0001-00001.jsonl"
    lines.write_text(lines.read_text().replace('"loss":1.5', '"loss":1.6'))
    assert proof_of(tmp_path, recipe).wrong == ["step 2: its ranks had the losses 1.5, 1.6"]


def test_rows_that_ranks_share_count_once(tmp_path: Path, recipe: Recipe) -> None:
    do(tmp_path, after=0, steps=range(1, 9), workers=4, size=2)
    do(tmp_path, after=5, steps=range(6, 9), workers=2)
    assert (proof_of(tmp_path, recipe).wrong, proof_of(tmp_path, recipe).rows) == ([], 58)


def test_ranks_that_share_a_sequence_and_had_other_rows_are_found(tmp_path: Path, recipe: Recipe) -> None:
    do(tmp_path, after=0, steps=range(1, 4), workers=4, size=2)
    lines = tmp_path / LEDGER_FOLDER / "rows-0001-00003.jsonl"
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    told[1]["rows"].pop()
    lines.write_text("".join(json.dumps(line) + "\n" for line in told))
    assert proof_of(tmp_path, recipe).wrong == ["step 2: ranks 2 and 3 share a sequence and had other rows"]


def test_nothing_written_proves_nothing(tmp_path: Path, recipe: Recipe) -> None:
    assert proof_of(tmp_path, recipe).steps == 0
    begin_attempt(tmp_path, step=0, world_size=2)
    assert proof_of(tmp_path, recipe).steps == 0


def test_a_worker_that_was_cut_off_learns_that_others_took_over(tmp_path: Path) -> None:
    first = Ledger(tmp_path, attempt=begin_attempt(tmp_path, step=0, world_size=1).number, rank=0)
    first.refuse_superseded()
    assert begin_attempt(tmp_path, step=0, world_size=1).number == 2
    with pytest.raises(SupersededError):
        first.refuse_superseded()
    assert [attempt.number for attempt in attempts(tmp_path)] == [1, 2]


def test_of_many_ranks_each_writes_several_steps_at_once_and_all_of_them_before_a_checkpoint(tmp_path: Path) -> None:
    begin_attempt(tmp_path, step=0, world_size=1024)
    [attempt] = attempts(tmp_path)
    ledger = Ledger(tmp_path, attempt=1, rank=0, world_size=1024)

    def written() -> list[int]:
        return list(lines(tmp_path, attempt))

    for step in range(1, 16):
        ledger.write(step, [], loss=1.0, seed=0)
    assert written() == []
    ledger.write(16, [], loss=1.0, seed=0)
    assert written() == list(range(1, 17))
    ledger.write(17, [], loss=1.0, seed=0)
    ledger.sync()
    assert written() == list(range(1, 18))
    with ledger:
        ledger.write(18, [], loss=1.0, seed=0)
    assert written() == list(range(1, 19))
