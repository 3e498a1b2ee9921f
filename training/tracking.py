"""A run told to Weights & Biases and MLflow as it happens, by the driver, from the file that the workers write.

Not by a worker: the driver has the user's keys, and a server that is slow or gone is felt there by nobody. What a tracker raises is told in
the run's events, and the training goes on without it. TensorBoard's files are written by rank 0 (`training/metrics.py`), always.
"""

import importlib.util
import json
import netrc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from hone.errors import ResourceError
from hone.recipe import Recipe
from hone.run_folder import METRICS_FILE, LinesFollower, tell
from hone.storage import write_json
from training.job import Job

TRACKED_FOLDER = "tracked"
"""In the run folder: up to which step each tracker has been told."""
POLL_S = 1.0
FINISH_S = 60.0
"""How long a tracker may take to end, once the training has."""
MODULES = {"wandb": "wandb", "mlflow": "mlflow"}
"""Extra of ours -> what it brings along."""
WANDB_HOST = "api.wandb.ai"


class Tracker(Protocol):
    """One service, for one run."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """All that was measured at a step."""

    def end(self, *, failed: bool) -> None:
        """The training has ended; a resumed one begins the same run again."""


def check_trackers(recipe: Recipe) -> None:
    """Whether all that the recipe names can be told.

    Raises:
        ResourceError: a package or a key is not there.
    """
    for name in recipe.track.to:
        if importlib.util.find_spec(MODULES[name]) is None:
            raise ResourceError(f"track.to {name}: its package is not installed; `pip install 'hone[{name}]'` where this command runs")
    if "wandb" in recipe.track.to and not _wandb_has_key():
        raise ResourceError("track.to wandb: there is no key; run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline")


class Tracking:
    """Tells a run's trackers, from a thread of its own, while the block lasts."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._begin: dict[str, Callable[[Job], Tracker]] = {name: BEGIN[name] for name in job.recipe.track.to}
        self._over, self._failed = threading.Event(), False
        self._threads: dict[str, threading.Thread] = {}

    def __enter__(self) -> "Tracking":
        if self._begin:
            (self._job.folder / TRACKED_FOLDER).mkdir(exist_ok=True)
        for name in self._begin:  # one each, so that a slow one holds up no other
            self._threads[name] = threading.Thread(target=self._follow, args=(name,), name=f"track-{name}", daemon=True)
            self._threads[name].start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._failed = kind is not None
        self._over.set()
        for name, thread in self._threads.items():
            thread.join(timeout=FINISH_S)
            if thread.is_alive():
                tell(self._job.folder, "tracking_failed", tracker=name, why=f"it did not end within {FINISH_S:.0f} s")

    def _follow(self, name: str) -> None:
        try:
            tracker = self._begin[name](self._job)
            lines = _Steps(self._job.folder, after=_told(self._job.folder, name))
            while not (over := self._over.wait(POLL_S)):
                self._tell(name, tracker, lines.whole())
            self._tell(name, tracker, lines.whole(with_last=over and not self._failed))
            tracker.end(failed=self._failed)
        except Exception as error:  # whatever a library raises: it is not the training's
            said = (str(error).splitlines() or [""])[0]
            tell(self._job.folder, "tracking_failed", tracker=name, why=f"{type(error).__name__}: {said}")

    def _tell(self, name: str, tracker: Tracker, steps: dict[int, dict[str, float]]) -> None:
        for step, values in steps.items():
            tracker.log(step, values)
        if steps:
            write_json(_told_file(self._job.folder, name), {"step": max(steps)})


class _Steps:
    """What was measured, a step at a time and each once: a restarted run writes some of its lines again."""

    def __init__(self, folder: Path, *, after: int) -> None:
        self._lines, self._after = LinesFollower(folder / METRICS_FILE), after
        self._held: dict[int, dict[str, float]] = {}

    def whole(self, *, with_last: bool = False) -> dict[int, dict[str, float]]:
        """Steps that are over since the last call, with what was measured at each; the last one may not be over yet."""
        for line in self._lines.new_lines()[0]:
            values = {name: float(value) for name, value in line.items() if isinstance(value, int | float) and name != "step"}
            if line["step"] > self._after:
                self._held[line["step"]] = {**self._held.get(line["step"], {}), **values}
        last = max(self._held, default=0)
        made = {step: self._held.pop(step) for step in sorted(self._held) if step < last or with_last}
        self._after = max(made, default=self._after)
        return made


class WandbRun:
    """A run of Weights & Biases, whose id is the run's name; WANDB_MODE, WANDB_ENTITY and the others of its own variables hold."""

    def __init__(self, job: Job) -> None:
        import wandb

        settings = wandb.Settings(silent=True, console="off")
        self._run = wandb.init(
            project=job.recipe.track.project,
            id=_plain_id(job),
            name=job.run_id,
            group=job.run_id.split("/")[0] if "/" in job.run_id else None,
            config=job.recipe.model_dump(mode="json"),
            dir=str(job.folder),
            resume="allow",
            settings=settings,
        )
        # By a metric of our own: of its own steps it takes none that is not above the last, and a resumed run goes back a little.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({**values, "step": step})

    def end(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MlflowRun:
    """A run of MLflow, found again by its tag `hone.run_id`; MLFLOW_TRACKING_URI says where, by default as MLflow does."""

    def __init__(self, job: Job) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(job.recipe.track.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(job.recipe.track.project)
        known = self._client.search_runs([number], filter_string=f"tags.`hone.run_id` = '{job.run_id}'", max_results=1)
        if known:
            self._id: str = known[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"hone.run_id": job.run_id, "hone.base": str(job.base_id), "hone.data": job.data.digest}
        self._id = self._client.create_run(number, run_name=job.run_id, tags=tags).info.run_id
        for key, value in _flat(job.recipe.model_dump(mode="json")).items():
            self._client.log_param(self._id, key, str(value)[:500])

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def end(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


BEGIN: dict[str, Callable[[Job], Tracker]] = {"wandb": WandbRun, "mlflow": MlflowRun}


def _plain_id(job: Job) -> str:
    """Theirs may hold no slash, and a trial's name does."""
    return job.run_id.replace("/", "-")


def _told(folder: Path, name: str) -> int:
    path = _told_file(folder, name)
    return int(json.loads(path.read_bytes())["step"]) if path.exists() else -1


def _told_file(folder: Path, name: str) -> Path:
    return folder / TRACKED_FOLDER / f"{name}.json"


def _flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in tree.items():
        made |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value} if value is not None else {}
    return made


def _wandb_has_key() -> bool:
    """Asked before launch: without a key it would ask for one, in the middle of a run."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return True
    try:
        found = netrc.netrc(os.environ.get("NETRC"))
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
    host = os.environ.get("WANDB_BASE_URL", WANDB_HOST).removeprefix("https://").removeprefix("http://").split("/")[0].split(":")[0]
    return found.authenticators(host) is not None
