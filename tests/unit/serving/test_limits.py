"""Token buckets: what a minute holds, what is reserved, what is given back."""

from dataclasses import replace
from typing import Any

import pytest

from serving.callers import ANONYMOUS, Caller
from serving.calls import ChatCall, CompletionCall, Done, EmbedCall, Piece, Sampling, Started
from serving.engine.fairness import Tenant
from serving.errors import RequestLimitError, TokenLimitError
from serving.limits import SWEEP, UNSAID_TOKENS, Limits, Spent, expected_tokens


class Clock:
    """A time that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limits(clock: Clock) -> Limits:
    return Limits(clock)


def caller(key: str = "k", *, requests: int | None = None, tokens: int | None = None) -> Caller:
    return Caller(key, f"p/{key}", Tenant("p"), ("inference",), ("*",), requests, tokens)


def test_a_key_has_its_requests_at_once_and_then_as_they_come_back(limits: Limits, clock: Clock) -> None:
    who = caller(requests=6)
    for left in range(5, -1, -1):
        headers = limits.reserve(who, 10).headers
        assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("6", str(left))
        assert "x-ratelimit-limit-tokens" not in headers
    with pytest.raises(RequestLimitError) as caught:
        limits.reserve(who, 10)
    assert caught.value.retry_after_s == pytest.approx(10)
    assert caught.value.headers == {"retry-after": "10"}
    clock.now = 9.9
    with pytest.raises(RequestLimitError):
        limits.reserve(who, 10)
    clock.now = 10.1
    limits.reserve(who, 10)


def test_what_was_not_used_is_given_back(limits: Limits) -> None:
    who = caller(tokens=100)
    reservation = limits.reserve(who, 90)
    assert reservation.headers["x-ratelimit-remaining-tokens"] == "10"
    assert reservation.headers["x-ratelimit-reset-tokens"] == "54s"
    with pytest.raises(TokenLimitError, match="10 are left and this request may take 20") as caught:
        limits.reserve(who, 20)
    assert caught.value.retry_after_s == pytest.approx(6)
    reservation.settle(30)
    assert limits.reserve(who, 20).headers["x-ratelimit-remaining-tokens"] == "50"


def test_what_was_used_beyond_the_reservation_is_owed(limits: Limits, clock: Clock) -> None:
    who = caller(tokens=60)
    limits.reserve(who, 10).settle(100)  # 40 below zero
    clock.now = 39
    with pytest.raises(TokenLimitError):
        limits.reserve(who, 1)
    clock.now = 42
    limits.reserve(who, 1)


def test_nothing_is_taken_by_a_request_that_is_refused(limits: Limits) -> None:
    who = caller(requests=2, tokens=10)
    limits.reserve(who, 10)
    for _ in range(5):
        with pytest.raises(TokenLimitError):
            limits.reserve(who, 1)
    with pytest.raises(TokenLimitError, match="this request may take 11"):
        limits.reserve(who, 11)
    limits.reserve(replace(who, tokens_per_minute=None), 1)  # the second request is still there


def test_a_request_that_can_never_fit_is_not_to_be_sent_again(limits: Limits) -> None:
    with pytest.raises(TokenLimitError) as caught:
        limits.reserve(caller(tokens=10), 11)
    assert caught.value.headers == {"x-should-retry": "false"}
    assert (caught.value.status, caught.value.type, caught.value.code) == (429, "tokens", "rate_limit_exceeded")


def test_keys_do_not_share_and_no_limit_is_none(limits: Limits) -> None:
    limits.reserve(caller("a", requests=1), 1)
    limits.reserve(caller("b", requests=1), 1)
    for _ in range(100):
        assert limits.reserve(ANONYMOUS, 10**9).headers == {}


def test_a_minute_never_has_more_than_twice_its_limit(limits: Limits, clock: Clock) -> None:
    who, served = caller(requests=60), 0
    for tick in range(600):
        clock.now = tick / 10
        try:
            limits.reserve(who, 0)
            served += 1
        except RequestLimitError:
            pass
    assert 115 <= served <= 120


def test_buckets_of_idle_keys_are_forgotten(limits: Limits, clock: Clock) -> None:
    for n in range(SWEEP):
        limits.reserve(caller(f"k{n}", requests=1), 1)
    clock.now = 61
    limits.reserve(caller("another", requests=1), 1)
    assert len(limits._buckets) == 1
    with pytest.raises(RequestLimitError):
        limits.reserve(caller("another", requests=1), 1)


def test_what_a_call_may_take_is_its_prompt_and_every_answer() -> None:
    sampling: Any = Sampling(max_tokens=50, temperature=1, top_p=1, seed=None, stop=())
    assert expected_tokens(ChatCall("m", [{"role": "user", "content": "x" * 400}], 3, sampling)) == 101 + 150
    assert expected_tokens(CompletionCall("m", [[1, 2, 3], "x" * 4], 2, sampling)) == 3 + 2 + 2 * 2 * 50
    assert expected_tokens(CompletionCall("m", [[1]], 1, replace(sampling, max_tokens=None))) == 1 + UNSAID_TOKENS
    assert expected_tokens(EmbedCall("m", [[1, 2], "abc"])) == 3


def test_tokens_are_known_at_any_moment_of_an_answer() -> None:
    spent = Spent()
    assert spent.tokens == 0
    spent.note([Started("a@1", "d", 10)])
    spent.note([Piece(0, "x", (), 2), Piece(1, "y", (), 3)])
    assert spent.tokens == 15
    spent.note([Piece(0, "z", (), 5), Done(1, "stop", 4)])
    assert spent.tokens == 19
