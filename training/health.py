"""Signs of life: a thread of each worker writes down where the worker is, and says so when one gets nowhere.

A collective waits for the slowest rank for as long as it takes, so one rank that stands still looks like all of them doing so. Each
rank's file in `health/` says what it does, since when, and its stack at that moment. Who is to blame is the rank whose file is no longer
written (its process is stopped or its machine gone), or else the one that has come least far.
"""

import json
import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from hone.run_folder import tell
from training.forward import Batcher
from training.job import Job
from training.ledger import this_worker
from training.worker import Worker

HEALTH_FOLDER = "health"
STALLED_EXIT = 70
"""What a worker exits with that has waited for too long; Ray then starts all of them again."""
STEPS_LOOKED_AT = 20
STARVED = 0.2
"""Share of a step's time spent on waiting for rows."""
SLOW, SLOW_S = 1.5, 0.1
"""Times the median of the ranks' forward passes, and by how many seconds a step at least."""


@dataclass
class Beat:
    """What one rank's file says."""

    rank: int
    worker: str
    step: int
    doing: str
    count: int
    """Marks and batches so far: how far the rank has come."""
    still_s: float
    """Since the last of them."""
    forward_s: float
    """Of a step, the mean over the last ones."""
    stack: list[str]


class Health:
    """One worker's."""

    def __init__(self, job: Job, worker: Worker, batcher: Batcher, *, attempt: int) -> None:
        """Start the thread. `mark` is called from the thread that this is made in; a batch that `batcher` makes is progress too."""
        self._job, self._worker, self._settings = job, worker, job.recipe.health
        self._folder = job.folder / HEALTH_FOLDER / f"{attempt:04d}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._thread_id = threading.get_ident()
        self._doing, self._step, self._count, self._marked = "start", 0, 0, time.monotonic()
        self._times: list[tuple[float, float, float]] = []
        self._batcher, self._seen = batcher, batcher.made
        self._told, self._patience = False, 1.0
        self._said: set[str] = set()
        self._ended = threading.Event()
        self._every_s = every_s(worker.world_size, stall_s=self._settings.stall_s)
        self._clock, self._unsure_until = FileClock(), 0.0
        self._write()  # so that a rank which freezes at once is known too
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)
        self._thread.start()

    def mark(self, doing: str, step: int | None = None, *, patience: float = 1) -> None:
        """Say what the worker does now; `patience` is by how much longer than a step it may take."""
        self._patience = patience
        self._doing, self._count, self._marked, self._told = doing, self._count + 1, time.monotonic(), False
        self._step = self._step if step is None else step

    def timed(self, *, step_s: float, data_s: float, forward_s: float) -> None:
        """Take in how long a step took, how long of it rows were waited for, and how long the forward passes were."""
        self._times = [*self._times[1 - STEPS_LOOKED_AT :], (step_s, data_s, forward_s)]

    def __enter__(self) -> "Health":
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            if self._batcher.made != self._seen:
                self._seen, self._marked, self._told = self._batcher.made, time.monotonic(), False
            try:
                self._write()
                self._look()
            except OSError:
                continue  # a full disk is not this thread's to tell

    def _write(self) -> None:
        frame = sys._current_frames().get(self._thread_id)
        stack = [line.rstrip() for line in traceback.format_stack(frame)] if frame else []
        beat = Beat(
            rank=self._worker.rank,
            worker=this_worker(),
            step=self._step,
            doing=self._doing,
            count=self._count + self._seen,
            still_s=time.monotonic() - self._marked,
            forward_s=self._mean(2),
            stack=stack,
        )
        staging = self._folder / f".{self._worker.rank:05d}"
        staging.write_text(json.dumps(vars(beat)))
        staging.rename(self._folder / _name(self._worker.rank))
        if self._clock.jumped(_written_at(self._folder, self._worker.rank), time.monotonic(), by_s=self._settings.stall_s / 4):
            self._unsure_until = time.monotonic() + 3 * self._every_s  # by then all that are alive have written by the new clock

    def _look(self) -> None:
        """Read what the others say, but only where there is something to say of it: with a thousand ranks that is a thousand files."""
        still_s, stall_s = time.monotonic() - self._marked, self._settings.stall_s * self._patience
        if still_s >= stall_s:
            self._look_for_blame()
        elif self._worker.rank == 0 and len(self._times) == STEPS_LOOKED_AT:
            self._look_at_speed(read_beats(self._folder))
        if still_s >= stall_s + self._settings.end_stalled_after_s * self._patience:
            os._exit(STALLED_EXIT)  # the thread that trains is in a collective, which nothing but this ends

    def _look_for_blame(self) -> None:
        """The lowest rank of those that are alive speaks, once a stall. The others look no further than to one that is alive below them:
        a thousand ranks that each read a thousand files would be the end of the file system."""
        if not self._told and time.monotonic() >= self._unsure_until and not self._is_any_alive_below():
            self._told = True
            self._name(read_beats(self._folder), _silence(self._folder, self._worker.rank))

    def _is_any_alive_below(self) -> bool:
        now = _written_at(self._folder, self._worker.rank)
        return any(abs(now - _written_at(self._folder, rank)) < self._settings.stall_s / 2 for rank in range(self._worker.rank))

    def _name(self, beats: dict[int, Beat], silent_s: dict[int, float]) -> None:
        """Write down all stacks, and who is to blame."""
        silent = [rank for rank in beats if silent_s[rank] >= self._settings.stall_s / 2]
        rank = silent[0] if silent else min(beats, key=lambda rank: (beats[rank].count, -beats[rank].still_s))
        beat = beats[rank]
        stacks = self._folder / f"stacks-at-step-{self._step}.txt"
        stacks.write_text(
            "\n".join(f"rank {b.rank} on {b.worker}, {b.doing}, step {b.step}\n" + "\n".join(b.stack) + "\n" for b in beats.values())
        )
        why = f"no sign of life for {silent_s[rank]:.0f} s" if silent else f"{beat.doing} for {beat.still_s:.0f} s"
        tell(self._job.folder, "stalled", rank=rank, worker=beat.worker, step=beat.step, why=why, stacks=str(stacks))

    def _look_at_speed(self, beats: dict[int, Beat]) -> None:
        share = self._mean(1) / max(self._mean(0), 1e-9)
        if share > STARVED and "starved" not in self._said:
            self._said.add("starved")
            tell(self._job.folder, "starved", rank=self._worker.rank, step=self._step, share_of_time_waiting_for_rows=round(share, 3))
        times = sorted(beat.forward_s for beat in beats.values() if beat.forward_s)
        if len(times) < 2:
            return
        median = times[(len(times) - 1) // 2]
        for beat in beats.values():
            if beat.forward_s > max(SLOW * median, median + SLOW_S) and f"slow {beat.rank}" not in self._said:
                self._said.add(f"slow {beat.rank}")
                about = {"forward_s": round(beat.forward_s, 4), "median_s": round(median, 4)}
                tell(self._job.folder, "slow_rank", rank=beat.rank, worker=beat.worker, step=self._step, **about)

    def _mean(self, which: int) -> float:
        return sum(times[which] for times in self._times) / max(1, len(self._times))


class FileClock:
    """Notices when the file system's clock is set, by what this process's own, which nobody can set, says at the same moments."""

    def __init__(self) -> None:
        self._ahead_s: float | None = None

    def jumped(self, written_at: float, now: float, *, by_s: float) -> bool:
        """Whether the clock by which a file was just `written_at` has moved against ours, `now`, since the last call, and by so much."""
        before, self._ahead_s = self._ahead_s, written_at - now
        return before is not None and abs(self._ahead_s - before) >= by_s


def every_s(world_size: int, *, stall_s: float) -> float:
    """How often a rank writes: at most 64 of them a second."""
    return max(min(2.0, stall_s / 5), world_size / 64)


def read_beats(folder: Path) -> dict[int, Beat]:
    """Rank -> the last that it said."""
    return {beat.rank: beat for path in sorted(folder.glob("rank-*.json")) for beat in [Beat(**json.loads(path.read_text()))]}


def _silence(folder: Path, rank: int) -> dict[int, float]:
    """Rank -> seconds between its last file and ours, by the file system's clock, which all of them share. Ours is the older one where
    that clock was set back after the rank had fallen silent."""
    now = _written_at(folder, rank)
    return {int(path.stem.split("-")[1]): abs(now - path.stat().st_mtime) for path in folder.glob("rank-*.json")}


def _written_at(folder: Path, rank: int) -> float:
    """Seconds since 1970 by the file system's clock; long ago where the rank has written nothing."""
    try:
        return (folder / _name(rank)).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _name(rank: int) -> str:
    return f"rank-{rank:05d}.json"
