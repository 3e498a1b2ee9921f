"""Which causal models answer in one batch, and up to what context: read from the configuration, then measured.

Whether one can is found when the server starts, with the reason where it cannot, and it is never served wrong.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hone.errors import BaseModelError
from serving.engine.cache import SlotCache, bytes_per_token
from serving.engine.decoder import FULL, SLIDING, Decoder, sliding_window
from serving.engine.lora import Segments

NEEDED_ARGUMENTS = ("attention_mask", "position_ids", "past_key_values", "logits_to_keep")
ATTENTION = {FULL, SLIDING}
ROPE_OF_THE_WHOLE_BATCH = {"dynamic", "longrope"}
"""These change every row's rotation once any row of the batch is longer than the original context."""
PROBE_TOKENS = 12
PROBE_WINDOW = 5
"""That layers of sliding attention get while it is tried whether the engine slides it as they do."""
MOST_ROWS, FEWEST_ROWS = 32, 16
"""Unless it is said how many: a step with 32 rows makes 1.25 times the tokens a second of one with 16 (docs/decisions/0024)."""


class CannotMixError(BaseModelError):
    """Rows of this architecture cannot share a batch."""


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative difference (in L2 norm) between two ways of computing the same logits in this type."""
    return 1e-3 if dtype == torch.float32 else 5e-2


def room_of(
    decoder: Decoder, *, token_bytes: int, positions: int, max_context: int | None, max_rows: int | None, memory_bytes: int
) -> tuple[int, int]:
    """Rows that run at once, and tokens that one of them may have, prompt and answer together.

    Args:
        decoder: The base, after `probe`.
        token_bytes: Keys and values of one token.
        positions: What its position embeddings reach.
        max_context: As it was asked for; without that, the most that the architecture and the memory allow.
        max_rows: As it was asked for; without that, `MOST_ROWS`, or fewer where each would have less than the whole context.
        memory_bytes: What may be spent on keys and values.

    Raises:
        BaseModelError: it cannot be served at the context that was asked for.
    """
    limits = {"its position embeddings": positions, **_limits(decoder)}
    reason, most = min(limits.items(), key=lambda item: item[1])
    if max_context is not None and max_context > most:
        name = type(decoder.model).__name__
        raise BaseModelError(f"max_context {max_context} is past what {name} can be served at: {most}, for {reason}")
    tokens = memory_bytes // token_bytes
    rows = max_rows or min(MOST_ROWS, max(FEWEST_ROWS, tokens // (max_context or most)))
    return rows, max_context or max(1, min(most, tokens // rows))


@torch.inference_mode()
def probe(decoder: Decoder) -> int:
    """Compare the slot engine with the model's own plain forward pass, on rows of different lengths, in pieces, one decode step included;
    where layers see a window of tokens, with one so short that it slides. If that alone goes wrong, the engine slides none
    (`decoder.window` is None), and the context stays within it.

    Returns:
        Bytes of one token's keys and values.

    Raises:
        CannotMixError: they differ.
    """
    if decoder.window is not None:
        try:
            with _short_window(decoder):
                return _compare(decoder)
        except CannotMixError:
            decoder.window = None
    return _compare(decoder)


@contextmanager
def _short_window(decoder: Decoder) -> Iterator[None]:
    """Inside the block, model and engine slide a window of `PROBE_WINDOW` tokens."""
    config, window = decoder.model.config.get_text_config(), decoder.window
    config.sliding_window = decoder.window = PROBE_WINDOW
    try:
        yield
    finally:
        config.sliding_window = decoder.window = window


def _compare(decoder: Decoder) -> int:
    """As `probe`, with the window as it is."""
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
    return bytes_per_token(cache)


def check_architecture(model: Any) -> None:
    """What its configuration and its signature say.

    Raises:
        CannotMixError: rows of this architecture cannot share a batch.
        BaseModelError: it is no decoder.
    """
    name, config = type(model).__name__, model.config.get_text_config()
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


def _limits(decoder: Decoder) -> dict[str, int]:
    """What the context must stay within for a batch of rows to be computed as each row alone would be."""
    limits, config = {}, decoder.model.config.get_text_config()
    if decoder.window is None and (window := sliding_window(config)):
        limits["its sliding window, which this engine does not slide as it does"] = int(window)
    if getattr(config, "attention_chunk_size", None):
        limits["its attention chunks, which this engine does not cut"] = int(config.attention_chunk_size)
    rope = getattr(config, "rope_parameters", None) or {}
    for settings in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
        if settings.get("rope_type") in ROPE_OF_THE_WHOLE_BATCH:
            original = settings.get("original_max_position_embeddings") or config.max_position_embeddings
            limits[f"{settings['rope_type']} rope, which past that would depend on the other rows of the batch"] = int(original)
    return limits
