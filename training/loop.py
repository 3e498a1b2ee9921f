"""What every worker runs, top to bottom: steps, validation, checkpoints, export."""

from training.checkpoint import load_checkpoint, save_checkpoint
from training.export import export
from training.guard import picks_best, refuse_without_best
from training.job import Job
from training.metrics import MetricsFile
from training.retention import refuse_broken_budget
from training.start import start
from training.step import take_step
from training.worker import Worker


def train(job: Job, worker: Worker) -> None:
    """Run a job on this worker, from its newest checkpoint if there is one, and leave the result in `job.export_folder`."""
    recipe = job.recipe
    run = start(job, worker)
    total_steps = run.plan.total_steps
    eval_steps = recipe.train.eval_steps or run.plan.steps_per_epoch
    save_steps = recipe.train.save_steps or eval_steps
    picking = picks_best(recipe, has_validation=bool(len(run.validation)))
    golden_rows = run.validation if len(run.validation) else run.rows

    checkpoint, guard = load_checkpoint(run.engine, worker, run.average)
    metrics = MetricsFile(
        job.folder, rank=worker.rank, keep_steps=checkpoint, total_steps=total_steps, trained_parameters=run.groups.trained_parameters
    )
    if checkpoint == 0 and run.measures:
        before = run.measure()
        metrics.write({"step": 0, **before})
        refuse_broken_budget(before, recipe.guard.max_retain_loss_increase)

    for step in range(checkpoint, total_steps):
        metrics.write(take_step(run, step, checkpoint=checkpoint))
        done = step + 1
        is_last = done == total_steps
        measured: dict[str, float] = {}
        if run.measures and (is_last or done % eval_steps == 0):
            with run.averaged():
                measured = run.measure()
                metrics.write({"step": done, **measured})
                if guard.look(done, measured, recipe) and picking:
                    export(run, golden_rows)
        if guard.reason:
            metrics.write({"step": done, "stopped": guard.reason})
        if not is_last and not guard.reason and done % save_steps == 0:
            save_checkpoint(run.engine, worker, done, {"step": done, **measured}, guard=guard, average=run.average)
            checkpoint = done
        elif measured:
            worker.report({"step": done, **measured})
        if guard.reason:
            break

    if picking:
        refuse_without_best(guard, recipe)
    else:
        with run.averaged():
            export(run, golden_rows)
    metrics.write({"step": done, "published_step": guard.best_step if picking else done})
    metrics.close()
