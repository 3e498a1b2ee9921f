"""`hone plan`: what a recipe will take before it is launched, estimated by a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cluster.cli_run import HomeOption, Overrides, RecipeFile
from cluster.terminal import output, size, table
from hone.errors import RecipeError

PLAN = "training.plan"
NOTHING_FITS = 3
"""Exit code with which that process still prints a plan."""
ON_CPU = ("weights", "gradients", "optimizer", "activations", "checkpoint", "allocator", "process", "total")
ON_GPU = ("weights", "gradients", "optimizer", "activations", "process", "total", "host")
"""A checkpoint on its way is in the machine's memory, and no malloc keeps anything."""
NAMES = {"process": "GPU ITSELF", "host": "OF THE MACHINE"}


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="What to plan for: 8xH100, 2x8xA100-80GB, 4xCPU:16GiB; by default this machine.", show_default=False),
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Plan for this Ray cluster, as it is now.", show_default=False)
    ] = None,
    prices: Annotated[Path | None, typer.Option(help="Prices an hour (YAML), in place of the examples.", show_default=False)] = None,
    hardware: Annotated[
        Path | None, typer.Option(help="Table of accelerators (YAML), in place of the published figures.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    home: HomeOption = None,
) -> None:
    """What a recipe takes before it is launched: memory of each ZeRO stage, what fits, time, GPU-hours and money.

    Reads the data and the base's configuration, no weights, and starts nothing; tokens are kept for the run. `auto` for zero.stage and
    train.micro_batch_size takes what this recommends. Exits 1 where nothing fits. Memory has been compared with that of real workers;
    time is an estimate, and the prices are examples.
    """
    if cluster and address:
        raise RecipeError("--cluster and --address name two clusters; leave one of them out")
    argv = [sys.executable, "-P", "-m", PLAN, str(recipe), *(overrides or [])]
    for name, value in (("cluster", cluster), ("address", address), ("prices", prices), ("hardware", hardware), ("home", home)):
        argv += [f"--{name}", str(value)] if value is not None else []
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, NOTHING_FITS):
        raise typer.Exit(done.returncode if done.returncode > 0 else 128 - done.returncode)
    if as_json:
        typer.echo(done.stdout.rstrip())
    else:
        _print(json.loads(done.stdout), output())
    raise typer.Exit(1 if done.returncode else 0)


def _print(found: dict[str, Any], console: Console) -> None:
    console.print(
        f"{found['name']}: {found['task']} by {found['method']} on {found['base']}, {found['precision']}; "
        f"{found['parameters']:,} parameters, of which {found['trained_parameters']:,} train",
        markup=False,
    )
    console.print(f"{found['steps']:,} steps, {found['units']:,.0f} {found['unit']}; on {found['cluster']}\n", markup=False)
    for workers in found["workers"]:
        stages = [each for each in found["stages"] if each["workers"] == workers]
        console.print(table(_head(found), [_memory_row(each, found) for each in stages], title=_title(stages[0], found)))
        console.print()
    if found["others"]:
        console.print(table(_costs_head(found), [_costs_row(each, found) for each in found["others"]], title="Time and cost (estimates)"))
    if found["advice"]:
        console.print(f"\n{found['advice']}", markup=False)
    if found["recommended"]:
        console.print(f"\n{_recommended(found)}", markup=False)


def _title(each: dict[str, Any], found: dict[str, Any]) -> str:
    workers = f"each of {each['workers']} workers" if each["workers"] > 1 else "a single worker"
    host = f", and {size(each['host_available'])} of the machine's" if each["host_available"] is not None else ""
    return f"Memory of {workers}; there are {size(each['available'])}{' on the GPU' if found['on_gpu'] else ''}{host} for each"


def _head(found: dict[str, Any]) -> tuple[str, ...]:
    parts = (NAMES[part] if found["on_gpu"] and part in NAMES else part.upper() for part in _parts(found))
    return ("STAGE", "ROWS", *parts, "FITS", "MOST ROWS")


def _parts(found: dict[str, Any]) -> tuple[str, ...]:
    return ON_GPU if found["on_gpu"] else ON_CPU


def _memory_row(each: dict[str, Any], found: dict[str, Any]) -> tuple[str, ...]:
    fits = "yes" if each["fits"] else "no"
    return (
        str(each["stage"]),
        str(each["micro_batch_size"]),
        *(size(each["bytes"][part]) for part in _parts(found)),
        fits if each["is_allowed"] else "not with this recipe",
        str(each["largest_micro_batch_size"]),
    )


def _costs_head(found: dict[str, Any]) -> tuple[str, ...]:
    return ("WORKERS", "STAGE", "ROWS", f"{found['unit'].upper()}/S", "TIME", _hours(found).upper(), f"COST ({found['currency']}, example)")


def _costs_row(each: dict[str, Any], found: dict[str, Any]) -> tuple[str, ...]:
    cheapest = min(found["others"], key=lambda other: other["accelerator_hours"])
    return (
        str(each["workers"]),
        str(each["stage"]),
        str(each["micro_batch_size"]),
        f"{each['units_a_second']:,.0f}",
        _time(each["seconds"]),
        f"{each['accelerator_hours']:.3g}",
        f"{_money(each, found)}{'  cheapest' if each == cheapest else ''}",
    )


def _recommended(found: dict[str, Any]) -> str:
    best = found["recommended"]
    cost = f", about {_money(best, found)}" if best["cost"] is not None else ""
    hours = f"{best['accelerator_hours']:.3g} {_hours(found)}"
    on_others = best["workers"] not in found["workers"] or (bool(found["advice"]) and len(found["workers"]) > 1)
    workers = f" on {best['workers']} worker{'s' if best['workers'] > 1 else ''}" if on_others else ""
    return (
        f"recommended: zero.stage {best['stage']}, train.micro_batch_size {best['micro_batch_size']}{workers}: {found['reason']}. "
        f"{size(best['bytes']['total'])} a worker, {_time(best['seconds'])}, {hours}{cost}; time and cost are estimates"
    )


def _hours(found: dict[str, Any]) -> str:
    return "GPU-hours" if found["on_gpu"] else "core-hours"


def _money(each: dict[str, Any], found: dict[str, Any]) -> str:
    return "" if each["cost"] is None else f"{each['cost']:,.2f} {found['currency']}"


def _time(seconds: float) -> str:
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
