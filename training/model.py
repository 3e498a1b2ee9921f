"""The model that trains: the base from its folder, a fresh head where the task needs one, and the method's trainable weights."""

import math
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from hone.base_model import BaseModel
from hone.errors import BaseModelError, RecipeError
from hone.recipe import LoraMethod, Recipe
from training.job import Job
from training.tasks import TASKS, Task


def choose_dtype(recipe: Recipe, *, use_gpu: bool) -> torch.dtype:
    """bf16 where the recipe asks for it, or where the hardware has it and the recipe leaves it open."""
    if recipe.train.precision == "auto":
        return torch.bfloat16 if use_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32


def build_model(job: Job, *, dtype: torch.dtype, sharded: bool) -> Any:
    """Base model plus method, identical on every rank and at every ZeRO stage.

    Args:
        job: What to build.
        dtype: Type of the weights.
        sharded: The caller holds an `HfDeepSpeedConfig` for stage 3, so loading gives each rank its shard alone.
    """
    recipe, task = job.recipe, TASKS[job.recipe.task]
    model, fresh = task.load_model(job.base_folder, labels=job.data.labels, dtype=dtype, pad_token_id=job.data.pad_token_id)
    _start_fresh_weights(model, fresh, seed=recipe.train.seed, sharded=sharded)
    torch.manual_seed(recipe.train.seed)
    model = apply_method(model, recipe, task)
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def apply_method(model: Any, recipe: Recipe, task: Task) -> Any:
    """Wrap the model as the method asks.

    Raises:
        RecipeError: the target modules match nothing; the message lists the linear layers there are.
    """
    if not isinstance(recipe.method, LoraMethod):
        return model
    from peft import LoraConfig, get_peft_model

    method, heads = recipe.method, task.head_modules(model)
    config = LoraConfig(
        task_type=task.peft_task_type,
        r=method.r,
        lora_alpha=method.lora_alpha,
        lora_dropout=method.lora_dropout,
        target_modules=method.target_modules,
        modules_to_save=heads,
        exclude_modules=heads,
    )
    try:
        with warnings.catch_warnings():
            # peft 0.21 reads a property that transformers 5.23 has renamed; nothing a user could do about it.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            return get_peft_model(model, config)
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        names = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise RecipeError(
            f"method.target_modules {method.target_modules} match nothing in {recipe.base}; its linear layers are {', '.join(names)}"
        ) from None


def check_model(recipe: Recipe, base: BaseModel, *, labels: list[str] | None) -> None:
    """Build the model without its weights, to find out in a second what would otherwise fail on the workers.

    Raises:
        BaseModelError: transformers has no such model for the task. RecipeError: target modules that match nothing.
    """
    from transformers import AutoConfig

    task = TASKS[recipe.task]
    task.check_base(base)
    try:
        config = AutoConfig.from_pretrained(base.folder, **({"num_labels": len(labels)} if labels else {}))
        with torch.device("meta"):
            model = task.model_class().from_config(config)
    except (ValueError, KeyError) as error:
        raise BaseModelError(f"{base.id.name}: cannot do task {recipe.task} ({str(error).splitlines()[0][:200]})") from None
    apply_method(model, recipe, task)


def gathered(parameters: Iterable[torch.nn.Parameter], *, sharded: bool, modifier_rank: int | None = None) -> AbstractContextManager[Any]:
    """A block in which ZeRO-3's parameters are whole; outside it each rank holds a shard (and a naive save writes empty tensors)."""
    if not sharded:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=modifier_rank)
    return context


def _start_fresh_weights(model: Any, names: set[str], *, seed: int, sharded: bool) -> None:
    """Fill weights that the base does not have from the seed alone: loading fills them differently at each ZeRO stage."""
    fresh = [(name, p) for name, p in model.named_parameters() if name in names]
    if not fresh:
        return
    generator = torch.Generator().manual_seed(seed)
    deviation = float(getattr(model.config, "initializer_range", 0.02))
    with gathered([p for _, p in fresh], sharded=sharded, modifier_rank=0), torch.no_grad():
        for name, parameter in sorted(fresh):
            if parameter.dim() > 1:
                values = torch.randn(parameter.shape, generator=generator) * min(deviation, 1 / math.sqrt(parameter.shape[-1]))
                parameter.copy_(values.to(parameter.dtype))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
