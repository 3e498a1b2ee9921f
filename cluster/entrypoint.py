"""The command line of `python -m training`, which is all that this room knows of training."""

import sys
from collections.abc import Sequence
from pathlib import Path

MODULE = "training"


def training_argv(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    is_search: bool = False,
    folds: int | None = None,
    home: str | Path | None = None,
    run_id: str | None = None,
    address: str | None = None,
    python: Sequence[str] = (sys.executable, "-P"),
) -> list[str]:
    """What to run for one recipe. `-P` keeps a `training.py` in the user's folder from being run instead."""
    options: list[str] = ["--search"] if is_search else []
    for name, value in (("--folds", folds), ("--home", home), ("--run-id", run_id), ("--address", address)):
        if value is not None:
            options += [name, str(value)]
    return [*python, "-m", MODULE, str(recipe), *overrides, *options]


def resuming_argv(run_id: str, overrides: Sequence[str], *, home: str | Path, address: str | None = None) -> list[str]:
    """What to run to go on with a run."""
    options = ["--resume", run_id, "--home", str(home), *(["--address", address] if address else [])]
    return [sys.executable, "-P", "-m", MODULE, *overrides, *options]
