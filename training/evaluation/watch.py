"""How far an evaluation is: a bar in a terminal, or a small file that the process which waits for it reads."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hone.storage import write_json

Watch = Callable[[str, int, int], None]
"""Told what is being done, how much of it is, and of how much."""
WRITE_EVERY_S = 0.5


def unwatched(what: str, done: int, total: int) -> None:
    """Nobody looks."""


@contextmanager
def bars(console: Console) -> Iterator[Watch]:
    """A bar for each thing that is done, gone when the block ends; nothing where the console is no terminal."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    tasks = {}

    def watch(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=total)
        progress.update(tasks[what], completed=done, total=total)

    with progress:
        yield watch


class WatchFile:
    """A file that another process, on another node perhaps, can look at."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + WRITE_EVERY_S
            write_json(self._path, [what, done, total])

    def read(self) -> tuple[str, int, int] | None:
        """What was last written, if anything was."""
        with suppress(FileNotFoundError):
            what, done, total = json.loads(self._path.read_text())
            return str(what), int(done), int(total)
        return None
