"""Puts the serving application on a Ray cluster through Serve's declarative interface, and waits until it answers.

The application is known here by its import path alone.
"""

import errno
import ipaddress
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Literal

from cluster.connect import LocalRay
from cluster.dashboard import Dashboard, open_url
from hone.errors import ResourceError, RunFailedError
from hone.keys import Keys
from hone.recipe.serving import ServingSettings
from hone.storage import Home
from hone.tasks import TaskName

Auth = Literal["auto", "required", "off"]
Replicas = int | tuple[int, int]
"""How many; or the fewest and the most."""
IMPORT_PATH = "serving.app:build"
APPLICATION = "hone"
APPLICATIONS_PATH = "/api/serve/applications/"
FAILED = frozenset({"DEPLOY_FAILED", "UNHEALTHY"})
POLL_S = 0.5
SLOTS = ServingSettings()


def access_at(host: str, home: Home, *, allow_anonymous: bool) -> Auth:
    """Who is to need a key on an address.

    Raises:
        ResourceError: others could reach it, and nobody could come in, or everybody could without that being said.
    """
    if allow_anonymous:
        return "off"
    if _is_loopback(host):
        return "auto"
    if not any(key.is_active(time.time()) for key in Keys(home.store_url).all()):
        raise ResourceError(
            f"--host {host}: others could reach it, and there are no API keys; make one with `hone keys create NAME`, "
            "or let everyone in with --allow-anonymous"
        )
    return "required"


def parse_replicas(text: str) -> Replicas:
    """`2`, or `0:4` for the fewest and the most.

    Raises:
        ResourceError: it is neither.
    """
    numbers = text.split(":")
    if all(number.isdecimal() for number in numbers) and len(numbers) <= 2:
        fewest, most = int(numbers[0]), int(numbers[-1])
        if most >= 1 and fewest <= most:
            return most if len(numbers) == 1 else (fewest, most)
    raise ResourceError(f"--replicas {text}: is neither a number, such as 2, nor the fewest and the most, such as 0:4")


def check_bind(host: str, port: int) -> None:
    """Refuse a port that is taken, and an address that is not this machine's.

    Raises:
        ResourceError: either.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            other = "address with --host" if error.errno == errno.EADDRNOTAVAIL else "port with --port"
            raise ResourceError(f"port {port} on {host}: {_why(error)}; choose another {other}") from None


def deploy(
    dashboard: Dashboard,
    *,
    base: str,
    home: str | None,
    http: tuple[str, int] | None = None,
    auth: Auth = "auto",
    replicas: Replicas = 1,
    serving: ServingSettings = SLOTS,
) -> None:
    """Ask the cluster for the serving application; other applications on it stay.

    Args:
        dashboard: The cluster.
        base: Base model, as the replicas find it.
        home: Home, as the replicas see it; by default their $HONE_HOME.
        http: Host and port of Serve's proxy, which only a cluster without Serve takes; by default the cluster's own.
        auth: Who needs an API key, as in `serving.app.ServeArgs`.
        replicas: How many, likewise.
        serving: Which engine answers, and where adapters are kept.

    Raises:
        ResourceError: the cluster does not answer, or refuses the configuration.
    """
    args = {"base": base, "auth": auth, "num_replicas": replicas, **({"home": home} if home else {}), **_serving_args(serving)}
    application = {"name": APPLICATION, "import_path": IMPORT_PATH, "route_prefix": "/", "args": args}
    config: dict[str, Any] = {"applications": [*_others(dashboard), application]}
    if http is not None:
        config |= {"proxy_location": "HeadOnly", "http_options": {"host": http[0], "port": http[1]}}
    dashboard.put(APPLICATIONS_PATH, config)


def deploy_locally(
    ray: LocalRay,
    *,
    base: str,
    home: str,
    host: str,
    port: int,
    auth: Auth = "auto",
    replicas: Replicas = 1,
    serving: ServingSettings = SLOTS,
) -> dict[str, TaskName]:
    """Deploy on a local Ray and wait until it answers; the models that are served, and their tasks.

    Raises:
        RunFailedError: it failed to start.
    """
    dashboard = Dashboard(ray.dashboard, token=ray.token)
    deploy(dashboard, base=base, home=home, http=(host, port), auth=auth, replicas=replicas, serving=serving)
    wait_until_deployed(dashboard, is_alive=lambda: ray.process.poll() is None)
    return wait_until_healthy(url_of(host, port))


def url_of(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def wait_until_deployed(dashboard: Dashboard, *, is_alive: Callable[[], bool] = lambda: True) -> None:
    """Wait until Serve calls the application running; however long its base takes to load.

    Raises:
        RunFailedError: it failed to start; the reason is in the message.
    """
    while True:
        details = dashboard.get(APPLICATIONS_PATH)["applications"].get(APPLICATION, {})
        status = details.get("status")
        if status == "RUNNING":
            return
        if status in FAILED or not is_alive():
            raise RunFailedError(f"serving did not start: {_reason(details)}")
        time.sleep(POLL_S)


def wait_until_healthy(url: str, *, timeout_s: float = 60) -> dict[str, TaskName]:
    """Wait until `/healthz` answers; the models that are served, and their tasks. None are told where that takes a key.

    Raises:
        RunFailedError: it does not within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            _get(f"{url}/healthz")
            return {model["id"]: model["task"] for model in json.loads(_get(f"{url}/v1/models"))["data"]}
        except urllib.error.HTTPError as error:
            if error.code == 401:
                return {}
            reason: Exception = error
        except (OSError, ValueError, KeyError) as error:
            reason = error
        if time.monotonic() > deadline:
            raise RunFailedError(f"{url}/healthz does not answer after {timeout_s:.0f} s ({reason})")
        time.sleep(POLL_S)


def _serving_args(serving: ServingSettings) -> dict[str, Any]:
    """What an application is told of this section, whose keys are its own too: nothing where it is the default."""
    return serving.model_dump(exclude_defaults=True)


def _others(dashboard: Dashboard) -> list[dict[str, Any]]:
    """Configurations of the other applications: a declarative deployment removes whatever it does not name."""
    running = dashboard.get(APPLICATIONS_PATH)["applications"]
    return [app["deployed_app_config"] for name, app in running.items() if name != APPLICATION and app.get("deployed_app_config")]


def _reason(details: dict[str, Any]) -> str:
    """The last line of what Serve says went wrong, the exception's own."""
    said = [details.get("message") or "", *(d.get("message") or "" for d in (details.get("deployments") or {}).values())]
    lines = [line.strip() for text in said for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line and not line.startswith("File ")]
    return (errors or lines or ["the local Ray ended"])[-1]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _why(error: OSError) -> str:
    return "already in use" if error.errno == errno.EADDRINUSE else (error.strerror or str(error))


def _get(url: str) -> bytes:
    with open_url(urllib.request.Request(url), timeout_s=5) as response:
        return bytes(response.read())
