"""Requests and tokens a minute, key by key: token buckets in the memory of the one ingress.

A bucket holds a minute's worth and fills at its rate, so a key that was idle may use a minute's worth at once, and no minute sees more than
twice the limit. A request reserves its prompt (by its length, since the ingress has no tokenizer) and what its answer may have;
when it ends, what it did not use is given back, and what it used beyond that is taken, below zero if need be. docs/decisions/0015 says
why here and not in Redis.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from serving.callers import Caller
from serving.calls import Call, ChatCall, CompletionCall, Done, Event, Media, Piece, Sampling, Started, TokenizeCall
from serving.errors import RequestLimitError, TokenLimitError

MINUTE_S = 60.0
SWEEP = 1024
"""Keys with buckets, past which those that are full are forgotten: they would be made anew the same."""


class Bucket:
    """What is left of a minute's worth."""

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._level = float(limit)
        self._at = now

    def level(self, now: float) -> float:
        """What is there; below 0 where more was used than had been reserved."""
        self._level = min(self.limit, self._level + (now - self._at) * self.limit / MINUTE_S)
        self._at = now
        return self._level

    def take(self, amount: float, now: float) -> None:
        self._level = min(self.limit, self.level(now) - amount)

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` is there."""
        return max(0.0, (amount - self.level(now)) * MINUTE_S / self.limit)


@dataclass
class Reservation:
    """What a request has taken."""

    headers: dict[str, str]
    """OpenAI's `x-ratelimit-*`."""
    _tokens: Bucket | None
    _reserved: int
    _now: Callable[[], float]

    def settle(self, used: int) -> None:
        """Say how many tokens it used after all; once."""
        if self._tokens is not None:
            self._tokens.take(used - self._reserved, self._now())


class Limits:
    """The buckets of every key that has limits. On the event loop, in one process."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._buckets: dict[tuple[str, str], Bucket] = {}
        """By id of the key, and what is counted."""

    def reserve(self, caller: Caller, tokens: int) -> Reservation:
        """Take a request and so many tokens of a caller's minute.

        Raises:
            RequestLimitError, TokenLimitError: there is not as much left; nothing was taken.
        """
        now = self._now()
        counted = self._bucket(caller, "requests", caller.requests_per_minute, now)
        spent = self._bucket(caller, "tokens", caller.tokens_per_minute, now)
        if counted is not None and (wait := counted.wait_s(1, now)) > 0:
            raise RequestLimitError(f"limit of {counted.limit} requests a minute reached; try again in {_span(wait)}", None, None, wait)
        if spent is not None and tokens > spent.limit:
            raise TokenLimitError(
                f"this request may take {tokens:,} tokens and its key has {spent.limit:,} a minute; shorten it, or lower max_tokens"
            )
        if spent is not None and (wait := spent.wait_s(tokens, now)) > 0:
            raise TokenLimitError(
                f"limit of {spent.limit:,} tokens a minute reached: {max(0, int(spent.level(now))):,} are left and this request may take "
                f"{tokens:,}; try again in {_span(wait)}",
                None,
                None,
                wait,
            )
        headers: dict[str, str] = {}
        for name, bucket, amount in (("requests", counted, 1), ("tokens", spent, tokens)):
            if bucket is not None:
                bucket.take(amount, now)
                headers[f"x-ratelimit-limit-{name}"] = str(bucket.limit)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, int(bucket.level(now))))
                headers[f"x-ratelimit-reset-{name}"] = _span(bucket.wait_s(bucket.limit, now))
        return Reservation(headers, spent, tokens, self._now)

    def _bucket(self, caller: Caller, what: str, limit: int | None, now: float) -> Bucket | None:
        if limit is None:
            return None
        bucket = self._buckets.get((caller.key, what))
        if bucket is None:
            if len(self._buckets) >= SWEEP:
                self._buckets = {key: kept for key, kept in self._buckets.items() if kept.level(now) < kept.limit}
            bucket = self._buckets[caller.key, what] = Bucket(limit, now)
        return bucket


def _span(seconds: float) -> str:
    """As OpenAI writes it: `120ms`, `1.5s`, `6m0s`."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    if seconds < MINUTE_S:
        return f"{seconds:.3g}s"
    return f"{int(seconds // MINUTE_S)}m{int(seconds % MINUTE_S)}s"


BYTES_PER_TOKEN = 4
"""Of English text, about; what is wrong with it is settled when the request ends."""
UNSAID_TOKENS = 256
"""Reserved for an answer whose request sets it no limit."""


def expected_tokens(call: Call) -> int:
    """What to reserve for a call: its prompt, and what its answers may have."""
    match call:
        case ChatCall():
            prompt = sum(_length(str(message["content"])) + _listed(message.get("tool_calls")) for message in call.messages)
            return prompt + _listed(call.tools.definitions if call.tools else None) + call.n * _answer(call.sampling)
        case CompletionCall():
            return sum(map(_length, call.prompts)) + len(call.prompts) * call.n * _answer(call.sampling)
        case TokenizeCall():
            return 0
        case _:
            return sum(1 if isinstance(each, Media) else _length(each) for each in call.inputs)


def _length(text: str | list[int]) -> int:
    return len(text.encode()) // BYTES_PER_TOKEN + 1 if isinstance(text, str) else len(text)


def _listed(values: Sequence[dict[str, Any]] | None) -> int:
    return _length(json.dumps(values, ensure_ascii=False)) if values else 0


def _answer(sampling: Sampling) -> int:
    return UNSAID_TOKENS if sampling.max_tokens is None else sampling.max_tokens


class Spent:
    """Tokens of a request, as its events come."""

    def __init__(self) -> None:
        self._prompt = 0
        self._made: dict[int, int] = {}

    @property
    def tokens(self) -> int:
        return self._prompt + sum(self._made.values())

    def note(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case Started():
                    self._prompt = event.prompt_tokens
                case Piece() | Done():
                    self._made[event.choice] = max(event.tokens, self._made.get(event.choice, 0))
