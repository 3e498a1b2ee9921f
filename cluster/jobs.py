"""Jobs on a cluster: submit, follow, list, stop. The store keeps what is known of each, also when its cluster is gone."""

import asyncio
import logging
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.dashboard import Dashboard, NotFoundError
from cluster.entrypoint import training_argv
from cluster.package import check_paths_travel, pack
from hone.errors import HoneError, ResourceError
from hone.ids import new_run_id
from hone.recipe import Recipe
from hone.storage import Home
from hone.store import ENDED, Job, Store

STATUS = {"PENDING": "submitted", "RUNNING": "running", "SUCCEEDED": "succeeded", "FAILED": "failed", "STOPPED": "stopped"}
"""Ray's word for a job's state -> ours."""
POLL_S = 0.5
STOP_TIMEOUT_S = 60.0
LIST_TIMEOUT_S = 3.0
AGENT_TIMEOUT_S = 60.0
CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
"""Loggers that tell of every upload and every closed connection."""
NO_AGENT = "No available agent"
NEEDS_HOME = "is not set on this cluster, so what the job makes would be lost; set it there or give hone submit --cluster-home"


@dataclass(frozen=True)
class JobState:
    """What is known of one job, and how."""

    id: str
    kind: str
    status: str
    address: str | None
    recipe: str
    result: str
    updated_at: datetime | None
    note: str = ""
    """Why `status` is only the last that was known; empty where the cluster has just confirmed it."""

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED


@dataclass(frozen=True)
class Submission:
    """A job that a cluster has accepted."""

    id: str
    entrypoint: str
    packed: int
    """Files that travelled."""
    staying: list[str]
    """Recipe paths that must exist on the cluster already."""


def submit(
    recipe_path: Path,
    recipe: Recipe,
    overrides: Sequence[str],
    *,
    dashboard: Dashboard,
    home: Home,
    cluster_home: str | None = None,
    is_search: bool = False,
    folds: int | None = None,
    working_dir: Path | None = None,
) -> Submission:
    """Send a recipe and the folder it is in to a cluster as a Ray Job, and record it.

    Args:
        recipe_path: The file that `recipe` was read from.
        recipe: The recipe with the overrides applied.
        overrides: `KEY=VALUE` pairs, applied again on the cluster.
        dashboard: The cluster.
        home: Where the job is recorded.
        cluster_home: The home as the cluster's nodes see it. By default this home where the cluster is this machine, and else the
            cluster's own $HONE_HOME.
        is_search: Run the recipe's `search:`.
        folds: First train on so many folds.
        working_dir: The folder that travels, by default the recipe's own.

    Raises:
        HoneError: the folder is too large or does not hold the recipe, or the cluster does not take the job.
    """
    recipe_path = recipe_path.resolve()
    folder = (working_dir or recipe_path.parent).resolve()
    if not recipe_path.is_relative_to(folder):
        raise ResourceError(f"{recipe_path}: is not below the working directory {folder}, so it would not travel with the job")
    staying = check_paths_travel(recipe_path, overrides, folder)
    dashboard.get("/api/version")
    is_here = dashboard.is_on_this_machine()
    home_there = cluster_home or (str(home.root) if is_here else None)
    run_id = new_run_id(recipe.name)
    python = sys.executable if is_here else "python"
    argv = training_argv(
        recipe_path.relative_to(folder),
        overrides,
        is_search=is_search,
        folds=folds,
        home=home_there,
        run_id=run_id,
        python=(python,),
    )
    # Without a home of ours the cluster's has to be set: the default would be in the job's working directory, which Ray deletes.
    entrypoint = ("" if home_there else f': "${{HONE_HOME:?{NEEDS_HOME}}}" && ') + shlex.join(argv)
    with closing(Store(home.store_url)) as store, tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch, "job.zip")
        packed = pack(folder, archive, home=home.root)
        store.add_job(run_id, kind=_kind(is_search), recipe=str(recipe_path), status="submitted", address=dashboard.address)
        try:
            _submit_job(dashboard, entrypoint=entrypoint, run_id=run_id, archive=archive, kind=_kind(is_search))
        except (RuntimeError, OSError) as error:
            reason = f"{dashboard.address}: the cluster did not take the job: {str(error).strip().splitlines()[-1]}"
            store.move_job(run_id, "failed", message=reason)
            raise ResourceError(reason) from error
    return Submission(run_id, entrypoint, len(packed), [] if is_here else staying)


def follow(job_id: str, *, dashboard: Dashboard, home: Home, write: Callable[[str], object]) -> JobState:
    """Write the job's log as it grows, until the job ends; how it ended.

    Raises:
        ResourceError: the cluster went away meanwhile. NotFoundError: it knows no such job.
    """

    async def tail() -> None:
        async for text in _client(dashboard).tail_job_logs(job_id):
            write(text)

    dashboard.get(f"/api/jobs/{job_id}")
    try:
        asyncio.run(tail())
    except (RuntimeError, OSError) as error:
        raise ResourceError(
            f"{dashboard.address}: the connection was lost while following {job_id} ({error}); "
            f"the job may still run, and `hone jobs list` shows what is known of it"
        ) from error
    while True:
        state = find_job(job_id, home=home, address=dashboard.address)
        if state.has_ended:
            return state
        if state.note:
            raise ResourceError(f"{state.note}; the last known state of {job_id} is {state.status}")
        time.sleep(POLL_S)


def list_jobs(home: Home, *, address: str | None = None) -> list[JobState]:
    """Jobs in the store, newest first, brought up to date from the clusters that answer.

    With `address` only that cluster's, and also those that were sent to it from elsewhere.

    Raises:
        ResourceError: `address` was given, does not answer, and the store knows no job of it.
    """
    with closing(Store(home.store_url)) as store:
        recorded = [job for job in store.jobs() if address in (None, job.address)]
        asked = {job.address for job in recorded if job.address and job.status not in ENDED} | ({address} if address else set())
        answers = {place: _ray_jobs(place) for place in asked}
        shown = [_current(job, answers.get(job.address or ""), store) for job in recorded]
    if address is None:
        return shown
    there = answers[address]
    if isinstance(there, ResourceError):
        if not shown:
            raise there
        return shown
    known = {state.id for state in shown}
    return shown + [_sent_from_elsewhere(name, info, address) for name, info in there.items() if name not in known]


def find_job(job_id: str, *, home: Home, address: str | None = None) -> JobState:
    """What is known of one job, brought up to date where its cluster answers.

    Raises:
        HoneError: neither the store nor the cluster at `address` knows it.
    """
    with closing(Store(home.store_url)) as store:
        job = store.job(job_id)
        if job is not None:
            place = job.address or address
            return _current(job, _ray_jobs(place) if place and job.status not in ENDED else None, store)
    if address is None:
        raise HoneError(f"no job {job_id!r} in {home.root}; `hone jobs list` shows those that are known, --address asks a cluster")
    there = _ray_jobs(address)
    if isinstance(there, ResourceError):
        raise there
    if job_id not in there:
        raise NotFoundError(f"{address}: no job {job_id!r}; `hone jobs list --address {address}` shows those that it has")
    return _sent_from_elsewhere(job_id, there[job_id], address)


def stop(job_id: str, *, home: Home, address: str | None = None, timeout_s: float = STOP_TIMEOUT_S) -> JobState:
    """Ask a job to stop and wait until it has; how it ended.

    Ray answers yes to a stop of a pending job and does nothing (https://github.com/ray-project/ray/issues/58353), so its answer counts
    for nothing here: the request is repeated until the job's state says that it has ended.

    Raises:
        ResourceError: it runs on no cluster, the cluster does not answer, or the job has not ended within `timeout_s`.
    """
    state = find_job(job_id, home=home, address=address)
    if state.has_ended:
        return state
    place = state.address or address
    if place is None:
        raise ResourceError(f"{job_id}: runs in a terminal on the machine that started it; press Ctrl-C there")
    if state.note:
        raise ResourceError(f"{job_id}: cannot be stopped: {state.note}; its last known state is {state.status}")
    dashboard = Dashboard(place)
    deadline = time.monotonic() + timeout_s
    while True:
        dashboard.post(f"/api/jobs/{job_id}/stop")
        asked_at = time.monotonic()
        while time.monotonic() < min(asked_at + 5, deadline):
            state = find_job(job_id, home=home, address=place)
            if state.has_ended:
                return state
            time.sleep(POLL_S)
        if time.monotonic() >= deadline:
            raise ResourceError(
                f"{job_id}: asked to stop, and still {state.status} after {timeout_s:.0f} s; try again, or see {place} for what holds it"
            )


def log_of(state: JobState, *, home: Home) -> str:
    """All that the job has written so far.

    Raises:
        ResourceError: its cluster does not answer, or it ran in a terminal, where its log went.
    """
    if state.address is None:
        raise ResourceError(f"{state.id}: ran in a terminal, which has its log; its metrics are in {home.runs / state.id}")
    return str(Dashboard(state.address).get(f"/api/jobs/{state.id}/logs")["logs"])


def _submit_job(dashboard: Dashboard, *, entrypoint: str, run_id: str, archive: Path, kind: str) -> None:
    """Hand the job to Ray, again while its head is up and the agent that starts jobs is not yet."""
    deadline = time.monotonic() + AGENT_TIMEOUT_S
    while True:
        try:
            _client(dashboard).submit_job(
                entrypoint=entrypoint, submission_id=run_id, runtime_env={"working_dir": str(archive)}, metadata={"hone": kind}
            )
        except RuntimeError as error:
            if NO_AGENT not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)
        else:
            return


def _client(dashboard: Dashboard) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    return JobSubmissionClient(dashboard.address, headers=dashboard.headers)


def _ray_jobs(address: str) -> dict[str, Any] | ResourceError:
    """Submission id -> what Ray says of it, or why it says nothing."""
    try:
        return {job["submission_id"]: job for job in Dashboard(address, timeout_s=LIST_TIMEOUT_S).get("/api/jobs/") if job["submission_id"]}
    except ResourceError as error:
        return error


def _current(job: Job, there: dict[str, Any] | ResourceError | None, store: Store) -> JobState:
    """The store's job, after what its cluster says has been put into the store."""
    note = ""
    if isinstance(there, ResourceError):
        note = there.message
    elif there is not None and job.id not in there:
        note = f"{job.address}: the Ray there does not know this job; it was started anew since, or is another cluster"
    elif there is not None:
        status, why = _status(there[job.id])
        if status != "submitted":
            store.move_job(job.id, status, message=why)
        job = store.job(job.id) or job
    return JobState(job.id, job.kind, job.status, job.address, job.recipe, job.result or "", job.updated_at, note)


def _sent_from_elsewhere(job_id: str, info: dict[str, Any], address: str) -> JobState:
    status, why = _status(info)
    kind = (info.get("metadata") or {}).get("hone", "other")
    ended = info.get("end_time") or info.get("start_time")
    return JobState(job_id, kind, status, address, "", why, datetime.fromtimestamp(ended / 1000, UTC) if ended else None)


def _status(info: dict[str, Any]) -> tuple[str, str]:
    """Our word for the state of a Ray job, and for a failed one the last line that it wrote."""
    status = STATUS.get(info["status"], "running")
    lines = [line.strip() for line in (info.get("message") or "").splitlines() if line.strip()]
    return status, lines[-1].removeprefix("hone: ") if status == "failed" and lines else ""


def _kind(is_search: bool) -> str:
    return "tune" if is_search else "train"
