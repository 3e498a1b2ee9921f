"""What `hone top` makes of two scrapes, and what it says where there is no server."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from cluster.watch import Quantiles, compare, quantile, scrape
from hone.errors import ResourceError
from hone.usage import Used
from serving.engine.measures import ROWS, Histogram
from serving.gate import Counts
from serving.measured import Measured
from serving.metering import Sums
from serving.metrics import COUNTERS, GAUGES, HISTOGRAMS, exposition


class Server:
    """Answers /metrics with what it is given, to holders of a key."""

    key: str | None = None

    def __init__(self) -> None:
        self.counts = Counts()
        self.replicas: list[Measured] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                is_known = server.key in (None, (self.headers["Authorization"] or "").removeprefix("Bearer "))
                self.send_response(200 if is_known else 401)
                self.end_headers()
                self.wfile.write(exposition(server.counts, server.replicas) if is_known else b"{}")

            def log_message(self, *_: object) -> None:
                """Says nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = Thread(target=self._http.serve_forever)
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def replica(name: str, *, scale: int = 1) -> Measured:
    """One that did `scale` times as much."""
    histograms = {each: Histogram(ROWS) if "rows" in each else Histogram() for each in HISTOGRAMS}
    for _ in range(98 * scale):
        histograms["time_to_first_token_seconds"].observe(0.015)
    for _ in range(2 * scale):
        histograms["time_to_first_token_seconds"].observe(4)
        histograms["batch_rows"].observe(3)
    counters = dict.fromkeys(COUNTERS, 0.0) | {
        "prompt_tokens": 1000.0 * scale,
        "cached_tokens": 250.0 * scale,
        "completion_tokens": 300.0 * scale,
    }
    gauges = dict.fromkeys(GAUGES, 0.0) | {"slots": 16.0, "rows_running": 5.0, "adapters_resident": 2.0}
    adapters = {"busy@1": Sums(Used(9 * scale, 900 * scale, 0, 290 * scale)), "idle@1": Sums(Used(1, 100, 0, 10))}
    keys = {"acme/bot": Sums(Used(10 * scale, 1000 * scale, 250 * scale, 300 * scale))}
    return Measured(name, histograms, counters, gauges, adapters, keys)


def test_rates_are_what_grew_between_two_looks(server: Server) -> None:
    server.replicas = [replica("a"), replica("b")]
    server.counts.ended("/v1/chat/completions", 200, 0.1)
    before = scrape(server.url)
    server.replicas = [replica("a", scale=2), replica("b", scale=3)]
    for status in (200, 200, 429, 404, 503):
        server.counts.ended("/v1/chat/completions", status, 0.1)
    look = compare(before, scrape(server.url))
    assert look.requests_per_s * look.seconds == pytest.approx(5)
    assert look.errors_per_s * look.seconds == pytest.approx(3)
    assert look.refused_per_s * look.seconds == pytest.approx(2)
    assert look.completion_tokens_per_s * look.seconds == pytest.approx(900)
    assert look.prompt_tokens_per_s * look.seconds == pytest.approx(3000)
    assert look.cached_share == pytest.approx(0.25)
    assert (look.replicas, look.slots, look.rows_running, look.adapters_resident) == (2, 32, 10, 4)
    assert look.batch_rows == pytest.approx(3)
    assert look.time_to_first_token_s.p50 == pytest.approx(0.015, abs=0.005)
    assert look.time_to_first_token_s.p99 == pytest.approx(3.5, abs=1.5)
    assert look.time_between_tokens_s == Quantiles(None, None)
    assert [line.name for line in look.adapters] == ["busy@1", "idle@1"]
    assert look.adapters[0].completion_tokens_per_s * look.seconds == pytest.approx(3 * 290)
    assert (look.adapters[1].requests_per_s, look.adapters[1].requests) == (0, 2)
    assert [(line.name, line.requests) for line in look.keys] == [("acme/bot", 50)]


def test_a_replica_that_was_replaced_does_not_count_backwards(server: Server) -> None:
    server.replicas = [replica("a", scale=5)]
    before = scrape(server.url)
    server.replicas = [replica("new")]
    look = compare(before, scrape(server.url))
    assert look.completion_tokens_per_s * look.seconds == pytest.approx(300)


@pytest.mark.parametrize(
    ("buckets", "share", "expected"),
    [
        ([], 0.5, None),
        ([(1.0, 0.0), (float("inf"), 0.0)], 0.5, None),
        ([(1.0, 10.0), (2.0, 10.0), (float("inf"), 10.0)], 0.5, 0.5),
        ([(1.0, 0.0), (2.0, 10.0), (float("inf"), 10.0)], 0.5, 1.5),
        ([(1.0, 5.0), (2.0, 10.0), (float("inf"), 10.0)], 1.0, 2.0),
        ([(1.0, 0.0), (2.0, 0.0), (float("inf"), 10.0)], 0.99, 2.0),
    ],
)
def test_quantiles_are_guessed_as_prometheus_does(buckets: list[tuple[float, float]], share: float, expected: float | None) -> None:
    assert quantile(buckets, share) == (None if expected is None else pytest.approx(expected))


def top(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "cluster.cli", "top", *arguments]

    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}, check=False)


def test_the_command_prints_one_look(server: Server) -> None:
    server.replicas, server.key = [replica("a")], "secret"
    done = top(server.url, "--json", "--interval", "0.2", HONE_API_KEY="secret")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["keys"][0]["name"] == "acme/bot"
    done = top(f"{server.url}/v1", "--once", "--interval", "0.2", HONE_API_KEY="secret")
    assert "busy@1" in done.stdout
    assert "5 of 16 slots" in done.stdout
    done = top(server.url, "--once", HONE_API_KEY="wrong")
    assert (done.returncode, "HONE_API_KEY" in done.stderr) == (1, True)


def test_a_server_that_is_not_there_is_said_in_one_line() -> None:
    with pytest.raises(ResourceError, match="is `hone serve` running there"):
        scrape("http://127.0.0.1:9")
    with pytest.raises(ResourceError, match="http://HOST:PORT"):
        scrape("file:///etc/passwd")
