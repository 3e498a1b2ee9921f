"""Keys and values of the running rows, one slot per row.

A transformers `Cache` whose layers are [slots, heads, positions, head size] tensors written in place. Rows have their own positions, so a
row may join while others are in the middle of their answers. Running rows always fill slots 0..n-1: a forward pass sees a view of them,
never a gathered copy, and a row that leaves is replaced by the last one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

FIRST_CAPACITY = 128
"""Positions allocated at first; doubled as rows grow, up to the context."""
CHUNK = 64
"""Blocks kept aside for which memory is taken at once."""


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
        self.reach(width)
        rows = slice(first, first + len(positions))
        slots = torch.arange(rows.start, rows.stop, device=positions.device)[:, None]
        self.window = Window(rows, slots, positions, width)

    def reach(self, width: int) -> None:
        """Make the slots at least `width` positions long."""
        if width > self.capacity:
            capacity = min(self.max_context, max(2 * self.capacity, width))
            for layer in self.layers:
                layer.grow(capacity)
            self.capacity = capacity  # last: where memory runs out half-way, the next attempt grows the rest

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
        if self.is_initialized and capacity > self.keys.shape[2]:
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


class BlockStore:
    """Pieces of slots, kept aside. Memory is taken a chunk of blocks at a time, so that nothing is copied when it grows."""

    def __init__(self, cache: SlotCache, *, block: int) -> None:
        self._cache = cache
        self._block = block
        self._chunks: list[list[tuple[Tensor, Tensor]]] = []
        """Of each chunk, of each layer: [CHUNK, heads, block, size] for the keys and for the values."""

    def save(self, places: Sequence[int], *, slot: int, first: int) -> None:
        """Copy a slot's blocks from the `first`-th on to `places`."""
        while max(places) >= CHUNK * len(self._chunks):
            self._chunks.append([(self._empty(layer.keys), self._empty(layer.values)) for layer in self._cache.layers])
        for chunk, index, blocks in self._runs(places):
            span = slice((first + blocks.start) * self._block, (first + blocks.stop) * self._block)
            for layer, (keys, values) in zip(self._cache.layers, chunk, strict=True):
                for kept, whole in ((keys, layer.keys), (values, layer.values)):
                    kept[index] = whole[slot, :, span].unflatten(1, (len(index), self._block)).transpose(0, 1)

    def load(self, places: Sequence[int], *, slot: int) -> None:
        """Copy the blocks at `places` to the beginning of a slot, one behind the other."""
        self._cache.reach(len(places) * self._block)
        for chunk, index, blocks in self._runs(places):
            span = slice(blocks.start * self._block, blocks.stop * self._block)
            for layer, (keys, values) in zip(self._cache.layers, chunk, strict=True):
                for kept, whole in ((keys, layer.keys), (values, layer.values)):
                    whole[slot, :, span] = kept[index].transpose(0, 1).flatten(1, 2)

    def _runs(self, places: Sequence[int]) -> Iterator[tuple[list[tuple[Tensor, Tensor]], Tensor, range]]:
        """Neighbours in `places` that lie in one chunk: the chunk, where in it they lie, and which of `places` they are."""
        for number, run in groupby(range(len(places)), key=lambda n: places[n] // CHUNK):
            blocks = list(run)
            index = torch.tensor([places[n] % CHUNK for n in blocks], device=self._chunks[0][0][0].device)
            yield self._chunks[number], index, range(blocks[0], blocks[-1] + 1)

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_empty(CHUNK, like.shape[1], self._block, like.shape[3])


def bytes_per_token(cache: Cache) -> int:
    """Keys and values of one token in all layers of a cache that holds some. Measured, for no configuration says it of every architecture:
    layers may differ, or share, or keep something smaller."""
    kept = [tensor for layer in cache.layers for name in ("keys", "values") if (tensor := getattr(layer, name, None)) is not None]
    return max(1, sum(int(tensor[0, :, 0].nbytes) for tensor in kept))
