"""Hosts that really are apart: network namespaces joined by a bridge, each with a Ray node of its own. Needs root."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.processes import end

HERE = "10.77.0.1"
"""The address of this process on their network."""
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
QUICK = {
    # A node that does not answer is given up after seconds. Ray's own limits are a minute.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}


def why_not() -> str:
    """Why there can be no such hosts here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    tried = subprocess.run(["ip", "netns", "list"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "this machine has no network namespaces"


class Hosts:
    """A head here and any number of hosts, ended with this block."""

    def __init__(self, log: Path) -> None:
        self._log, self._name = log, f"hone{os.getpid() % 100000}"
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._spaces: list[str] = []
        self._head: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        _ray("get-auth-token", "--generate")  # one for all of them; an old one is kept
        _ip("link", "add", "name", self._name, "type", "bridge")
        _ip("addr", "add", f"{HERE}/24", "dev", self._name)
        _ip("link", "set", self._name, "up")
        head = ["--head", "--port=6399", f"--node-ip-address={HERE}", "--num-cpus=0", "--include-dashboard=false"]
        self._head = self._start("head", [], head)
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        for node in [*self._nodes.values(), *([self._head] if self._head else [])]:
            end(node)  # `ray start --block` ends its node when it is asked to end
        for space in self._spaces:
            for pid in _ip("netns", "pids", space).split():
                _kill(int(pid))
            _ip("netns", "del", space)
        _ip("link", "del", self._name)

    @property
    def address(self) -> str:
        """Of the head."""
        return f"{HERE}:6399"

    def add(self, host: str, number: int) -> None:
        """A host on the network with that name, up to five letters, and number."""
        space = f"{self._name}{host}"
        _ip("netns", "add", space)
        self._spaces.append(space)
        _ip("link", "add", space, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", space, "master", self._name, "up")
        for device, address in (("lo", ""), ("eth0", f"10.77.0.{number}/24")):
            if address:
                _ip("-n", space, "addr", "add", address, "dev", device)
            _ip("-n", space, "link", "set", device, "up")

    def start_node(self, host: str, number: int) -> None:
        """Ray with one CPU on it."""
        node = [f"--address={self.address}", f"--node-ip-address=10.77.0.{number}", "--num-cpus=1"]
        self._nodes[host] = self._start(host, ["ip", "netns", "exec", f"{self._name}{host}"], node)

    def cut_off(self, host: str) -> None:
        """Pull its cable."""
        _ip("link", "set", f"{self._name}{host}", "down")

    def join_again(self, host: str) -> None:
        """Put it back."""
        _ip("link", "set", f"{self._name}{host}", "up")

    def pids(self, host: str, named: str = "") -> list[int]:
        """Processes on it whose command line has that in it."""
        found = [int(pid) for pid in _ip("netns", "pids", f"{self._name}{host}").split()]
        return [pid for pid in found if named in _command(pid)]

    def wait_ended(self, host: str) -> None:
        """Until Ray on it has ended by itself, as it does once it hears that it was given up; what it leaves is ended too."""
        self._nodes.pop(host).wait(timeout=120)
        deadline = time.monotonic() + 60
        while self.pids(host) and time.monotonic() < deadline:
            time.sleep(0.5)
        for pid in self.pids(host):
            _kill(pid)

    def _start(self, name: str, before: list[str], options: list[str]) -> subprocess.Popen[bytes]:
        argv = [*before, *RAY, "start", "--block", "--disable-usage-stats", *options]
        environment = {**os.environ, **QUICK, "GLOO_SOCKET_IFNAME": "eth0" if before else self._name}
        with (self._log / f"{name}.log").open("ab") as out:
            return subprocess.Popen(argv, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


def _ray(*arguments: str) -> None:
    subprocess.run([*RAY, *arguments], check=True, capture_output=True)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""
