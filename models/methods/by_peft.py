"""What the methods have in common that PEFT does (https://huggingface.co/docs/peft)."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

from hone.errors import RecipeError
from models.blocks import linear_names
from models.methods.method import Applying, State


class PeftMethod:
    """Configured by PEFT, saved in its format, and loaded by `PeftModel.from_pretrained`."""

    name: ClassVar[str]

    def config(self, model: Any, settings: Any, how: Applying) -> Any:
        """The PEFT configuration for this model."""
        raise NotImplementedError

    def apply(self, model: Any, settings: Any, how: Applying) -> Any:
        from peft import get_peft_model

        try:
            with _without_renaming():
                return get_peft_model(model, self.config(model, settings, how))
        except ValueError as error:
            if "arget modules" not in str(error):
                raise
            targets = getattr(settings, "target_modules", None)
            raise no_targets(model, targets) from None

    def off(self, model: Any) -> AbstractContextManager[Any]:
        block: AbstractContextManager[Any] = model.disable_adapter()
        return block

    def trained(self, name: str, parameter: torch.nn.Parameter) -> bool:  # noqa: ARG002 - the protocol's signature
        return parameter.requires_grad

    def save(self, model: Any, settings: Any, state: State, folder: Path) -> None:  # noqa: ARG002
        # "auto" would look for the base on the hub, to see whether its vocabulary grew.
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)

    def load(self, model: Any, folder: Path) -> Any:
        from peft import PeftModel

        with _without_renaming():
            return PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)

    def merge(self, model: Any) -> Any:
        _put_heads_in_place(model.get_base_model())
        return model.merge_and_unload()


@contextmanager
def _without_renaming() -> Iterator[None]:
    """peft 0.21 reads a property that transformers 5.23 has renamed; nothing that a user could do about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


def no_targets(model: Any, targets: Any) -> RecipeError:
    """What to say where nothing of the model is meant by the target modules."""
    name = type(model).__name__
    what = f"method.target_modules {targets} match nothing in {name}" if targets else f"method.target_modules is needed for {name}"
    return RecipeError(f"{what}; its linear layers are {', '.join(linear_names(model))}")


def _put_heads_in_place(model: Any) -> None:
    """Put modules that were trained whole where they belong. PEFT's own unloading fails on those of several layers, such as RoBERTa's
    classification head (https://github.com/huggingface/peft/pull/3213)."""
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save[module.active_adapter])
