"""AdamW over what trains, group by group, and the learning rate as a function of the step alone, so that it needs no state to resume."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hone.recipe import FreezeMethod, FullMethod, GradualUnfreezing, LoraMethod, OptimSettings, Recipe
from models.blocks import Depths, depths
from training.zero import elements


@dataclass(frozen=True, order=True)
class Group:
    """Parameters that learn alike."""

    scale: float
    """Its learning rate, as a share of the schedule's."""
    weight_decay: float
    thaws_at: int
    """The step (from 0) from which it trains."""


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of an optimiser, in its order."""

    groups: list[Group]
    parameters: list[list[torch.nn.Parameter]]
    names: list[list[str]]

    def set_step(self, optimizer: Any, step: int, learning_rate: float) -> None:
        """What trains at this step, and how fast. What has just thawed starts with an empty optimiser state, at any ZeRO stage."""
        for n, (group, parameters) in enumerate(zip(self.groups, self.parameters, strict=True)):
            is_thawed = step >= group.thaws_at
            optimizer.param_groups[n]["lr"] = learning_rate * group.scale if is_thawed else 0.0
            if parameters[0].requires_grad != is_thawed:
                for parameter in parameters:
                    parameter.requires_grad_(is_thawed)
            if step == group.thaws_at and step > 0:
                _forget(optimizer, n)

    @property
    def trained_parameters(self) -> int:
        """How many numbers there are in them."""
        return elements(self.trainable)

    @property
    def trainable(self) -> list[torch.nn.Parameter]:
        """All of them."""
        return list(self.named.values())

    @property
    def named(self) -> dict[str, torch.nn.Parameter]:
        """All of them, by their names in the model."""
        pairs = zip(self.names, self.parameters, strict=True)
        return {name: parameter for names, parameters in pairs for name, parameter in zip(names, parameters, strict=True)}


def make_optimizer(
    model: torch.nn.Module, recipe: Recipe, *, heads: Sequence[str] | None, steps_per_epoch: int
) -> tuple[torch.optim.AdamW, Groups]:
    """AdamW (https://arxiv.org/abs/1711.05101) over the parameters that require gradients.

    Args:
        model: With the method applied to it.
        heads: Names of the modules that start fresh.
        steps_per_epoch: After how many steps gradual unfreezing takes up the next layer, unless the recipe says.
    """
    optim, sorted_out = recipe.optim, defaultdict(list)
    heights = depths(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_head = any(f".{head}." in f".{name}" for head in heads or ())
            scale = _scale(name, recipe, heights, is_head=is_head)
            decay = optim.weight_decay if _is_matrix(parameter) else 0.0
            thaws_at = _thaws_at(name, recipe, heights, has_heads=bool(heads), epoch=steps_per_epoch)
            sorted_out[Group(scale, decay, thaws_at)].append((name, parameter))
    order = sorted(sorted_out, reverse=True)
    parameters = [[parameter for _, parameter in sorted_out[group]] for group in order]
    optimizer = torch.optim.AdamW(
        [{"params": held, "weight_decay": group.weight_decay} for group, held in zip(order, parameters, strict=True)],
        lr=optim.learning_rate,
        betas=optim.betas,
        eps=optim.eps,
    )
    return optimizer, Groups(order, parameters, [[name for name, _ in sorted_out[group]] for group in order])


def learning_rate(step: int, total_steps: int, settings: OptimSettings) -> float:
    """Learning rate of one step (from 0), as transformers' schedules of the same names give it."""
    warmup = math.ceil(total_steps * settings.warmup_ratio)
    if step < warmup:
        return settings.learning_rate * step / max(1, warmup)
    done = (step - warmup) / max(1, total_steps - warmup)
    match settings.lr_scheduler_type:
        case "linear":
            return settings.learning_rate * (1 - done)
        case "cosine":
            return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        case "constant":
            return settings.learning_rate
        case "wsd":
            falls = max(1, math.ceil(total_steps * settings.decay_ratio))
            return settings.learning_rate * min(1.0, (total_steps - step) / falls)


def _scale(name: str, recipe: Recipe, heights: Depths, *, is_head: bool) -> float:
    optim = recipe.optim
    if is_head:
        return (optim.head_learning_rate or optim.learning_rate) / optim.learning_rate
    scale = float(optim.layerwise_lr_decay ** (heights.top - heights.of(name)))
    is_second = isinstance(recipe.method, LoraMethod) and ".lora_B." in name
    return scale * (recipe.method.loraplus_lr_ratio if is_second and isinstance(recipe.method, LoraMethod) else 1.0)


def _thaws_at(name: str, recipe: Recipe, heights: Depths, *, has_heads: bool, epoch: int) -> int:
    gradual = recipe.method.gradual_unfreezing if isinstance(recipe.method, FullMethod | FreezeMethod) else None
    height = heights.of(name)
    if gradual is None or height == heights.top:
        return 0
    return _late(gradual, heights.layers - height, has_heads=has_heads) * (gradual.every_steps or epoch)


def _late(gradual: GradualUnfreezing, from_top: int, *, has_heads: bool) -> int:
    """After how many of the intervals the layer thaws that has so many above it."""
    at_start = gradual.start_layers or (0 if has_heads else 1)
    return max(0, from_top - at_start + 1)


def _is_matrix(parameter: torch.nn.Parameter) -> bool:
    """Not a bias, a norm's weight or a vector of factors. ZeRO-3 keeps the shape elsewhere."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) > 1 and math.prod(shape) > max(shape)


def _forget(optimizer: Any, number: int) -> None:
    """Empty the state of one group, which AdamW then begins anew. DeepSpeed has kept it at zero gradients, but has counted the steps."""
    inner = getattr(optimizer, "optimizer", optimizer)
    flat = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    if flat is None:
        held = inner.param_groups[number]["params"]
    else:  # ZeRO-3, whose groups are parted once more
        held = [part for n, part in enumerate(flat) if optimizer.sub_group_to_group_id[n] == number]
    for tensor in held:
        inner.state.pop(tensor, None)
