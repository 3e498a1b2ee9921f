"""From logits to tokens, a different setting for each row.

A sampled token is a function of the row's logits and of one number in [0, 1) from the row's own generator, so a request with a seed
gives the same text in any company and on any device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from serving.engine.constraint import Constraint


@dataclass(frozen=True)
class Chooser:
    """How one row chooses. The filters act in the order of the fields, each on what the one before it left."""

    random: Random
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Only the likeliest k tokens; 0 is all of them."""
    top_p: float = 1.0
    """Only the likeliest tokens whose probabilities together reach this much (https://arxiv.org/abs/1904.09751)."""
    min_p: float = 0.0
    """Only tokens with at least this part of the likeliest one's probability (https://arxiv.org/abs/2407.01082)."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for every time that the answer has it."""
    presence_penalty: float = 0.0
    """Taken off a token's logit where the answer has it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    logprobs: int | None = None
    """Log probabilities of the chosen token and of this many of the likeliest; None wants none."""
    constraint: Constraint | None = None
    """What the answer must be written as; no setting above allows a token that this forbids."""
    counts: dict[int, int] = field(default_factory=dict)
    """How often each token was chosen, where a penalty asks."""
    is_seeded: bool = False
    """Whether `random` follows from a seed that the request gave."""

    @property
    def counts_tokens(self) -> bool:
        return bool(self.frequency_penalty or self.presence_penalty)

    @property
    def sorts(self) -> bool:
        """Whether only some of the likeliest tokens may be chosen."""
        return self.top_k > 0 or self.top_p < 1

    def adjustments(self) -> dict[int, float]:
        """Token -> what is added to its logit."""
        added = dict(self.logit_bias)
        if self.counts_tokens:
            for token, count in self.counts.items():
                added[token] = added.get(token, 0.0) - self.presence_penalty - count * self.frequency_penalty
        return added


@dataclass(frozen=True)
class Chosen:
    """The next token of a row."""

    token: int
    logprob: float | None = None
    """Of the model's own distribution, before temperature, filters, penalties, biases and constraints; None where it was not asked for."""
    likeliest: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens of that distribution with their log probabilities, likeliest first."""


def make_chooser(*, seed: int | None, choice: int, **settings: object) -> Chooser:
    """The chooser of the `choice`-th answer to a request; without a seed it is different every time."""
    random = Random() if seed is None else Random(f"{seed}/{choice}")
    return Chooser(random, is_seeded=seed is not None, **settings)  # type: ignore[arg-type]


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[Chosen | None]:
    """The next token of each row of `logits` [rows, vocabulary]; None where they are not numbers any more, or where the row's constraint
    has failed."""
    adjusted = _constrained(_adjusted(logits, choosers), choosers)
    # Where a constraint leaves no token, the largest of what is left is no number either.
    finite = adjusted.amax(dim=-1).isfinite().tolist()
    tokens = _tokens(adjusted, choosers, finite)
    chosen: list[Chosen | None] = [Chosen(token) if ok else None for token, ok in zip(tokens, finite, strict=True)]
    for n, chooser in enumerate(choosers):
        if chooser.counts_tokens:
            chooser.counts[tokens[n]] = chooser.counts.get(tokens[n], 0) + 1
        if chooser.constraint is not None and finite[n]:
            chooser.constraint.take(tokens[n])
    asked = [n for n, chooser in enumerate(choosers) if chooser.logprobs is not None and finite[n]]
    for n, scored in zip(asked, _scored(logits, asked, tokens, choosers), strict=True):
        chosen[n] = scored
    return chosen


def _adjusted(logits: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """Logits with biases and penalties; the same tensor where no row has any."""
    added = [(n, token, value) for n, chooser in enumerate(choosers) for token, value in chooser.adjustments().items()]
    if not added:
        return logits
    rows, tokens, values = zip(*added, strict=True)
    where = torch.tensor([rows, tokens], device=logits.device)
    return logits.index_put((where[0], where[1]), torch.tensor(values, dtype=logits.dtype, device=logits.device), accumulate=True)


def _constrained(logits: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """Logits of minus infinity where a row's constraint forbids the token; the same tensor where no row has one."""
    constraints = [(n, chooser.constraint) for n, chooser in enumerate(choosers) if chooser.constraint is not None]
    if not constraints:
        return logits
    allowed = torch.stack([constraint.allowed(logits.shape[-1]) for _, constraint in constraints]).to(logits.device)
    rows = torch.tensor([n for n, _ in constraints], device=logits.device)
    return logits.index_copy(0, rows, logits[rows].where(allowed, -torch.inf))


def _tokens(logits: Tensor, choosers: Sequence[Chooser], finite: Sequence[bool]) -> list[int]:
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    for sorts, sample in ((False, _sample), (True, _sample_likeliest)):
        rows = [n for n, each in enumerate(choosers) if each.temperature > 0 and each.sorts == sorts and finite[n]]
        if rows:
            taken = logits if len(rows) == len(logits) else logits[rows]
            for n, token in zip(rows, sample(taken, [choosers[n] for n in rows]), strict=True):
                tokens[n] = token
    return tokens


def _sample(logits: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """Inverse transform sampling over all tokens, in the order of the vocabulary: sorting one of 150,000 takes far longer."""
    probabilities = _probabilities(logits, choosers)
    tokens: list[int] = _drawn(_without_unlikely(probabilities, choosers), choosers)[:, 0].tolist()
    return tokens


def _sample_likeliest(logits: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """Inverse transform sampling over the sorted probabilities of each row, those past top-k and top-p left out."""
    probabilities, order = _probabilities(logits, choosers).sort(descending=True, stable=True)
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    top_k = _column([chooser.top_k or logits.shape[-1] for chooser in choosers], logits)
    probabilities = probabilities.where(ranks < top_k, 0)
    before = probabilities.cumsum(-1) - probabilities
    top_p = _column([chooser.top_p for chooser in choosers], logits) * probabilities.sum(-1, keepdim=True)
    kept = _without_unlikely(probabilities.where(before < top_p, 0), choosers)
    tokens: list[int] = order.gather(-1, _drawn(kept, choosers))[:, 0].tolist()
    return tokens


def _probabilities(logits: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    # Shifted by the maximum first: a tiny temperature would send the logits to infinity otherwise.
    shifted = logits.double() - logits.amax(-1, keepdim=True)
    return (shifted / _column([chooser.temperature for chooser in choosers], logits)).softmax(-1)


def _without_unlikely(probabilities: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    if not any(chooser.min_p for chooser in choosers):
        return probabilities
    least = _column([chooser.min_p for chooser in choosers], probabilities) * probabilities.amax(-1, keepdim=True)
    return probabilities.where(probabilities >= least, 0)


def _drawn(kept: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """[rows, 1]: where one number of each row's generator falls among the probabilities that were kept."""
    reached = kept.cumsum(-1)
    drawn = _column([chooser.random.random() for chooser in choosers], kept) * reached[:, -1:]
    return (reached > drawn).to(torch.uint8).argmax(-1, keepdim=True)


def _scored(logits: Tensor, rows: Sequence[int], tokens: Sequence[int], choosers: Sequence[Chooser]) -> list[Chosen]:
    """The choices of `rows` with their log probabilities."""
    if not rows:
        return []
    logprobs = logits[list(rows)].float().log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor([tokens[n] for n in rows], device=logits.device)[:, None])[:, 0].tolist()
    most = min(max(choosers[n].logprobs or 0 for n in rows), logits.shape[-1])
    values, indices = (tensor.tolist() for tensor in logprobs.topk(most, dim=-1))
    return [
        Chosen(tokens[n], own[at], tuple(zip(indices[at], values[at], strict=True))[: choosers[n].logprobs]) for at, n in enumerate(rows)
    ]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
