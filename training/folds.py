"""k-fold cross-validation: every row validates once, the folds side by side as the cluster has room; then one training on everything."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from hone.errors import RecipeError, RunFailedError
from hone.recipe import Recipe, with_overrides
from hone.storage import Home, write_text
from training.job import Job
from training.launch import final_metrics, prepare_job
from training.metrics import read_metrics
from training.progress import DataProgress, RunProgress
from training.trials import labels, read_trials, run_trials

FOLDS_FILE = "folds.json"
CONFIDENCE = 0.95


class Spread(BaseModel):
    """A metric over the folds."""

    mean: float
    deviation: float
    """Standard deviation of the folds."""
    low: float
    """Of the 95% confidence interval of the mean, by Student's t over the folds."""
    high: float
    values: list[float]


class Folds(BaseModel):
    """What cross-validation came to."""

    k: int
    metrics: dict[str, Spread]
    pooled: dict[str, Any] = {}
    """The metrics of the task on the predictions of all folds together, each row by the fold that had not seen it."""
    steps: int
    """Steps that the training on everything takes."""


@dataclass(frozen=True)
class CrossValidated:
    """The folds, and the recipe that trains on everything."""

    folds: Folds
    recipe: Recipe


def cross_validate(recipe: Recipe, k: int, *, home: Home, run_id: str, console: Console) -> CrossValidated:
    """Train k times, each time without one fold.

    Raises:
        RecipeError: the recipe names validation rows of its own. DataError: too few rows, or a class that a fold would never see.
        RunFailedError: a fold did not finish.
    """
    if recipe.data.validation is not None:
        raise RecipeError("--folds validates on the training rows themselves, and data.validation names others; leave one of them out")
    folder = home.runs / run_id
    with DataProgress(console=console) as watch:
        for fold in range(k):  # all of them are checked before the first one starts, on tokens that are made once
            chosen = with_overrides(recipe, {"data.folds": k, "data.fold": fold})
            prepare_job(chosen, home=home, run_id=run_id, folder=folder / "prepared" / str(fold), watch=watch)
    from ray import tune

    with RunProgress(lambda: labels(folder), console=console):
        space = {"data.fold": tune.grid_search(list(range(k)))}
        run_trials(with_overrides(recipe, {"data.folds": k}), space, home=home, run_id=run_id, folder=folder)
    trials = read_trials(folder)
    done = sorted((path for path, trial in trials.items() if trial.finished), key=lambda path: trials[path].values["data.fold"])
    if len(done) < k:
        raise RunFailedError(f"{k - len(done)} of {k} folds did not finish; their reasons are in {folder}/trials/*/failure.json")
    steps = _steps_on_everything(recipe, done, k)
    folds = Folds(k=k, metrics=_spreads([final_metrics(path) for path in done]), pooled=_pooled(done), steps=steps)
    write_text(folder / FOLDS_FILE, folds.model_dump_json(indent=2) + "\n")
    return CrossValidated(folds, _on_everything(recipe, steps))


def say(folds: Folds, console: Console) -> None:
    """The metrics, a line each."""
    for name, spread in folds.metrics.items():
        console.print(
            f"{folds.k} folds: {name} {spread.mean:.4f} (95% from {spread.low:.4f} to {spread.high:.4f}, deviation {spread.deviation:.4f})",
            highlight=False,
        )


def _on_everything(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with nothing held out, for as many steps as the folds showed to be best."""
    chosen = {"data.folds": None, "data.fold": 0, "data.validation_fraction": 0.0, "guard.early_stopping_patience": None}
    return with_overrides(recipe, {**chosen, **({"train.max_steps": steps} if recipe.guard.early_stopping_patience else {})})


def _steps_on_everything(recipe: Recipe, folders: list[Path], k: int) -> int:
    """The folds' median of the step that was best, more by as much as there are more rows."""
    lines = [read_metrics(folder) for folder in folders]
    if recipe.guard.early_stopping_patience:
        last = [next(line["published_step"] for line in reversed(each) if "published_step" in line) for each in lines]
    else:
        last = [max(line["step"] for line in each) for each in lines]
    return max(1, round(float(statistics.median(last)) * k / (k - 1)))


def _spreads(metrics: list[dict[str, float]]) -> dict[str, Spread]:
    names = [name for name in metrics[0] if name.startswith(("eval_", "retain_"))]
    return {name: _spread([each[name] for each in metrics]) for name in names}


def _spread(values: list[float]) -> Spread:
    from scipy.stats import t

    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    reach = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * deviation / math.sqrt(len(values))
    return Spread(mean=mean, deviation=deviation, low=mean - reach, high=mean + reach, values=values)


def _pooled(folders: list[Path]) -> dict[str, Any]:
    """Filled in by the evaluation of each fold's validation rows."""
    return {"rows": sum(Job.load(folder).data.validation_rows for folder in folders)}
