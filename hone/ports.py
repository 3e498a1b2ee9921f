"""A free port of this machine, from below those that the kernel gives to outgoing connections."""

import random
import socket

LOOPBACK = "127.0.0.1"
RANGE = range(20_000, 32_000)
"""Asking the kernel for port 0 gives one that any outgoing connection may be given a moment later; Linux gives those from 32768 up,
and Ray's own workers listen between 10002 and 19999."""


def free_port(wanted: int | None = None) -> int:
    """A port that nobody on 127.0.0.1 listens on just now; `wanted`, if that is free."""
    for port in [*([wanted] if wanted else []), *random.SystemRandom().sample(RANGE, 50), 0]:
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError("no free port on 127.0.0.1")
