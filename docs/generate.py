"""Writes docs/recipe.md and docs/cli.md from the code, so that they cannot drift from it (tests/docs proves it)."""

import inspect
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hone.recipe import Recipe

HERE = Path(__file__).parent


def pages() -> dict[str, str]:
    """File name -> Markdown."""
    return {"recipe.md": recipe_page(), "cli.md": cli_page()}


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
    return " ".join((text or "").split())


def _spelling(parameter: Any) -> str:
    return ", ".join(parameter.opts) if parameter.param_type_name == "option" else (parameter.name or "").upper()


if __name__ == "__main__":
    for file_name, page in pages().items():
        (HERE / file_name).write_text(page)
