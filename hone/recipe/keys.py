"""The keys that a recipe may have, found in the settings classes themselves."""

from typing import Any, get_args, get_origin

from pydantic import BaseModel

Root = type[BaseModel]


def fields_at(root: Root, path: tuple[str, ...]) -> list[str]:
    """Names of the keys that may stand below a path."""
    return list(dict.fromkeys(field for model in _models_at(root, path) for field in model.model_fields))


def all_keys(root: Root, path: tuple[str, ...] = ()) -> list[str]:
    """Every key below a path, in dotted form."""
    keys: list[str] = []
    for field in fields_at(root, path):
        here = (*path, field)
        keys += [".".join(here), *all_keys(root, here)]
    return keys


def _models_at(root: Root, path: tuple[str, ...]) -> list[Root]:
    """The settings classes that may stand at a dotted path (several where the section is a union)."""
    models: list[Root] = [root]
    for part in path:
        annotations = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        models = [model for annotation in annotations for model in _models_in(annotation)]
    return models


def _models_in(annotation: Any) -> list[Root]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is dict:
        return []
    return [model for part in get_args(annotation) for model in _models_in(part)]
