"""HTTP to the dashboard of a Ray cluster: its jobs, its nodes, its Serve applications. No ray needed, and no request without a timeout.

The paths are Ray's documented REST interface (https://docs.ray.io/en/latest/cluster/running-applications/job-submission/rest.html,
https://docs.ray.io/en/latest/serve/api/index.html#serve-rest-api).
"""

import json
import re
import socket
import urllib.error
import urllib.request
from typing import Any

from cluster.connect import auth_token
from hone.errors import ResourceError

TIMEOUT_S = 10.0
LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
AUTH_HINT = (
    "set RAY_AUTH_TOKEN to the cluster's token, or RAY_AUTH_MODE=token to use the one in ~/.ray/auth_token "
    "(`ray get-auth-token` on the head prints it)"
)


class NotFoundError(ResourceError):
    """The cluster answers, and has nothing of that name."""


class Dashboard:
    """The dashboard at an http(s) URL."""

    def __init__(self, address: str, *, token: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        """Nothing is sent yet. Raises ResourceError where `address` is no dashboard URL."""
        self.address = checked_address(address)
        self._token = token or auth_token()
        self._timeout_s = timeout_s

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    def get(self, path: str) -> Any:
        return self._request("GET", path)

    def put(self, path: str, body: Any) -> Any:
        return self._request("PUT", path, body)

    def post(self, path: str, body: Any = None) -> Any:
        return self._request("POST", path, body or {})

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        """The answer's JSON (None where it has none).

        Raises:
            NotFoundError: 404. ResourceError: no answer in time, a refused token, or any other refusal.
        """
        request = urllib.request.Request(
            self.address + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={**self.headers, "Content-Type": "application/json"},
        )
        try:
            with open_url(request, timeout_s=self._timeout_s) as response:
                return _json(response.read())
        except urllib.error.HTTPError as error:
            with error:
                said = _last_line(error.read().decode(errors="replace")) or error.reason
            if error.code in (401, 403):
                raise ResourceError(f"{self.address}: Ray refuses the token ({said}); {AUTH_HINT}") from None
            raise (NotFoundError if error.code == 404 else ResourceError)(
                f"{self.address}: {method} {path} answers {error.code}: {said}"
            ) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ResourceError(
                f"{self.address}: no Ray dashboard answers there ({reason}); check the address and that the cluster is up"
            ) from None

    def is_on_this_machine(self) -> bool:
        """Whether every node of the cluster is this machine. (A loopback address proves nothing: it may be a forwarded port.)"""
        try:
            nodes = self.get("/nodes?view=summary")["data"]["summary"]
            return {node["hostname"] for node in nodes if node["raylet"].get("state") == "ALIVE"} == {socket.gethostname()}
        except (KeyError, TypeError, ResourceError):
            return False


def open_url(request: urllib.request.Request, *, timeout_s: float) -> Any:
    """The response; the machine's own addresses are never asked for through a proxy."""
    host = request.host.rpartition(":")[0] or request.host
    direct = [urllib.request.ProxyHandler({})] if host in LOOPBACK else []
    return urllib.request.build_opener(*direct).open(request, timeout=timeout_s)


def checked_address(address: str) -> str:
    """The dashboard URL without a trailing slash; `HOST:PORT` is taken as http.

    Raises:
        ResourceError: some other kind of address.
    """
    address = address if "://" in address else f"http://{address}"
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", address):
        raise ResourceError(f"{address}: give the URL of the Ray dashboard, such as http://127.0.0.1:8265")
    return address.rstrip("/")


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")[:300]
