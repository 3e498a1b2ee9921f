"""Step and validation metrics in the run folder, written by rank 0 as they happen: `metrics.jsonl`, and TensorBoard's event files.

Step metrics go here and not through `ray.train.report`, which blocks for a health-check interval at every call.
"""

import json
from pathlib import Path
from typing import Any

from hone.run_folder import METRICS_FILE, read_metrics
from hone.storage import write_text

TABLE_FILE = "metrics.parquet"
BOARD_FOLDER = "tensorboard"


class MetricsFile:
    """Appends to the files on rank 0, and does nothing on the others."""

    def __init__(self, folder: Path, *, rank: int, keep_steps: int, **about: int) -> None:
        """Drop what a lost worker wrote after step `keep_steps`, from which this run goes on. The first line says what is `about` it."""
        self._file = self._board = None
        if rank:
            return
        from tensorboardX import SummaryWriter

        path = folder / METRICS_FILE
        kept = [m for m in read_metrics(folder) if m["step"] <= keep_steps] if keep_steps else []
        write_text(path, "".join(json.dumps(m) + "\n" for m in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)
        # TensorBoard passes over what an earlier attempt wrote from `purge_step` on.
        self._board = SummaryWriter(str(folder / BOARD_FOLDER), purge_step=keep_steps + 1, flush_secs=10)
        self.write({"step": keep_steps, **about})

    def write(self, values: dict[str, Any]) -> None:
        if not self._file or not self._board:
            return
        self._file.write(json.dumps(values) + "\n")
        for name, value in values.items():
            if isinstance(value, float):
                self._board.add_scalar(_board_name(name), value, values["step"])

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_error: object) -> None:
        if self._file and self._board:
            self._file.close()
            self._board.close()


def write_table(folder: Path) -> None:
    """All metrics as one Parquet table, a row a line, for whoever compares many runs."""
    import pyarrow as pa
    from pyarrow import parquet

    lines = read_metrics(folder)
    if lines:
        names = dict.fromkeys(name for line in lines for name in line)
        parquet.write_table(pa.Table.from_pydict({name: [line.get(name) for line in lines] for name in names}), folder / TABLE_FILE)


def _board_name(name: str) -> str:
    """TensorBoard groups by what stands before the slash."""
    for kind in ("eval", "retain"):
        if name.startswith(f"{kind}_"):
            return f"{kind}/{name.removeprefix(f'{kind}_')}"
    return f"train/{name}"
