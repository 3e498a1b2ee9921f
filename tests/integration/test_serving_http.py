"""The server as its users meet it: Ray Serve on a localhost port, driven by OpenAI's own client and by plain HTTP."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import ray
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from cluster.connect import SERVE_PROXIES
from hone.keys import Keys
from hone.ports import free_port
from hone.registry import Registry
from hone.storage import Home
from hone.usage import Usage, Used
from serving.app import ServeArgs, build
from tests.serving_fixtures import greedy_alone, publish, reload_peft

USER: Any = [{"role": "user", "content": "hello there, why does it rain?"}]
LABELS = {"tone": ["angry", "calm"], "topic": ["art", "news", "sport"]}


class Server:
    """A running application."""

    def __init__(self, home: Home, base: Path, port: int, *, prefix: str = "", key: str = "none") -> None:
        self.home = home
        self.base = base
        self.port = port
        self.prefix = prefix
        self.key = key
        self.registry = Registry(home)

    @property
    def client(self) -> OpenAI:
        """Refuses answers that are not as OpenAI's types say."""
        return self.open(strict=True)

    def open(self, *, strict: bool) -> OpenAI:
        url = f"http://127.0.0.1:{self.port}{self.prefix}/v1"
        return OpenAI(base_url=url, api_key=self.key, max_retries=0, timeout=60, _strict_response_validation=strict)

    def http(self, method: str, path: str, body: Any = None, **more: str) -> tuple[int, dict[str, str], Any]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            payload = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            headers = {"content-type": "application/json", "authorization": f"Bearer {self.key}"}
            headers |= {name.replace("_", "-"): value for name, value in more.items()}
            connection.request(method, self.prefix + path, payload, headers)
            response = connection.getresponse()
            said, content = {name.lower(): value for name, value in response.getheaders()}, response.read()
            return response.status, said, json.loads(content) if said["content-type"] == "application/json" else content.decode()
        finally:
            connection.close()

    def chat(self, model: str, **options: Any) -> Any:
        settings: dict[str, Any] = {"temperature": 0, "max_tokens": 12} | options
        return self.client.chat.completions.create(model=model, messages=USER, **settings)

    def text(self, model: str, **options: Any) -> str:
        return str(self.chat(model, **options).choices[0].message.content)

    def status(self) -> dict[str, Any]:
        return dict(self.http("GET", "/healthz")[2])


def until(true: Callable[[], bool], *, seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def served(
    openai_errors: None,  # noqa: ARG001
    local_ray: None,  # noqa: ARG001
    llama: Path,
    bert: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Server]]:
    """A chat server, a classification server, and a chat server that takes keys, three applications on one port."""
    port = free_port()
    home = Home(tmp_path_factory.mktemp("home"))
    publish(home, llama, "narrow", seed=1, r=2, target_modules=["q_proj", "v_proj"])
    publish(home, llama, "wide", seed=2, r=8, target_modules="all-linear")
    for n, (name, labels) in enumerate(LABELS.items()):
        publish(home, bert, name, seed=n, labels=labels, r=4, target_modules=["query", "value"])
    publish(home, llama, "broken", seed=3, shift=0.5, r=2, target_modules=["q_proj"])
    Registry(home).set_alias("prod", "wide@1")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(ServeArgs(base=str(llama), home=str(home.root), max_rows=4, max_queued=8)), name="chat", route_prefix="/")
    serve.run(build(ServeArgs(base=str(bert), home=str(home.root))), name="classify", route_prefix="/encoder")
    keyed = Home(tmp_path_factory.mktemp("keyed"))
    for name in ("narrow", "wide"):
        publish(keyed, llama, name, seed=5, r=2, target_modules=["q_proj"])
    root = Keys(keyed.store_url).create("root", scopes=["admin"])[1]
    serve.run(build(ServeArgs(base=str(llama), home=str(keyed.root), max_rows=2)), name="keyed", route_prefix="/keyed")
    yield {
        "chat": Server(home, llama, port),
        "encoder": Server(home, bert, port, prefix="/encoder"),
        "keyed": Server(keyed, llama, port, prefix="/keyed", key=root),
    }
    serve.shutdown()


@pytest.fixture(scope="module")
def openai_errors() -> Iterator[None]:
    """What `hone serve` sets for Serve's proxies, before there is a Ray."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SERVE_PROXIES.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def server(served: dict[str, Server]) -> Server:
    return served["chat"]


def test_the_client_lists_and_retrieves_models(server: Server) -> None:
    ids = [model.id for model in server.client.models.list()]
    assert ids == [str(server.base), server.base.name, "broken@1", "narrow@1", "wide@1", "prod"]
    for name in [*ids, "wide"]:
        model = server.client.models.retrieve(name)
        assert model.id == name
    assert server.client.models.retrieve("prod").to_dict()["adapter"] == "wide@1"


def test_chat_answers_as_transformers_does_with_that_adapter(server: Server) -> None:
    for name in ("narrow", "wide"):
        manifest = server.registry.resolve(name)
        model = reload_peft(server.home, server.base, manifest)
        from transformers import AutoTokenizer

        from hone.chat import encode_prompt, end_of_turn_ids, ensure_template

        tokenizer = AutoTokenizer.from_pretrained(server.base)
        ensure_template(tokenizer)
        ids = greedy_alone(model, encode_prompt(tokenizer, USER), tokens=30, end_ids=sorted(end_of_turn_ids(tokenizer)))
        answer = server.chat(name, max_tokens=30)
        assert answer.choices[0].message.content == tokenizer.decode(ids, skip_special_tokens=True).rstrip("�")
        assert answer.usage.completion_tokens == len(ids)
        assert answer.model == f"{name}@1"


def test_adapters_called_at_once_answer_as_each_alone(server: Server) -> None:
    names = ["narrow", "wide", "prod", server.base.name] * 2  # as many as may wait
    alone = {name: server.text(name, max_tokens=60) for name in set(names)}
    assert len({alone["narrow"], alone["wide"], alone[server.base.name]}) == 3
    with ThreadPoolExecutor(len(names)) as pool:
        together = list(pool.map(lambda name: server.text(name, max_tokens=60), names))
    assert together == [alone[name] for name in names]


def test_the_client_streams(server: Server) -> None:
    whole = server.chat("wide", max_tokens=40)
    chunks = list(server.chat("wide", max_tokens=40, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [whole.choices[0].finish_reason]


def test_completions_and_seeds(server: Server) -> None:
    def complete(seed: int) -> list[str]:
        answer = server.client.completions.create(model="narrow", prompt=["the cat", "why"], n=2, seed=seed, temperature=1, max_tokens=20)
        return [choice.text for choice in answer.choices]

    first = complete(1)
    assert len(first) == 4
    assert len(set(first)) == 4
    assert complete(1) == first
    assert complete(2) != first


def test_bad_requests_raise_the_right_errors_and_the_server_keeps_answering(server: Server) -> None:
    cases: list[tuple[type[openai.APIStatusError], dict[str, Any], str | None]] = [
        (openai.NotFoundError, {"model": "nobody"}, "model_not_found"),
        (openai.NotFoundError, {"model": "wide@7"}, "model_not_found"),
        (openai.BadRequestError, {"max_tokens": -5}, None),
        (openai.BadRequestError, {"max_tokens": 10**9}, "context_length_exceeded"),
        (openai.BadRequestError, {"temperature": "warm"}, None),
        (openai.BadRequestError, {"messages": []}, None),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": "word " * 500}]}, "context_length_exceeded"),
        (openai.BadRequestError, {"functions": [{"name": "f"}]}, "unsupported_parameter"),
        (openai.InternalServerError, {"model": "broken"}, "adapter_refused"),
    ]
    for stream in (False, True):
        for error, changes, code in cases:
            with pytest.raises(error) as caught:
                server.client.chat.completions.create(**{"model": "wide", "messages": USER, "stream": stream} | changes)
            assert caught.value.code == code
            assert caught.value.type
            assert caught.value.request_id
            assert server.text("wide", max_tokens=1) is not None


def test_malformed_bodies_and_routes_have_openais_shape(server: Server) -> None:
    for method, path, body, status in [
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"", 400),
        ("POST", "/v1/completions", [1], 400),
        ("POST", "/v1/nothing", {}, 404),
        ("GET", "/v1/models/a%2Fb", None, 404),
        ("DELETE", "/v1/chat/completions", None, 405),
    ]:
        got, headers, answer = server.http(method, path, body)
        assert (got, set(answer["error"])) == (status, {"message", "type", "param", "code"}), (path, answer)
        assert headers["x-request-id"]
    status, headers, _ = server.http("POST", "/v1/chat/completions", {"model": "prod", "messages": USER, "max_tokens": 2})
    assert (status, headers["x-hone-adapter"].split()[0]) == (200, "wide@1")


def test_a_new_version_and_a_moved_alias_answer_without_a_restart(server: Server) -> None:
    before = server.text("wide", max_tokens=30)
    with pytest.raises(openai.NotFoundError):
        server.chat("wide@2")
    publish(server.home, server.base, "wide", seed=20, r=4, target_modules=["o_proj", "up_proj"])
    published = time.monotonic()
    answer = server.chat("wide@2", max_tokens=30)
    assert time.monotonic() - published < 30
    assert answer.model == "wide@2"
    assert answer.choices[0].message.content != before
    assert server.chat("wide").model == "wide@2"
    assert server.text("wide@1", max_tokens=30) == before
    assert server.chat("prod").model == "wide@1"
    server.registry.set_alias("prod", "wide@2")
    assert server.chat("prod").model == "wide@2"


def test_a_client_that_goes_away_frees_its_rows(server: Server) -> None:
    assert until(lambda: server.status()["running"] == 0)
    many: dict[str, Any] = {"model": "narrow", "prompt": "the", "max_tokens": 250, "temperature": 1, "n": 16}
    # Streamed completions carry `finish_reason: null`, as OpenAI's own do, which the client's own types do not allow.
    with server.open(strict=False).completions.create(**many, stream=True) as stream:
        next(iter(stream))
        assert server.status()["running"], "pieces come while rows run"
    assert until(lambda: (server.status()["running"], server.status()["waiting"]) == (0, 0))
    before = server.status()["completed"]
    with ThreadPoolExecutor(1) as pool:
        ask = server.client.with_options(timeout=0.5).completions.create
        impatient = pool.submit(ask, **(many | {"prompt": ["the"] * 8}), logit_bias={"2": -100})
        assert until(lambda: server.status()["running"] > 0)
        with pytest.raises(openai.APITimeoutError):
            impatient.result()
    assert until(lambda: (server.status()["running"], server.status()["waiting"]) == (0, 0))
    assert server.status()["completed"] < before + 8 * 16, "rows of a client that has gone are not made to their end"
    with server.open(strict=False).completions.create(**many, stream=True) as stream:
        next(iter(stream))
        with pytest.raises(openai.APITimeoutError):  # behind the others, and so before it was told anything
            server.client.with_options(timeout=0.3).completions.create(**many, stream=True)
        assert until(lambda: server.status()["waiting"] < 16), "what waited for a client that has gone is dropped"
    assert until(lambda: (server.status()["running"], server.status()["waiting"]) == (0, 0))
    assert server.text("narrow")


def test_more_requests_than_it_holds_are_told_to_come_back(server: Server) -> None:
    def ask(_: int) -> int:
        return server.http("POST", "/v1/completions", {"model": "narrow", "prompt": "the", "max_tokens": 200, "n": 4})[0]

    with ThreadPoolExecutor(40) as pool:
        statuses = list(pool.map(ask, range(40)))
    assert set(statuses) == {200, 429}
    assert server.text("wide")


def test_an_encoder_serves_each_adapters_own_classes(served: dict[str, Server]) -> None:
    server = served["encoder"]

    def classify(name: str) -> Any:
        return server.http("POST", "/v1/classify", {"model": name, "input": ["the cat sat", "good morning"]})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(classify, [*LABELS] * 4))
    for name, (status, headers, body) in zip([*LABELS] * 4, answers, strict=True):
        assert status == 200, body
        assert headers["x-hone-adapter"].split()[0] == f"{name}@1"
        assert [list(row["probs"]) for row in body["data"]] == [LABELS[name]] * 2
        assert [sum(row["probs"].values()) for row in body["data"]] == pytest.approx([1, 1])
    status, _, body = server.http("POST", "/v1/classify", {"model": server.base.name, "input": "x"})
    assert (status, body["error"]["param"]) == (400, "model")
    status, _, body = server.http("POST", "/v1/classify", {"model": "wide", "input": "x"})
    assert status == 404
    assert "is an adapter of" in body["error"]["message"]


def holder(server: Server, name: str, **settings: Any) -> Server:
    """The same server, with a new key."""
    token = Keys(server.home.store_url).create(name, **settings)[1]
    return Server(server.home, server.base, server.port, prefix=server.prefix, key=token)


def test_keys_open_refuse_and_end_on_a_running_server(served: dict[str, Server]) -> None:
    root = served["keyed"]
    bot = holder(root, "bot", project="acme", adapters=["narrow"], requests_per_minute=3)
    assert [model.id for model in bot.client.models.list()] == ["narrow@1"]
    answer = bot.client.chat.completions.with_raw_response.create(model="narrow", messages=USER, max_tokens=2)
    assert answer.headers["x-ratelimit-remaining-requests"] == "2"
    with pytest.raises(openai.PermissionDeniedError):
        bot.chat("wide")
    bot.chat("narrow")
    with pytest.raises(openai.RateLimitError) as limited:
        bot.chat("narrow", stream=True)
    assert 1 <= int(limited.value.response.headers["retry-after"]) <= 20
    nobody = Server(root.home, root.base, root.port, prefix=root.prefix)
    with pytest.raises(openai.AuthenticationError) as refused:
        nobody.chat("narrow")
    assert (refused.value.code, bool(refused.value.request_id)) == ("invalid_api_key", True)
    Keys(root.home.store_url).revoke("acme/bot")
    assert until(lambda: bot.http("GET", "/v1/models")[0] == 401)
    assert root.text("narrow", max_tokens=2) is not None


def test_usage_and_metrics_of_a_running_server_agree(served: dict[str, Server]) -> None:
    root = served["keyed"]
    bot = holder(root, "metered")
    answers = [bot.chat(name, max_tokens=7) for name in ("narrow", "wide", "wide")]
    with bot.client.chat.completions.create(model="wide", messages=USER, max_tokens=180, temperature=1, stream=True) as stream:
        next(chunk for chunk in stream if chunk.choices[0].delta.content)  # the first of all says only that there will be an answer
    assert until(lambda: root.status()["running"] == 0)
    status, headers, text = root.http("GET", "/metrics")
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/plain")
    samples = {(s.name, *sorted(s.labels.items())): s.value for f in text_string_to_metric_families(text) for s in f.samples}

    def total(name: str, **labels: str) -> float:
        return sum(v for (n, *at), v in samples.items() if n == name and labels.items() <= dict(at).items())

    usage = Usage(root.home.store_url)
    key = next(key.id for key in Keys(root.home.store_url).all() if key.name == "metered")
    assert until(lambda: usage.by("key").get((key,), Used()).requests == 4)
    used = usage.by("key")[key,]
    made = sum(answer.usage.completion_tokens for answer in answers)
    assert used.completion_tokens > made, "what was made for a client that left is metered too"
    assert used.completion_tokens < made + 180
    assert total("hone_key_tokens_total", key="default/metered", kind="completion") == used.completion_tokens
    assert total("hone_key_requests_total", key="default/metered") == 4
    assert total("hone_time_to_first_token_seconds_count") >= 4
    assert total("hone_replicas") == 1
    assert root.http("GET", "/metrics", authorization=f"Bearer {bot.key}")[0] == 403


def test_what_serves_own_proxy_answers_has_openais_shape(server: Server) -> None:
    body = {"model": "wide", "messages": USER, "max_tokens": 200}
    status, headers, answer = server.http("POST", "/v1/chat/completions", body, x_request_timeout_seconds="0.001")
    assert (status, answer["error"]["code"], headers["x-should-retry"]) == (408, "request_timeout", "false")
    assert server.text("wide", max_tokens=1) is not None


def test_a_requests_id_is_given_back_and_in_the_log_of_ingress_and_replica(server: Server) -> None:
    _, headers, _ = server.http("POST", "/v1/completions", {"model": "wide", "prompt": "a", "max_tokens": 2}, x_request_id="mine-4711")
    assert headers["x-request-id"] == "mine-4711"
    logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"

    def lines(of: str) -> list[str]:
        return [line for path in logs.glob(f"replica_chat_{of}_*.log") for line in path.read_text().splitlines() if "mine-4711" in line]

    assert until(lambda: any("/v1/completions for anonymous: 200" in line for line in lines("Ingress")))
    assert until(lambda: any("wide@" in line and "2 made" in line for line in lines("Replica")))


def replica_of(application: str) -> psutil.Process:
    title = f"ray::ServeReplica:{application}:Replica"
    return next(p for p in psutil.Process().children(recursive=True) if "".join(p.cmdline()[:1]).startswith(title))


def test_a_replica_that_is_killed_is_a_503_to_try_again_and_then_answers(served: dict[str, Server]) -> None:
    root = served["keyed"]
    body = {"model": "narrow", "prompt": "a", "max_tokens": 250, "temperature": 1, "n": 16}
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(root.http, "POST", "/v1/completions", body)
        assert until(lambda: root.status()["running"] > 0)
        behind = pool.submit(root.http, "POST", "/v1/completions", body | {"stream": True})
        assert until(lambda: root.status()["waiting"] > 16), "the stream waits behind the others"
        replica_of("keyed").kill()
        lost = [each.result(120) for each in (asked, behind)]
    assert [(status, answer["error"]["code"], headers["retry-after"]) for status, headers, answer in lost] == 2 * [
        (503, "replica_lost", "1")
    ]
    assert until(lambda: root.http("POST", "/v1/completions", body | {"n": 1, "max_tokens": 2})[0] == 200, seconds=120)


def test_a_replica_that_is_killed_in_the_middle_of_an_answer_ends_it_by_an_error(served: dict[str, Server]) -> None:
    root = served["keyed"]
    # Sixteen answers of 250 tokens by a replica that makes two at once: there is most of it left when the first text comes.
    client = root.open(strict=False)  # whose strict mode refuses an unfinished completion, for OpenAI too
    stream = client.completions.create(model="narrow", prompt="a", max_tokens=250, n=16, stream=True, logit_bias={"2": -100})
    assert next(stream).choices
    replica_of("keyed").kill()
    with pytest.raises(openai.APIError) as raised:
        list(stream)
    assert raised.value.code == "replica_lost"
    assert until(lambda: root.http("POST", "/v1/completions", {"model": "narrow", "prompt": "a", "max_tokens": 2})[0] == 200, seconds=120)
