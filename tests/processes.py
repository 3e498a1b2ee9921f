"""Processes that tests and benchmarks start, ended."""

import signal
import subprocess


def end(process: subprocess.Popen[bytes], *, asked_by: signal.Signals = signal.SIGTERM, within_s: float = 30) -> None:
    """Ask it to end, and kill it where it does not."""
    process.send_signal(asked_by)
    try:
        process.wait(timeout=within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
