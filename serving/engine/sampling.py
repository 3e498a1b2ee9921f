"""From logits to tokens, a different setting for each row.

A sampled token is a function of the row's logits and of one number in [0, 1) from the row's own generator, so a request with a seed
gives the same text in any company and on any device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chooser:
    """How one row chooses."""

    temperature: float
    """0 takes the likeliest token."""
    top_p: float
    """Only the likeliest tokens whose probabilities together reach this much (https://arxiv.org/abs/1904.09751)."""
    random: Random


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[int | None]:
    """The next token of each row of `logits` [rows, vocabulary]; None where they are not numbers any more."""
    best = logits.max(dim=-1)
    tokens = best.indices.tolist()
    finite = best.values.isfinite().tolist()
    sampled = [n for n, chooser in enumerate(choosers) if chooser.temperature > 0 and finite[n]]
    if sampled:
        for n, token in zip(sampled, _sample(logits[sampled], [choosers[n] for n in sampled]), strict=True):
            tokens[n] = token
    return [token if ok else None for token, ok in zip(tokens, finite, strict=True)]


def _sample(logits: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """Inverse transform sampling over the sorted probabilities of each row."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    # Shifted by the maximum first: a tiny temperature would send the logits to infinity otherwise.
    scaled = (logits.double() - logits.amax(-1, keepdim=True)) / column([chooser.temperature for chooser in choosers])
    probabilities, order = scaled.softmax(-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.where(before < column([chooser.top_p for chooser in choosers]), 0)
    reached = kept.cumsum(-1)
    drawn = column([chooser.random.random() for chooser in choosers]) * reached[:, -1:]
    index = (reached > drawn).to(torch.uint8).argmax(-1, keepdim=True)
    tokens: list[int] = order.gather(-1, index)[:, 0].tolist()
    return tokens
