"""The ledger: which rows every step of a run saw, on which rank, and the loss, kept whatever becomes of the workers.

`ledger/` in the run folder has a file for each attempt (a start of the workers: the first one, and one after each loss or resume) that
says from which step it went on, and a file of lines for each of its ranks. Nothing is ever taken out of it: where an attempt began
before the end of the one before, what that one had done past this point was lost, and its lines stay as a second witness of the loss.
"""

import json
import math
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from hone.run_folder import LEDGER_FOLDER, Attempt, attempt_file, attempts, read_lines
from hone.storage import write_new
from training.batches import Rows


class Line(BaseModel):
    """What one rank did at one step."""

    model_config = ConfigDict(frozen=True)

    step: int
    """From 1."""
    rows: list[int]
    """Numbers of the training rows that it learnt from, or from a slice of each, in the run's own numbering."""
    loss: float
    """Over all ranks."""
    seed: int
    """Of dropout and augmentation."""


class SupersededError(Exception):
    """This worker was cut off, and others have taken up the run since. It is to end without a word."""


WRITES_A_STEP = 64
"""By all ranks together, at most: where there are more, each writes the lines of several steps at once."""


class Ledger:
    """Writes one rank's lines. What a killed one had not written yet it had done since the last checkpoint, and will be done again."""

    def __init__(self, folder: Path, *, attempt: int, rank: int, world_size: int = 1) -> None:
        self._folder, self.attempt = folder / LEDGER_FOLDER, attempt
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = (self._folder / _lines_file(attempt, rank)).open("a", encoding="utf-8")
        self._held, self._most_held = list[str](), math.ceil(world_size / WRITES_A_STEP)

    def write(self, step: int, rows: Iterable[Rows], *, loss: float, seed: int) -> None:
        """Say what was learnt from at a step (from 1)."""
        numbers = [row for part in rows for row in part.tolist()]
        self._held.append(json.dumps({"step": step, "rows": numbers, "loss": loss, "seed": seed}, separators=(",", ":")) + "\n")
        if len(self._held) >= self._most_held:
            self._write_held()

    def sync(self) -> None:
        """Have it on disk, before a checkpoint says that these steps are done."""
        self._write_held()
        os.fsync(self._file.fileno())

    def is_newest(self) -> bool:
        """Whether the run was not started again since, elsewhere: what a worker that was cut off for a while has to know."""
        return not (self._folder / attempt_file(self.attempt + 1)).exists()

    def refuse_superseded(self) -> None:
        """Raise SupersededError where the run was started again elsewhere."""
        if not self.is_newest():
            raise SupersededError("the run was started again elsewhere")

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_error: object) -> None:
        self._write_held()
        self._file.close()

    def _write_held(self) -> None:
        self._file.write("".join(self._held))
        self._file.flush()
        self._held = []


def begin_attempt(folder: Path, **about: Any) -> Attempt:
    """Claim the next number. Two that try at once get two numbers."""
    ledger = folder / LEDGER_FOLDER
    ledger.mkdir(parents=True, exist_ok=True)
    number = len(attempts(folder)) + 1
    while True:
        made = Attempt(number=number, **about)
        if write_new(ledger / attempt_file(number), made.model_dump_json(indent=1) + "\n"):
            return made
        number += 1


def lines(folder: Path, attempt: Attempt) -> dict[int, dict[int, Line]]:
    """Step -> rank -> what it did, of one attempt. What a killed worker wrote half of is left out."""
    made: dict[int, dict[int, Line]] = {}
    for rank in range(attempt.world_size):
        for written in read_lines(folder / LEDGER_FOLDER / _lines_file(attempt.number, rank)):
            made.setdefault(written["step"], {})[rank] = Line(**written)
    return made


def this_worker() -> str:
    """Host and process."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _lines_file(attempt: int, rank: int) -> str:
    return f"rows-{attempt:04d}-{rank:05d}.jsonl"
