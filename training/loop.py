"""What every worker runs, top to bottom: steps, validation, checkpoints, export."""

from hone.run_folder import tell
from training.checkpoints.resume import resume
from training.checkpoints.writer import CheckpointWriter
from training.divergence import rows_of
from training.export import export
from training.guard import picks_best, refuse_without_best
from training.health import Health
from training.job import Job
from training.ledger import Ledger
from training.metrics import MetricsFile
from training.nvme import remove_swap
from training.retention import refuse_broken_budget
from training.spikes import LossWatch
from training.start import start
from training.step import take_step
from training.worker import Worker

WRITING = 20.0
"""Large weights take long to write: so many times as long as a step may, before a worker counts as stalled."""


def train(job: Job, worker: Worker) -> None:
    """Run a job on this worker, from its newest checkpoint if there is one, and leave the result in `job.export_folder`."""
    try:
        _train(job, worker)
    finally:
        remove_swap(job, worker)


def _train(job: Job, worker: Worker) -> None:
    recipe = job.recipe
    run = start(job, worker)
    total_steps = run.plan.total_steps
    eval_steps = recipe.train.eval_steps or run.plan.steps_per_epoch
    save_steps = recipe.train.save_steps or eval_steps
    picking = picks_best(recipe, has_validation=bool(len(run.validation)))
    golden_rows = run.validation if len(run.validation) else run.rows

    resumed = resume(job, run.state, worker)
    guard, saved, noticed = resumed.guard, resumed.step, False
    losses = LossWatch(spread=recipe.health.spike_spread)
    about = {"total_steps": total_steps, "trained_parameters": run.groups.trained_parameters}
    with (
        Ledger(job.folder, attempt=resumed.attempt, rank=worker.rank, world_size=worker.world_size) as ledger,
        CheckpointWriter(job, worker, ledger) as checkpoints,
        MetricsFile(job.folder, rank=worker.rank, keep_steps=resumed.step, **about) as metrics,
        Health(job, worker, run.batcher, attempt=resumed.attempt) as health,
    ):
        if resumed.step == 0 and run.measures:
            before = run.measure()
            metrics.write({"step": 0, **before})
            refuse_broken_budget(before, recipe.guard.max_retain_loss_increase)

        for step in range(resumed.step, total_steps):
            done = step + 1
            health.mark("training", done)
            taken = take_step(run, step, ledger=ledger, checkpoint=saved)
            metrics.write(taken.line)
            health.timed(**taken.times)
            if worker.rank == 0 and step == resumed.step:
                tell(job.folder, "first_step", step=done)
            if worker.rank == 0 and (spike := losses.spike(taken.loss)):
                tell(job.folder, "loss_spike", step=done, **spike, rows=rows_of(run, step))
            is_last = done == total_steps
            measured: dict[str, float] = {}
            if run.measures and (is_last or done % eval_steps == 0):
                health.mark("measuring")
                with run.averaged():
                    measured = run.measure()
                    metrics.write({"step": done, **measured})
                    if guard.look(done, measured, recipe) and picking:
                        health.mark("exporting", patience=WRITING)
                        ledger.refuse_superseded()
                        export(run, golden_rows)
            if guard.reason:
                metrics.write({"step": done, "stopped": guard.reason})
            if measured:
                worker.report({"step": done, **measured})
            is_due = done % save_steps == 0 or (taken.noticed and not noticed)
            noticed = taken.noticed
            if is_due and not is_last and not guard.reason:
                health.mark("saving", patience=WRITING)
                checkpoints.save(run.state, step=done, loss=taken.loss, guard=guard, metrics=measured)
                saved = done
            if guard.reason:
                break

        health.mark("exporting", patience=WRITING)
        if picking:
            refuse_without_best(guard, recipe)
        else:
            ledger.refuse_superseded()
            with run.averaged():
                export(run, golden_rows)
        checkpoints.wait()
        metrics.write({"step": done, "published_step": guard.best_step if picking else done})
