"""Runs one command in this terminal and never leaves it behind.

The child is in a process group of its own, so Ctrl-C in the terminal reaches this process alone, which passes it on exactly once: a
second interrupt would cut short the child's own orderly end. Whatever asks this process to stop (Ctrl-C, SIGTERM, a closed terminal)
is passed on as SIGINT; a child that has not ended some time later is killed.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

GRACE_S = 30.0
"""Ray needs up to 10 s to take down workers."""
REPEAT_AFTER_S = 1.0
"""A stop signal this soon after another is the same wish: `timeout` and some shells send it to the process and to its group."""
PR_SET_PDEATHSIG = 1


def run_child(argv: Sequence[str], *, environment: Mapping[str, str] | None = None, grace_s: float = GRACE_S) -> int:
    """Run `argv` to its end and give its exit code; 128 + N where signal N ended it.

    Args:
        argv: Program and arguments.
        environment: Variables beside those of this process.
        grace_s: Seconds from the first request to stop until the child is killed.
    """
    return _Child(grace_s).run(argv, {**os.environ, **(environment or {})})


class _Child:
    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._process: subprocess.Popen[bytes] | None = None
        self._asked_at: float | None = None

    def run(self, argv: Sequence[str], environment: Mapping[str, str]) -> int:
        names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {name: signal.signal(name, self._stop) for name in names} | {signal.SIGTSTP: signal.signal(signal.SIGTSTP, self._pause)}
        try:
            self._process = subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=end_with_parent())
            if self._asked_at is not None:
                self._process.send_signal(signal.SIGINT)
            return self._wait()
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def _wait(self) -> int:
        assert self._process is not None
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = self._process.wait(timeout=0.5)
                return code if code >= 0 else 128 - code
            if self._asked_at is not None and time.monotonic() - self._asked_at > self._grace_s:
                self._process.kill()

    def _stop(self, _signal: int, _frame: object) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            if self._process is not None:
                self._process.send_signal(signal.SIGINT)
        elif now - self._asked_at > REPEAT_AFTER_S and self._process is not None:
            self._process.kill()

    def _pause(self, _signal: int, _frame: object) -> None:
        """Ctrl-Z: the child sleeps while this process does."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)


def end_with_parent() -> Callable[[], None] | None:
    """What the child does between fork and exec so that it gets SIGTERM should this process be killed (Linux only)."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # found before the fork, after which loading a library is not safe

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    return ask
