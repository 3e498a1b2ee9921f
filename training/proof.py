"""`python -m training.proof RUN`: proof, from the ledger, that a run learnt from every row of every step once.

What counts of an attempt are the steps up to where the next one began. For each of them the rows of all ranks together must be exactly
those that the recipe's seed puts there; ranks that share sequences must have had the same ones, which count once. The first steps that
were done again must have had the same loss both times.
"""

import argparse
import json
import math
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hone.errors import HoneError
from hone.recipe import Recipe
from hone.run_folder import Attempt, attempts, find_run_folder
from hone.storage import Home
from training.batches import BatchPlan, batch_plan
from training.job import Job
from training.ledger import Line, lines

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""By how much the loss of a step that was done again may differ, as a share of it: sums are made in another order."""
FIRST_STEPS = 10
"""That are done again after a checkpoint, whose losses must be the same. Later ones drift apart in an honest run too: the difference that
another number of workers makes in the last bits grows with every step, once from 1e-7 to 0.3 within 370 of them."""


@dataclass
class Proof:
    """What the ledger shows."""

    steps: int = 0
    """Proven, from the first on."""
    rows: int = 0
    """Learnt from in these steps."""
    attempts: list[Attempt] = field(default_factory=list)
    repeated: int = 0
    """Steps that were done again after a loss."""
    last_loss: float = math.nan
    """Of the last of these steps."""
    worst: float = 0.0
    """The greatest difference between the losses of one of the first steps that were done again, as a share of it."""
    drift: float = 0.0
    """Likewise of the steps after these, which proves nothing."""
    wrong: list[str] = field(default_factory=list)
    """What speaks against it."""


@dataclass(frozen=True)
class _Done:
    """One step, as an attempt did it."""

    attempt: Attempt
    ranks: dict[int, Line]

    @property
    def is_whole(self) -> bool:
        return len(self.ranks) == self.attempt.world_size

    @property
    def loss(self) -> float:
        return next(iter(self.ranks.values())).loss


def prove(folder: Path, plan: BatchPlan, recipe: Recipe, *, up_to: int | None = None) -> Proof:
    """Read the whole ledger of a run.

    Args:
        folder: The run's.
        plan: Which rows each step should have seen.
        recipe: For how near losses must be.
        up_to: Only the first so many steps, as a checkpoint needs them; by default all that were done.
    """
    proof, done = Proof(attempts=attempts(folder)), dict[int, _Done]()
    for attempt in proof.attempts:
        again = {step: _Done(attempt, ranks) for step, ranks in lines(folder, attempt).items()}
        _compare(proof, done, again, first=attempt.step + 1)
        done = {step: each for step, each in done.items() if step <= attempt.step}
        if max(done, default=0) < attempt.step:
            proof.wrong.append(f"attempt {attempt.number} began after step {attempt.step}, and {max(done, default=0)} were done before it")
        done |= again
    last = max((step for step, each in done.items() if each.is_whole), default=0)
    if up_to is not None and last < up_to:
        proof.wrong.append(f"the ledger ends at step {last}, and {up_to} should be done")
    for step in range(1, min(last, last if up_to is None else up_to) + 1):
        proof.wrong += _wrong_with(step, done.get(step), plan)
        proof.steps, proof.rows = step, proof.rows + len(plan.rows(step - 1))
        proof.last_loss = done[step].loss if step in done else math.nan
    allowed = TOLERANCE["fp32" if recipe.train.precision == "fp32" else "bf16"]
    if proof.worst > allowed:
        proof.wrong.append(f"a step that was done again had another loss, by a share of {proof.worst:.1e} (allowed are {allowed:.0e})")
    return proof


def prove_steps(job: Job, step: int, *, loss: float) -> list[str]:
    """What speaks against a checkpoint of so many steps, the last of which had that loss."""
    plan = batch_plan(job.recipe, job.data.sources)
    proof = prove(job.folder, plan, job.recipe, up_to=step)
    if not proof.wrong and proof.last_loss != loss:
        proof.wrong.append(f"the ledger has the loss {proof.last_loss} for step {step}, and the checkpoint {loss}")
    return proof.wrong


def _compare(proof: Proof, before: dict[int, _Done], again: dict[int, _Done], *, first: int) -> None:
    for step in before.keys() & again.keys():
        one, other = before[step].loss, again[step].loss
        difference = abs(one - other) / max(abs(one), 1e-3)
        proof.repeated += 1
        if step < first + FIRST_STEPS:
            proof.worst = max(proof.worst, difference)
        else:
            proof.drift = max(proof.drift, difference)


def _wrong_with(step: int, done: _Done | None, plan: BatchPlan) -> list[str]:
    if done is None:
        return [f"step {step}: nothing is written of it"]
    wrong = []
    if not done.is_whole:
        wrong.append(f"step {step}: {len(done.ranks)} of {done.attempt.world_size} ranks wrote of it")
    size = done.attempt.sequence_parallel_size
    seen = Counter(row for rank, line in done.ranks.items() if rank % size == 0 for row in line.rows)
    for rank, line in done.ranks.items():
        first = done.ranks.get(rank - rank % size)
        if first and line.rows != first.rows:
            wrong.append(f"step {step}: ranks {rank - rank % size} and {rank} share a sequence and had other rows")
    should = Counter(plan.rows(step - 1).tolist())
    if missing := should - seen:
        wrong.append(f"step {step}: {_count(missing)} not seen")
    if extra := seen - should:
        wrong.append(f"step {step}: {_count(extra)} seen that were not due")
    losses = {line.loss for line in done.ranks.values()}
    if len(losses) > 1 or not all(map(math.isfinite, losses)):
        wrong.append(f"step {step}: its ranks had the losses {', '.join(map(str, sorted(losses)))}")
    return wrong


def _count(rows: Counter[int]) -> str:
    named = ", ".join(str(row) for row in sorted(rows)[:5])
    return f"{rows.total()} rows ({named}{', ...' if len(rows) > 5 else ''})"


def main(argv: list[str] | None = None) -> int:
    """Print the proof of one run as JSON; the exit code: 0 proven, 1 not, or a mistake (said in one line)."""
    parser = argparse.ArgumentParser(prog="python -m training.proof")
    parser.add_argument("run_id")
    parser.add_argument("--home")
    args = parser.parse_args(argv)
    try:
        folder = find_run_folder(Home(args.home), args.run_id)
    except HoneError as error:
        print(f"hone: {error.message}", file=sys.stderr)  # noqa: T201
        return 1
    job = Job.load(folder)
    plan = batch_plan(job.recipe, job.data.sources)
    proof = prove(folder, plan, job.recipe)
    said = {**asdict(proof), "attempts": [attempt.model_dump(mode="json") for attempt in proof.attempts], "total_steps": plan.total_steps}
    print(json.dumps({**said, "last_loss": proof.last_loss if proof.steps else None}))  # noqa: T201
    return 1 if proof.wrong or not proof.steps else 0


if __name__ == "__main__":
    sys.exit(main())
