"""Which replica takes a request, by name and load alone."""

from collections import Counter

import pytest

from serving.router import ranked

REPLICAS = [f"replica-{n}" for n in range(4)]


def first(model: str, loads: dict[str, int], replicas: list[str] = REPLICAS) -> str:
    return ranked(model, replicas, name=str, load=lambda replica: loads.get(replica, 0))[0]


def test_an_idle_server_has_every_adapter_at_one_replica_and_its_share_at_each() -> None:
    homes = Counter(first(f"bot-{n}@1", {}) for n in range(400))
    assert set(homes) == set(REPLICAS)
    assert min(homes.values()) > 60
    assert all(first(f"bot-{n}@1", {}) == first(f"bot-{n}@1", {}) for n in range(400))


def test_a_replica_that_comes_takes_its_share_and_nothing_else_moves() -> None:
    models = [f"bot-{n}@1" for n in range(400)]
    before, after = ({model: first(model, {}, replicas) for model in models} for replicas in (REPLICAS, [*REPLICAS, "new"]))
    moved = [model for model in models if after[model] != before[model]]
    assert {after[model] for model in moved} == {"new"}
    assert 40 < len(moved) < 130


def test_a_hot_adapter_spreads_in_the_same_order_each_time() -> None:
    def spread(requests: int) -> Counter[str]:
        loads: Counter[str] = Counter()
        for _ in range(requests):
            loads[first("hot@1", loads)] += 1
        return loads

    assert len(spread(1)) == 1
    crowded = spread(64)
    assert set(crowded) == set(REPLICAS)
    assert max(crowded.values()) <= 64 / 4 * 1.25 + 1
    assert set(spread(2)) <= set(spread(8)) <= set(crowded)


def test_a_busy_replica_is_passed_over_and_one_always_remains() -> None:
    favourite = first("bot@1", {})
    assert first("bot@1", {favourite: 1, **{other: 1 for other in REPLICAS if other != favourite}}) == favourite
    assert first("bot@1", {favourite: 9}) != favourite
    for loads in (dict.fromkeys(REPLICAS, 16), {replica: n for n, replica in enumerate(REPLICAS)}, {REPLICAS[0]: 100}):
        assert first("bot@1", loads) in REPLICAS


@pytest.mark.parametrize("load", [0, 1, 50])
def test_the_only_replica_takes_all(load: int) -> None:
    assert ranked("bot@1", ["one"], name=str, load=lambda _: load) == ["one"]
