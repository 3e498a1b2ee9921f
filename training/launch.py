"""From a recipe to trained weights: prepare and check everything here, then run the loop on Ray Train's workers."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hone.base_model import BaseModel, find_base_model
from hone.errors import DataError, HoneError, RunFailedError
from hone.folder import Folder
from hone.recipe import Recipe, with_overrides
from hone.run_folder import FAILURE_FILE, PLAN_FILE, attempts, read_events, read_metrics, tell
from hone.storage import Home, write_text
from training.data import prepare_data
from training.environment import write_environment
from training.failures import UnevenWorkersError, WorkersOutOfMemoryError, raise_recorded_failure, record_failure
from training.guard import check_guard
from training.job import Job, PreparedData
from training.ledger import SupersededError
from training.metrics import write_table
from training.rank_log import logged
from training.resources import Resources, plan_workers, scaling_config
from training.token_cache import Watch, unwatched
from training.tracking import Tracking, check_trackers

if TYPE_CHECKING:
    from training.plan.plan import Plan

MEASURED = {"eval_loss", "retain_loss"}


def prepare_job(
    recipe: Recipe,
    *,
    home: Home,
    run_id: str,
    folder: Path | None = None,
    watch: Watch = unwatched,
    plan: Callable[[Recipe], tuple[bool, Resources]] = plan_workers,
) -> Job:
    """Check base, data, method and resources, tokenise, and write the run folder. Nothing is written where something is wrong.

    Args:
        recipe: What to run.
        home: Where runs and prepared data are.
        run_id: Name of the run.
        folder: Of the run, where it is a part of another; by default its own.
        watch: Told how far the data is.
        plan: What workers get, by default of the cluster; `without_cluster` for a run without Ray.

    Raises:
        HoneError: whatever the user has to mend, in one line.
    """
    from models.tasks import Head
    from training.model import check_model

    home.ready()
    check_trackers(recipe)
    if recipe.checkpoints.uri:
        Folder(recipe.checkpoints.uri).check_writable("checkpoints.uri")
    base = find_base_model(recipe.base, home=home, revision=recipe.revision)
    data = prepare_data(recipe, base, home=home, watch=watch)
    if recipe.search and recipe.search.metric.startswith("eval_") and not data.validation_rows:
        raise DataError("search.metric is measured on validation rows, and there are none; set data.validation or data.validation_fraction")
    check_model(recipe, base, head=Head(data.labels, data.problem_type))
    check_guard(recipe, data)
    use_gpu, each = plan(recipe)
    recipe, planned, why_not = _planned(recipe, base, data, use_gpu=use_gpu)
    (home.runs / run_id).mkdir(parents=True, exist_ok=folder is not None)
    folder = folder or home.runs / run_id
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(
        run_id=run_id,
        folder=folder,
        recipe=recipe,
        base_folder=base.folder,
        base_id=base.id,
        data=data,
        use_gpu=use_gpu,
        resources_per_worker=each,
    )
    job.save()
    write_environment(folder)
    tell(folder, "prepared", rows=data.train_rows)
    if planned:
        write_text(folder / PLAN_FILE, planned.model_dump_json(indent=1) + "\n")
        tell(folder, "planned", advice=planned.advice)
    else:
        tell(folder, "not_planned", why=why_not)
    return job


def _planned(recipe: Recipe, base: BaseModel, data: PreparedData, *, use_gpu: bool) -> tuple[Recipe, "Plan | None", str]:
    """What the recipe takes on the cluster, or on this machine where there is none; the recipe with numbers for `auto`; why there is none.

    Raises:
        ResourceError: the recipe leaves something open, and nothing fits.
    """
    import ray

    from training.plan.hardware import load_hardware, load_prices
    from training.plan.machines import ray_cluster, this_machine
    from training.plan.plan import make_plan, settle

    hardware = load_hardware()
    try:
        cluster = ray_cluster(recipe, hardware, use_gpu=use_gpu) if ray.is_initialized() else this_machine(recipe, hardware)
        made = make_plan(recipe, base, data, cluster=cluster, hardware=hardware, prices=load_prices())
    except Exception as error:
        if recipe.is_open:
            raise
        # An unknown GPU, or a model that cannot be traced: the run needs neither.
        return recipe, None, str(error).splitlines()[0] if str(error) else type(error).__name__
    return settle(recipe, made), made, ""


def fit(job: Job, *, callbacks: Sequence[Any] = ()) -> dict[str, float]:
    """Run the job on Ray Train workers; its last metrics, those before the first step as `base_eval_...`.

    Where a pass does not fit into memory, the run goes on with portions half as large; the global batch stays. Where an elastic cluster
    gave as many workers as cannot share sequences evenly, it goes on with as many of them as can.

    Raises:
        RunFailedError: the workers stopped for a reason that a restart cannot mend, or failed more often than the recipe allows.
    """
    with Tracking(job):
        while True:
            try:
                _run_workers(job, callbacks)
                return final_metrics(job.folder)
            except WorkersOutOfMemoryError as error:
                job = _with_smaller_portions(job, error)
            except UnevenWorkersError:
                job = _with_even_workers(job)
            finally:
                write_table(job.folder)


def _run_workers(job: Job, callbacks: Sequence[Any]) -> None:
    scaling = job.recipe.scaling
    # `ray.train.report` blocks for one interval a call; the default of 2 s is felt at every validation.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2" if scaling.most <= 8 else "1")
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"folder": str(job.folder)},
        torch_config=TorchConfig(backend="nccl" if job.use_gpu else "gloo"),
        scaling_config=scaling_config(scaling, job.resources_per_worker, use_gpu=job.use_gpu),
        run_config=ray.train.RunConfig(
            name=f"ray-{len(attempts(job.folder)) + 1}",  # under a name that it knows, Ray would go on by what it remembers itself
            storage_path=str(job.folder),
            failure_config=ray.train.FailureConfig(max_failures=scaling.max_failures),
            callbacks=list(callbacks),
        ),
    )
    tell(job.folder, "launching", workers=scaling.workers)
    try:
        with _interrupts_raised():
            trainer.fit()
    except TrainingFailedError as error:
        raise_recorded_failure(job.folder)
        raise RunFailedError(
            f"the workers failed more often than scaling.max_failures {scaling.max_failures} allows; the last said: {_last_line(error)}"
        ) from error
    raise_recorded_failure(job.folder)


def _with_smaller_portions(job: Job, error: WorkersOutOfMemoryError) -> Job:
    """Raises the error where a portion is one row already."""
    train = job.recipe.train
    if train.portion == 1:
        raise error
    smaller = with_overrides(job.recipe, {"train.micro_batch_size": train.portion // 2})
    tell(job.folder, "out_of_memory", why=error.message, micro_batch_size=smaller.train.portion)
    return _again(job, smaller)


def _with_even_workers(job: Job) -> Job:
    """No more workers than the last that began, less those that were left over; Ray takes any number between the fewest and the most."""
    scaling = job.recipe.scaling
    began = next(event["world_size"] for event in reversed(read_events(job.folder)) if event["event"] == "workers_began")
    most = max(began - began % scaling.sequence_parallel_size, scaling.fewest)
    fewer = with_overrides(job.recipe, {"scaling.num_workers": [scaling.fewest, most]})
    tell(job.folder, "uneven_workers", began=began, most=most)
    return _again(job, fewer)


def _again(job: Job, recipe: Recipe) -> Job:
    made = job.model_copy(update={"recipe": recipe})
    made.save()
    (job.folder / FAILURE_FILE).unlink()
    return made


@contextmanager
def _interrupts_raised() -> Iterator[None]:
    """Ctrl-C as KeyboardInterrupt again: Ray Train's handler stops the workers, exits the process with 0, and stays in place after fit."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, before)


def train_loop_per_worker(config: dict[str, str]) -> None:
    """What Ray Train calls on each worker."""
    import torch.distributed as dist

    from training.loop import train
    from training.worker import RayWorker

    folder, worker = Path(config["folder"]), RayWorker()
    if not folder.is_dir():
        raise RunFailedError(f"worker {worker.rank} cannot see the run folder {folder}; all nodes must mount the same home")
    if (folder / FAILURE_FILE).exists():
        return  # restarted after a failure that a restart does not mend
    if worker.rank == 0:
        tell(folder, "workers_began", world_size=worker.world_size)
    try:
        with logged(folder, worker.rank):
            train(Job.load(folder), worker)
    except SupersededError:
        return
    except Exception as error:
        if not dist.is_initialized():
            raise  # Ray has ended the group under a step, to make one of another size
        if not record_failure(folder, error, rank=worker.rank) or not isinstance(error, HoneError):
            raise  # what is no mistake of the recipe's may have met this worker alone, and the others wait for it
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def final_metrics(folder: Path) -> dict[str, float]:
    """The last value of every metric of a run until the step whose weights are published, and what was measured before its first step as
    `base_eval_...` and `base_retain_...`."""
    lines = read_metrics(folder)
    published = next((line["published_step"] for line in reversed(lines) if "published_step" in line), None)
    last: dict[str, float] = {}
    for line in lines:
        if published is None or line["step"] <= published:
            last |= {name: value for name, value in line.items() if not isinstance(value, str)}
    if published is not None:
        last["published_step"] = published
    before: dict[str, float] = next((line for line in lines if line["step"] == 0 and MEASURED & line.keys()), {})
    return {**last, **{f"base_{name}": value for name, value in before.items() if name.startswith(("eval_", "retain_"))}}


def _last_line(error: Exception) -> str:
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]
