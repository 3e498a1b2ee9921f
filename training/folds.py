"""k-fold cross-validation: every row validates once, the folds side by side as the cluster has room; then one training on everything."""

import math
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel
from rich.console import Console

from hone.errors import RecipeError, RunFailedError
from hone.metrics import metrics_of
from hone.recipe import Recipe, with_overrides
from hone.run_folder import read_metrics
from hone.storage import Home, write_text
from training.evaluation.bootstrap import Bootstrap
from training.evaluation.evaluate import estimated
from training.evaluation.metrics import measures
from training.evaluation.places import PREDICTIONS_FILE
from training.evaluation.result import Metric
from training.evaluation.table import read_predictions
from training.job import Job
from training.launch import final_metrics, prepare_job
from training.progress import DataProgress, RunProgress
from training.publish import check_export
from training.trials import labels, read_trials, run_trials

FOLDS_FILE = "folds.json"
CONFIDENCE = 0.95
NOT_POOLED = {"chosen_likelier"}
"""What the tables of predictions do not hold enough for."""


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
    pooled: list[Metric] = []
    """The metrics of the task on the predictions of all folds together, each row by the model that had not seen it, with 95% intervals
    over resamples of the rows."""
    pooled_rows: int = 0
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
            job = prepare_job(chosen, home=home, run_id=run_id, folder=folder / "prepared" / str(fold), watch=watch)
            # One choice for `auto`: folds that train alike, and the training on everything likewise.
            recipe = with_overrides(
                recipe, {"zero.stage": job.recipe.zero.stage, "train.micro_batch_size": job.recipe.train.micro_batch_size}
            )
    from ray import tune

    with RunProgress(lambda: labels(folder), console=console):
        space = {"data.fold": tune.grid_search(list(range(k)))}
        run_trials(with_overrides(recipe, {"data.folds": k}), space, home=home, run_id=run_id, folder=folder)
    trials = read_trials(folder)
    done = sorted((path for path, trial in trials.items() if trial.finished), key=lambda path: trials[path].values["data.fold"])
    if len(done) < k:
        raise RunFailedError(f"{k - len(done)} of {k} folds did not finish; their reasons are in {folder}/trials/*/failure.json")
    steps = _steps_on_everything(recipe, done, k)
    console.print(f"{k} folds trained; evaluating each on the rows that it has not seen", highlight=False)
    pooled, rows = _pooled(done, seed=recipe.train.seed)
    folds = Folds(k=k, metrics=_spreads([final_metrics(path) for path in done]), pooled=pooled, pooled_rows=rows, steps=steps)
    write_text(folder / FOLDS_FILE, folds.model_dump_json(indent=2) + "\n")
    return CrossValidated(folds, _on_everything(recipe, steps))


def say(folds: Folds, console: Console) -> None:
    """The metrics, a line each."""
    for name, spread in folds.metrics.items():
        console.print(
            f"{folds.k} folds: {name} {spread.mean:.4f} (95% from {spread.low:.4f} to {spread.high:.4f}, deviation {spread.deviation:.4f})",
            highlight=False,
        )
    for metric in folds.pooled:
        value = metric.tuned
        console.print(
            f"all {folds.pooled_rows:,} rows, each by the fold that had not seen it: {metric.name} {value.value:.4f} "
            f"(95% from {value.low:.4f} to {value.high:.4f})",
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


def _pooled(folders: list[Path], *, seed: int) -> tuple[list[Metric], int]:
    """The metrics of all folds' predictions together, and how many rows those are.

    Raises:
        RunFailedError: a fold's weights could not be evaluated.
    """
    jobs = [Job.load(folder) for folder in folders]
    with ThreadPoolExecutor(len(jobs)) as pool:  # each waits for a task of Ray's
        notes = [note for note in pool.map(check_export, jobs) if note]
    if notes:
        raise RunFailedError(f"a fold could not be evaluated: {notes[0]}")
    predicted = read_predictions([folder / PREDICTIONS_FILE for folder in folders])
    names = [name for name in metrics_of(jobs[0].recipe.task, jobs[0].data.problem_type) if name not in NOT_POOLED]
    return estimated(measures(predicted, names), {}, Bootstrap(len(predicted), seed=seed)), len(predicted)
