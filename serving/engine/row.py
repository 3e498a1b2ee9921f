"""One answer in the making: what it was asked with, what it has so far, and what it tells whoever waits for it."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from serving.engine.fairness import EVERYONE, Tenant
from serving.engine.lora import AdapterWeights
from serving.engine.measures import Measures
from serving.engine.sampling import Chooser, Chosen
from serving.engine.text import TextStream, TokenText, token_text
from serving.errors import DeadlineError, EngineError, RequestError

BASE = ""
"""Stands for the digest of no adapter."""


@dataclass(frozen=True)
class TokenScore:
    """A token as text, and how likely the model found it."""

    token: TokenText
    logprob: float
    likeliest: "tuple[TokenScore, ...]" = ()
    """The likeliest tokens at its place, themselves without such a list."""
    begins: int = 0
    """Characters of the answer before it."""


@dataclass(frozen=True)
class TextPiece:
    """More of the answer."""

    text: str
    scores: tuple[TokenScore, ...] = ()
    """Of the tokens that begin in this text, where they were asked for."""
    tokens: int = 0
    """That were made so far."""


@dataclass(frozen=True)
class Ended:
    """The answer is complete."""

    reason: str
    """`stop` (end of turn, a stop string, or nothing that the row's constraint lets follow) or `length` (max_tokens)."""
    tokens: int
    """Tokens that the model made, the end-of-turn token included."""


Event = TextPiece | Ended | RequestError


@dataclass(eq=False)
class Row:
    """One answer in the making."""

    prompt: Sequence[int]
    adapter: AdapterWeights | None
    chooser: Chooser
    text: TextStream
    end_ids: frozenset[int]
    max_tokens: int
    emit: Callable[[Event], None]
    """Called on the model's thread."""
    tenant: Tenant = EVERYONE
    deadline: float = math.inf
    """When it is given up, by `time.monotonic()`."""
    asked_at: float = field(default_factory=time.monotonic)
    """When the replica had the request."""
    queued_at: float = field(default_factory=time.monotonic)
    """When it began to wait for the model."""
    token_at: float | None = None
    """When it got its last token."""
    first_token_s: float | None = None
    """Seconds from when the replica had the request to the first one."""
    kept: int = 0
    """Prompt tokens that were found read already."""
    read: int = 0
    """Prompt tokens whose keys and values are in the slot."""
    made: list[int] = field(default_factory=list)
    """Tokens of the answer."""
    cancelled: bool = False
    """Nobody waits for it any more. Any thread may set this; the row is dropped before the next forward pass."""
    _pending: list[TokenScore] = field(default_factory=list)
    """Of tokens that are not told yet."""
    _told: int = 0
    """Characters that were given out."""

    def begin(self, measures: Measures, *, kept: int = 0) -> None:
        """The model begins with it; `kept` tokens of its prompt are read already."""
        self.read = self.kept = kept
        measures.queue_wait.observe(time.monotonic() - self.queued_at)
        measures.prompt_tokens += len(self.prompt)
        measures.cached_tokens += kept

    def timed(self, measures: Measures, now: float) -> None:
        """It gets a token."""
        if self.token_at is None:
            self.first_token_s = now - self.asked_at
            measures.time_to_first_token.observe(self.first_token_s)
        else:
            measures.time_between_tokens.observe(now - self.token_at)
        self.token_at = now
        measures.completion_tokens += 1

    @property
    def is_read(self) -> bool:
        return self.read == len(self.prompt)

    @property
    def prefix_key(self) -> str | None:
        """What keys and values depend on beside the tokens; None where they are not to be kept."""
        return self.adapter.digest if self.adapter else BASE

    @property
    def filled(self) -> int:
        """Positions whose keys and values are in the slot: all but the last token's."""
        return self.read + max(0, len(self.made) - 1)

    def take(self, chosen: Chosen) -> bool:
        """Add a token, give out the text that it settles, and say whether the answer is complete."""
        self.made.append(chosen.token)
        ended = chosen.token in self.end_ids
        constraint = self.chooser.constraint
        if chosen.logprob is not None and not ended:
            self._pending.append(self._score(chosen, chosen.logprob))
        text = self.text.finish() if ended else self.text.push(chosen.token)
        is_over = ended or self.text.stopped or (constraint is not None and constraint.is_complete)
        reason = "stop" if is_over else "length" if len(self.made) >= self.max_tokens else None
        if reason and not ended:
            text += self.text.finish()
            reason = "stop" if self.text.stopped else reason
        self._tell(text, everything=reason is not None and not self.text.stopped)
        if reason:
            self.emit(Ended(reason, len(self.made)))
        return reason is not None

    def _tell(self, text: str, *, everything: bool) -> None:
        """Give out text and the scores of the tokens that begin in it; what begins past a stop string is never told."""
        self._told += len(text)
        told = [score for score in self._pending if everything or score.begins < self._told]
        del self._pending[: len(told)]
        if text or told:
            self.emit(TextPiece(text, tuple(told), len(self.made)))

    def _score(self, chosen: Chosen, logprob: float) -> TokenScore:
        tokenizer = self.text.tokenizer
        likeliest = tuple(TokenScore(token_text(tokenizer, token), value) for token, value in chosen.likeliest)
        return TokenScore(token_text(tokenizer, chosen.token), logprob, likeliest, self.text.settled)


def cancel(rows: Iterable[Row]) -> None:
    """Forget rows, wherever they are; nothing more is emitted for them after the forward pass that is running."""
    for row in rows:
        row.cancelled = True


def is_out(row: Row, now: float) -> bool:
    """Whether a row is not to go on; one that is past its deadline is told."""
    if not row.cancelled and now >= row.deadline:
        row.cancelled = True
        made = len(row.made)
        row.emit(DeadlineError(f"the request's timeout_s passed after {made} tokens of this answer" if made else TOO_LATE))
    return row.cancelled


TOO_LATE = "the request's timeout_s passed before its answer began; the server is busy, or the prompt is long"


def failure(row: Row) -> RequestError:
    """Why there is no next token for a row."""
    constraint = row.chooser.constraint
    if constraint is not None and constraint.error:
        return RequestError(f"this request's schema or tools could not be followed any further ({constraint.error}); make them simpler")
    return EngineError("the model's numbers overflowed on this request; its adapter's weights may be too large")
