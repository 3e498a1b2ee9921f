"""From trained weights to a published adapter: reload them in a clean process, compare, write the card, hand over to the registry."""

import shutil
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import hone
from hone.errors import GateError, RunFailedError
from hone.manifest import CARD_FILE, RECIPE_FILE, AdapterManifest, FileEntry, Lineage
from hone.methods import how_served
from hone.promotion import promote
from hone.registry import Registry
from hone.run_folder import tell
from hone.storage import Home, write_text
from models.tasks import TASKS
from training.card import card
from training.evaluation.places import NOT_EVALUATED, PLOTS, PROGRESS_FILE, REPORTED
from training.evaluation.watch import Watch, WatchFile, unwatched
from training.job import Job
from training.model import choose_dtype

METRICS_KEPT = ("loss", "eval_", "base_eval_", "retain_", "base_retain_", "published_step")
LOOK_EVERY_S = 0.5


def check_export(job: Job, *, watch: Watch = unwatched) -> str:
    """Reload the export where a worker would run, in a process of its own, compare it with the golden outputs, and evaluate it.

    Args:
        job: A finished run.
        watch: Told how far the evaluation is.

    Returns:
        Why there is no report, if there is none.

    Raises:
        RunFailedError: the saved weights do not answer as the trained ones did; nothing is published.
    """
    import ray

    each = job.resources_per_worker
    reload = ray.remote(num_cpus=each.get("CPU", 0), num_gpus=each.get("GPU", 0), max_retries=1)(_reload_in_clean_process)
    reloading, progress = reload.remote(str(job.folder)), WatchFile(job.folder / PROGRESS_FILE)
    while not ray.wait([reloading], timeout=LOOK_EVERY_S)[0]:
        if seen := progress.read():
            watch(*seen)
    code, said = ray.get(reloading)
    if code == NOT_EVALUATED:
        return f"{job.folder}: no report could be made: {said}"
    if code:
        raise RunFailedError(f"{job.export_folder}: the saved weights do not answer as the trained ones did: {said}")
    return ""


def publish(
    job: Job, metrics: dict[str, float], *, home: Home, trial: dict[str, Any] | None = None, folds: dict[str, Any] | None = None
) -> AdapterManifest:
    """Put the checked export into the registry as the next version of the recipe's name.

    Args:
        job: A finished run.
        metrics: Its last metrics.
        home: Where the registry is.
        trial: The search trial that made it, for the lineage.
        folds: What cross-validation came to, likewise.
    """
    recipe, folder = job.recipe, job.export_folder
    TASKS[recipe.task].load_processor(job.base_folder).save_pretrained(folder)
    write_text(folder / RECIPE_FILE, recipe.model_dump_json(indent=2) + "\n")
    kept = {name: value for name, value in metrics.items() if name.startswith(METRICS_KEPT)}
    created = datetime.now(UTC).isoformat(timespec="seconds")

    served = how_served(recipe.task, recipe.method.type, use_dora=getattr(recipe.method, "use_dora", False))

    def describe(version: int, files: dict[str, FileEntry]) -> AdapterManifest:
        return AdapterManifest(
            name=recipe.name,
            version=version,
            kind="full" if served == "whole" else "adapter",
            method=recipe.method.type,
            served=served,
            task=recipe.task,
            base=job.base_id,
            dtype=str(choose_dtype(recipe, use_gpu=job.use_gpu)).removeprefix("torch."),
            labels=job.data.labels,
            problem_type=job.data.problem_type,
            metrics=kept,
            lineage=Lineage(run_id=job.run_id, data_digest=job.data.digest, hone_version=hone.__version__, trial=trial, folds=folds),
            created_at=created,
            files=files,
        )

    reported = [job.folder / name for name in REPORTED if (job.folder / name).exists()]
    for path in [*reported, *sorted(job.folder.glob(PLOTS))]:
        shutil.copyfile(path, folder / path.name)
    write_text(folder / CARD_FILE, card(job, kept, created=created, trial=trial, folds=folds))
    return Registry(home).publish(folder, recipe.name, describe=describe)


def move_alias(job: Job, manifest: AdapterManifest, *, home: Home) -> str:
    """Move the recipe's alias, if it names one, to what was published; why not, if its gate does not let it."""
    alias = job.recipe.publish.alias
    if alias is None:
        return ""
    try:
        promote(Registry(home), alias, str(manifest.ref), by=f"run {job.run_id}", why="published")
    except GateError as error:
        tell(job.folder, "gate_refused", alias=alias, adapter=str(manifest.ref), why=error.message)
        return error.message
    return ""


def _reload_in_clean_process(folder: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", "training.check", folder], capture_output=True, text=True, check=False)
    said = (done.stdout if done.stdout.strip() else done.stderr).strip().splitlines()
    return done.returncode, said[-1] if said else f"exit code {done.returncode}"
