"""Slices of a packed sequence, for workers that share it: each runs the layers over its own slice, and attention alone sees all of it.

The slices of a batch are cut from the whole of it, after positions were counted and targets were set beside the tokens that predict them;
so what stands on the border between two slices is as it would be without one.
"""

from typing import Any

import torch
from torch.nn.functional import pad

from models.attention import can_pack
from models.tasks.causal import learns_prompt
from models.tasks.task import Batch

BY_LONGEST = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies follow from the longest position of a forward pass, which is another one in each slice."""


def slice_of(batch: Batch, *, number: int, of: int, pad_token_id: int) -> Batch:
    """One of so many slices of like length of a packed batch.

    Args:
        batch: What `models.tasks.causal.collate` made, packed.
        number: Which slice, from 0.
        of: How many there are.
        pad_token_id: For the tokens that are added where the length does not divide, as one more row that has no target.

    Returns:
        The same tensors: `input_ids` and `position_ids` [1, tokens / of]; `targets`, `predicted_at`, `row_of_target` and `last` of what
        stands in the slice, counted from its first token; `cu_seq_lens_q` of the whole sequence, which attention is over.
    """
    bounds, tokens = batch["cu_seq_lens_q"], batch["input_ids"].shape[1]
    added = -tokens % of
    width = (tokens + added) // of
    begin = number * width
    if added:
        bounds = torch.cat([bounds, bounds.new_tensor([tokens + added])])
    here = _within(batch["predicted_at"], begin, width)
    last = batch["last"][_within(batch["last"], begin, width)]
    return {
        "input_ids": pad(batch["input_ids"], (0, added), value=pad_token_id)[:, begin : begin + width],
        "position_ids": pad(batch["position_ids"], (0, added))[:, begin : begin + width],
        "cu_seq_lens_q": bounds,
        "targets": batch["targets"][here],
        "predicted_at": batch["predicted_at"][here] - begin,
        "row_of_target": batch["row_of_target"][here],
        "last": last - begin,
    }


def why_not_sliced(model: Any, *, of: int) -> str | None:
    """Why so many workers cannot share a sequence of this model; None where they can."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    if heads % of:
        return f"its {heads} attention heads do not divide among {of} workers"
    if learns_prompt(model) or not can_pack(model):
        return f"rows cannot be packed for {config.model_type}, and only packed ones are cut"
    if found := _rope_types(getattr(config, "rope_parameters", None) or {}) & set(BY_LONGEST):
        return f"its rotary embedding ({found.pop()}) follows from the longest position in a pass, and each slice has another one"
    return None


def _within(places: torch.Tensor, begin: int, width: int) -> torch.Tensor:
    return (places >= begin) & (places < begin + width)


def _rope_types(rope: dict[str, Any]) -> set[Any]:
    """Of the model, or of each kind of its layers."""
    return {part["rope_type"] for part in (rope, *rope.values()) if isinstance(part, dict) and "rope_type" in part}
