"""Hyperparameter search: Ray Tune with ASHA, each trial a whole training run through the same path, the best one published."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from hone.errors import RecipeError, RunFailedError
from hone.recipe import Choice, Distribution, GridSearch, LogUniform, RandInt, Recipe, Uniform
from hone.storage import Home
from training.job import Job
from training.launch import final_metrics, prepare_job
from training.progress import DataProgress, RunProgress
from training.trials import labels, read_trials, run_trials

NO_LIMIT = 10**6
"""ASHA would stop a trial at its `max_t` before it has saved anything; a trial ends by its own number of steps."""


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
        job = prepare_job(recipe, home=home, run_id=run_id, watch=watch)
    folder, settled = job.folder, job.recipe  # all trials with one choice for `auto`, or they could not be compared
    from ray.tune.schedulers import ASHAScheduler

    with RunProgress(lambda: labels(folder), console=console):
        run_trials(
            settled,
            {key: _domain(distribution) for key, distribution in settings.space.items()},
            home=home,
            run_id=run_id,
            folder=folder,
            max_concurrent=settings.max_concurrent_trials,
            num_samples=settings.num_samples,
            metric=settings.metric,
            mode=settings.mode,
            scheduler=ASHAScheduler(
                max_t=NO_LIMIT, grace_period=settings.scheduler.grace_period, reduction_factor=settings.scheduler.reduction_factor
            ),
        )
    trials = read_trials(folder)
    finished = {path: trial for path, trial in trials.items() if trial.finished}
    if not finished:
        raise RunFailedError(f"none of {len(trials)} trials finished; their reasons are in {folder}/trials/*/failure.json")
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
