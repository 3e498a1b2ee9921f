"""Hyperparameter search: Ray Tune with ASHA, each trial a whole training run through the same path, the best one published."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from hone.errors import RecipeError, RunFailedError
from hone.recipe import Choice, Distribution, GridSearch, LogUniform, RandInt, Recipe, SearchSettings, Uniform, parse_recipe, with_overrides
from hone.storage import Home, write_text
from training.job import Job
from training.launch import final_metrics, fit, prepare_job
from training.progress import DataProgress, RunProgress

TRIAL_FILE = "trial.json"
DRIVER_RESOURCES = {"CPU": 0, "memory": 256 * 2**20}
"""What a trial's driver takes. Not a CPU: drivers would hold the very CPUs that their own workers wait for, for ever."""
NO_LIMIT = 10**6
"""ASHA would stop a trial at its `max_t` before it has saved anything; a trial ends by its own number of steps."""


class Trial(BaseModel):
    """One trial, as its folder keeps it."""

    id: str
    values: dict[str, Any]
    finished: bool = False

    @property
    def label(self) -> str:
        values = " ".join(f"{key.rsplit('.', 1)[-1]}={_short(value)}" for key, value in self.values.items())
        return f"trial {self.id.rsplit('_', 1)[-1]} {values}"


@dataclass(frozen=True)
class SearchResult:
    """The best trial of a search."""

    job: Job
    metrics: dict[str, float]
    lineage: dict[str, Any]


def search(recipe: Recipe, *, home: Home, run_id: str, console: Console) -> SearchResult:
    """Run the recipe's trials and find the best that finished.

    Raises:
        RecipeError: no `search:` in the recipe. RunFailedError: no trial finished.
    """
    settings = recipe.search
    if settings is None:
        raise RecipeError("this recipe has no search: section, so there is nothing to try; add search.space")
    # Prepared once here: bad data or settings end the search before it starts, and every trial finds the tokens in the cache.
    with DataProgress(console=console) as watch:
        folder = prepare_job(recipe, home=home, run_id=run_id, watch=watch).folder
    trials_folder = folder / "trials"
    trials_folder.mkdir()
    with RunProgress(lambda: _labels(trials_folder), console=console):
        _run_trials(recipe, settings, home=home, run_id=run_id, folder=folder)
    trials = _read_trials(trials_folder)
    finished = {path: trial for path, trial in trials.items() if trial.finished}
    if not finished:
        raise RunFailedError(f"none of {len(trials)} trials finished; their reasons are in {trials_folder}/*/failure.json")
    metrics = {path: final_metrics(path) for path in finished}
    best = (min if settings.mode == "min" else max)(finished, key=lambda path: metrics[path][settings.metric])
    lineage = {
        "id": finished[best].id,
        "values": finished[best].values,
        "of": len(trials),
        "metric": settings.metric,
        "search_run_id": run_id,
    }
    return SearchResult(Job.load(best), metrics[best], lineage)


def _run_trials(recipe: Recipe, settings: SearchSettings, *, home: Home, run_id: str, folder: Path) -> None:
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C is ours to handle
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search import BasicVariantGenerator

    plain = recipe.model_copy(update={"search": None}).model_dump(mode="json")
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_run_trial, recipe=plain, home=str(home.root), run_id=run_id), DRIVER_RESOURCES),
        param_space={key: _domain(distribution) for key, distribution in settings.space.items()},
        tune_config=tune.TuneConfig(
            metric=settings.metric,
            mode=settings.mode,
            num_samples=settings.num_samples,
            search_alg=BasicVariantGenerator(
                random_state=recipe.train.seed, max_concurrent=settings.max_concurrent_trials or _trials_that_fit(recipe)
            ),
            scheduler=ASHAScheduler(
                max_t=NO_LIMIT, grace_period=settings.scheduler.grace_period, reduction_factor=settings.scheduler.reduction_factor
            ),
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
    )
    tuner.fit()


def _run_trial(values: dict[str, Any], *, recipe: dict[str, Any], home: str, run_id: str) -> None:
    """What Ray Tune runs for one trial: the driver of an ordinary training run."""
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    trial = Trial(id=tune.get_context().get_trial_id(), values=values)
    chosen = with_overrides(parse_recipe(recipe, where="trial"), values)
    folder = Home(home).runs / run_id / "trials" / trial.id
    job = prepare_job(chosen, home=Home(home), run_id=f"{run_id}/{trial.id}", folder=folder)
    write_text(folder / TRIAL_FILE, trial.model_dump_json())
    fit(job, callbacks=[TuneReportCallback()])
    write_text(folder / TRIAL_FILE, trial.model_copy(update={"finished": True}).model_dump_json())


def _trials_that_fit(recipe: Recipe) -> int:
    import ray

    from training.resources import plan_workers

    _, each = plan_workers(recipe)
    have = ray.cluster_resources()
    return max(1, min(int(have[name] // (amount * recipe.scaling.num_workers)) for name, amount in each.items() if amount))


def _domain(distribution: Distribution) -> Any:
    from ray import tune

    match distribution:
        case LogUniform(lower=lower, upper=upper):
            return tune.loguniform(lower, upper)
        case Uniform(lower=lower, upper=upper):
            return tune.uniform(lower, upper)
        case RandInt(lower=first, upper=end):
            return tune.randint(first, end)
        case Choice(categories=categories):
            return tune.choice(categories)
        case GridSearch(values=values):
            return tune.grid_search(values)


def _read_trials(folder: Path) -> dict[Path, Trial]:
    return {path.parent: Trial.model_validate_json(path.read_bytes()) for path in sorted(folder.glob(f"*/{TRIAL_FILE}"))}


def _labels(folder: Path) -> dict[Path, str]:
    return {path: trial.label for path, trial in _read_trials(folder).items()}


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)
