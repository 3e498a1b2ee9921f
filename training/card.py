"""The adapter's card: a README that says what it is, how good it is, and how to call it."""

from typing import Any

import yaml

from hone.methods import HOW_SERVED, Served, how_served
from hone.run_folder import read_metrics
from hone.tasks import curl
from training.evaluation.figures import changed, estimated, spelled
from training.evaluation.places import PLOTS, REPORT_FILE
from training.evaluation.result import read_evaluation, verdict_of
from training.job import Job

BARS = "▁▂▃▄▅▆▇█"


def card(job: Job, metrics: dict[str, float], *, created: str, trial: dict[str, Any] | None, folds: dict[str, Any] | None = None) -> str:
    """Markdown with the front matter that model hubs read."""
    recipe = job.recipe
    whole = _is_whole(job)
    front = {
        "library_name": "transformers" if whole else "hone" if recipe.method.type == "adapter" else "peft",
        "base_model": job.base_id.name if "/" in job.base_id.name and not job.base_id.name.startswith(("/", ".")) else None,
        "tags": ["hone", recipe.task, recipe.method.type],
    }
    parts = [
        f"---\n{yaml.safe_dump({k: v for k, v in front.items() if v}, sort_keys=False)}---",
        f"# {recipe.name}",
        f"{'A whole model' if whole else 'An adapter'} for {recipe.task}, tuned from `{job.base_id.name}` on {created} "
        f"({job.data.train_rows:,} training rows, {job.data.validation_rows:,} validation rows).",
        "## Validation\n\n" + (_folds_table(folds) if folds else _validation_table(metrics)),
        *_reported(job),
        "## Training loss\n\n" + _loss_line(job),
        "## Call it\n\n" + _how_to_call(job),
        "## Where it comes from\n\n" + _lineage(job, trial),
        "## Recipe\n\n```yaml\n" + yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False) + "```",
    ]
    return "\n\n".join(parts) + "\n"


def _validation_table(metrics: dict[str, float]) -> str:
    names = [name for name in metrics if name.startswith("eval_")]
    if not names:
        return "There were no validation rows."
    rows = [f"| {name.removeprefix('eval_')} | {_figure(metrics.get(f'base_{name}'))} | {_figure(metrics[name])} |" for name in names]
    return "\n".join(["| | before | after |", "| --- | --- | --- |", *rows])


def _folds_table(folds: dict[str, Any]) -> str:
    rows = [
        f"| {name.removeprefix('eval_')} | {spread['mean']:.4f} | {spread['low']:.4f} to {spread['high']:.4f} | {spread['deviation']:.4f} |"
        for name, spread in folds["metrics"].items()
    ]
    head = ["| | mean | 95% interval | deviation |", "| --- | --- | --- | --- |"]
    about = f"By {folds['k']}-fold cross-validation; the weights are those of a training on all rows afterwards."
    pooled = [f"| {m['name']} | {m['tuned']['value']:.4f} | {m['tuned']['low']:.4f} to {m['tuned']['high']:.4f} |" for m in folds["pooled"]]
    rows_said = f"All {folds['pooled_rows']:,} rows together, each by the fold that had not seen it:"
    return "\n".join([about, "", *head, *rows, "", rows_said, "", "| | value | 95% interval |", "| --- | --- | --- |", *pooled])


def _reported(job: Job) -> list[str]:
    """What the evaluation after training has left: the verdict, the metrics with their intervals, the plots."""
    parts = []
    remarks = verdict_of(job.folder)
    if remarks:
        parts.append("## Verdict\n\n" + "\n".join(f"- {says}" for says in remarks))
    evaluation = read_evaluation(job.folder)
    if evaluation:
        rows = [f"| {spelled(m.name)} | {estimated(m.base)} | {estimated(m.tuned)} | {changed(m.change)} |" for m in evaluation.metrics]
        against = f" Base: {evaluation.compared_with}." if evaluation.compared_with else ""
        table = "\n".join(["| | base | tuned | change |", "| --- | --- | --- | --- |", *rows])
        parts.append(
            f"## Evaluation\n\n{table}\n\nThe published weights on {evaluation.rows:,} validation rows, with 95% intervals.{against} "
            f"[{REPORT_FILE}]({REPORT_FILE}) has the examples."
        )
    pictures = [path.name for path in sorted(job.folder.glob(PLOTS))]
    titles = {name: name.removeprefix("plot_").removesuffix(".png").replace("_", " ").capitalize() for name in pictures}
    parts += ["\n\n".join(f"![{title}]({name})" for name, title in titles.items())] if pictures else []
    return parts


def _loss_line(job: Job, width: int = 48) -> str:
    losses = [m["loss"] for m in read_metrics(job.folder) if "loss" in m]
    if not losses:
        return "No steps."
    share = max(1, len(losses) / width)
    means = [sum(part) / len(part) for n in range(width) if (part := losses[int(n * share) : int((n + 1) * share)])]
    low, high = min(means), max(means)
    line = "".join(BARS[round((m - low) / ((high - low) or 1) * (len(BARS) - 1))] for m in means)
    return f"`{line}` {len(losses)} steps, {losses[0]:.3f} at the first and {losses[-1]:.3f} at the last"


def _how_to_call(job: Job) -> str:
    name, task = job.recipe.name, job.recipe.task
    base = name if _is_whole(job) else job.base_id.name
    called = curl(task, name, url="http://127.0.0.1:8000")
    return f"Served {HOW_SERVED[_served(job)]}.\n\n```sh\nhone serve --base {base}\n{called}\n```"


def _is_whole(job: Job) -> bool:
    return _served(job) == "whole"


def _served(job: Job) -> Served:
    method = job.recipe.method
    return how_served(job.recipe.task, method.type, use_dora=getattr(method, "use_dora", False))


def _lineage(job: Job, trial: dict[str, Any] | None) -> str:
    lines = [
        f"- run `{job.run_id}`",
        f"- base fingerprint `{job.base_id.fingerprint[:16]}`, data digest `{job.data.digest[:16]}`",
        f"- {job.recipe.scaling.workers} workers, ZeRO stage {job.recipe.zero.stage}",
    ]
    if len(job.data.sources) > 1:
        lines += [f"- an epoch saw {each.per_epoch:,} of {each.rows:,} rows of {each.name} ({each.role})" for each in job.data.sources]
    if trial:
        lines.append(f"- best of {trial['of']} search trials by {trial['metric']}: {trial['id']} with {trial['values']}")
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
