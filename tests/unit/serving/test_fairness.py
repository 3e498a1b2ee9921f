"""Tenants share by tokens, not by requests and not by time."""

from collections import Counter
from dataclasses import dataclass
from random import Random

import pytest

from serving.base import Engine, Served
from serving.engine.fairness import FairQueue, Tenant
from tests.unit.serving.rows import generation_of, prompt, row, run, step


@dataclass(frozen=True)
class Job:
    tenant: Tenant
    tokens: int


def serve(queue: FairQueue[Job], jobs: int) -> Counter[str]:
    """Tokens by tenant, one job at a time."""
    used: Counter[str] = Counter()
    for _ in range(jobs):
        job = queue.pop()
        queue.charge(job.tenant, job.tokens)
        used[job.tenant.name] += job.tokens
        queue.done(job)
    return used


@pytest.mark.parametrize("weight", [1, 3])
def test_tenants_share_by_weight_however_long_their_requests_are(weight: int) -> None:
    heavy, light = Tenant("heavy", weight), Tenant("light")
    queue: FairQueue[Job] = FairQueue()
    queue.extend([Job(light, 100) for _ in range(500)])
    queue.extend([Job(heavy, 7) for _ in range(5000)])
    used = serve(queue, 3000)
    assert used["heavy"] == pytest.approx(weight * used["light"], abs=100 * weight)


def test_what_was_not_used_is_not_saved_up() -> None:
    early, late = Tenant("early"), Tenant("late")
    queue: FairQueue[Job] = FairQueue()
    queue.extend([Job(early, 10) for _ in range(1000)])
    serve(queue, 500)
    queue.extend([Job(late, 10) for _ in range(400)])
    assert serve(queue, 400) == {"early": 2000, "late": 2000}


def test_what_was_used_is_remembered_while_others_are_busy() -> None:
    """A tenant that sends one request at a time has nothing here in between, and is no better off for it."""
    steady, single = Tenant("steady"), Tenant("single")
    queue: FairQueue[Job] = FairQueue()
    queue.extend([Job(steady, 10) for _ in range(1000)])
    used: Counter[str] = Counter()
    for _ in range(200):
        if not any(job.tenant == single for job in queue):
            queue.extend([Job(single, 90)])
        used += serve(queue, 1)
    assert used["single"] == pytest.approx(used["steady"], abs=100)


def test_a_queue_forgets_those_who_have_gone() -> None:
    queue: FairQueue[Job] = FairQueue()
    for n in range(50):
        queue.extend([Job(Tenant(str(n)), 5)])
        serve(queue, 1)
    assert queue._used == {}
    queue.extend([Job(Tenant("a"), 5), Job(Tenant("b"), 5)])
    gone = queue.remove(lambda job: job.tenant.name == "a")
    assert [job.tenant.name for job in gone] == ["a"]
    assert queue.peek() == Job(Tenant("b"), 5)
    serve(queue, 1)
    assert (len(queue), queue.peek(), queue._used) == (0, None, {})


def test_a_tenant_that_sits_out_is_passed_by() -> None:
    a, b = Tenant("a"), Tenant("b")
    queue: FairQueue[Job] = FairQueue()
    queue.extend([Job(a, 1), Job(b, 2), Job(a, 3)])
    assert queue.peek(besides={"a"}) == Job(b, 2)
    assert queue.peek(besides={"a", "b"}) is None
    assert queue.pop(besides={"a"}) == Job(b, 2)
    assert queue.peek(besides={"a"}) is None
    assert queue.peek() == Job(a, 1)


def test_what_is_put_back_is_next_again_and_nothing_of_it_is_left_running() -> None:
    a, b = Tenant("a"), Tenant("b")
    queue: FairQueue[Job] = FairQueue()
    queue.extend([Job(a, 1)])
    queue.charge(a, 10)
    queue.put_back([queue.pop()])
    queue.extend([Job(a, 2), Job(a, 3)])
    queue.put_back([queue.pop(), queue.pop(), queue.pop()])
    assert [job.tokens for job in queue] == [1, 2, 3]
    assert queue._running == {}
    queue.extend([Job(b, 4)])
    assert queue._used == {"a": 10, "b": 10}, "its tenant was never gone"


@pytest.mark.parametrize("weight", [0, -1, float("nan")])
def test_a_weight_is_above_zero(weight: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Tenant("odd", weight)


def test_a_tenant_with_few_requests_does_not_wait_behind_one_with_many(engine: Engine, everyone: dict[str, Served]) -> None:
    generation = generation_of(engine, max_rows=2)
    random = Random(0)
    many = [row(everyone["wide"], prompt(random, 10), max_tokens=10, ends=False, tenant=Tenant("many")) for _ in range(20)]
    few = [row(everyone["base"], prompt(random, 10), max_tokens=10, ends=False, tenant=Tenant("few")) for _ in range(3)]
    generation.add(many)
    step(generation)
    generation.add(few)
    while any(len(each.made) < 10 for each in few):
        step(generation)
    tokens = sum(each.read + len(each.made) for each in many)
    assert tokens <= sum(each.read + len(each.made) for each in few) + 2 * 20 + 20, "what was running, and one request more"
    run(generation)
    assert all(len(each.made) == 10 for each in many)
