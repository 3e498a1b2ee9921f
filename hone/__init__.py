"""The floor that every room stands on: recipe, data files, registry, store. Imports no ray, torch, transformers or fastapi."""

__version__ = "0.1.0"
