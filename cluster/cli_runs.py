"""`hone runs`: what is in the run folders, also after Ray is gone; and going on with a run that ended too early."""

import json
import subprocess
import sys
import time
from typing import Annotated, Any

import typer

from cluster.cli_run import HomeOption, RayAddress, run_training
from cluster.terminal import ago, notes, number, output, table

runs = typer.Typer(help="Runs in this home: list, show, tail, verify, resume, stop, compare.", no_args_is_help=True)

RunId = Annotated[str, typer.Argument(metavar="RUN", help="Run, as `hone runs list` shows it.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PROOF = "training.proof"
POLL_S = 0.5


@runs.command("list")
def list_(home: HomeOption = None, as_json: AsJson = False) -> None:
    """Every run, the last one that moved first."""
    from cluster.runs import all_runs
    from hone.storage import Home

    found = all_runs(Home(home))
    if as_json:
        output().print_json(json.dumps([run.summary() for run in found], default=str))
        return
    if not found:
        output().print("no runs yet; `hone train RECIPE` makes one", markup=False)
        return
    rows = [_row(run) for run in found]
    output().print(table(("RUN", "STATUS", "STEP", "LOSS", "ATTEMPTS", "CHANGED", "RESULT"), rows))


@runs.command()
def show(run_id: RunId, home: HomeOption = None, as_json: AsJson = False) -> None:
    """What a run is, how far it is, and what happened to it."""
    from cluster.runs import find_run
    from hone.storage import Home

    run = find_run(run_id, home=Home(home))
    if as_json:
        output().print_json(json.dumps({**run.summary(), "events": run.events, "metrics": run.last}, default=str))
        return
    console, recipe = output(), run.recipe
    console.print(
        f"{run.id}: {run.status}{f' ({run.result})' if run.result else ''}, step {run.step} of {run.total_steps or '?'}", markup=False
    )
    console.print(f"{recipe['task']} by {recipe['method']['type']} on {recipe['base']}", markup=False)
    console.print(f"{run.folder}\n", markup=False)
    console.print(table(("METRIC", "LAST"), [(name, number(value)) for name, value in run.last.items()]))
    begun = [(str(a.number), str(a.step), str(a.world_size), ago(a.started_at), "; ".join(a.passed_over)) for a in run.attempts]
    console.print(table(("ATTEMPT", "FROM STEP", "WORKERS", "BEGAN", "CHECKPOINTS PASSED OVER"), begun, title="\nAttempts"))
    console.print(table(("WHEN", "EVENT", ""), [event_row(event) for event in run.events[-12:]], title="\nLast events"))


@runs.command()
def tail(run_id: RunId, home: HomeOption = None) -> None:
    """Steps and events as they come, until the run ends."""
    from cluster.runs import is_over
    from hone.run_folder import EVENTS_FILE, METRICS_FILE, LinesFollower, find_run_folder
    from hone.storage import Home
    from hone.store import Store

    place = Home(home)
    folder, store = find_run_folder(place, run_id), Store(place.store_url)
    steps, events = LinesFollower(folder / METRICS_FILE), LinesFollower(folder / EVENTS_FILE)
    try:
        while True:
            has_ended = is_over(folder, store)
            for event in events.new_lines()[0]:
                output().print("  ".join(event_row(event)), markup=False)
            for line in steps.new_lines()[0]:
                output().print("  ".join(f"{name} {number(value)}" for name, value in line.items()), markup=False)
            if has_ended:
                return
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        store.close()


@runs.command()
def verify(run_id: RunId, home: HomeOption = None, as_json: AsJson = False) -> None:
    """Prove from the ledger that no row was skipped or seen twice, whatever happened on the way. Exits 1 where it cannot be proven."""
    argv = [sys.executable, "-P", "-m", PROOF, run_id, *(["--home", home] if home else [])]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout:
        raise typer.Exit(1)
    if as_json:
        typer.echo(done.stdout.rstrip())
        raise typer.Exit(done.returncode)
    proof = json.loads(done.stdout)
    _say_proof(run_id, proof)
    raise typer.Exit(done.returncode)


@runs.command()
def resume(
    run_id: RunId,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Such as scaling.num_workers=1.", show_default=False)
    ] = None,
    home: HomeOption = None,
    address: RayAddress = None,
) -> None:
    """Go on with a run that ended too early, from its newest whole checkpoint, on as many workers as there are now."""
    from cluster.entrypoint import resuming_argv
    from hone.run_folder import find_run_folder
    from hone.storage import Home

    place = Home(home)
    find_run_folder(place, run_id)
    raise typer.Exit(run_training(resuming_argv(run_id, overrides or [], home=place.root, address=address), address=address))


@runs.command()
def stop(run_id: RunId, home: HomeOption = None) -> None:
    """End a run here or on its cluster, and wait until it has; `hone runs resume` goes on with it."""
    from cluster.runs import stop_run
    from hone.storage import Home

    output().print(f"{run_id}: {stop_run(run_id, home=Home(home))}", markup=False)


@runs.command()
def compare(run_ids: Annotated[list[str], typer.Argument(metavar="RUN RUN...", show_default=False)], home: HomeOption = None) -> None:
    """Runs side by side: the settings in which they differ, and their last metrics."""
    from cluster.runs import differences, find_run
    from hone.storage import Home

    found = [find_run(run_id, home=Home(home)) for run_id in run_ids]
    settings = [(key, *map(str, values)) for key, values in differences([run.recipe for run in found]).items()]
    names = dict.fromkeys(name for run in found for name in run.last)
    metrics = [(name, *(number(run.last.get(name, "")) for run in found)) for name in names]
    output().print(table(("SETTING", *run_ids), settings, title="Settings that differ"))
    output().print(table(("METRIC", *run_ids), metrics, title="\nLast metrics"))


def _row(run: Any) -> tuple[str, ...]:
    step = f"{run.step}/{run.total_steps or '?'}"
    return run.id, run.status, step, number(run.last.get("loss", "")), str(len(run.attempts)), ago(run.changed_at), run.result


def event_row(event: dict[str, Any]) -> tuple[str, str, str]:
    """When, what, and what is said of it."""
    about = {name: value for name, value in event.items() if name not in ("at", "event") and value not in ([], "")}
    return event["at"][:19].replace("T", " "), event["event"], ", ".join(f"{name} {number(value)}" for name, value in about.items())


def _say_proof(run_id: str, proof: dict[str, Any]) -> None:
    console = output()
    begun = [(str(a["number"]), str(a["step"]), str(a["world_size"]), ", ".join(a["workers"])) for a in proof["attempts"]]
    console.print(table(("ATTEMPT", "FROM STEP", "WORKERS", "WHERE"), begun))
    again = (
        f"; {proof['repeated']} steps were done again, with losses that differ by {proof['worst']:.0e} at most" if proof["repeated"] else ""
    )
    if proof["drift"]:
        again += f" in the first after a checkpoint, and by {proof['drift']:.0e} later, as rounding grows"
    if not proof["steps"]:
        notes().print(f"{run_id}: no step is in the ledger", markup=False)
    elif proof["wrong"]:
        for line in proof["wrong"]:
            notes().print(f"{run_id}: {line}", markup=False)
    else:
        of = f" of {proof['total_steps']:,}" if proof["steps"] < proof["total_steps"] else ""
        console.print(
            f"proven: {proof['steps']:,}{of} steps, {proof['rows']:,} rows, each where the recipe's seed puts it, once{again}", markup=False
        )
