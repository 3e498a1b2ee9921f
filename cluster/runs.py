"""Runs as their folders tell of them, with what the store and the process list know."""

import json
import os
import signal
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hone.errors import ResourceError
from hone.run_folder import (
    EXPORT_FOLDER,
    FAILURE_FILE,
    JOB_FILE,
    METRICS_FILE,
    RESULT_FILE,
    Attempt,
    attempts,
    driver_of,
    find_run_folder,
    read_events,
    read_metrics,
)
from hone.storage import Home
from hone.store import ENDED, Store

STOP_TIMEOUT_S = 60.0
POLL_S = 0.2


@dataclass(frozen=True)
class Run:
    """One run folder."""

    id: str
    folder: Path
    status: str
    """`running`, `succeeded`, `failed`, `stopped`, or `lost` where the process that ran it is gone without a word."""
    result: str
    """What was published, or why it failed."""
    recipe: dict[str, Any]
    last: dict[str, Any]
    """The last value of every metric."""
    step: int
    total_steps: int | None
    attempts: list[Attempt]
    events: list[dict[str, Any]]
    changed_at: datetime

    def summary(self) -> dict[str, Any]:
        """What a list says of it."""
        return {
            "id": self.id,
            "status": self.status,
            "result": self.result,
            "step": self.step,
            "total_steps": self.total_steps,
            "loss": self.last.get("loss"),
            "attempts": [attempt.model_dump(mode="json") for attempt in self.attempts],
            "folder": str(self.folder),
            "changed_at": self.changed_at,
        }


def all_runs(home: Home) -> list[Run]:
    """Every run of a home, the last one that moved first."""
    if not home.runs.is_dir():
        return []
    with closing(Store(home.store_url)) as store:
        found = [_read(path.parent, store) for path in home.runs.glob(f"*/{JOB_FILE}")]
    return sorted(found, key=lambda run: run.changed_at, reverse=True)


def find_run(run_id: str, *, home: Home) -> Run:
    """One run.

    Raises:
        HoneError: there is none of that name.
    """
    folder = find_run_folder(home, run_id)
    with closing(Store(home.store_url)) as store:
        return _read(folder, store)


def is_over(folder: Path, store: Store) -> bool:
    """Whether a run has ended, without reading what it wrote."""
    return _state(folder, store)[0] != "running"


def stop_run(run_id: str, *, home: Home) -> str:
    """End a run and wait until it has; its state then.

    Raises:
        ResourceError: it runs on another machine, or does not end.
    """
    run, driver = find_run(run_id, home=home), driver_of(home.runs / run_id)
    if run.status != "running" or driver is None:
        return run.status
    if not driver.is_here:
        from cluster.jobs import stop

        return stop(run_id, home=home).status
    with suppress(ProcessLookupError):
        os.kill(driver.pid, signal.SIGINT)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while driver.is_alive:
        if time.monotonic() > deadline:
            raise ResourceError(f"{run_id}: process {driver.pid} was asked to stop and still runs after {STOP_TIMEOUT_S:.0f} s")
        time.sleep(POLL_S)
    return find_run(run_id, home=home).status


def differences(recipes: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Dotted keys in which recipes differ -> the value in each."""
    flat = [_flat(recipe) for recipe in recipes]
    keys = dict.fromkeys(key for each in flat for key in each)
    values = {key: [each.get(key) for each in flat] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _read(folder: Path, store: Store) -> Run:
    job = json.loads((folder / JOB_FILE).read_text())
    lines = read_metrics(folder)
    last: dict[str, Any] = {}
    for line in lines:
        last |= line
    status, result = _state(folder, store)
    newest = max(path.stat().st_mtime for path in (folder / METRICS_FILE, folder / JOB_FILE, folder / EXPORT_FOLDER) if path.exists())
    return Run(
        id=folder.name,
        folder=folder,
        status=status,
        result=result,
        recipe=job["recipe"],
        last={name: value for name, value in last.items() if name not in ("total_steps", "published_step")},
        step=last.get("step", 0),
        total_steps=last.get("total_steps"),
        attempts=attempts(folder),
        events=read_events(folder),
        changed_at=datetime.fromtimestamp(newest, UTC),
    )


def _state(folder: Path, store: Store) -> tuple[str, str]:
    if (folder / RESULT_FILE).exists():
        return "succeeded", json.loads((folder / RESULT_FILE).read_text())["adapter"] or ""
    job, driver = store.job(folder.name), driver_of(folder)
    if job is not None and job.status in ENDED:
        return job.status, (job.result or "").partition("\n")[0]
    if driver and driver.is_here and not driver.is_alive:
        return "lost", "the process that ran it is gone; `hone runs resume` goes on with it"
    if (folder / FAILURE_FILE).exists():
        return "failed", json.loads((folder / FAILURE_FILE).read_text())["message"]
    return "running", ""


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: value for name, child in tree.items() for key, value in _flat(child, f"{path}.{name}" if path else name).items()}
