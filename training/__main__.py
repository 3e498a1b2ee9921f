"""`python -m training RECIPE [KEY=VALUE ...]`: what a Ray Job runs, and what `hone train` and `hone tune` run."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from hone.data.report import MEANINGS
from hone.errors import HoneError, RunFailedError
from hone.ids import new_run_id
from hone.ports import free_port
from hone.recipe import Recipe, load_recipe
from hone.run_folder import CHECKPOINTS_FOLDER, RESULT_FILE, sign_in, tell
from hone.storage import Home, write_json
from hone.store import Store
from training.head_watch import watched_head

SAID_BY_ITSELF = ("bad_rows", "cut_targets", "empty_targets")


def main(argv: list[str] | None = None) -> int:
    """Run one recipe; the exit code: 0 done, 1 a mistake or a failed run (said in one line), 130 interrupted."""
    args = _arguments(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console(stderr=False, quiet=args.quiet, soft_wrap=True)
    try:
        home = Home(args.home)
        recipe = None if args.resume else load_recipe(args.recipe, args.overrides)
        home.ready()
        run_id = args.resume or args.run_id or new_run_id(recipe.name if recipe else "")
        with (
            _recorded(home, run_id, args) as store,
            _ray(args.address, has_trials=args.search or bool(args.folds)) as head,
            watched_head(head, partial(_end_without_head, store, home, run_id)),
        ):
            result = _resume(home, run_id, args, console) if recipe is None else _run(recipe, home, run_id, args, console)
            store.move_job(run_id, "succeeded", message=result["adapter"] or "")
    except HoneError as error:
        print(f"hone: {error.message}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("hone: interrupted; nothing was published", file=sys.stderr)  # noqa: T201
        return 130
    return 0


def _run(recipe: Recipe, home: Home, run_id: str, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Train, search or cross-validate, check, publish, and leave result.json in the run folder."""
    began = time.monotonic()
    # Heavy: torch and transformers. Imported once the recipe is known to be sound.
    from training.folds import cross_validate, say
    from training.launch import prepare_job
    from training.progress import DataProgress
    from training.tuning import search

    lineage: dict[str, Any] = {}
    folder: Path | None = None
    if args.folds:
        validated = cross_validate(recipe, args.folds, home=home, run_id=run_id, console=console)
        say(validated.folds, console)
        recipe, folder = validated.recipe, home.runs / run_id
        lineage["folds"] = validated.folds.model_dump(mode="json")
    if args.search:
        found = search(recipe, home=home, run_id=run_id, console=console)
        trial, metrics = found.lineage, found.metrics
        console.print(f"best of {trial['of']} trials: {trial['values']}, {trial['metric']} {metrics[trial['metric']]:.4f}")
        return _finish(found.job, metrics, home=home, began=began, console=console, trial=trial, **lineage)
    with DataProgress(console=console) as watch:
        job = prepare_job(recipe, home=home, run_id=run_id, folder=folder, watch=watch)
    _say_what_was_prepared(job.data, console)
    return _finish(job, _fit(job, console), home=home, began=began, console=console, **lineage)


def _resume(home: Home, run_id: str, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Go on with a run that ended too early."""
    began = time.monotonic()
    from training.progress import DataProgress
    from training.resume import resume_job

    with DataProgress(console=console) as watch:
        job = resume_job(run_id, [*([args.recipe] if args.recipe else []), *args.overrides], home=home, watch=watch)
    return _finish(job, _fit(job, console), home=home, began=began, console=console)


def _fit(job: Any, console: Console) -> dict[str, float]:
    from training.launch import fit
    from training.progress import RunProgress

    sign_in(job.folder)
    with RunProgress(lambda: {job.folder: job.recipe.name}, console=console):
        return fit(job)


def _finish(job: Any, metrics: dict[str, float], *, home: Home, began: float, console: Console, **lineage: Any) -> dict[str, Any]:
    """Check what was trained, publish it, and say so."""
    from training.evaluation.result import verdict_of
    from training.evaluation.watch import bars
    from training.publish import check_export, move_alias, publish

    with bars(console) as looking:
        note = check_export(job, watch=looking)
    for line in [note] if note else verdict_of(job.folder):
        console.print(line, markup=False)
    adapter, refused = None, ""
    if job.recipe.publish.enabled:
        manifest = publish(job, metrics, home=home, **lineage)
        adapter, refused = str(manifest.ref), move_alias(job, manifest, home=home)
    result = {"status": "succeeded", "run_id": job.run_id, "adapter": adapter, "metrics": metrics, "seconds": time.monotonic() - began}
    result |= {"alias_refused": refused} if refused else {}
    folder = home.runs / job.run_id.split("/")[0]
    write_json(folder / RESULT_FILE, result)
    if refused:
        console.print(f"the alias was not moved: {refused}", markup=False)
    console.print(f"{f'published {adapter}' if adapter else 'trained'} in {result['seconds']:.0f} s; run folder {folder}")
    return result


def _say_what_was_prepared(data: Any, console: Console) -> None:
    notes = [f"{' and '.join(data.formats)}: {data.train_rows:,} training rows, {data.validation_rows:,} validation rows"]
    if len(data.sources) > 1:
        notes.append("an epoch sees " + ", ".join(f"{s.per_epoch:,} of {s.rows:,} rows of {s.name}" for s in data.sources))
    if data.bad_rows:
        notes.append(f"{data.bad_rows:,} bad rows left out")
    if data.cut_rows:
        notes.append(f"{data.cut_rows:,} rows cut at data.max_length")
    if data.dropped_rows:
        notes.append(f"{data.dropped_rows:,} rows left out, with nothing to learn within data.max_length")
    notes += [f"{count:,} {MEANINGS[kind]}" for kind, count in data.findings.items() if kind not in SAID_BY_ITSELF]
    console.print("; ".join([*notes, *data.notes]))


@contextmanager
def _recorded(home: Home, run_id: str, args: argparse.Namespace) -> Iterator[Store]:
    """Keep the job's state in the store, whatever way it ends."""
    store = Store(home.store_url)
    try:
        if args.resume:
            store.reopen_job(run_id)
        elif store.job(run_id) is None:
            store.add_job(run_id, kind="tune" if args.search else "train", recipe=str(Path(args.recipe).resolve()), status="running")
        else:
            store.move_job(run_id, "running")
        yield store
    except KeyboardInterrupt:
        store.move_job(run_id, "stopped", message="interrupted")
        raise
    except Exception as error:
        store.move_job(run_id, "failed", message=str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise
    finally:
        store.close()


@contextmanager
def _ray(address: str | None, *, has_trials: bool) -> Iterator[str]:
    """A connection to the cluster at `address` or $RAY_ADDRESS, or a Ray of our own on this machine that ends with the block; where its
    head is."""
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options = _own_ray(has_trials=has_trials) if address == "local" else {}
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level="warning", **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RunFailedError(f"cannot reach Ray at {address}: {str(error).splitlines()[0]}") from error
    signal.signal(signal.SIGTERM, _interrupt)  # ray.init has put its own in place, which exits without a word
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


def _own_ray(*, has_trials: bool) -> dict[str, Any]:
    """Environment and options for a Ray of our own: on 127.0.0.1 alone, by token (docs/decisions/0004).

    A search needs the dashboard's API and needs its workers to know the address: what frees the CPUs of a trial that ASHA has stopped is
    an actor of Ray Train that asks the API whether the trial's controller lives, and without an answer it waits for ever.
    """
    port = free_port()
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ |= {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"127.0.0.1:{port}"}
    return {"include_dashboard": has_trials, "_node_ip_address": "127.0.0.1"}


def _at_least_two(text: str) -> int:
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text}: there must be two folds at least")
    return int(text)


def _end_without_head(store: Store, home: Home, run_id: str, why: str) -> None:
    """Keep how the run ended, say it, and end this process, whose own thread waits for a Ray that is gone."""
    again = f"; `hone runs resume {run_id}` goes on with it on another Ray" if (home.runs / run_id / CHECKPOINTS_FOLDER).is_dir() else ""
    try:
        if (home.runs / run_id).is_dir():
            tell(home.runs / run_id, "head_lost", why=why)
        store.move_job(run_id, "failed", message=f"{why}{again}")
    finally:
        print(f"hone: {why}{again}", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(1)


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training", description="Run one recipe: train, check, publish.")
    parser.add_argument("recipe", nargs="?", help="recipe file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as optim.learning_rate=2e-4")
    parser.add_argument("--search", action="store_true", help="run the recipe's search: and publish the best trial")
    parser.add_argument("--folds", type=_at_least_two, help="first train on so many folds, each time without one; then on everything")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that ended too early; overrides may change its scaling")
    parser.add_argument("--home", help="where runs and the registry live (default $HONE_HOME or ./.hone)")
    parser.add_argument("--address", help="Ray cluster (default $RAY_ADDRESS, or a Ray of its own)")
    parser.add_argument("--run-id", help="name of the run folder")
    parser.add_argument("--quiet", action="store_true", help="errors only")
    args = parser.parse_intermixed_args(argv)
    if not args.recipe and not args.resume:
        parser.error("name a recipe, or a run with --resume")
    return args


if __name__ == "__main__":
    sys.exit(main())
