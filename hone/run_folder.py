"""What a run's folder holds, and how it is read: by workers that go on, by commands, and by anyone after Ray is gone.

    job.json           the resolved recipe, the base and the data
    plan.json          what it was estimated to take in memory, time and money, and what `auto` became
    environment.json   versions, hardware, and the checkout that it was started in
    metrics.jsonl      a line a step and a line a validation, as they count in the end
    metrics.parquet    the same as a table, once the workers have ended; tensorboard/ likewise, as they happen
    tracked/           up to which step each tracking service was told; wandb/ is that service's own
    logs/              what each rank wrote to its output
    events.jsonl       what happened: attempts, checkpoints, stalls, what did not fit into memory
    ledger/            which rows every step of every attempt saw, and its loss
    health/            what each rank does now, and its stack
    checkpoints/       state to go on from
    export/            what was trained, in PEFT's or transformers' format
    driver.json        the process that runs it
    result.json        how it ended well; failure.json, how not

Files of lines are appended to, one line in one write. Readers pass over a last line that has no end yet.
"""

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from hone.errors import HoneError
from hone.storage import Home, write_text

JOB_FILE = "job.json"
PLAN_FILE = "plan.json"
METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
RESULT_FILE = "result.json"
FAILURE_FILE = "failure.json"
EXPORT_FOLDER = "export"
DRIVER_FILE = "driver.json"
LEDGER_FOLDER = "ledger"
CHECKPOINTS_FOLDER = "checkpoints"


def find_run_folder(home: Home, run_id: str) -> Path:
    """The folder of a run.

    Raises:
        HoneError: there is no run of that name.
    """
    folder = home.runs / run_id
    if not (folder / JOB_FILE).exists():
        raise HoneError(f"no run {run_id!r} in {home.runs}; `hone runs list` shows those that there are")
    return folder


class Attempt(BaseModel):
    """One start of a run's workers: the first one, and one after each loss or resume."""

    model_config = ConfigDict(frozen=True)

    number: int
    """From 1."""
    step: int
    """Steps already done, by the checkpoint that it goes on from."""
    checkpoint: str | None = None
    """Name of that checkpoint."""
    passed_over: list[str] = []
    """Why newer checkpoints were not used."""
    world_size: int
    sequence_parallel_size: int = 1
    """So many ranks after another saw the same rows, each a slice of them."""
    workers: list[str] = []
    """Host and process of each rank."""
    started_at: datetime = Field(default_factory=lambda: datetime.now(UTC))


def attempts(folder: Path) -> list[Attempt]:
    """All of a run, in order."""
    found = sorted((folder / LEDGER_FOLDER).glob("attempt-*.json"))
    return [Attempt.model_validate_json(path.read_bytes()) for path in found]


def attempt_file(number: int) -> str:
    """Its name in the ledger's folder."""
    return f"attempt-{number:04d}.json"


def tell(folder: Path, event: str, **about: Any) -> None:
    """Add a line to a run's events. Whoever takes part in it may."""
    line = json.dumps({"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **about}) + "\n"
    handle = os.open(folder / EVENTS_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def read_events(folder: Path) -> list[dict[str, Any]]:
    """What happened to a run, oldest first."""
    return read_lines(folder / EVENTS_FILE)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """A run's steps and validations."""
    return read_lines(folder / METRICS_FILE)


class Driver(BaseModel):
    """The process that runs a run."""

    model_config = ConfigDict(frozen=True)

    host: str
    pid: int
    started: str
    """When the kernel says that it began, by which it is told from a later process of the same number."""

    @property
    def is_here(self) -> bool:
        """Whether it was started on this machine."""
        return self.host == socket.gethostname()

    @property
    def is_alive(self) -> bool:
        """Whether it still runs, where it was started on this machine."""
        return self.is_here and _start_of(self.pid) == self.started


def sign_in(folder: Path) -> None:
    """Say in the run's folder that this process runs it."""
    write_text(
        folder / DRIVER_FILE, Driver(host=socket.gethostname(), pid=os.getpid(), started=_start_of(os.getpid())).model_dump_json() + "\n"
    )


def driver_of(folder: Path) -> Driver | None:
    """Who runs it, or ran it last."""
    path = folder / DRIVER_FILE
    return Driver.model_validate_json(path.read_bytes()) if path.exists() else None


def _start_of(pid: int) -> str:
    """Clock ticks from boot to a process's start, as /proc tells them; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""


class LinesFollower:
    """Reads a file of lines as it grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = 0
        self._offset = 0

    def new_lines(self) -> tuple[list[dict[str, Any]], bool]:
        """Whole lines since the last call, and whether they begin anew, as a restarted run's do: it drops what a lost worker wrote."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                is_new = status.st_ino != self._inode or status.st_size < self._offset
                self._inode, self._offset = status.st_ino, 0 if is_new else self._offset
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return [], False
        self._offset += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines()], is_new


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a file of JSON lines; none where there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
