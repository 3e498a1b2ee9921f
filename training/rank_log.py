"""`logs/` in the run folder: what each rank wrote to its output, the libraries' own messages too, kept after Ray is gone."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

LOGS_FOLDER = "logs"


@contextmanager
def logged(folder: Path, rank: int) -> Iterator[None]:
    """A block whose output and errors, down to those of C libraries, go to the rank's file, behind what earlier attempts wrote."""
    path = folder / LOGS_FOLDER / f"rank-{rank:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"from here on this worker writes to {path}", file=sys.stderr, flush=True)  # noqa: T201 - where whoever reads Ray's log finds it
    with path.open("ab", buffering=0) as file:
        file.write(f"--- {datetime.now(UTC).isoformat(timespec='seconds')}, process {os.getpid()}\n".encode())
        kept = {stream: os.dup(stream) for stream in (1, 2)}
        _flush()
        for stream in kept:
            os.dup2(file.fileno(), stream)
        try:
            yield
        finally:
            _flush()
            for stream, before in kept.items():
                os.dup2(before, stream)
                os.close(before)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
