"""`lora`: low-rank updates beside frozen weights, and what has been made of it: rsLoRA, DoRA, PiSSA, LoRA+, QLoRA."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file

from hone.recipe import LoraMethod
from models.blocks import is_conv1d
from models.methods.by_peft import PeftMethod
from models.methods.method import Applying, State

START = "start"
"""Name of the frozen adapter that takes away what PiSSA begins from."""
PISSA_FILE = "pissa.safetensors"
LARGEST_DECOMPOSED = 1024
"""Rows and columns of a weight up to which its singular vectors are found exactly."""
SPARE_VECTORS = 16
"""More vectors than are wanted make those that are wanted better."""


class Lora(PeftMethod):
    """PEFT's LoraConfig. PiSSA is ours: PEFT's changes the frozen weights, after which the base cannot be had back."""

    name: ClassVar[str] = "lora"

    def config(self, model: Any, settings: LoraMethod, how: Applying) -> Any:
        from peft import LoraConfig

        heads = list(how.heads) or None
        return LoraConfig(
            task_type=how.task.peft_task_type,
            r=settings.r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=settings.target_modules,
            fan_in_fan_out=any(map(is_conv1d, model.modules())),
            modules_to_save=heads,
            exclude_modules=heads,
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
            init_lora_weights=True if settings.init_lora_weights == "pissa" else settings.init_lora_weights,
        )

    def apply(self, model: Any, settings: LoraMethod, how: Applying) -> Any:
        made = super().apply(model, settings, how)
        if settings.init_lora_weights == "pissa":
            _begin_from_singular_vectors(made, settings, how)
        return made

    @contextmanager
    def off(self, model: Any) -> Iterator[None]:
        with super().off(model):
            yield
        _freeze_start(model)  # PEFT has made everything that is active trainable again

    def trained(self, name: str, parameter: torch.nn.Parameter) -> bool:
        return parameter.requires_grad and f".{START}." not in name

    def save(self, model: Any, settings: LoraMethod, state: State, folder: Path) -> None:
        if settings.init_lora_weights != "pissa":
            super().save(model, settings, state, folder)
            return
        # W + s (B A - B0 A0) is one update of twice the rank, which any LoRA implementation reads.
        config, own = model.peft_config["default"], model.hone_pissa_start
        before = config.r, config.lora_alpha
        doubled = {name: _with_start(name, tensor, own) for name, tensor in state.items()}
        config.r, config.lora_alpha = 2 * before[0], before[1] * (math.sqrt(2) if settings.use_rslora else 2)
        try:
            model.save_pretrained(folder, state_dict=doubled, save_embedding_layers=False, selected_adapters=["default"])
        finally:
            config.r, config.lora_alpha = before


def quantisation(settings: Any) -> dict[str, Any]:
    """Options for `from_pretrained` that keep the frozen weights in NF4, where the recipe asks for it.

    Raises:
        RecipeError: there is no GPU, or bitsandbytes is not installed.
    """
    if not getattr(settings, "load_in_4bit", False):
        return {}
    import importlib.util

    from hone.errors import RecipeError

    if not torch.cuda.is_available():
        raise RecipeError("method.load_in_4bit needs a GPU on each worker; leave it out to train in 16 or 32 bits")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError("method.load_in_4bit needs bitsandbytes on each worker: pip install 'hone[qlora]'")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def _begin_from_singular_vectors(model: Any, settings: LoraMethod, how: Applying) -> None:
    """PiSSA (https://arxiv.org/abs/2404.02948): A and B begin as the largest part of each weight, and a frozen second adapter takes the
    same part away, so that the model begins as the base and the base's own weights are never written to."""
    config = model.peft_config["default"]
    frozen = type(config)(**{**config.to_dict(), "modules_to_save": None, "inference_mode": False})
    model.add_adapter(START, frozen)
    for _, layer in _lora_layers(model):  # not the heads, of which only one can be active
        layer.set_adapter(["default", START])
    kept = how.folder / PISSA_FILE if how.folder else None
    known = load_file(kept) if kept and kept.exists() else {}
    made: State = {}
    model.hone_pissa_start = {}  # beside the frozen adapter itself, of which ZeRO-3 leaves each rank a shard
    for name, layer in _lora_layers(model):
        base = layer.get_base_layer()
        if base.weight.is_meta:
            continue
        with how.gather([base.weight]):
            first = known.get(f"{name}.A")
            if first is None:
                a, b = _largest_part(base.weight.T if layer.fan_in_fan_out else base.weight, settings.r, layer.scaling["default"])
            else:
                a, b = first, known[f"{name}.B"]
        made |= {f"{name}.A": a, f"{name}.B": b}
        model.hone_pissa_start |= {f"{name}.lora_A.default.weight": a, f"{name}.lora_B.default.weight": -b}
        _fill(layer, "default", a, b, how)
        _fill(layer, START, a, -b, how)
    _freeze_start(model)
    if kept and how.rank == 0 and not known:
        save_file({name: tensor.contiguous() for name, tensor in made.items()}, kept.with_suffix(".new"))
        os.replace(kept.with_suffix(".new"), kept)  # whole or not at all: a restarted worker reads it


def _freeze_start(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if f".{START}." in name:
            parameter.requires_grad_(False)


def _largest_part(weight: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [out, rank] with scaling * B @ A the best approximation of the weight; of a large one nearly so, by power
    iteration (https://arxiv.org/abs/0909.4061), as a full decomposition of every layer would take the better part of an hour."""
    matrix = weight.detach().float().to("cuda" if torch.cuda.is_available() else "cpu")
    if min(matrix.shape) > LARGEST_DECOMPOSED:
        u, s, v = torch.svd_lowrank(matrix, q=min(rank + SPARE_VECTORS, *matrix.shape), niter=16)
        v = v.T
    else:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return (root[:, None] * v[:rank]).cpu(), (u[:, :rank] * root).cpu()


def _fill(layer: Any, adapter: str, a: torch.Tensor, b: torch.Tensor, how: Applying) -> None:
    weights = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    with how.write(weights), torch.no_grad():
        for weight, values in zip(weights, (a, b), strict=True):
            if weight.shape == values.shape:  # elsewhere only a shard is here, and rank 0 writes
                weight.copy_(values.to(weight))


def _lora_layers(model: Any) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer) and "default" in module.lora_A]


def _with_start(name: str, tensor: torch.Tensor, start: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor, start[name].to(tensor)], 0 if ".lora_A." in name else 1) if name in start else tensor
