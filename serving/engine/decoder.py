"""Forward passes of a causal model over the slot cache: pieces of the prompts of new rows, and one token for every running row.

Both ask the model for what it documents: explicit position ids and a 4-D mask, which transformers passes on as it is; where some layers
see all tokens and some a window of them, a mask for each kind of layer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from serving.engine.cache import SlotCache
from serving.engine.lora import Mixer, RowPlan, Rows, Segments

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, as configurations name them."""


def sliding_window(config: Any) -> int | None:
    """Tokens that layers of sliding attention see by a text configuration, the one that asks among them; None where all layers see all."""
    slides = SLIDING in (getattr(config, "layer_types", None) or [SLIDING])
    return (slides and getattr(config, "sliding_window", None)) or None


class Decoder:
    """A causal model whose linear layers are wrapped by `mixer`."""

    def __init__(self, model: Any, mixer: Mixer) -> None:
        self.model = model
        self.mixer = mixer
        self.device: torch.device = model.device
        self._boolean_mask = model.config._attn_implementation == "sdpa"
        config = model.config.get_text_config()
        self.window = sliding_window(config)
        """See `sliding_window`; None too where the engine is not to slide it."""
        self._alternates = set(getattr(config, "layer_types", None) or ()) >= {FULL, SLIDING}

    def prefill(
        self, cache: SlotCache, chunks: Sequence[Sequence[int]], rows: Rows, *, first: int, starts: Sequence[int] | None = None
    ) -> Tensor:
        """Read a piece of the prompt of each row, into the slots from `first`.

        Pieces are padded on the left, so that all end at the same place and logits are made there alone. What padding writes lies at the
        position after the piece, is attended to by padding only, and is overwritten as the row goes on. Give rows sorted by adapter.

        Args:
            chunks: The pieces, none empty.
            starts: Positions that each slot already holds; none by default.

        Returns:
            [rows, vocabulary] float32: the logits after each piece's last token.
        """
        starts = starts or [0] * len(chunks)
        longest = max(map(len, chunks))
        width = max(start + len(chunk) for start, chunk in zip(starts, chunks, strict=True))
        ids = torch.tensor([[0] * (longest - len(chunk)) + list(chunk) for chunk in chunks], device=self.device)
        places = []
        for start, chunk in zip(starts, chunks, strict=True):
            end = start + len(chunk)
            places.append([end] * (longest - len(chunk)) + list(range(start, end)))
        positions = torch.tensor(places, device=self.device)
        cache.aim(first=first, positions=positions, width=min(width + 1, cache.max_context))
        return self._forward(cache, ids, positions, Segments(list(rows)))

    def decode(self, cache: SlotCache, tokens: Sequence[int], lengths: Sequence[int], plan: RowPlan) -> Tensor:
        """Read one more token of each row in slots 0..n-1; `lengths` are the positions already filled, `plan` the rows' adapters.

        Returns:
            [rows, vocabulary] float32: the logits after that token.
        """
        positions = torch.tensor(lengths, device=self.device)[:, None]
        cache.aim(first=0, positions=positions, width=max(lengths) + 1)
        ids = torch.tensor(tokens, device=self.device)[:, None]
        return self._forward(cache, ids, positions, plan)

    def _forward(self, cache: SlotCache, ids: Tensor, positions: Tensor, plan: RowPlan) -> Tensor:
        """Logits [rows, vocabulary] after the last of `ids` [rows, tokens]; each token attends to its position and those before it."""
        assert cache.window is not None, "SlotCache.aim comes first"
        mask = self._masks(torch.arange(cache.window.width, device=self.device), positions[:, :, None])
        with self.mixer.running(plan, tokens=ids.shape[1]):
            out = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        logits: Tensor = out.logits[:, -1]
        return logits.float()

    def _masks(self, places: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
        """What tokens at `positions` [rows, tokens, 1] see of `places` [width]: themselves and those before them, as far as the layers look
        back."""
        past = places <= positions
        if self.window is None:
            return self._mask(past)
        near = self._mask(past & (places > positions - self.window))
        return {FULL: self._mask(past), SLIDING: near} if self._alternates else near

    def _mask(self, seen: Tensor) -> Tensor:
        """[rows, tokens, width] booleans as [rows, 1, tokens, width] of what the model's attention takes."""
        mask = seen[:, None]
        if self._boolean_mask:
            return mask
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=self.device).masked_fill_(~mask, torch.finfo(dtype).min)
