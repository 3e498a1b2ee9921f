"""A Ray on this machine, started and ended by us, and the tokens by which Ray knows its own.

The head runs as a child process in a session of its own (cluster/head.py). It ends when our end of its standard input closes, so it
cannot outlive the command that started it, even one that was killed. Everything listens on 127.0.0.1 only, and asks for a token that
is passed on through the environment: whoever reaches Ray's ports without one could run code as this user.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hone.errors import ResourceError

DEFAULT_TOKEN_FILE = Path("~/.ray/auth_token")
START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 20
LONGEST_TEMP_DIR = 40
"""Ray puts Unix sockets below its temporary folder, and their paths end at 107 bytes."""
SERVE_PROXIES = {
    # What Serve's own proxies answer (408, 429, 503) comes in OpenAI's shape too.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.proxy.middlewares",
    # Requests go on to the ingress by gRPC and not through Ray's object store: less computing for each piece of an answer (decision 0022).
    "RAY_SERVE_PROXY_USE_GRPC": "1",
}
"""Variables of Ray Serve's HTTP servers; the Kubernetes manifests set the same."""


@dataclass
class LocalRay:
    """A running local Ray."""

    address: str
    """What a driver connects to, `127.0.0.1:PORT`."""
    dashboard: str
    """URL of the dashboard, jobs and Serve interface."""
    folder: Path
    """Its temporary folder; logs are in session_latest/logs."""
    environment: dict[str, str]
    """What a process needs in its environment to be let in."""
    process: subprocess.Popen[str]
    is_kept: bool = field(default=False, init=False)

    @property
    def pid(self) -> int:
        """The head's process id, and the id of the session that all its processes are in."""
        return self.process.pid

    @property
    def token(self) -> str | None:
        return auth_token(self.environment)

    def keep(self) -> None:
        """Let it outlive this process; from then on SIGTERM to its pid ends it."""
        assert self.process.stdin is not None
        self.process.stdin.write("keep\n")
        self.process.stdin.flush()
        self.is_kept = True


@contextmanager
def local_ray(*, min_cpus: int = 2) -> Iterator[LocalRay]:
    """A Ray on this machine for the length of the block; all its processes are gone afterwards.

    Args:
        min_cpus: Logical CPUs that it offers at least, whatever the machine has.

    Raises:
        ResourceError: it did not start.
    """
    environment = local_environment()
    folder = _temporary_folder()
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.head", str(folder), str(min_cpus)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(folder / "head.log").open("w"),
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    ray: LocalRay | None = None
    try:
        started = _started(process, folder)
        environment["RAY_ADDRESS"] = started["address"]
        ray = LocalRay(started["address"], started["dashboard"], folder, environment, process)
        yield ray
    finally:
        if ray is None or not ray.is_kept:
            with _signals_ignored():
                _stop(process)
                shutil.rmtree(folder, ignore_errors=True)


def local_environment() -> dict[str, str]:
    """Variables that a local Ray and every process that joins it must share, beyond those already set.

    The token is this user's own where there is one, so that `ray status` in another terminal works, and else made for this Ray alone:
    left to itself, `ray.init` writes one to the user's home folder.
    """
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Its documented use is elsewhere, but 0 is what makes Ray keep 127.0.0.1 as the node's address on Linux too; otherwise it
        # replaces it by the machine's public one and listens on all interfaces (ray/_private/services.py, get_node_ip_address).
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        **SERVE_PROXIES,
    }
    if environment["RAY_AUTH_MODE"] == "token" and auth_token(environment | dict(os.environ)) is None:
        environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return environment


def auth_token(environment: dict[str, str] | None = None) -> str | None:
    """The token to show a cluster: `$RAY_AUTH_TOKEN`, else the file `$RAY_AUTH_TOKEN_PATH`, else (RAY_AUTH_MODE=token) ~/.ray/auth_token.

    Raises:
        ResourceError: the file that was named cannot be read.
    """
    variables = {**os.environ, **(environment or {})}
    if variables.get("RAY_AUTH_MODE") not in (None, "token"):
        return None
    if token := variables.get("RAY_AUTH_TOKEN"):
        return token
    if named := variables.get("RAY_AUTH_TOKEN_PATH"):
        try:
            return Path(named).expanduser().read_text().strip()
        except OSError as error:
            raise ResourceError(f"RAY_AUTH_TOKEN_PATH {named}: cannot be read ({error.strerror})") from None
    default = DEFAULT_TOKEN_FILE.expanduser()
    if variables.get("RAY_AUTH_MODE") == "token" and default.is_file():
        return default.read_text().strip() or None
    return None


def processes_in_session(session: int) -> list[int]:
    """Ids of the live processes of a session (Linux; elsewhere none are found)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _parent, _group, sid = stat.read_text().rpartition(")")[2].split()[:4]
            if int(sid) == session and state != "Z":
                found.append(int(stat.parent.name))
    return found


def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="hone-ray-"))
    if len(str(folder)) > LONGEST_TEMP_DIR and Path("/tmp").is_dir():
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="hone-ray-", dir="/tmp"))
    return folder


def _started(process: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    """What the head says of itself once it is up."""
    import threading

    assert process.stdout is not None
    watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        line = process.stdout.readline()
    finally:
        watchdog.cancel()
    if line:
        return dict(json.loads(line))
    process.wait()
    said = [text.strip() for text in (folder / "head.log").read_text().splitlines() if text.strip()]
    raise ResourceError(f"a local Ray did not start on this machine: {said[-1] if said else f'nothing within {START_TIMEOUT_S} s'}")


def _stop(process: subprocess.Popen[str]) -> None:
    """End the head and whatever is left of its session."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        left = processes_in_session(process.pid)
        if not left and process.poll() is not None:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if process.poll() is None:
            process.kill()
        time.sleep(0.05)


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """Let cleaning up finish, however often Ctrl-C is pressed."""
    before = {name: signal.signal(name, signal.SIG_IGN) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
