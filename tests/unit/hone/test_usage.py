"""Usage in the store: totals that may be written again, summed over writers and hours."""

import pytest

from hone.usage import HOUR, Slot, Usage, Used, hour_of, total

NOW = 1_800_000_000


@pytest.fixture
def usage(store_url: str) -> Usage:
    return Usage(store_url)


def slot(key: str, adapter: str, *, hours_ago: int = 0) -> Slot:
    return Slot(hour_of(NOW) - hours_ago * HOUR, key, adapter)


def test_totals_that_are_written_twice_count_once(usage: Usage) -> None:
    for _ in range(2):
        usage.write("w1", {slot("k", "a@1"): Used(2, 10, 3, 5)})
    assert usage.by("key") == {("k",): Used(2, 10, 3, 5)}
    usage.write("w1", {slot("k", "a@1"): Used(3, 15, 3, 9)})
    assert usage.by("key") == {("k",): Used(3, 15, 3, 9)}


def test_writers_keys_adapters_and_hours_are_summed(usage: Usage) -> None:
    usage.write("w1", {slot("k", "a@1"): Used(1, 1, 0, 1), slot("k", "b@1"): Used(1, 2, 0, 20), slot("m", "a@1"): Used(1, 4, 0, 4)})
    usage.write("w2", {slot("k", "a@1"): Used(1, 8, 8, 8), slot("k", "a@1", hours_ago=30): Used(1, 16, 0, 5_000_000_000)})
    assert usage.by("key", since=NOW - HOUR) == {("k",): Used(3, 11, 8, 29), ("m",): Used(1, 4, 0, 4)}
    assert usage.by("adapter", since=NOW) == {("b@1",): Used(1, 2, 0, 20), ("a@1",): Used(3, 13, 8, 13)}
    assert usage.by("key", "adapter")["k", "a@1"] == Used(3, 25, 8, 5_000_000_009)
    assert total(usage.by("key").values()) == Used(5, 31, 8, 5_000_000_033)


def test_since_counts_from_the_beginning_of_its_hour(usage: Usage) -> None:
    usage.write("w", {slot("k", "a@1"): Used(1, 1, 0, 1)})
    assert usage.by("key", since=hour_of(NOW) + HOUR - 1)
    assert not usage.by("key", since=hour_of(NOW) + HOUR)
