"""Whether the head of the Ray cluster still answers, asked by a thread of the driver.

A head that is gone leaves the driver waiting in a call that nothing interrupts, until Ray's own client ends the process from within, with
an error of its own and without giving the run's state a chance to be kept. So the thread asks the head's port, and gives up before Ray
does.
A head that comes back in time (with its state, as KubeRay keeps it in Redis) is taken for what it was.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

RAY_GIVES_UP_AFTER_S = 60.0
"""Ray's own default of `gcs_rpc_server_reconnect_timeout_s` (src/ray/common/ray_config_def.h)."""
SHARE = 0.75
"""Of that time."""


@contextmanager
def watched_head(address: str, lost: Callable[[str], None], *, patience_s: float | None = None) -> Iterator[None]:
    """A block in which `lost` is called, with the reason, once nothing has listened at the head's address for too long.

    Args:
        address: `HOST:PORT` of the cluster's control store.
        lost: Called from the thread, once. The thread that called Ray may never return.
        patience_s: For how long; by default three quarters of what Ray allows.
    """
    limit_s = SHARE * _ray_gives_up_after_s() if patience_s is None else patience_s
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(address, lost, limit_s, over), name="head-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def _watch(address: str, lost: Callable[[str], None], limit_s: float, over: threading.Event) -> None:
    every_s, answered = min(5.0, limit_s / 5), time.monotonic()
    while not over.wait(every_s):
        if _answers(address, timeout_s=every_s):
            answered = time.monotonic()
        elif time.monotonic() - answered >= limit_s:
            lost(f"the Ray head at {address} has not answered for {limit_s:.0f} s")
            return


def _answers(address: str, *, timeout_s: float) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s):
            return True
    except OSError:
        return False


def _ray_gives_up_after_s() -> float:
    return float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", RAY_GIVES_UP_AFTER_S))  # noqa: SIM112 - as Ray spells it
