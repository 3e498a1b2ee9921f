"""A run that ended too early, made ready to go on: by what it was prepared as, on what the cluster has now."""

from collections.abc import Sequence

from hone.base_model import find_base_model
from hone.errors import RecipeError, RunFailedError
from hone.folder import Folder
from hone.recipe import Recipe, parse_override, with_overrides
from hone.run_folder import FAILURE_FILE, RESULT_FILE, driver_of, find_run_folder, tell
from hone.storage import Home
from training.data import prepare_data
from training.job import Job
from training.model import check_model
from training.resources import plan_workers
from training.token_cache import Watch, unwatched
from training.tracking import check_trackers

MAY_CHANGE = ("scaling", "checkpoints", "publish", "track")
"""Sections of a recipe that say nothing of what is learnt."""


def resume_job(run_id: str, overrides: Sequence[str], *, home: Home, watch: Watch = unwatched) -> Job:
    """A run as it was prepared, to go on with on what the cluster has now.

    Args:
        run_id: Which.
        overrides: `KEY=VALUE` of what does not change what is learnt: scaling, checkpoints, publish and track.
        home: Where runs are.
        watch: Told how far the data is, where it has to be prepared again.

    Raises:
        HoneError: there is no such run.
        RunFailedError: it is done, or its base or data are no longer what they were.
        RecipeError: another key.
    """
    folder = find_run_folder(home, run_id)
    if (folder / RESULT_FILE).exists():
        raise RunFailedError(f"{run_id} is done; its result is in {folder / RESULT_FILE}")
    driver = driver_of(folder)
    if driver and driver.is_alive:
        raise RunFailedError(f"{run_id} is still run by process {driver.pid}; `hone runs stop {run_id}` ends it")
    job = Job.load(folder)
    recipe = _changed(job.recipe, overrides)
    check_trackers(recipe)
    if recipe.checkpoints.uri:
        Folder(recipe.checkpoints.uri).check_writable("checkpoints.uri")
    base = find_base_model(recipe.base, home=home, revision=recipe.revision)
    data = prepare_data(recipe, base, home=home, watch=watch)
    for what, before, now in (("base", job.base_id, base.id), ("data", job.data.digest, data.digest)):
        if before != now:
            raise RunFailedError(f"{run_id}: its {what} has changed since it began ({before} then, {now} now); start a new run")
    check_model(recipe, base, head=job.head)
    use_gpu, each = plan_workers(recipe)
    resumed = job.model_copy(update={"recipe": recipe, "data": data, "use_gpu": use_gpu, "resources_per_worker": each})
    resumed.save()
    (folder / FAILURE_FILE).unlink(missing_ok=True)
    tell(folder, "resumed", overrides=list(overrides))
    return resumed


def _changed(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    values = dict(map(parse_override, overrides))
    for key in values:
        if key.split(".")[0] not in MAY_CHANGE:
            raise RecipeError(f"{key}: a run goes on with the recipe that it began with, all but {', '.join(MAY_CHANGE)}; start a new run")
    return with_overrides(recipe, values)
