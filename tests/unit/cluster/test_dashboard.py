"""Jobs and deployments against a small HTTP server that answers as Ray's dashboard does, also where Ray's own answers mislead."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.dashboard import Dashboard
from cluster.deploy import deploy, wait_until_deployed
from cluster.jobs import find_job, list_jobs, stop
from hone.errors import ResourceError, RunFailedError
from hone.recipe.serving import ServingSettings, VllmSettings
from hone.storage import Home
from hone.store import Store


class FakeRay(ThreadingHTTPServer):
    """Answers by `answers[method, path]`, and keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[tuple[str, str], tuple[int, Any]] = {}
        self.received: list[tuple[str, str, Any]] = []
        self.tokens: list[str | None] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FakeRay

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.received.append((self.command, self.path, json.loads(body) if body else None))
        self.server.tokens.append(self.headers.get("Authorization"))
        code, value = self.server.answers.get((self.command, self.path), (404, "nothing here"))
        data = json.dumps(value).encode() if not isinstance(value, str) else value.encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def ray() -> Iterator[FakeRay]:
    with FakeRay() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def record(home: Home, job_id: str, address: str | None, status: str = "running") -> None:
    store = Store(home.store_url)
    store.add_job(job_id, kind="train", recipe="recipe.yaml", status=status, address=address)
    store.close()


def job(status: str, **more: object) -> dict[str, object]:
    return {"submission_id": "j", "status": status, "message": "", "metadata": {"hone": "train"}, **more}


def test_stop_does_not_believe_an_answer_that_a_pending_job_has_stopped(ray: FakeRay, home: Home) -> None:
    record(home, "j", ray.address, "submitted")
    ray.answers["POST", "/api/jobs/j/stop"] = (200, {"stopped": True})
    ray.answers["GET", "/api/jobs/"] = (200, [job("PENDING")])
    with pytest.raises(ResourceError, match="asked to stop, and still submitted after 1 s"):
        stop("j", home=home, timeout_s=1)


def test_stop_reports_how_a_job_really_ended(ray: FakeRay, home: Home) -> None:
    record(home, "j", ray.address)
    ray.answers["GET", "/api/jobs/"] = (200, [job("FAILED", message="Job failed, last logs:\n\nhone: bad data\n")])
    assert stop("j", home=home).status == "failed"
    assert ("POST", "/api/jobs/j/stop", {}) not in ray.received
    assert find_job("j", home=home).result == "bad data"


def test_a_job_in_a_terminal_cannot_be_stopped_from_here(home: Home) -> None:
    record(home, "j", None)
    with pytest.raises(ResourceError, match="press Ctrl-C there"):
        stop("j", home=home)


def test_a_cluster_that_is_gone_leaves_the_last_known_state(home: Home) -> None:
    record(home, "j", "http://127.0.0.1:9")
    state = list_jobs(home)[0]
    assert state.status == "running"
    assert "no Ray dashboard answers there" in state.note
    with pytest.raises(ResourceError, match="its last known state is running"):
        stop("j", home=home)


def test_a_cluster_that_was_started_anew_does_not_change_what_is_known(ray: FakeRay, home: Home) -> None:
    record(home, "j", ray.address)
    ray.answers["GET", "/api/jobs/"] = (200, [])
    state = list_jobs(home)[0]
    assert state.status == "running"
    assert "does not know this job" in state.note


def test_a_list_of_one_cluster_has_also_what_others_sent_there(ray: FakeRay, home: Home) -> None:
    record(home, "j", ray.address)
    record(home, "here", None)
    ray.answers["GET", "/api/jobs/"] = (200, [job("RUNNING"), job("SUCCEEDED", submission_id="other", end_time=1_700_000_000_000)])
    assert [(s.id, s.status) for s in list_jobs(home, address=ray.address)] == [("j", "running"), ("other", "succeeded")]
    assert {s.id for s in list_jobs(home)} == {"j", "here"}


def test_a_refused_token_says_how_to_give_one(ray: FakeRay) -> None:
    ray.answers["GET", "/api/version"] = (401, "Unauthorized: Missing authentication token")
    with pytest.raises(ResourceError, match=r"refuses the token \(Unauthorized: Missing.*RAY_AUTH_TOKEN"):
        Dashboard(ray.address).get("/api/version")
    with pytest.raises(ResourceError):
        Dashboard(ray.address, token="mine").get("/api/version")
    assert ray.tokens[-1] == "Bearer mine"


def test_a_deployment_leaves_other_applications_alone(ray: FakeRay) -> None:
    other = {"name": "other", "import_path": "theirs:app", "route_prefix": "/theirs"}
    running = {"other": {"deployed_app_config": other}, "by-hand": {"deployed_app_config": None}, "hone": {"deployed_app_config": {}}}
    ray.answers["GET", "/api/serve/applications/"] = (200, {"applications": running})
    ray.answers["PUT", "/api/serve/applications/"] = (200, "")
    deploy(Dashboard(ray.address), base="/b", home=None, http=("127.0.0.1", 8123))
    sent = ray.received[-1][2]
    assert sent["applications"][0] == other
    assert sent["applications"][1]["args"] == {"base": "/b", "auth": "auto", "num_replicas": 1}
    assert sent["http_options"] == {"host": "127.0.0.1", "port": 8123}


@pytest.mark.parametrize(
    ("serving", "told"),
    [
        (ServingSettings(), {}),
        (ServingSettings(adapter_disk="/kept"), {"adapter_disk": "/kept"}),
        (
            ServingSettings(adapter_disk="/kept", adapter_disk_bytes=1000, engine="vllm", vllm=VllmSettings(max_loras=2)),
            {"adapter_disk": "/kept", "adapter_disk_bytes": 1000, "engine": "vllm", "vllm": {"max_loras": 2}},
        ),
    ],
)
def test_the_application_is_told_of_the_recipes_section(ray: FakeRay, serving: ServingSettings, told: dict[str, Any]) -> None:
    ray.answers["GET", "/api/serve/applications/"] = (200, {"applications": {}})
    ray.answers["PUT", "/api/serve/applications/"] = (200, "")
    deploy(Dashboard(ray.address), base="/b", home=None, serving=serving)
    args = ray.received[-1][2]["applications"][0]["args"]
    assert args == {"base": "/b", "auth": "auto", "num_replicas": 1, **told}


def test_a_deployment_that_fails_says_the_exception_alone(ray: FakeRay) -> None:
    trace = (
        "Deploying app failed:\nTraceback (most recent call last):\n  File 'x'\nhone.errors.BaseModelError: /b: no config.json\n\nNote: y"
    )
    ray.answers["GET", "/api/serve/applications/"] = (200, {"applications": {"hone": {"status": "DEPLOY_FAILED", "message": trace}}})
    with pytest.raises(RunFailedError, match=r"^serving did not start: hone\.errors\.BaseModelError: /b: no config\.json$"):
        wait_until_deployed(Dashboard(ray.address))
