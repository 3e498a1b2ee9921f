"""`metrics.jsonl` in the run folder: one object a step, one a validation, written by rank 0 as they happen.

Step metrics go here and not through `ray.train.report`, which blocks for a health-check interval at every call.
"""

import json
from pathlib import Path
from typing import Any

from hone.storage import write_text
from training.job import METRICS_FILE


class MetricsFile:
    """Appends to the file on rank 0, and does nothing on the others."""

    def __init__(self, folder: Path, *, rank: int, keep_steps: int, total_steps: int) -> None:
        """Drop what a lost worker wrote after step `keep_steps`, from which this run goes on."""
        self._file = None
        if rank:
            return
        path = folder / METRICS_FILE
        kept = [m for m in read_metrics(folder) if m["step"] <= keep_steps] if keep_steps else []
        write_text(path, "".join(json.dumps(m) + "\n" for m in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self.write({"step": keep_steps, "total_steps": total_steps})

    def write(self, values: dict[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        if self._file:
            self._file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Every whole line of a run's metrics."""
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
