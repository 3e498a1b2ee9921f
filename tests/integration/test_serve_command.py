"""`hone serve` in the foreground: it answers, and whatever ends it, nothing is left."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.connect import processes_in_session
from hone.keys import Keys
from hone.ports import free_port
from hone.storage import Home

READY = "Ctrl-C ends it."


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def key(tmp_path: Path) -> str:
    """One of the home that is served."""
    return Keys(Home(tmp_path / ".hone").store_url).create("bot", scopes=["admin"])[1]


@pytest.fixture
def server(llama: Path, port: int, tmp_path: Path, host: str, key: str) -> Iterator["subprocess.Popen[str]"]:  # noqa: ARG001
    """`hone serve`, once it answers."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "HONE_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "serve", "--base", str(llama), "--host", host, "--port", str(port)],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith(READY):
            break
    else:
        pytest.fail("".join(said))
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("host", "name", "code"), [("127.0.0.1", "SIGINT", 130), ("0.0.0.0", "SIGTERM", 143), ("127.0.0.1", "SIGKILL", -9)]
)
def test_it_answers_and_leaves_nothing_behind(
    server: "subprocess.Popen[str]", llama: Path, port: int, key: str, name: str, code: int
) -> None:
    url = f"http://127.0.0.1:{port}/v1/models"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(url, timeout=30)
    with urllib.request.urlopen(urllib.request.Request(url, headers={"authorization": f"Bearer {key}"}), timeout=30) as response:
        assert str(llama) in [model["id"] for model in json.load(response)["data"]]
    (head,) = psutil.Process(server.pid).children()
    assert len(processes_in_session(head.pid)) > 5
    folder = Path(head.cmdline()[-2])
    assert folder.is_dir()

    server.send_signal(signal.Signals[name])
    assert server.wait(60) == code
    deadline = time.monotonic() + 30  # after SIGKILL the head ends by itself
    while processes_in_session(head.pid) or folder.exists() or is_taken(port):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False
