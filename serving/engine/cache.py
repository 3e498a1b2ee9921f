"""Keys and values of the running rows, one slot per row.

A transformers `Cache` whose layers are [slots, heads, positions, head size] tensors written in place. Rows have their own positions, so a
row may join while others are in the middle of their answers. Running rows always fill slots 0..n-1: a forward pass sees a view of them,
never a gathered copy, and a row that leaves is replaced by the last one.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

FIRST_CAPACITY = 128
"""Positions allocated at first; doubled as rows grow, up to the context."""


@dataclass
class Window:
    """What the forward pass that is about to run writes and reads."""

    rows: slice
    """Slots of the rows in the batch; they are neighbours."""
    slots: Tensor
    """[rows, 1]: the same as indices."""
    positions: Tensor
    """[rows, tokens]: where each new token's keys and values go."""
    width: int
    """Positions that attention looks at, from 0."""


class SlotCache(Cache):  # type: ignore[misc]
    """Room for `slots` rows of up to `max_context` tokens."""

    def __init__(self, *, slots: int, max_context: int) -> None:
        self.window: Window | None = None
        self.slots = slots
        self.max_context = max_context
        self.capacity = min(FIRST_CAPACITY, max_context)
        super().__init__(layer_class_to_replicate=partial(SlotLayer, self))

    def aim(self, *, first: int, positions: Tensor, width: int) -> None:
        """Say where the next forward pass writes, growing the slots to `width` where they are shorter."""
        if width > self.capacity:
            capacity = min(self.max_context, max(2 * self.capacity, width))
            for layer in self.layers:
                layer.grow(capacity)
            self.capacity = capacity  # last: where memory runs out half-way, the next attempt grows the rest
        rows = slice(first, first + len(positions))
        slots = torch.arange(rows.start, rows.stop, device=positions.device)[:, None]
        self.window = Window(rows, slots, positions, width)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot over another."""
        for layer in self.layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def clear(self, slot: int) -> None:
        """Zero a slot. Masked positions still meet a weight of 0, and 0 times a left-over NaN would be NaN."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[slot] = 0
                layer.values[slot] = 0


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's slots."""

    keys: Tensor
    values: Tensor

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._empty(key_states, self._cache.capacity), self._empty(value_states, self._cache.capacity)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write [rows, heads, tokens, size] at the window's positions; return what attention looks at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self._cache.window
        assert window is not None, "SlotCache.aim comes before the forward pass"
        self.keys[window.slots, :, window.positions] = key_states.transpose(1, 2)
        self.values[window.slots, :, window.positions] = value_states.transpose(1, 2)
        return self.keys[window.rows, :, : window.width], self.values[window.rows, :, : window.width]

    def grow(self, capacity: int) -> None:
        if self.is_initialized:
            keys, values = self._empty(self.keys, capacity), self._empty(self.values, capacity)
            keys[:, :, : self.keys.shape[2]] = self.keys
            values[:, :, : self.values.shape[2]] = self.values
            self.keys, self.values = keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        return self._cache.window.width if self._cache.window else 0, 0

    def get_seq_length(self) -> int:
        """Rows have lengths of their own; every forward pass is given its position ids and mask, so nothing derives them from this."""
        return 0

    def get_max_length(self) -> int:
        return self._cache.max_context

    def _empty(self, like: Tensor, capacity: int) -> Tensor:
        """Zeros, not uninitialised memory: see `SlotCache.clear`."""
        return like.new_zeros(self._cache.slots, like.shape[1], capacity, like.shape[3])


def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * head_dim * dtype.itemsize)
