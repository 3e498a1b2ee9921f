"""`prompt` and `prefix`: learnt vectors before the words, or before the keys and values of each layer."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from hone.errors import RecipeError
from hone.recipe import PrefixMethod, PromptMethod
from models.methods.by_peft import PeftMethod
from models.methods.method import Applying, State


class Prompt(PeftMethod):
    """PEFT's PromptTuningConfig."""

    name: ClassVar[str] = "prompt"

    def config(self, model: Any, settings: PromptMethod, how: Applying) -> Any:  # noqa: ARG002 - the protocol's signature
        from peft import PromptTuningConfig

        return PromptTuningConfig(
            task_type=how.task.peft_task_type,
            num_virtual_tokens=settings.num_virtual_tokens,
            **_heads(how),
        )

    def apply(self, model: Any, settings: Any, how: Applying) -> Any:
        if self.name == "prompt" and how.task.peft_task_type == "SEQ_CLS" and "score" in how.heads:
            raise RecipeError(
                "method prompt does not go with classification by a causal language model: transformers finds where a row ends by "
                "its padding tokens, which learnt vectors hide; use lora, ia3 or adapter, or an encoder"
            )
        return super().apply(model, settings, how)

    @contextmanager
    def off(self, model: Any) -> Iterator[None]:
        from peft.utils import ModulesToSaveWrapper

        # As peft's disable_adapter does it, which fails for classifiers: they have no prepare_inputs_for_generation.
        heads = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
        model.forward = model.base_model.forward
        for head in heads:
            head.enable_adapters(False)
        try:
            yield
        finally:
            del model.forward
            for head in heads:
                head.enable_adapters(True)

    def save(self, model: Any, settings: Any, state: State, folder: Path) -> None:
        # peft would run the module that holds the vectors, which under ZeRO-3 waits for the other ranks for ever; they are in `state`.
        [vectors] = [tensor for name, tensor in state.items() if name.startswith("prompt_encoder.")]
        model.get_prompt_embedding_to_save = lambda adapter_name: vectors  # noqa: ARG005
        try:
            super().save(model, settings, state, folder)
        finally:
            del model.get_prompt_embedding_to_save

    def merge(self, model: Any) -> Any:  # noqa: ARG002 - the protocol's signature
        raise RecipeError(
            f"what {self.name} tuning learns stands beside the base's weights and cannot be merged into them; export it as peft"
        )


class Prefix(Prompt):
    """PEFT's PrefixTuningConfig, without the network that the paper trains the prefix through."""

    name: ClassVar[str] = "prefix"

    def config(self, model: Any, settings: PrefixMethod | PromptMethod, how: Applying) -> Any:  # noqa: ARG002 - the protocol's signature
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(task_type=how.task.peft_task_type, num_virtual_tokens=settings.num_virtual_tokens, **_heads(how))

    def apply(self, model: Any, settings: Any, how: Applying) -> Any:
        if "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
            raise RecipeError(f"method prefix puts keys and values into the attention's cache, and {type(model).__name__} has none")
        return super().apply(model, settings, how)


def _heads(how: Applying) -> dict[str, Any]:
    return {"modules_to_save": list(how.heads)} if how.heads else {}
