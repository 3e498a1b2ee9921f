"""Which causal models answer in one batch, and up to what context: read from the configuration, then measured.

Whether one can is found when the server starts, with the reason where it cannot, and it is never served wrong.
"""

import inspect
from typing import Any

import torch

from hone.errors import BaseModelError
from serving.engine.cache import SlotCache, bytes_per_token
from serving.engine.decoder import Decoder
from serving.engine.lora import Segments

NEEDED_ARGUMENTS = ("attention_mask", "position_ids", "past_key_values", "logits_to_keep")
ATTENTION = {"full_attention", "sliding_attention"}
ROPE_OF_THE_WHOLE_BATCH = {"dynamic", "longrope"}
"""These change every row's rotation once any row of the batch is longer than the original context."""
PROBE_TOKENS = 12
MOST_ROWS, FEWEST_ROWS = 32, 16
"""Unless it is said how many: a step with 32 rows makes 1.25 times the tokens a second of one with 16 (docs/decisions/0024)."""


class CannotMixError(BaseModelError):
    """Rows of this architecture cannot share a batch."""


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative difference (in L2 norm) between two ways of computing the same logits in this type."""
    return 1e-3 if dtype == torch.float32 else 5e-2


def room_of(model: Any, *, positions: int, max_context: int | None, max_rows: int | None, memory_bytes: int) -> tuple[int, int]:
    """Rows that run at once, and tokens that one of them may have, prompt and answer together.

    Args:
        model: The base.
        positions: What its position embeddings reach.
        max_context: As it was asked for; without that, the most that the architecture and the memory allow.
        max_rows: As it was asked for; without that, `MOST_ROWS`, or fewer where each would have less than the whole context.
        memory_bytes: What may be spent on keys and values.

    Raises:
        CannotMixError: rows of this architecture cannot share a batch.
        BaseModelError: it is no decoder, or cannot be served at the context that was asked for.
    """
    config = model.config.get_text_config()
    _check_architecture(model, config)
    limits = {"its position embeddings": positions, **_window_limits(config)}
    reason, most = min(limits.items(), key=lambda item: item[1])
    if max_context is not None and max_context > most:
        raise BaseModelError(f"max_context {max_context} is past what {type(model).__name__} can be served at: {most}, for {reason}")
    tokens = memory_bytes // bytes_per_token(config, model.dtype)
    rows = max_rows or min(MOST_ROWS, max(FEWEST_ROWS, tokens // (max_context or most)))
    return rows, max_context or max(1, min(most, tokens // rows))


def probe(decoder: Decoder) -> None:
    """Compare the slot engine with the model's own plain forward pass, on rows of different lengths, in pieces, one decode step included.

    Raises:
        CannotMixError: they differ.
    """
    model = decoder.model
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    lengths = (PROBE_TOKENS, PROBE_TOKENS // 2)
    rows = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
    wanted = torch.cat([model(input_ids=torch.tensor([row], device=decoder.device)).logits[:, -1].float() for row in rows])
    cache = SlotCache(slots=len(rows), max_context=PROBE_TOKENS)
    try:
        pieces = [([row[:3] for row in rows], [0, 0]), ([row[3:-1] for row in rows], [3, 3])]
        for chunks, starts in pieces:
            decoder.prefill(cache, chunks, [None, None], first=0, starts=starts)
        got = decoder.decode(cache, [row[-1] for row in rows], [len(row) - 1 for row in rows], Segments([None, None]))
    except Exception as error:  # of whatever kind: each architecture has its own way of refusing a mask or positions
        raise CannotMixError(f"{type(model).__name__}: {error}") from error
    difference = float((got - wanted).norm() / wanted.norm())
    if not difference <= tolerance(model.dtype):
        raise CannotMixError(
            f"{type(model).__name__}: rows in one batch do not give what each gives alone (relative difference {difference:.2g}), "
            "so its adapters cannot be mixed"
        )


def _check_architecture(model: Any, config: Any) -> None:
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise BaseModelError(f"{name} is an encoder-decoder; this engine serves decoders and encoders")
    missing = [argument for argument in NEEDED_ARGUMENTS if argument not in inspect.signature(model.forward).parameters]
    if missing:
        raise CannotMixError(f"{name} takes no {', '.join(missing)}, so rows of different lengths cannot share a batch")
    other = sorted(set(getattr(config, "layer_types", None) or []) - ATTENTION)
    if other or getattr(model, "_is_stateful", False):
        kinds = ", ".join(other) or "recurrent layers"
        raise CannotMixError(
            f"{name} keeps a state that is not keys and values ({kinds}), so rows of different lengths cannot share a batch"
        )


def _window_limits(config: Any) -> dict[str, int]:
    """What the context must stay within for a batch of rows to be computed as each row alone would be."""
    limits = {}
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if windowed and getattr(config, "sliding_window", None):
        limits["its sliding window, which this engine does not slide"] = int(config.sliding_window)
    if getattr(config, "attention_chunk_size", None):
        limits["its attention chunks, which this engine does not cut"] = int(config.attention_chunk_size)
    rope = getattr(config, "rope_parameters", None) or {}
    for settings in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
        if settings.get("rope_type") in ROPE_OF_THE_WHOLE_BATCH:
            original = settings.get("original_max_position_embeddings") or config.max_position_embeddings
            limits[f"{settings['rope_type']} rope, which past that would depend on the other rows of the batch"] = int(original)
    return limits
