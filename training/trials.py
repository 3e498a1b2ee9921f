"""Several runs of one recipe side by side, as many at a time as the cluster holds: each the driver of an ordinary training run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from hone.recipe import Recipe, parse_recipe, with_overrides
from hone.storage import Home, write_text
from training.launch import fit, prepare_job
from training.resources import plan_workers

TRIAL_FILE = "trial.json"
DRIVER_RESOURCES = {"CPU": 0, "memory": 256 * 2**20}
"""What a trial's driver takes. Not a CPU: drivers would hold the very CPUs that their own workers wait for, for ever."""


class Trial(BaseModel):
    """One trial, as its folder keeps it."""

    id: str
    values: dict[str, Any]
    finished: bool = False

    @property
    def label(self) -> str:
        values = " ".join(f"{key.rsplit('.', 1)[-1]}={_short(value)}" for key, value in self.values.items())
        return f"trial {self.id.rsplit('_', 1)[-1]} {values}"


def run_trials(
    recipe: Recipe,
    space: Mapping[str, Any],
    *,
    home: Home,
    run_id: str,
    folder: Path,
    max_concurrent: int | None = None,
    num_samples: int = 1,
    **settings: Any,
) -> None:
    """Run the recipe with values drawn from `space` (recipe key -> a domain of Ray Tune), each trial in a folder of its own.

    Args:
        recipe: What all of them have in common.
        space: What they differ in.
        home: Where runs and the registry are.
        run_id: The run that they are part of.
        folder: Its folder; trials are in `trials/` below it.
        max_concurrent: By default as many as the cluster holds.
        num_samples: How often to draw from the whole space.
        settings: More of `ray.tune.TuneConfig`.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C is ours to handle
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a checkpoint between two validations has no metric to report
    from ray import tune
    from ray.tune.search import BasicVariantGenerator

    (folder / "trials").mkdir(exist_ok=True)
    plain = recipe.model_copy(update={"search": None}).model_dump(mode="json")
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_run_trial, recipe=plain, home=str(home.root), run_id=run_id), DRIVER_RESOURCES),
        param_space=dict(space),
        tune_config=tune.TuneConfig(
            num_samples=num_samples,
            search_alg=BasicVariantGenerator(random_state=recipe.train.seed, max_concurrent=max_concurrent or _trials_that_fit(recipe)),
            **settings,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
    )
    tuner.fit()


def read_trials(folder: Path) -> dict[Path, Trial]:
    """Folder of each trial of a run -> what it was."""
    return {path.parent: Trial.model_validate_json(path.read_bytes()) for path in sorted(folder.glob(f"trials/*/{TRIAL_FILE}"))}


def labels(folder: Path) -> dict[Path, str]:
    """Folder of each trial -> how to call it."""
    return {path: trial.label for path, trial in read_trials(folder).items()}


def _run_trial(values: dict[str, Any], *, recipe: dict[str, Any], home: str, run_id: str) -> None:
    """What Ray Tune runs for one trial."""
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

    _, each = plan_workers(recipe)
    have = ray.cluster_resources()
    return max(1, min(int(have[name] // (amount * recipe.scaling.fewest)) for name, amount in each.items() if amount))


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)
