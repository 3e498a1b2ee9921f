"""The model that trains: the base from its folder, a fresh head where the task needs one, and the method's trainable weights."""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hone.base_model import BaseModel
from hone.errors import BaseModelError, RecipeError
from hone.methods import METHODS as HOW_MADE
from hone.methods import MethodName
from hone.recipe import Recipe
from models.methods import METHODS, Applying, quantisation
from models.slices import why_not_sliced
from models.tasks import TASKS, Head, Task
from training.job import Job
from training.sharded_base import load_sharded
from training.zero import sharded_loading

DROPOUTS = ("attention_dropout", "activation_dropout", "hidden_dropout", "dropout", "attn_dropout", "dropout_prob", "dropout_rate")
"""Names under which models keep a share to drop that is no module of its own."""


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By `train.precision`."""


def choose_dtype(recipe: Recipe, *, use_gpu: bool) -> torch.dtype:
    """What the recipe asks for; where it leaves that open, bf16 if the hardware has it."""
    if recipe.train.precision == "auto":
        return torch.bfloat16 if use_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return DTYPES[recipe.train.precision]


def build_model(job: Job, *, dtype: torch.dtype, zero3: dict[str, Any] | None = None, rank: int = 0) -> tuple[Any, list[str]]:
    """Base model plus method, identical on every rank and at every ZeRO stage, and the names of the modules that start fresh.

    Args:
        job: What to build.
        dtype: Type of the weights.
        zero3: DeepSpeed's configuration, where it is of stage 3: each rank gets its shards alone.
        rank: Which of the workers this is.
    """
    recipe, task = job.recipe, TASKS[job.recipe.task]
    model, fresh = load_base(job, dtype=dtype, zero3=zero3, options=quantisation(recipe.method))
    heads = task.head_modules(model, fresh)
    _drop_no_layers(model)
    if recipe.train.dropout is not None:
        _set_dropout(model, recipe.train.dropout)
    torch.manual_seed(recipe.train.seed)
    how = Applying(
        task,
        heads,
        gather=partial(gathered, sharded=bool(zero3)),
        write=partial(gathered, sharded=bool(zero3), modifier_rank=0),
        folder=job.folder,
        rank=rank,
    )
    with sharded_loading(zero3):
        model = METHODS[recipe.method.type].apply(model, recipe.method, how)
    if recipe.train.gradient_checkpointing:
        _recompute(model)
    return model, heads


def load_base(
    job: Job, *, dtype: torch.dtype, zero3: dict[str, Any] | None = None, options: dict[str, Any] | None = None
) -> tuple[Any, set[str]]:
    """The base as training begins with it, and the parameters that its folder does not have, which are drawn from the recipe's seed."""
    task = TASKS[job.recipe.task]
    if zero3 and job.head == Head() and not options:
        model = load_sharded(job.base_folder, model_class=task.model_class(), dtype=dtype, config=zero3)
        if model is not None:
            return model, set()
    with sharded_loading(zero3):
        model, fresh = task.load_model(job.base_folder, head=job.head, dtype=dtype, pad_token_id=job.data.pad_token_id, options=options)
        _start_fresh_weights(model, fresh, seed=job.recipe.train.seed, sharded=bool(zero3))
    return model, fresh


def load_trained(job: Job, folder: Path, *, dtype: torch.dtype) -> Any:
    """What `folder` holds of a trained model, in a process that knows nothing of the training: plain transformers, PEFT, or ours."""
    recipe = job.recipe
    model, _ = load_weights(
        folder,
        task=TASKS[recipe.task],
        method=recipe.method.type,
        base_folder=job.base_folder,
        head=job.head,
        dtype=dtype,
        pad_token_id=job.data.pad_token_id,
        options=quantisation(recipe.method),
    )
    return model


def load_weights(
    folder: Path,
    *,
    task: Task,
    method: MethodName,
    base_folder: Path,
    head: Head,
    dtype: torch.dtype,
    pad_token_id: int,
    options: dict[str, Any] | None = None,
) -> tuple[Any, set[str]]:
    """The model that `folder` holds whole, or what it holds beside a base; and the names of parameters that had to be started anew."""
    source = folder if HOW_MADE[method].served == "whole" else base_folder
    model, fresh = task.load_model(source, head=head, dtype=dtype, pad_token_id=pad_token_id, options=options)
    loaded = METHODS[method].load(model, folder)
    return (loaded if options else loaded.to(dtype)).eval(), fresh


def check_model(recipe: Recipe, base: BaseModel, *, head: Head) -> None:
    """Build the model without its weights, to find out in a second what would otherwise fail on the workers.

    Raises:
        BaseModelError: transformers has no such model for the task. RecipeError: target modules that match nothing, or more workers to a
            sequence than the model can share it among.
    """
    model = build_on_meta(recipe, base, head=head)
    size = recipe.scaling.sequence_parallel_size
    if size > 1 and (reason := why_not_sliced(model, of=size)):
        raise RecipeError(f"scaling.sequence_parallel_size {size} does not go with {base.id.name}: {reason}")


def build_on_meta(recipe: Recipe, base: BaseModel, *, head: Head, dtype: torch.dtype = torch.float32) -> Any:
    """The model that will train, with its method, but without a single weight. Raises as `check_model`."""
    from transformers import AutoConfig

    task = TASKS[recipe.task]
    task.check_base(base)
    try:
        config = AutoConfig.from_pretrained(base.folder, **({"num_labels": len(head.labels)} if head.labels else {}))
        with torch.device("meta"):
            model = task.model_class().from_config(config, dtype=dtype)
    except (ValueError, KeyError) as error:
        raise BaseModelError(f"{base.id.name}: cannot do task {recipe.task} ({str(error).splitlines()[0][:200]})") from None
    _drop_no_layers(model)
    model = METHODS[recipe.method.type].apply(model, recipe.method, Applying(task, task.head_modules(model)))
    if recipe.train.gradient_checkpointing:
        _recompute(model)
    return model


def gathered(parameters: Iterable[torch.nn.Parameter], *, sharded: bool, modifier_rank: int | None = None) -> AbstractContextManager[Any]:
    """A block in which ZeRO-3's parameters are whole; outside it each rank holds a shard (and a naive save writes empty tensors)."""
    if not sharded:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=modifier_rank)
    return context


def _drop_no_layers(model: Any) -> None:
    """Some speech models leave layers out at random. Each worker would leave out others, and then wait for those that it did not."""
    for part in [model.config, *model.modules()]:
        for name in [name for name in vars(part) if name.endswith("layerdrop")]:
            setattr(part, name, 0.0)


def _recompute(model: Any) -> None:
    """By its name since transformers 5.20, or by the one before."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.enable_input_require_grads()


def _set_dropout(model: Any, share: float) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = share
        for name in DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, share)


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
            elif name.endswith(("weight", "bias")):  # of a norm, or of a layer
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.copy_((torch.randn(parameter.shape, generator=generator) * deviation).to(parameter.dtype))
