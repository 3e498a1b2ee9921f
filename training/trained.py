"""What is evaluated or exported, wherever it comes from: trained weights in a folder, of a run or published, and their base."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hone.base_model import BaseModel, find_base_model
from hone.errors import BaseModelError
from hone.manifest import AdapterManifest
from hone.methods import METHODS, MethodName
from hone.recipe import Recipe
from hone.registry import Registry
from hone.storage import Home
from models.tasks import TASKS, Head, Inputs, Task, inputs_by
from training.job import Job
from training.model import choose_dtype, load_weights
from training.tokenise import longest

RECIPE_FILE = "recipe.json"


@dataclass(frozen=True)
class Trained:
    """Enough to load the model and its base."""

    name: str
    """NAME@VERSION, or the run."""
    recipe: Recipe
    """The resolved recipe that made it."""
    folder: Path
    """Where its weights are."""
    base_folder: Path
    """Where the base is; of a whole model that is not to be compared with it, its own folder."""
    base_name: str
    head: Head
    dtype: torch.dtype
    max_length: int
    """What rows are cut to."""

    @property
    def task(self) -> Task:
        return TASKS[self.recipe.task]

    @property
    def method(self) -> MethodName:
        return self.recipe.method.type

    @property
    def keeps_base(self) -> bool:
        """Whether the model answers as the base with its adapter off."""
        return METHODS[self.method].keeps_base

    def processor(self) -> Any:
        """Tokenizer, image processor or feature extractor."""
        return self.task.load_processor(self.base_folder)

    def inputs(self) -> Inputs:
        """What turns rows into tensors."""
        return inputs_by(self.processor())

    def load(self) -> tuple[Any, set[str]]:
        """The trained model, and names of the base's parameters that it had to start anew (a new head)."""
        return load_weights(
            self.folder,
            task=self.task,
            method=self.method,
            base_folder=self.base_folder,
            head=self.head,
            dtype=self.dtype,
            pad_token_id=self.inputs().pad_token_id,
        )

    def load_base(self) -> tuple[Any, set[str]]:
        """The base for this task, and names of its parameters that it does not have."""
        model, fresh = self.task.load_model(self.base_folder, head=self.head, dtype=self.dtype, pad_token_id=self.inputs().pad_token_id)
        return model.eval(), fresh


def trained_by(job: Job) -> Trained:
    """What a run has just exported."""
    return Trained(
        name=job.recipe.name,
        recipe=job.recipe,
        folder=job.export_folder,
        base_folder=job.base_folder,
        base_name=job.base_id.name,
        head=job.head,
        dtype=choose_dtype(job.recipe, use_gpu=job.use_gpu),
        max_length=job.data.max_length,
    )


def published(ref: str, *, home: Home, needs_base: bool = True) -> Trained:
    """An adapter of the registry.

    Args:
        ref: Its name, version or alias.
        home: Where the registry is.
        needs_base: Whether the base is asked of a whole model too, which can be loaded without.

    Raises:
        UnknownAdapterError: no such adapter. BaseModelError: its base is not here, or is another one by now.
    """
    registry = Registry(home)
    manifest = registry.resolve(ref)
    registry.verify(manifest.ref)
    folder = registry.path(manifest.ref)
    recipe = Recipe.model_validate_json((folder / RECIPE_FILE).read_bytes())
    is_alone = manifest.kind == "full" and not needs_base
    base = find_base_model(str(folder), home=home) if is_alone else _base_of(manifest, home)
    return Trained(
        name=str(manifest.ref),
        recipe=recipe,
        folder=folder,
        base_folder=base.folder,
        base_name=manifest.base.name,
        head=Head(manifest.labels, manifest.problem_type),
        dtype=getattr(torch, manifest.dtype),
        max_length=longest(recipe, base),
    )


def _base_of(manifest: AdapterManifest, home: Home) -> BaseModel:
    try:
        base = find_base_model(manifest.base.name, home=home, revision=manifest.base.revision)
    except BaseModelError as error:
        raise BaseModelError(f"{manifest.ref}: its base cannot be found; {error.message}") from None
    if base.id.fingerprint != manifest.base.fingerprint:
        raise BaseModelError(
            f"{manifest.ref}: its base {manifest.base.name} is not what it was trained on (fingerprint {base.id.fingerprint[:16]}, "
            f"and it was {manifest.base.fingerprint[:16]}); restore that base, or train again on this one"
        )
    return base
