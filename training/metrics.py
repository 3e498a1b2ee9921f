"""`metrics.jsonl` in the run folder: one object a step, one a validation, written by rank 0 as they happen.

Step metrics go here and not through `ray.train.report`, which blocks for a health-check interval at every call.
"""

import json
import os
from pathlib import Path
from typing import Any

from hone.storage import write_text
from training.job import METRICS_FILE


class MetricsFile:
    """Appends to the file on rank 0, and does nothing on the others."""

    def __init__(self, folder: Path, *, rank: int, keep_steps: int, **about: int) -> None:
        """Drop what a lost worker wrote after step `keep_steps`, from which this run goes on. The first line says what is `about` it."""
        self._file = None
        if rank:
            return
        path = folder / METRICS_FILE
        kept = [m for m in read_metrics(folder) if m["step"] <= keep_steps] if keep_steps else []
        write_text(path, "".join(json.dumps(m) + "\n" for m in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self.write({"step": keep_steps, **about})

    def write(self, values: dict[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        if self._file:
            self._file.close()


class MetricsFollower:
    """Reads the file as it grows."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS_FILE
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


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Every whole line of a run's metrics."""
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
