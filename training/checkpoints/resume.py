"""Going on from the newest checkpoint that is whole, at any number of workers, with proof that nothing before it was left out."""

from dataclasses import dataclass, field
from typing import TypeVar

import torch.distributed as dist

from hone.errors import ResourceError, RunFailedError
from hone.folder import Folder, first_line, how_to_reach
from hone.run_folder import tell
from training.checkpoints.files import Checkpoint, DamagedCheckpointError, PieceReader, check_part, find, key_of, read_index
from training.checkpoints.pieces import TrainedState
from training.guard import Guard
from training.job import Job
from training.ledger import begin_attempt, this_worker
from training.proof import prove_steps
from training.worker import Worker

T = TypeVar("T")


@dataclass(frozen=True)
class Resumed:
    """Where an attempt begins."""

    attempt: int
    """Its number in the ledger."""
    step: int = 0
    """Steps that are done."""
    guard: Guard = field(default_factory=Guard)
    """What the guard has seen in them."""


def resume(job: Job, state: TrainedState, worker: Worker) -> Resumed:
    """Load the newest whole checkpoint, if there is one, and begin an attempt in the ledger. Every rank takes part.

    Raises:
        RunFailedError: the ledger does not prove the steps that the checkpoint says are done.
        ResourceError: nobody can say which checkpoints there are.
    """
    root, passed_over = job.checkpoints, list[str]()
    for name in _same_on_all(_found(root) if worker.rank == 0 else []):
        folder = root.below(name)
        damage = _damage(folder, worker)
        if damage:
            passed_over.append(damage)
            continue
        checkpoint = read_index(folder)
        _refuse_unproven(job, checkpoint, worker)
        _load(state, folder, checkpoint, worker)
        return _begin(job, worker, checkpoint, passed_over)
    state.forget_moments()  # without ZeRO, in 16 bits, DeepSpeed lets AdamW take a step of nothing when it is made, which would count
    return _begin(job, worker, None, passed_over)


def _found(root: Folder) -> list[str]:
    try:
        return find(root)
    except OSError as error:
        raise ResourceError(f"checkpoints in {root}: cannot be read ({first_line(error)}); {how_to_reach(str(root))}") from None


def _damage(folder: Folder, worker: Worker) -> str:
    """What is wrong with the files, the same on every rank; empty where nothing is. Each rank reads a share of the parts."""
    try:
        for part in read_index(folder).parts[worker.rank :: worker.world_size]:
            check_part(folder, part)
        found = ""
    except (DamagedCheckpointError, OSError) as error:
        found = str(error)
    everyone: list[str] = [""] * worker.world_size
    dist.all_gather_object(everyone, found)
    return next(filter(None, everyone), "")


def _refuse_unproven(job: Job, checkpoint: Checkpoint, worker: Worker) -> None:
    wrong = _same_on_all(prove_steps(job, checkpoint.step, loss=checkpoint.loss) if worker.rank == 0 else [])
    if wrong:
        raise RunFailedError(
            f"the checkpoint of step {checkpoint.step} in {job.folder} cannot be gone on from: {wrong[0]}"
            f"{f' (and {len(wrong) - 1} more)' if len(wrong) > 1 else ''}; `hone runs verify {job.run_id}` says all"
        )


def _load(state: TrainedState, folder: Folder, checkpoint: Checkpoint, worker: Worker) -> None:
    reader = PieceReader(folder, checkpoint.parts, place=worker.rank / worker.world_size)
    state.load(checkpoint.adam_steps, lambda piece: reader.fill(key_of(piece.kind, piece.name), piece.start, piece.values))


def _begin(job: Job, worker: Worker, checkpoint: Checkpoint | None, passed_over: list[str]) -> Resumed:
    everyone: list[str] = [""] * worker.world_size
    dist.all_gather_object(everyone, this_worker())
    number = 0
    if worker.rank == 0:
        step, name = (checkpoint.step, checkpoint.folder) if checkpoint else (0, None)
        about = {"step": step, "checkpoint": name, "passed_over": passed_over}
        size = job.recipe.scaling.sequence_parallel_size
        begun = begin_attempt(job.folder, **about, world_size=worker.world_size, sequence_parallel_size=size, workers=everyone)
        number = begun.number
        tell(job.folder, "attempt", number=number, **about, world_size=worker.world_size)
    number = _same_on_all(number)
    return Resumed(number, checkpoint.step, Guard(**checkpoint.guard)) if checkpoint else Resumed(number)


def _same_on_all(value: T) -> T:
    """Rank 0's, on every rank."""
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]
