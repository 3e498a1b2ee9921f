"""`adapter`: small bottleneck layers behind frozen ones, where they end the attention and feed-forward blocks.

Ours, as PEFT has none. Saved beside PEFT's format: the same two file names, names of tensors as they are in the model.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hone.errors import RecipeError
from hone.recipe import AdapterMethod
from models.blocks import AFTER_ATTENTION, AFTER_FEEDFORWARD, ending
from models.methods.by_peft import no_targets
from models.methods.method import Applying, State

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PEFT_TYPE = "BOTTLENECK"
"""What the configuration says in PEFT's place for the kind of adapter. PEFT does not know it and refuses the folder."""
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
START_DEVIATION = 1e-2
"""Of the down projection at the start; the up projection starts at zero, and so the model as the base."""


class Bottleneck(nn.Module):
    """A layer of the base and a bottleneck behind it: h + up(activation(down(h)))."""

    def __init__(self, base: Any, width: int, *, size: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.is_on = True
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.down = nn.Linear(width, size, **like)
        self.up = nn.Linear(size, width, **like)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        if not self.down.weight.is_meta:
            nn.init.normal_(self.down.weight, std=START_DEVIATION)
            nn.init.zeros_(self.down.bias)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out], as the layer of the base."""
        h: torch.Tensor = self.base(x)
        return h + self.up(self.dropout(self.activation(self.down(h)))) if self.is_on else h

    @property
    def weight(self) -> torch.Tensor:
        """Some models look at the type of a layer's weight (T5)."""
        weight: torch.Tensor = self.base.weight
        return weight


class Adapter:
    """Houlsby's two or Pfeiffer's one a layer."""

    name: ClassVar[str] = "adapter"

    def apply(self, model: Any, settings: AdapterMethod, how: Applying) -> Any:
        heads = list(how.heads)
        names = _targets(model, settings)
        model.requires_grad_(False)
        _insert(model, names, settings)
        for name in heads:
            model.get_submodule(name).requires_grad_(True)
        model.hone_adapter = {"target_modules": names, "modules_to_save": heads}
        return model

    @contextmanager
    def off(self, model: Any) -> Iterator[None]:
        inserted = [module for module in model.modules() if isinstance(module, Bottleneck)]
        for module in inserted:
            module.is_on = False
        try:
            yield
        finally:
            for module in inserted:
                module.is_on = True

    def trained(self, name: str, parameter: nn.Parameter) -> bool:  # noqa: ARG002 - the protocol's signature
        return parameter.requires_grad

    def save(self, model: Any, settings: AdapterMethod, state: State, folder: Path) -> None:
        described = {"peft_type": PEFT_TYPE, **settings.model_dump(), **model.hone_adapter}
        (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n")
        kept = {name: tensor.contiguous() for name, tensor in state.items() if _is_learnt(name, model.hone_adapter["modules_to_save"])}
        save_file(kept, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    def load(self, model: Any, folder: Path) -> Any:
        described = json.loads((folder / CONFIG_FILE).read_text())
        heads, names = described["modules_to_save"], described["target_modules"]
        settings = AdapterMethod.model_validate({key: described[key] for key in AdapterMethod.model_fields})
        _insert(model, names, settings)
        model.hone_adapter = {"target_modules": names, "modules_to_save": heads}
        state = load_file(folder / WEIGHTS_FILE)
        wanted = {name for name, _ in model.named_parameters() if _is_learnt(name, heads)}
        if wanted != set(state):
            odd = sorted(wanted ^ set(state))
            raise RecipeError(f"{folder}: {len(odd)} tensors are not those of this base ({odd[0]}, ...)")
        model.load_state_dict(state, strict=False)
        return model

    def merge(self, model: Any) -> Any:  # noqa: ARG002
        raise RecipeError("bottleneck layers are no change of the base's weights and cannot be merged into them; serve it with hone")


def _insert(model: Any, names: list[str], settings: AdapterMethod) -> None:
    for name in names:
        base = model.get_submodule(name)
        width = base.out_features if isinstance(base, nn.Linear) else base.nf
        made = Bottleneck(base, width, size=settings.bottleneck_size, activation=settings.activation, dropout=settings.adapter_dropout)
        model.set_submodule(name, made)


def _targets(model: Any, settings: AdapterMethod) -> list[str]:
    if settings.target_modules:
        names = ending(model, settings.target_modules)
    else:
        attention = ending(model, AFTER_ATTENTION) if settings.placement == "houlsby" else []
        names = [*attention, *ending(model, AFTER_FEEDFORWARD, but=AFTER_ATTENTION)]
    if not names:
        raise no_targets(model, settings.target_modules)
    return names


def _is_learnt(name: str, heads: list[str]) -> bool:
    return ".down." in name or ".up." in name or name.startswith(tuple(f"{head}." for head in heads))
