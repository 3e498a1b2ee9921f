"""Attention over packed rows: rows laid end to end in one sequence, each attending to itself alone.

Registered with transformers as an attention implementation (https://huggingface.co/docs/transformers/attention_interface), so that every
model which uses that interface can run on it. Where the rows begin comes through the model as `cu_seq_lens_q`, by the names that
transformers gives flash attention's arguments. On a GPU in 16 bits one kernel does all rows (torch's `varlen_attn`); elsewhere each row
is one call of `scaled_dot_product_attention`, so no mask is ever made and nothing is computed between rows.
"""

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "hone_packed"


def register() -> str:
    """Make the implementation known to transformers; its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    return NAME


def can_pack(model: Any) -> bool:
    """Whether the model's attention can run on packed rows: all of it goes through the interface, and nothing else mixes tokens."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    return (
        bool(getattr(model, "_supports_attention_backend", False))
        and not getattr(model, "_is_stateful", False)
        and kinds <= {"full_attention", "sliding_attention"}
        and getattr(config, "attn_logit_softcapping", None) is None
        and config.model_type != "gpt_oss"  # attention sinks
    )


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - the interface's signature; rows are told apart by their bounds
    *,
    cu_seq_lens_q: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each row to itself.

    Args:
        query: [1, heads, tokens, width]; key and value [1, key-value heads, tokens, width].
        cu_seq_lens_q: Where rows begin, and at last where the last one ends: [rows + 1] int32.
        sliding_window: How many tokens a token sees at most, itself among them.

    Returns:
        [1, tokens, heads, width], and None for the weights, which are never made.
    """
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        return _by_one_kernel(query, key, value, cu_seq_lens_q, scaling=scaling, window=sliding_window, causal=causal), None
    grouped = query.shape[1] != key.shape[1]
    bounds = cu_seq_lens_q.tolist()
    rows = []
    for start, end in pairwise(bounds):
        within = sliding_window is not None and end - start > sliding_window
        rows.append(
            scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                attn_mask=_window_mask(end - start, sliding_window, causal=causal, device=query.device) if within else None,
                dropout_p=dropout,
                is_causal=causal and not within,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(rows, 2).transpose(1, 2), None


def _by_one_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    *,
    scaling: float | None,
    window: int | None,
    causal: bool,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)))
    longest = int((bounds[1:] - bounds[:-1]).max())
    reach = -1 if window is None else window - 1
    out: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(reach, 0 if causal else reach))
    return torch.as_tensor(out)[None]


def _window_mask(length: int, window: int | None, *, causal: bool, device: Any) -> torch.Tensor:
    """[length, length], True where a token sees another."""
    assert window is not None
    back = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (back < window) & ((back >= 0) if causal else (back > -window))
