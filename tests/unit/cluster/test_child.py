"""A child process gets each wish to stop exactly once, and is never left behind."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

CHILD = """\
import pathlib, signal, sys, time
log = pathlib.Path(sys.argv[1])
def note(number, frame):
    with log.open("a") as file:
        file.write(f"{signal.Signals(number).name}\\n")
    if number == signal.SIGTERM or sys.argv[2] == "obeys":
        time.sleep(0.5)  # tidies up: a second signal would be noted
        sys.exit(130)
for name in (signal.SIGINT, signal.SIGTERM):
    signal.signal(name, note)
log.write_text("ready\\n")
while True:
    time.sleep(0.05)
"""

PARENT = "import sys; from cluster.child import run_child; sys.exit(run_child(sys.argv[2:], grace_s=float(sys.argv[1])))"

Start = Callable[..., "subprocess.Popen[bytes]"]


def wait_for(met: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def start(log: Path) -> Start:
    """Start a parent in a session of its own, and wait until its child is ready."""

    def begin(manner: str = "obeys", *, grace_s: float = 30, **options: object) -> "subprocess.Popen[bytes]":
        argv = [sys.executable, "-c", PARENT, str(grace_s), sys.executable, "-c", CHILD, str(log), manner]
        parent = subprocess.Popen(argv, start_new_session=True, **options)  # type: ignore[call-overload]
        wait_for(lambda: log.exists() and "ready" in log.read_text())
        return parent  # type: ignore[no-any-return]

    return begin


def received(log: Path) -> list[str]:
    return log.read_text().split()[1:]


def test_an_exit_code_goes_through() -> None:
    from cluster.child import run_child

    assert run_child([sys.executable, "-c", "raise SystemExit(7)"]) == 7
    assert run_child([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 128 + 9


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_to_the_parent_alone_reaches_the_child_once_as_an_interrupt(start: Start, log: Path, name: str) -> None:
    parent = start()
    parent.send_signal(signal.Signals[name])
    assert parent.wait(30) == 130
    assert received(log) == ["SIGINT"]


def test_a_signal_to_the_whole_process_group_reaches_the_child_once(start: Start, log: Path) -> None:
    parent = start()
    os.killpg(parent.pid, signal.SIGINT)
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.wait(30) == 130
    assert received(log) == ["SIGINT"]


def test_ctrl_c_in_a_terminal_reaches_the_child_once(start: Start, log: Path) -> None:
    keyboard, terminal = pty.openpty()
    try:
        parent = start(stdin=terminal, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.write(keyboard, b"\x03")
        assert parent.wait(30) == 130
        assert received(log) == ["SIGINT"]
    finally:
        os.close(keyboard)
        os.close(terminal)


def test_a_child_that_will_not_stop_is_killed_after_its_time(start: Start, log: Path) -> None:
    parent = start("refuses", grace_s=0.5)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(30) == 128 + 9
    assert received(log) == ["SIGINT"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_a_killed_parent_takes_its_child_along(start: Start, log: Path) -> None:
    parent = start()
    parent.kill()
    parent.wait(30)
    wait_for(lambda: received(log) == ["SIGTERM"])
