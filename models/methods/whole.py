"""`full` and `freeze`: the base's own weights train, all of them or the upper ones, and the result is a whole model."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch

from hone.errors import RecipeError
from hone.recipe import FreezeMethod
from models.blocks import depths
from models.methods.method import Applying, State


class Full:
    """Every weight trains."""

    name: ClassVar[str] = "full"

    def apply(self, model: Any, settings: Any, how: Applying) -> Any:  # noqa: ARG002 - the protocol's signature
        return model

    def off(self, model: Any) -> AbstractContextManager[Any]:
        raise NotImplementedError("the base is there no longer once its own weights train")

    def trained(self, name: str, parameter: torch.nn.Parameter) -> bool:  # noqa: ARG002
        return True

    def save(self, model: Any, settings: Any, state: State, folder: Path) -> None:  # noqa: ARG002
        model.save_pretrained(folder, state_dict=state)

    def load(self, model: Any, folder: Path) -> Any:  # noqa: ARG002
        return model

    def merge(self, model: Any) -> Any:
        return model


class Freeze(Full):
    """The embeddings and the lowest layers stay."""

    name: ClassVar[str] = "freeze"

    def apply(self, model: Any, settings: FreezeMethod, how: Applying) -> Any:
        heights = depths(model)
        wanted = settings.freeze_layers
        stay = wanted if isinstance(wanted, int) else round(wanted * heights.layers)
        if stay > heights.layers:
            raise RecipeError(f"method.freeze_layers {stay}: the base has {heights.layers} layers")
        if stay == heights.layers and not how.heads:
            raise RecipeError(
                f"method.freeze_layers {stay} would leave nothing to train: the base has {heights.layers} layers and no new head"
            )
        for name, parameter in model.named_parameters():
            height = heights.of(name)
            is_frozen = settings.freeze_embeddings if height == 0 else height <= stay
            parameter.requires_grad_(not is_frozen or name.startswith(tuple(f"{head}." for head in how.heads)))
        return model
