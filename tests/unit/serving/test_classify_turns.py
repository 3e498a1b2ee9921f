"""Whose turn it is to be classified: by tokens between tenants, together where rows can share a forward pass, and not past a deadline."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from hone.keys import Keys
from hone.storage import Home
from serving.access import KeyRing
from serving.engine.classifier import BATCH_TOKENS, PASSED_AT_MOST, Asked, Classification
from serving.engine.fairness import EVERYONE, Tenant
from serving.engine.heads import Heads
from serving.engine.row import TOO_LATE
from serving.errors import DeadlineError
from serving.ingress import make_app
from serving.replica import Replica
from tests.unit.serving.conftest import Shelf

MANY, FEW = Tenant("many"), Tenant("few")


class Noting(Heads):
    """Computes nothing, and notes which rows came together."""

    def __init__(self) -> None:
        """Holds no model."""
        self.batches: list[list[Any]] = []

    def collate(self, rows: Any) -> Any:
        self.batches.append(list(rows))
        return rows

    def logits(self, batch: Any, adapters: Any) -> torch.Tensor:  # noqa: ARG002
        return torch.zeros(len(batch), 1)


@pytest.fixture
def heads() -> Noting:
    return Noting()


def rows(heads: Heads, count: int, *, cost: int = 10, tenant: Tenant = EVERYONE, alike: int = 0, deadline: float = math.inf) -> list[Asked]:
    made: list[Asked] = []
    for _ in range(count):
        row: Any = (tenant.name, cost, alike)
        made.append(Asked(row, cost, heads, None, Future(), alike=(alike,), tenant=tenant, deadline=deadline))
    return made


def queue_of(*groups: list[Asked], max_rows: int = 8) -> Classification:
    queue = Classification(max_rows=max_rows)
    for group in groups:
        queue.add(group)
    return queue


def answered(asked: list[Asked]) -> int:
    return sum(each.result.done() for each in asked)


def test_one_input_does_not_wait_for_the_hundreds_of_another_tenant(heads: Noting) -> None:
    many, few = rows(heads, 256, tenant=MANY), rows(heads, 1, tenant=FEW)
    queue = queue_of(many)
    queue.step()
    queue.add(few)
    queue.step()
    assert (answered(few), answered(many)) == (1, 15)
    while queue.step():
        pass
    assert (answered(many), queue.waiting, queue._waiting._used) == (256, 0, {})


def test_tenants_share_tokens_by_weight(heads: Noting) -> None:
    """Not rows, and not batches: those of one are fourteen times as long."""
    heavy, light = Tenant("heavy", 3), Tenant("light")
    queue = queue_of(rows(heads, 2000, cost=7, tenant=heavy), rows(heads, 500, cost=100, tenant=light), max_rows=16)
    for _ in range(60):
        queue.step()
    tokens: Counter[str] = Counter()
    for name, cost, _ in (row for batch in heads.batches for row in batch):
        tokens[name] += cost
    assert tokens["heavy"] == pytest.approx(3 * tokens["light"], abs=300)


def test_rows_that_can_share_a_pass_do_whatever_stands_between_them(heads: Noting) -> None:
    mixed = [row for _ in range(16) for alike in (1, 2) for row in rows(heads, 1, alike=alike)]
    queue = queue_of(mixed)
    while queue.step():
        pass
    assert [[alike for *_, alike in batch] for batch in heads.batches] == [[1] * 8, [2] * 8, [1] * 8, [2] * 8]


def test_rows_of_other_heads_run_by_themselves(heads: Noting) -> None:
    other = Noting()
    queue = queue_of(rows(heads, 2, tenant=MANY), rows(other, 2, tenant=FEW), rows(heads, 2, tenant=MANY))
    while queue.step():
        pass
    assert ([len(batch) for batch in heads.batches], [len(batch) for batch in other.batches]) == ([4], [2])


def test_a_pass_holds_so_many_tokens_padding_included(heads: Noting) -> None:
    short, long = rows(heads, 6, cost=10), rows(heads, 1, cost=BATCH_TOKENS // 4)
    queue = queue_of(short, long, rows(heads, 1, cost=BATCH_TOKENS + 1))
    while queue.step():
        pass
    assert [[cost for _, cost, _ in batch] for batch in heads.batches] == [[10] * 6, [BATCH_TOKENS // 4], [BATCH_TOKENS + 1]]
    queue = queue_of(rows(heads, 1, cost=BATCH_TOKENS // 4), rows(heads, 6, cost=10))
    queue.step()
    assert len(heads.batches[-1]) == 4, "each is as long as the first"


def test_a_row_that_fits_into_no_batch_of_others_gets_its_turn(heads: Noting) -> None:
    """Every batch is begun by the tenant with the shorter rows, and would go past the first row of the other."""
    odd = rows(heads, 1, cost=6, tenant=MANY, alike=2)
    queue = queue_of(rows(heads, 100, cost=5, tenant=FEW), odd, rows(heads, 100, cost=6, tenant=MANY), max_rows=2)
    for _ in range(4):
        queue.step()
    assert answered(odd) == 1


def test_looking_for_what_fits_ends(heads: Noting) -> None:
    behind = rows(heads, 1, alike=1)
    queue = queue_of(rows(heads, 1, alike=1), rows(heads, PASSED_AT_MOST, alike=2), behind, rows(heads, 1, alike=1))
    queue.step()
    assert (answered(behind), len(heads.batches[0])) == (1, 3), "just within sight"
    queue = queue_of(rows(heads, 1, alike=1), rows(heads, PASSED_AT_MOST + 1, alike=2), rows(heads, 1, alike=1))
    queue.step()
    assert len(heads.batches[1]) == 1
    assert queue.waiting == PASSED_AT_MOST + 2, "what was passed is there still"


def test_what_nobody_waits_for_any_more_takes_no_room_and_costs_nothing(heads: Noting) -> None:
    gone, still, other = rows(heads, 50, tenant=MANY), rows(heads, 8, tenant=MANY), rows(heads, 8, tenant=FEW)
    for each in gone:
        each.result.cancel()
    queue = queue_of(gone, still, other)
    queue.step()
    assert (answered(still), answered(other), len(heads.batches[0])) == (4, 4, 8)
    queue.step()
    assert (queue.waiting, queue._waiting._running, queue._waiting._used) == (0, {}, {})


def test_a_picture_of_no_tokens_is_not_free(heads: Noting) -> None:
    queue = queue_of(rows(heads, 100, cost=0, tenant=MANY), rows(heads, 100, cost=1, tenant=FEW))
    queue.step()
    assert Counter(name for name, *_ in heads.batches[0]) == {"many": 4, "few": 4}


def test_rows_past_their_deadline_are_told_wherever_they_wait(heads: Noting) -> None:
    now = time.monotonic()
    late, later, never = rows(heads, 20, deadline=now - 1), rows(heads, 20, deadline=now + 3600), rows(heads, 20)
    late[3].result.cancel()
    queue = queue_of(rows(heads, 8), never, late, later)
    queue.step()
    assert (answered(late), answered(later), answered(never), queue.waiting) == (20, 0, 0, 40)
    for each in late:
        if not each.result.cancelled():
            with pytest.raises(DeadlineError, match=TOO_LATE):
                each.result.result()
    assert queue._next_deadline == now + 3600
    while queue.step():
        pass
    assert all(each.result.result() is not None for each in [*later, *never])


def test_nobody_looks_through_the_queue_before_a_deadline(heads: Noting, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = queue_of(rows(heads, 20, deadline=time.monotonic() + 3600))
    monkeypatch.setattr(queue._waiting, "remove", lambda _: pytest.fail("it was looked through"))
    assert queue.step()


@pytest.fixture(scope="module")
def replica(label_shelf: Shelf) -> Iterator[Replica]:
    replica = Replica(base=str(label_shelf.base), home=str(label_shelf.home.root), max_rows=4)
    yield replica
    replica.stop()


@pytest.fixture
def http(replica: Replica, label_shelf: Shelf) -> Iterator[TestClient]:
    with TestClient(make_app(replica, label_shelf.registry)) as client:
        yield client


@pytest.fixture
def waiting(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """What has been asked of the engine."""
    seen: list[Asked] = []
    ask: Callable[[Any, Any], None] = type(replica._engine).ask

    def noted(self: Any, asked: Any) -> None:
        seen.extend(asked)
        ask(self, asked)

    monkeypatch.setattr(type(replica._engine), "ask", noted)
    return seen


@pytest.mark.parametrize("route", ["/v1/classify", "/v1/embeddings"])
def test_a_time_limit_that_passes_while_others_are_read_is_a_504(
    http: TestClient, replica: Replica, waiting: list[Asked], route: str
) -> None:
    body = {"model": "tone", "input": ["the cat", "why"]}
    assert http.post(route, json={**body, "timeout_s": 3600}).status_code == 200, "and its adapter is loaded"
    waiting.clear()
    replica._engine.thread.call(lambda: time.sleep(0.6))  # type: ignore[attr-defined]
    response = http.post(route, json={**body, "timeout_s": 0.3})
    assert len(waiting) == 2, "it did reach the engine"
    assert (response.status_code, response.headers["x-should-retry"]) == (504, "false")
    assert response.json()["error"] == {"message": TOO_LATE, "type": "server_error", "param": None, "code": "deadline_exceeded"}
    assert http.post(route, json=body).status_code == 200
    assert waiting[-1].deadline == math.inf


@pytest.mark.parametrize("route", ["/v1/classify", "/v1/embeddings"])
@pytest.mark.parametrize("timeout_s", [0, -1, "5"])
def test_a_time_limit_is_a_number_above_0(http: TestClient, route: str, timeout_s: Any) -> None:
    response = http.post(route, json={"model": "tone", "input": "x", "timeout_s": timeout_s})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "timeout_s")


def test_the_document_has_the_time_limit(http: TestClient) -> None:
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    for name in ("ClassifyRequest", "EmbeddingsRequest", "ChatRequest", "CompletionRequest"):
        assert {"type": "number", "exclusiveMinimum": 0} in schemas[name]["properties"]["timeout_s"]["anyOf"]


@pytest.mark.parametrize("route", ["/v1/classify", "/v1/embeddings"])
def test_a_keys_project_and_weight_are_its_tenant(
    replica: Replica, label_shelf: Shelf, home: Home, waiting: list[Asked], route: str
) -> None:
    keys = Keys(home.store_url)
    with TestClient(make_app(replica, label_shelf.registry, KeyRing(keys.all, auth="required"))) as client:
        for name, project, weight in (("a", "acme", 3.0), ("b", "acme", 1.0), ("c", "other", 0.5)):
            headers = {"authorization": f"Bearer {keys.create(name, project=project, weight=weight)[1]}"}
            assert client.post(route, json={"model": "tone", "input": "x"}, headers=headers).status_code == 200
    assert [asked.tenant for asked in waiting] == [Tenant("acme", 3.0), Tenant("acme", 1.0), Tenant("other", 0.5)]


@pytest.mark.parametrize("route", ["/v1/classify", "/v1/embeddings"])
def test_what_was_read_before_the_time_passed_is_taken_from_the_keys_minute(
    replica: Replica, label_shelf: Shelf, home: Home, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    limit, keys = 120, Keys(home.store_url)
    headers = {"authorization": f"Bearer {keys.create('a', tokens_per_minute=limit)[1]}"}
    body = {"model": "tone", "input": ["the cat sat on a mat"] * 4}
    with TestClient(make_app(replica, label_shelf.registry, KeyRing(keys.all, auth="required"))) as client:
        read = tokens_of(client, route, body, headers)
        monkeypatch.setattr(type(replica._engine), "ask", half_of(type(replica._engine).ask))
        before = left(client, headers)
        response = client.post(route, json={**body, "input": body["input"] * 2, "timeout_s": 0.4}, headers=headers)
        assert response.status_code == 504
        assert before - read - 1 <= left(client, headers) <= before - read + 4, "and the minute goes on, two tokens a second"


def tokens_of(client: TestClient, route: str, body: dict[str, Any], headers: dict[str, str]) -> int:
    """Tokens of one forward pass."""
    response = client.post(route, json=body, headers=headers)
    assert response.status_code == 200
    tokens: int = response.json()["usage"]["total_tokens"]
    assert tokens >= 12
    return tokens


def left(client: TestClient, headers: dict[str, str]) -> int:
    """Tokens of the key's minute; asking takes none."""
    return int(client.post("/tokenize", json={"model": "tone", "prompt": "x"}, headers=headers).headers["x-ratelimit-remaining-tokens"])


def half_of(ask: Any) -> Any:
    """The engine makes one forward pass, and then nothing for longer than anybody waits."""

    def asked(self: Any, rows: Any) -> None:
        ask(self, rows)
        self.thread.call(self.classification.step)
        self.thread.call(lambda: time.sleep(0.8))

    return asked
