"""What is looked at once a run has exported its weights, and what of it is left in the run folder."""

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hone
from hone.run_folder import read_metrics
from hone.storage import write_json, write_text
from training.evaluation.evaluate import Found, Options, evaluate
from training.evaluation.places import EVALUATION_FILE, PREDICTIONS_FILE, PROGRESS_FILE, REPORT_FILE, VERDICT_FILE
from training.evaluation.table import write_predictions
from training.evaluation.watch import WatchFile
from training.job import Job
from training.token_rows import TokenRows
from training.trained import trained_by
from training.verdict import verdict

MOST_ROWS = 2000
"""Validation rows that are evaluated, unless they are a fold, whose predictions are pooled with those of the others."""
WRITTEN_ROWS = 16
WRITTEN_TOKENS = 64


def evaluate_run(job: Job, model: Any, fresh: set[str]) -> None:
    """Evaluate what a run exported on its validation rows, and write what the run folder says of it: evaluation.json,
    predictions.parquet, verdict.json, report.html and PNG files.

    Args:
        job: The run.
        model: What it exported, reloaded.
        fresh: The base's parameters that had to be started anew.
    """
    trained, watch = trained_by(job), WatchFile(job.folder / PROGRESS_FILE)
    found = None
    try:
        if job.data.validation_rows:
            options = Options(
                rows=None if job.recipe.data.folds else MOST_ROWS,
                written_rows=WRITTEN_ROWS,
                written_tokens=WRITTEN_TOKENS,
                seed=job.recipe.train.seed,
            )
            found = evaluate(trained, model, TokenRows(job.data, "validation"), fresh=fresh, options=options, watch=watch)
            write_found(found, job.folder, labels=job.data.labels)
        _write_report(job, found)
    finally:
        with suppress(FileNotFoundError):
            (job.folder / PROGRESS_FILE).unlink()


def write_found(found: Found, folder: Path, *, labels: list[str] | None) -> None:
    """evaluation.json and predictions.parquet."""
    write_text(folder / EVALUATION_FILE, found.evaluation.model_dump_json(indent=2) + "\n")
    write_predictions(found, labels, folder / PREDICTIONS_FILE)


def _write_report(job: Job, found: Found | None) -> None:
    from training.evaluation.plots import plots
    from training.evaluation.report import report

    lines, recipe = read_metrics(job.folder), job.recipe
    remarks = verdict(lines, recipe)
    evaluation = found.evaluation if found else None
    drawn = plots(lines, evaluation, budget=recipe.guard.max_retain_loss_increase)
    for plot in drawn:
        (job.folder / plot.file).write_bytes(plot.png)
    write_json(job.folder / VERDICT_FILE, [asdict(remark) for remark in remarks])
    page = report(
        title=recipe.name,
        subtitle=f"{recipe.task} by {recipe.method.type}, tuned from {job.base_id.name}",
        recipe=recipe,
        facts=_facts(job),
        evaluation=evaluation,
        remarks=remarks,
        plots=drawn,
    )
    write_text(job.folder / REPORT_FILE, page)


def _facts(job: Job) -> list[tuple[str, str]]:
    data, recipe = job.data, job.recipe
    return [
        ("run", job.run_id),
        ("base", job.base_id.name + (f" at {job.base_id.revision}" if job.base_id.revision else "")),
        ("base fingerprint", job.base_id.fingerprint[:16]),
        ("data digest", data.digest[:16]),
        ("rows", f"{data.train_rows:,} to train, {data.validation_rows:,} to validate, {data.retain_rows:,} to measure forgetting"),
        *((f"{source.role} rows", f"{source.per_epoch:,} of {source.rows:,} an epoch from {source.name}") for source in data.sources),
        ("workers", f"{recipe.scaling.workers}, ZeRO stage {recipe.zero.stage}, {'GPU' if job.use_gpu else 'CPU'}"),
        ("hone", hone.__version__),
    ]
