"""AdamW over what trains, and the learning rate as a function of the step alone, so that it needs no state to resume."""

import math
from typing import Any

import torch

from hone.recipe import OptimSettings


def make_optimizer(model: torch.nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101) over the parameters that require gradients."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        trainable, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )


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


def set_learning_rate(optimizer: Any, value: float) -> None:
    """Set it on every group of a torch optimiser or of DeepSpeed's wrapper round one."""
    for group in optimizer.param_groups:
        group["lr"] = value
