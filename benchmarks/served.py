"""hone's serving on a Ray of this process, as `hone serve` has it, with settings that only a Serve configuration can have."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import serve

from cluster.connect import SERVE_PROXIES
from hone.ports import free_port
from serving.app import ServeArgs, build


@contextmanager
def served(args: ServeArgs) -> Iterator[str]:
    """The URL at which it answers, for the length of the block."""
    port = free_port()
    os.environ.update(SERVE_PROXIES)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="warning")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(args), name="hone", route_prefix="/")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        ray.shutdown()
