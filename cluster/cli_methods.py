"""`hone methods`: which methods of fine-tuning go with which tasks, and why not where they do not."""

import json
from typing import Annotated

import typer

from cluster.terminal import output, table


def methods(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Which methods go with which tasks, how what they make is served, and why some do not go together."""
    from hone.methods import HOW_SERVED, METHODS, how_served, why_not
    from hone.tasks import TASKS

    if as_json:
        typer.echo(json.dumps(as_data(), indent=2))
        return
    console = output()
    console.print(table(("METHOD", "LEARNS", "SERVED", "PAPER"), [(n, f.says, HOW_SERVED[f.served], f.paper) for n, f in METHODS.items()]))
    console.print()
    rows = [(task, *("no" if why_not(task, name) else how_served(task, name) for name in METHODS)) for task in TASKS]
    console.print(table(("TASK", *METHODS), rows))
    for (task, name), reason in reasons().items():
        console.print(f"\n{task} by {name}: {reason}", markup=False)


def as_data() -> dict[str, object]:
    """The same as JSON values."""
    from dataclasses import asdict

    from hone.methods import METHODS, how_served, why_not
    from hone.tasks import TASKS

    goes = [
        {"task": task, "method": name, "served": None if why_not(task, name) else how_served(task, name), "why_not": why_not(task, name)}
        for task in TASKS
        for name in METHODS
    ]
    methods = {name: {"says": facts.says, "paper": facts.paper, "served": facts.served} for name, facts in METHODS.items()}
    return {"methods": methods, "tasks": {name: asdict(facts) for name, facts in TASKS.items()}, "goes": goes}


def reasons() -> dict[tuple[str, str], str]:
    """Why a task and a method do not go together, for each pair that does not; tasks of one reason together."""
    from hone.methods import METHODS

    found: dict[tuple[str, str], list[str]] = {}
    for name, facts in METHODS.items():
        for task, reason in facts.refuses.items():
            found.setdefault((name, reason), []).append(task)
    return {(", ".join(tasks), name): reason for (name, reason), tasks in found.items()}
