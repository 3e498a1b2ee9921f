"""Where things stand in a model, whatever its architecture: its layers from the lowest to the highest, and what each of them ends with."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

AFTER_ATTENTION = (
    "o_proj",
    "out_proj",
    "out_lin",
    "attention.output.dense",
    "attn.c_proj",
    "self_attn.dense",
    "self_attention.dense",
    "SelfAttention.o",
    "EncDecAttention.o",
    "wo_proj",
)
"""Ends of the names of the layers that end an attention block."""
AFTER_FEEDFORWARD = (
    "down_proj",
    "fc2",
    "lin2",
    "mlp.c_proj",
    "dense_4h_to_h",
    "fc_out",
    "DenseReluDense.wo",
    "output_dense",
    "output.dense",
    "mlp.wo",
    "mlp.Wo",
)
"""Likewise of a feed-forward block; what is in AFTER_ATTENTION is not meant."""
KEYS_AND_VALUES = (
    *("k_proj", "v_proj", "key", "value", "k_lin", "v_lin", "key_proj", "value_proj"),
    *("SelfAttention.k", "SelfAttention.v", "EncDecAttention.k", "EncDecAttention.v"),
    *("query_key_value", "qkv_proj", "c_attn", "Wqkv", "qkv"),
)


@dataclass(frozen=True)
class Depths:
    """How high each parameter stands: 0 for embeddings, 1 for the lowest layer, and so on; `top` for what is above all layers."""

    lists: tuple[tuple[str, int], ...]
    """Name of each list of layers, and how many layers stand below it."""
    layers: int

    @property
    def top(self) -> int:
        return self.layers + 1

    def of(self, name: str) -> int:
        """The height of a parameter by its name."""
        for prefix, below in self.lists:
            if name.startswith(prefix):
                return below + int(name[len(prefix) :].split(".", 1)[0]) + 1
        return 0 if any(part in EMBEDDINGS or part.endswith("embeddings") for part in name.split(".")) else self.top


EMBEDDINGS = {
    *("embed_tokens", "wte", "wpe", "word_embeddings", "shared", "embed_positions", "layernorm_embedding"),
    *("patch_embedding", "feature_extractor", "feature_projection", "pos_conv_embed", "conv1", "conv2", "embed_in"),
}


def depths(model: Any) -> Depths:
    """Find the lists of layers of a transformers model (an encoder-decoder has two; the decoder's stand above the encoder's)."""
    found: list[tuple[str, int]] = []
    for name, module in model.named_modules():
        is_layers = isinstance(module, torch.nn.ModuleList) and len({type(child) for child in module}) == 1
        inside = any(name.startswith(prefix) for prefix, _ in found)
        if is_layers and not inside and any(isinstance(part, torch.nn.Linear) or is_conv1d(part) for part in module.modules()):
            found.append((f"{name}.", len(module)))
    lists, below = [], 0
    for prefix, count in found:
        lists.append((prefix, below))
        below += count
    return Depths(tuple(lists), below)


def ending(model: Any, ends: Iterable[str], *, but: Iterable[str] = ()) -> list[str]:
    """Full names of the linear layers whose names end so, in the order of the model, the head's not among them."""
    heights = depths(model)
    inside = tuple(prefix for prefix, _ in heights.lists)
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, torch.nn.Linear) or is_conv1d(module))
        and name.startswith(inside)
        and _ends(name, ends)
        and not _ends(name, but)
    ]


def is_conv1d(module: Any) -> bool:
    """GPT-2's linear layer, whose weight stands the other way round."""
    return type(module).__name__ == "Conv1D"


def linear_names(model: Any) -> list[str]:
    """The last part of the name of each linear layer, for messages."""
    return sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)})


def _ends(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)
