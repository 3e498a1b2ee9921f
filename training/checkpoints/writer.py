"""Checkpoints written beside the training: it waits while its state is copied, not while that is written. Where memory has no room for the
state, which is on NVMe then, it has none for a copy either: training waits while one sub-group after another is written.

Each rank writes what it holds, in a thread; rank 0's thread waits for the others' files and then writes the index. Where the state is
small (an adapter's), all of it goes to rank 0 first, and a checkpoint is one file.
"""

import json
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

from hone.folder import Folder
from hone.methods import METHODS
from hone.run_folder import tell
from training.checkpoints.files import Checkpoint, Part, folder_name, keep, key_of, write_index, write_part
from training.checkpoints.pieces import Piece, TrainedState
from training.guard import Guard
from training.job import Job
from training.ledger import Ledger, SupersededError
from training.worker import Worker

PART_WAIT_S = 600.0
"""How long rank 0 waits for the other ranks' files."""
POLL_S = 0.05
"""Between two looks at which files there are, for every 64 ranks."""


class CheckpointWriter:
    """Writes checkpoints of one worker's state, one after another."""

    def __init__(self, job: Job, worker: Worker, ledger: Ledger) -> None:
        """`ledger` is the worker's; it is on disk before a checkpoint is."""
        self._job, self._worker, self._ledger = job, worker, ledger
        self._is_small = METHODS[job.recipe.method.type].keeps_base
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._is_abandoned = False

    def save(self, state: TrainedState, *, step: int, loss: float, guard: Guard, metrics: dict[str, float]) -> None:
        """Take a copy of the state and leave. Every rank takes part.

        Args:
            state: What to save.
            step: Steps that are done.
            loss: Of the last of them.
            guard: What the guard has seen.
            metrics: What was measured at this step, if anything was.
        """
        began = time.perf_counter()
        self.wait()
        self._ledger.sync()
        about = {"step": step, "attempt": self._ledger.attempt, "loss": loss, "guard": guard.state(), "metrics": metrics}
        if state.is_on_nvme and not self._is_small:
            outline = {_key(piece): piece.values for piece in state.outline() if self._is_mine(piece)}
            values = (piece.values for piece in state.pieces() if self._is_mine(piece))
            self._write(outline, values, state.steps(), about, None)
            return
        tensors, adam_steps = self._copied(state)
        if tensors is not None:
            waited_s = time.perf_counter() - began
            self._writing = self._thread.submit(self._write, tensors, None, adam_steps, about, waited_s)

    def wait(self) -> None:
        """Until what was begun is written, or has failed."""
        if self._writing:
            self._writing.result()
            self._writing = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        self._is_abandoned = kind is not None  # the other ranks may be gone, and what they have not written never comes
        self._thread.shutdown()

    def _is_mine(self, piece: Piece) -> bool:
        """Whether this rank saves it; of what every rank holds, the first does."""
        return self._worker.rank == 0 or not piece.is_shared

    def _copied(self, state: TrainedState) -> tuple[dict[str, torch.Tensor] | None, dict[str, int]]:
        steps = state.steps()
        copied = {_key(piece): piece.values.detach().to("cpu", copy=True) for piece in state.pieces() if self._is_mine(piece)}
        if not self._is_small or self._worker.world_size == 1:
            return copied, steps
        # Parts of an adapter are a few megabytes: pickled tensors, and one collective for all of them.
        everyone: list[Any] | None = [None] * self._worker.world_size if self._worker.rank == 0 else None
        dist.gather_object((copied, steps), everyone)
        if everyone is None:
            return None, {}
        return {k: v for tensors, _ in everyone for k, v in tensors.items()}, {k: v for _, known in everyone for k, v in known.items()}

    def _write(
        self,
        tensors: dict[str, torch.Tensor],
        values: Iterable[torch.Tensor] | None,
        adam_steps: dict[str, int],
        about: dict[str, Any],
        waited_s: float | None,
    ) -> None:
        """Write this rank's part, as `write_part`, and on rank 0 the index. `waited_s` is None where training waits for all of it."""
        began, rank, root = time.monotonic(), self._worker.rank, self._job.checkpoints
        folder = root.below(folder_name(about["step"], about["attempt"]))
        try:
            part = write_part(folder, f"{_part(rank)}.safetensors", tensors, values)
            if not self._is_small:
                folder.write(f"{_part(rank)}.json", json.dumps({"part": part.model_dump(), "steps": adam_steps}).encode())
            if rank:
                return
            parts, adam_steps = ([part], adam_steps) if self._is_small else self._all_parts(folder)
            self._ledger.refuse_superseded()
            write_index(folder, Checkpoint(**about, world_size=self._worker.world_size, adam_steps=adam_steps, parts=parts))
            keep(root, last=self._job.recipe.checkpoints.keep_last, best_step=about["guard"]["best_step"])
            written_s = time.monotonic() - began
            took = {"waited_s": round(written_s if waited_s is None else waited_s, 4), "written_s": round(written_s, 3)}
            tell(self._job.folder, "checkpoint", step=about["step"], bytes=sum(part.size for part in parts), **took)
        except (OSError, SupersededError) as error:
            # The run goes on: what it has learnt is worth more than this checkpoint, and the one before is still there.
            tell(self._job.folder, "checkpoint_failed", step=about["step"], rank=rank, why=str(error))

    def _all_parts(self, folder: Folder) -> tuple[list[Part], dict[str, int]]:
        said: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + PART_WAIT_S
        while True:
            there = set(folder.files())  # one request, and not one for each rank that has not written yet
            missing = set(range(self._worker.world_size)) - said.keys()
            said |= {rank: found for rank in missing if f"{_part(rank)}.json" in there and (found := _said(folder, rank))}
            missing -= said.keys()
            if not missing:
                break
            self._ledger.refuse_superseded()
            if self._is_abandoned or time.monotonic() > deadline:
                raise TimeoutError(f"ranks {sorted(missing)} have not written their parts")
            time.sleep(POLL_S * max(1, self._worker.world_size / 64))
        parts = [Part.model_validate(said[rank]["part"]) for rank in sorted(said)]
        return parts, {name: count for one in said.values() for name, count in one["steps"].items()}


def _said(folder: Folder, rank: int) -> dict[str, Any] | None:
    """What a rank says of its part; None where it has not said it all yet."""
    name = f"{_part(rank)}.json"
    try:
        found: dict[str, Any] = json.loads(folder.read(name)) if folder.size(name) else {}
    except ValueError:
        return None
    return found or None


def _part(rank: int) -> str:
    return f"part-{rank:05d}"


def _key(piece: Piece) -> str:
    return key_of(piece.kind, piece.name, piece.start)
