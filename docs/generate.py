"""Writes the pages and tables of docs/ that follow from the code, so that they cannot drift from it (tests/docs proves it)."""

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs.scaling import with_tables
from hone.recipe import Recipe

HERE = Path(__file__).parent


def pages() -> dict[str, str]:
    """File name -> Markdown."""
    scaling = with_tables((HERE / "scaling.md").read_text())
    return {"recipe.md": recipe_page(), "cli.md": cli_page(), "methods.md": methods_page(), "scaling.md": scaling}


def recipe_page() -> str:
    """Every key of a recipe, section by section."""
    parts = ["# Recipe", "Every key, its default and its meaning. `hone recipe schema` prints the same for an editor."]
    parts += _section("", Recipe)
    return "\n\n".join(parts) + "\n"


def cli_page() -> str:
    """Every command of `hone` with its options."""
    from cluster.cli import app

    root = typer.main.get_command(app)
    parts = ["# Command line"]
    _command("hone", root, parts)
    return "\n\n".join(parts) + "\n"


def methods_page() -> str:
    """Every method and task, which of them go together, and what is measured."""
    from cluster.cli_methods import reasons
    from hone.methods import HOW_SERVED, METHODS, how_served, why_not
    from hone.metrics import METRICS, metrics_of
    from hone.tasks import TASKS

    methods = [(f"`{n}`", f.says, HOW_SERVED[f.served], f"[paper]({f.paper})" if f.paper else "") for n, f in METHODS.items()]
    tasks = [(f"`{n}`", f.says, f.shape, f.base, f"`{f.route}`") for n, f in TASKS.items()]
    goes = [(f"`{task}`", *("no" if why_not(task, name) else how_served(task, name) for name in METHODS)) for task in TASKS]
    measured = [(f"`{task}`", ", ".join(f"`{name}`" for name in metrics_of(task))) for task in TASKS]
    others = {"any number of classes": "multi_label_classification", "numbers": "regression"}
    measured += [
        (f"classification with {says}", ", ".join(f"`{name}`" for name in metrics_of("text-classification", problem)))
        for says, problem in others.items()
    ]
    meanings = [(f"`{n}`", f.says + ("" if f.higher_is_better else "; lower is better")) for n, f in METRICS.items()]
    parts = [
        "# Tasks and methods",
        "What a model can be tuned to do, in which ways, and what goes with what. `hone methods` prints the same.",
        "## Tasks",
        _table(("task", "the model", "rows", "base", "called at"), tasks),
        "## Methods",
        _table(("method", "trains", "served", ""), methods),
        "## What goes with what",
        "How the result is served: " + "; ".join(f"`{name}` is {says}" for name, says in HOW_SERVED.items()) + ".",
        _table(("task", *(f"`{name}`" for name in METHODS)), goes),
        "\n".join(f"- {tasks} by {name}: {reason}." for (tasks, name), reason in reasons().items()),
        "## Metrics",
        "What `hone evaluate` measures, and the report of every training.",
        _table(("task", "metrics"), measured),
        _table(("metric", "meaning"), meanings),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _section(path: str, model: type[BaseModel]) -> list[str]:
    title = f"## `{path}`" if path else "## Top level"
    rows = [f"| `{name}` | {_default(field)} | {_line(field.description)} |" for name, field in model.model_fields.items()]
    parts = [title, inspect.getdoc(model) or "", "\n".join(["| key | default | meaning |", "| --- | --- | --- |", *rows])]
    for name, field in model.model_fields.items():
        for inner in _models(field.annotation):
            kind = inner.model_fields.get("type")
            label = f"{path}.{name}".lstrip(".") + (f" (type: {get_args(kind.annotation)[0]})" if kind else "")
            parts += _section(label, inner)
    return parts


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)] if get_origin(annotation) else []


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    return "see below" if isinstance(value, BaseModel) else "" if value is None else f"`{value}`"


def _command(name: str, command: Any, parts: list[str]) -> None:
    if command.hidden:
        return
    parts.append(f"## `{name}`")
    parts.append(inspect.cleandoc(command.help or ""))
    rows = [f"| `{_spelling(p)}` | {_line(getattr(p, 'help', None))} |" for p in command.params if p.name != "help"]
    if rows and not getattr(command, "commands", None):
        parts.append("\n".join(["| argument | meaning |", "| --- | --- |", *rows]))
    for child_name, child in getattr(command, "commands", {}).items():
        _command(f"{name} {child_name}", child, parts)


def _line(text: str | None) -> str:
    """Without the backslashes that keep the terminal from reading a bracket as markup."""
    return " ".join((text or "").replace("\\[", "[").split())


def _spelling(parameter: Any) -> str:
    return ", ".join(parameter.opts) if parameter.param_type_name == "option" else (parameter.name or "").upper()


if __name__ == "__main__":
    for file_name, page in pages().items():
        (HERE / file_name).write_text(page)
