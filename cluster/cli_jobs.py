"""`hone submit` and `hone jobs`: recipes on a cluster."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli_run import Folds, HomeOption, Overrides, RecipeFile, check_has_search
from cluster.terminal import ago, notes, output, table

jobs = typer.Typer(help="What runs and ran: list, logs, stop.", no_args_is_help=True)

ClusterUrl = Annotated[str | None, typer.Option("--address", help="Dashboard URL of a Ray cluster.", show_default=False)]
JobId = Annotated[str, typer.Argument(metavar="ID", help="Job id, as `hone jobs list` shows it.", show_default=False)]


def submit(
    recipe: RecipeFile,
    overrides: Overrides = None,
    address: Annotated[
        str, typer.Option("--address", envvar="RAY_DASHBOARD_ADDRESS", help="Dashboard URL, such as http://127.0.0.1:8265.")
    ] = ...,  # type: ignore[assignment]  # how typer is told that an option is required
    home: HomeOption = None,
    cluster_home: Annotated[
        str | None,
        typer.Option(help="Home as the cluster's nodes see it (default its $HONE_HOME; this home if the cluster is this machine)."),
    ] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Run the recipe's search.")] = False,
    folds: Folds = None,
    working_dir: Annotated[Path | None, typer.Option(help="Folder that travels (default the recipe's own).", show_default=False)] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Show the job's log until it ends.")] = True,
) -> None:
    """Send a recipe and its data files to a cluster as a Ray Job."""
    from cluster.dashboard import Dashboard
    from cluster.jobs import submit as send
    from hone.recipe import load_recipe
    from hone.storage import Home

    checked = load_recipe(recipe, overrides)
    if tune:
        check_has_search(checked.search, recipe)
    dashboard, place = Dashboard(address), Home(home)
    place.ready()
    sent = send(
        recipe,
        checked,
        overrides or [],
        dashboard=dashboard,
        home=place,
        cluster_home=cluster_home,
        is_search=tune,
        folds=folds,
        working_dir=working_dir,
    )
    notes().print(f"submitted {sent.id} to {dashboard.address} with {sent.packed} files", markup=False)
    for path in sent.staying:
        notes().print(f"note: {path} does not travel, so the cluster's nodes must see it there", markup=False)
    if follow:
        _follow(sent.id, dashboard, place, home)
    else:
        output().print(sent.id, markup=False)


@jobs.command("list")
def list_(
    home: HomeOption = None, address: ClusterUrl = None, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Jobs, newest first, with their state now or the last that is known."""
    from cluster.dashboard import checked_address
    from cluster.jobs import list_jobs
    from hone.storage import Home

    states = list_jobs(Home(home), address=checked_address(address) if address else None)
    if as_json:
        output().print_json(json.dumps([dataclasses.asdict(state) for state in states], default=str))
        return
    if not states:
        output().print("no jobs yet; `hone train RECIPE` runs one here, `hone submit RECIPE --address URL` on a cluster", markup=False)
        return
    rows = [_row(state) for state in states]
    output().print(table(("ID", "KIND", "STATUS", "WHERE", "CHANGED", "RESULT"), rows))
    for note in dict.fromkeys(state.note for state in states if state.note):
        notes().print(f"note: {note}", markup=False)


@jobs.command()
def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    home: HomeOption = None,
    address: ClusterUrl = None,
) -> None:
    """What a job has written."""
    from cluster.dashboard import Dashboard
    from cluster.jobs import find_job, log_of
    from hone.storage import Home

    place = Home(home)
    state = find_job(job_id, home=place, address=address)
    if follow and state.address and not state.has_ended:
        _follow(job_id, Dashboard(state.address), place, home)
    else:
        sys.stdout.write(log_of(state, home=place))


@jobs.command()
def stop(job_id: JobId, home: HomeOption = None, address: ClusterUrl = None) -> None:
    """Stop a job, and wait until it has."""
    from cluster.jobs import stop as end
    from hone.storage import Home

    state = end(job_id, home=Home(home), address=address)
    output().print(f"{job_id}: {state.status}" + (f" ({state.result})" if state.result else ""), markup=False)


def _follow(job_id: str, dashboard: Any, place: Any, home: str | None) -> None:
    """Show the log to its end; exits 0 if the job did well, 1 if not, 130 on Ctrl-C, which leaves the job alone."""
    from cluster.jobs import follow as tail

    option = f" --home {home}" if home else ""
    try:
        state = tail(job_id, dashboard=dashboard, home=place, write=_write)
    except KeyboardInterrupt:
        notes().print(
            f"\nhone: no longer following; {job_id} goes on. "
            f"`hone jobs logs {job_id} --follow{option}` comes back to it, `hone jobs stop {job_id}{option}` ends it",
            markup=False,
        )
        raise typer.Exit(130) from None
    notes().print(f"{job_id}: {state.status}" + (f" ({state.result})" if state.result else ""), markup=False)
    raise typer.Exit(0 if state.status == "succeeded" else 1)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _row(state: Any) -> tuple[str, ...]:
    status = f"{state.status} (last known)" if state.note else state.status
    return state.id, state.kind, status, state.address or "here", ago(state.updated_at), state.result.partition("\n")[0]
