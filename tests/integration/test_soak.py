"""A server for a long time, with ten times more clients than it has slots, and clients that go away, read slowly, or hang up halfway."""

import asyncio
import json
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ray import serve

from hone.storage import Home
from serving.app import ServeArgs, build
from tests.integration.test_scaling import ADAPTERS, adapters_published, is_replica
from tests.integration.test_serving_http import USER, Server, until

SLOTS = 4
REQUESTS = int(os.environ.get("HONE_TEST_SOAK", "10000" if os.environ.get("HONE_TEST_HEAVY") else "400"))
CLIENTS = 10 * SLOTS
KEPT_MIB = 40
"""That a replica may grow by between a fifth of the requests and the last."""


@pytest.fixture(scope="module")
def server(local_ray: None, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:  # noqa: ARG001
    with adapters_published(Home(tmp_path_factory.mktemp("home")), llama) as server:
        # Fewer adapters fit than there are, so they come and go all the time.
        args = ServeArgs(base=str(llama), home=str(server.home.root), max_rows=SLOTS, max_adapters=4, max_queued=32)
        serve.run(build(args), name="chat", route_prefix="/")
        yield server


@pytest.fixture(scope="module")
def expected(server: Server) -> dict[tuple[str, int], str]:
    """What each adapter says in so many tokens, with nobody else there."""
    return {(name, tokens): server.text(name, max_tokens=tokens) for name in ADAPTERS for tokens in (2, 6)}


class Soak:
    """Clients that ask, some of which hang up when they have had the first piece."""

    def __init__(self, server: Server, expected: dict[tuple[str, int], str]) -> None:
        self._url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
        self._expected, self._draw = expected, random.Random(0)
        self._left = REQUESTS
        self.ended: Counter[str] = Counter()
        self.rss: list[float] = []
        """MiB of the replica, at each hundredth of the way."""
        [self._replica] = [process for process in psutil.process_iter(["cmdline"]) if is_replica(process)]

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            await asyncio.gather(*(self._ask_on(client) for _ in range(CLIENTS)))

    async def _ask_on(self, client: httpx.AsyncClient) -> None:
        while self._left > 0:
            self._left -= 1
            if self._left % max(1, REQUESTS // 100) == 0:
                self.rss.append(self._replica.memory_info().rss / 2**20)
            name, tokens = self._draw.choice(list(self._expected))
            body = {"model": name, "messages": USER, "temperature": 0, "max_tokens": tokens}
            way = self._draw.choices(["whole", "stream", "hang up"], [5, 3, 2])[0]
            while (end := await self._ask(client, body, way, self._expected[name, tokens])) == "429":
                self.ended["429"] += 1
                await asyncio.sleep(0.05 + 0.2 * self._draw.random())
            self.ended[end] += 1

    async def _ask(self, client: httpx.AsyncClient, body: dict[str, Any], way: str, expected: str) -> str:
        """How it ended."""
        if way == "whole":
            answer = await client.post(self._url, json=body)
            if answer.status_code != 200:
                return str(answer.status_code)
            return "right" if answer.json()["choices"][0]["message"]["content"] == expected else "wrong"
        said = ""
        async with client.stream("POST", self._url, json={**body, "stream": True}) as answer:
            if answer.status_code != 200:
                return str(answer.status_code)
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return str(event["error"]["code"])
                    said += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                    if way == "hang up":
                        return "hung up"
        return "right" if said == expected else "wrong"


def test_requests_by_the_thousand_with_clients_that_go_away(server: Server, expected: dict[tuple[str, int], str]) -> None:
    soak = Soak(server, expected)
    asyncio.run(soak.run())
    print(soak.ended, f"{REQUESTS} requests; replica {soak.rss[0]:.0f} to {soak.rss[-1]:.0f} MiB")  # noqa: T201
    assert set(soak.ended) <= {"right", "hung up", "429"}, soak.ended
    assert soak.ended["right"] + soak.ended["hung up"] == REQUESTS
    assert min(soak.ended["right"], soak.ended["hung up"]) > REQUESTS / 10
    assert until(lambda: (server.status()["running"], server.status()["waiting"]) == (0, 0)), "what nobody waits for is not made"
    warm = max(soak.rss[len(soak.rss) // 10 : len(soak.rss) // 5])
    assert soak.rss[-1] - warm < KEPT_MIB, soak.rss


def opened(server: Server, *, stream: bool = True, tokens: int = 100) -> socket.socket:
    """A connection on which a long answer was asked for."""
    body = json.dumps({"model": ADAPTERS[0], "messages": USER, "stream": stream, "max_tokens": tokens, "logit_bias": {"2": -100}}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def is_idle(server: Server) -> bool:
    status = server.status()
    return (status["running"], status["waiting"]) == (0, 0)


def test_clients_that_do_not_read_keep_nobody_waiting(server: Server, expected: dict[tuple[str, int], str]) -> None:
    connections = [opened(server) for _ in range(2 * SLOTS)]
    assert server.text(ADAPTERS[1], max_tokens=6) == expected[ADAPTERS[1], 6]
    assert until(lambda: is_idle(server), seconds=60), "an answer that nobody reads is made, and gives its slot back"
    for connection in connections:
        assert b"200 OK" in connection.recv(4096)
        connection.close()


def test_a_client_that_will_send_no_more_has_its_answer(server: Server) -> None:
    connection = opened(server, stream=False, tokens=8)
    connection.shutdown(socket.SHUT_WR)
    received = b""
    while piece := connection.recv(65536):
        received += piece
    connection.close()
    assert received == b"" or b"200 OK" in received, "answered whole, or taken for one that has gone away"
    assert until(lambda: is_idle(server), seconds=60)


def test_halves_of_requests_keep_nobody_waiting(server: Server, expected: dict[tuple[str, int], str]) -> None:
    halves = []
    for sent in (
        b"POST /v1/chat",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{",
        b"\x16\x03\x01\x02\x00",
    ):
        for _ in range(8):
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
            connection.sendall(sent)
            halves.append(connection)
    assert {name: server.text(name, max_tokens=2) for name in ADAPTERS} == {name: expected[name, 2] for name in ADAPTERS}
    for connection in halves:
        connection.close()
    time.sleep(0.2)
    assert server.text(ADAPTERS[0], max_tokens=2) == expected[ADAPTERS[0], 2]
