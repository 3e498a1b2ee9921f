"""Several replicas: adapters keep to one, a killed one costs no answer, a rolling update no request, and where nobody asks are none."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from transformers import AutoTokenizer

from cluster.connect import SERVE_PROXIES
from hone.chat import encode_prompt, end_of_turn_ids, ensure_template
from hone.ports import free_port
from hone.storage import Home
from serving.app import ServeArgs, build
from tests.integration.test_serving_http import USER, Server, until
from tests.serving_fixtures import greedy_alone, publish, reload_peft

ADAPTERS = [f"bot-{n}@1" for n in range(6)]
TOKENS = 12


@contextmanager
def adapters_published(home: Home, base: Path) -> Iterator[Server]:
    """Serve on a port of its own, and a home with adapters for whatever is deployed there."""
    port = free_port()
    for n, name in enumerate(ADAPTERS):
        publish(home, base, name.split("@", maxsplit=1)[0], seed=n, r=4, target_modules="all-linear")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SERVE_PROXIES.items():
            patch.setenv(name, value)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield Server(home, base, port)
    serve.shutdown()


@pytest.fixture(scope="module")
def server(local_ray: None, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:  # noqa: ARG001
    with adapters_published(Home(tmp_path_factory.mktemp("home")), llama) as server:
        yield server


@pytest.fixture(scope="module")
def expected(server: Server) -> dict[str, str]:
    """What each adapter says by itself, from transformers and PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(server.base)
    ensure_template(tokenizer)
    prompt, ends = encode_prompt(tokenizer, USER), sorted(end_of_turn_ids(tokenizer))
    answers = {}
    for name in ADAPTERS:
        model = reload_peft(server.home, server.base, server.registry.resolve(name))
        answers[name] = tokenizer.decode(greedy_alone(model, prompt, tokens=TOKENS, end_ids=ends), skip_special_tokens=True).rstrip("�")
    assert len(set(answers.values())) == len(ADAPTERS)
    return answers


def deploy(server: Server, **args: Any) -> None:
    settings = {"base": str(server.base), "home": str(server.home.root), "max_rows": 4, "num_cpus": 0.5}
    serve.run(build(ServeArgs.model_validate(settings | args)), name="chat", route_prefix="/")


def gauge(server: Server, name: str) -> dict[str, float]:
    """By replica; or by nothing, where the ingress has one of it."""
    families = text_string_to_metric_families(server.http("GET", "/metrics")[2])
    return {sample.labels.get("replica", ""): sample.value for family in families for sample in family.samples if sample.name == name}


class Asking:
    """Clients that ask in a circle for one adapter after another, until the block ends. Like OpenAI's own they try again where it is worth
    it, twelve times at most."""

    def __init__(self, server: Server, expected: dict[str, str], *, clients: int = 6) -> None:
        self._server, self._expected = server, expected
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(clients)
        self.answered: Counter[bool] = Counter()
        """Whether an answer was the adapter's own."""
        self.errors: list[Exception] = []
        """What was raised to a client in the end."""
        self.retried: Counter[str] = Counter()
        self._running = [self._pool.submit(self._ask, n) for n in range(clients)]

    def _ask(self, first: int) -> None:
        number = first
        while not self._stopped.is_set():
            name = ADAPTERS[number % len(ADAPTERS)]
            try:
                self.answered[self._text(name) == self._expected[name]] += 1
            except Exception as error:
                self.errors.append(error)
            number += 1

    def _text(self, name: str) -> str:
        for attempt in range(12):
            try:
                return self._server.text(name, max_tokens=TOKENS)
            except (openai.InternalServerError, openai.RateLimitError, openai.APIConnectionError) as error:
                if attempt == 11:
                    raise
                self.retried[getattr(error, "code", None) or type(error).__name__] += 1
                time.sleep(min(0.1 * 2**attempt, 2))
        raise AssertionError

    def __enter__(self) -> "Asking":
        return self

    def __exit__(self, *_error: object) -> None:
        self._stopped.set()
        for each in self._running:
            each.result(timeout=120)
        self._pool.shutdown()


def test_an_adapter_stays_with_one_replica_while_there_is_room(server: Server, expected: dict[str, str]) -> None:
    deploy(server, num_replicas=2)
    for _ in range(4):
        assert {name: server.text(name, max_tokens=TOKENS) for name in ADAPTERS} == expected
    resident = gauge(server, "hone_adapters_resident")
    assert len(resident) == 2
    assert sum(resident.values()) == len(ADAPTERS), "each is in the memory of one of the two"


def test_a_replica_that_is_killed_costs_no_answer_and_no_adapter_is_taken_for_another(server: Server, expected: dict[str, str]) -> None:
    deploy(server, num_replicas=2)
    running = [process for process in psutil.process_iter(["name", "cmdline"]) if is_replica(process)]
    assert len(running) == 2
    with Asking(server, expected) as asking:
        assert until(lambda: asking.answered[True] >= 12, seconds=60)
        os.kill(running[0].pid, signal.SIGKILL)
        before = asking.answered[True]
        assert until(lambda: asking.answered[True] >= before + 30, seconds=120)
        assert until(lambda: len(gauge(server, "hone_slots")) == 2, seconds=120), "another takes its place"
    assert not asking.errors
    assert not asking.answered[False]


def test_a_rolling_update_fails_no_request(server: Server, expected: dict[str, str]) -> None:
    deploy(server, num_replicas=2)
    before = set(gauge(server, "hone_slots"))
    with Asking(server, expected, clients=4) as asking:
        assert until(lambda: asking.answered[True] >= 8, seconds=60)
        deploy(server, num_replicas=2, max_rows=3)
        at = asking.answered[True]
        assert until(lambda: asking.answered[True] >= at + 12, seconds=60)
    after = gauge(server, "hone_slots")
    assert set(after.values()) == {3}
    assert not before & set(after)
    assert not asking.errors
    assert not asking.answered[False]
    assert not asking.retried, "nobody had to ask twice"


def test_replicas_come_with_the_requests_and_the_last_one_goes_when_there_are_none(server: Server, expected: dict[str, str]) -> None:
    deploy(server, num_replicas=(0, 2), max_rows=2, idle_s=5)
    with Asking(server, expected, clients=8) as asking:
        assert until(lambda: running() == 2, seconds=120), "eight clients, two slots"
    assert not asking.errors
    assert until(lambda: running() == 0, seconds=180), "idle"
    assert server.http("GET", "/healthz")[0] == 200
    assert ADAPTERS[0] in [model.id for model in server.client.models.list()]
    assert gauge(server, "hone_replicas")[""] == 0
    time.sleep(5)
    assert running() == 0, "to look wakes nobody"
    assert server.text(ADAPTERS[0], max_tokens=TOKENS) == expected[ADAPTERS[0]]
    assert running() == 1


def running() -> int:
    """Replicas as Serve counts them, those that start or stop among them."""
    return sum(serve.status().applications["chat"].deployments["Replica"].replica_states.values())


def is_replica(process: psutil.Process) -> bool:
    return "ServeReplica:chat:Replica" in " ".join(process.info["cmdline"] or [])
