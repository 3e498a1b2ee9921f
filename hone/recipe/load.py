"""YAML and dotted overrides to a checked recipe; each mistake with its line and what to do."""

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hone.errors import RecipeError
from hone.recipe.keys import all_keys, fields_at
from hone.recipe.recipe import Recipe


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML (or resolved JSON) recipe and apply `key.path=value` overrides.

    Raises:
        RecipeError: the file cannot be read, or a line for each key that is wrong, with its line number.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    try:
        tree = yaml.safe_load(text)
        lines = _key_lines(yaml.compose(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values; this is {'empty' if tree is None else type(tree).__name__}")
    for override in overrides or []:
        key, value = parse_override(override)
        _set(tree, key, value)
        lines.pop(tuple(key.split(".")), None)
    return _absolute(parse_recipe(tree, where=str(path), lines=lines), path.resolve().parent)


def parse_recipe(tree: dict[str, Any], *, where: str, lines: dict[tuple[str, ...], int] | None = None) -> Recipe:
    """Check a tree of plain values.

    Raises:
        RecipeError: one line per wrong key, each with `where` and its line number if known.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(e, tree, where, lines or {}) for e in error.errors())) from None


def with_overrides(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """A copy with dotted keys set, checked like a recipe file.

    Raises:
        RecipeError: a key or value that a recipe file could not have.
    """
    tree = recipe.model_dump(mode="json")
    for key, value in values.items():
        _set(tree, key, value)
    return parse_recipe(tree, where="overrides")


def parse_override(text: str) -> tuple[str, Any]:
    """Split `optim.learning_rate=2e-4` into its key and YAML value.

    Raises:
        RecipeError: no `=`, or a value that is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"override {text!r}: write KEY=VALUE, such as optim.learning_rate=2e-4")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"override {text!r}: the value is not valid YAML") from None


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of the recipe file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _absolute(recipe: Recipe, folder: Path) -> Recipe:
    """Paths in the recipe, made absolute against the recipe's own folder. A base that is no folder there is a hub name."""

    def absolute(path: str) -> str:
        return path if "://" in path else str((folder / Path(path).expanduser()).resolve())

    def all_absolute(sources: str | list[str] | None) -> str | list[str] | None:
        return [absolute(path) for path in sources] if isinstance(sources, list) else sources and absolute(sources)

    sources = {name: all_absolute(getattr(recipe.data, name)) for name in ("train", "validation", "retain")}
    mix = [mixed.model_copy(update={"source": all_absolute(mixed.source)}) for mixed in recipe.data.mix]
    data = recipe.data.model_copy(update={**sources, "mix": mix})
    checkpoints = recipe.checkpoints.model_copy(update={"uri": recipe.checkpoints.uri and absolute(recipe.checkpoints.uri)})
    serving = recipe.serving.model_copy(update={"adapter_disk": all_absolute(recipe.serving.adapter_disk)})
    looks_local = recipe.base.startswith((".", "/", "~")) or (folder / recipe.base).is_dir()
    base = absolute(recipe.base) if looks_local else recipe.base
    return recipe.model_copy(update={"data": data, "base": base, "checkpoints": checkpoints, "serving": serving})


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        child = tree.setdefault(part, {})
        if not isinstance(child, dict):
            raise RecipeError(f"override {key!r}: {part!r} is {child!r}, which has no keys inside it")
        tree = child
    if last == "type" and tree.get(last) != value:
        tree.clear()  # the other type's keys mean nothing to this one
    tree[last] = value


def _key_lines(node: yaml.Node | None, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """Line number (from 1) of each key of a YAML document."""
    found: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            found[here] = key.start_mark.line + 1
            found |= _key_lines(value, here)
    return found


def _explain(error: Any, tree: dict[str, Any], where: str, lines: dict[tuple[str, ...], int]) -> str:
    """One line for one pydantic error: where, which key, what is wrong, what to do."""
    path = _keys_of(error["loc"], tree)
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    place = f"{where}:{line}" if line else where
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        if path[-1] in fields_at(Recipe, path[:-1]):
            return f"{place}: {key}: does not go with the type chosen there; remove it"
        near = _nearest(path)
        known = ", ".join(fields_at(Recipe, path[:-1]))
        return f"{place}: {key}: unknown key" + (
            f"; did you mean {near}?" if near else f"; known here: {known}" if known else "; remove it"
        )
    if error["type"] == "missing":
        return f"{place}: {key}: required, and not there"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] == "value_error" else f" (got {error['input']!r})"
    return f"{place}: {key}: {message}{given}" if key else f"{place}: {message}{given}"


def _keys_of(loc: tuple[str | int, ...], tree: Any) -> tuple[str, ...]:
    """A pydantic location without the union branches it names, which are not keys of the file."""
    keys: list[str] = []
    for n, part in enumerate(loc):
        is_last = n == len(loc) - 1
        if isinstance(tree, dict) and (part in tree or is_last):
            tree = tree.get(part)
            keys.append(str(part))
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
            keys.append(str(part))
    return tuple(keys)


def _nearest(path: tuple[str, ...]) -> str | None:
    """The known key most like an unknown one: first in its own section, then anywhere in the recipe."""
    here = difflib.get_close_matches(path[-1], fields_at(Recipe, path[:-1]), n=1, cutoff=0.6)
    if here:
        return ".".join((*path[:-1], here[0]))
    elsewhere = {key.rsplit(".", 1)[-1]: key for key in all_keys(Recipe)}
    close = difflib.get_close_matches(path[-1], elsewhere, n=1, cutoff=0.8)
    return elsewhere[close[0]] if close else None
