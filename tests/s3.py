"""A real S3 server on loopback: moto's, as a process and in an environment of its own, which `make s3-server` makes.

botocore wants an older python-dateutil than the one that is pinned here, so it cannot be in the same environment.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from hone.ports import free_port

ENVIRONMENT = Path(__file__).resolve().parents[1] / ".venv-s3"
NUMBERS = count(1)


@dataclass(frozen=True)
class Store:
    """An S3 server."""

    port: int

    def uri(self, path: str) -> str:
        """Of a path that begins with a bucket, saying where the server is."""
        return f"s3://{path}?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def new_bucket(self) -> str:
        """The name of an empty one."""
        from pyarrow.fs import S3FileSystem

        name = f"bucket-{next(NUMBERS)}"
        endpoint = f"127.0.0.1:{self.port}"
        S3FileSystem(endpoint_override=endpoint, scheme="http", region="us-east-1", allow_bucket_creation=True).create_dir(name)
        return name


def running_store() -> Iterator[Store]:
    """Start one, or skip; keys for it are in this process's environment while it runs."""
    command = os.environ.get("HONE_TEST_S3_SERVER") or shutil.which("moto_server", path=str(ENVIRONMENT / "bin"))
    if not command:
        pytest.skip("no S3 server to test against: `make s3-server` installs one")
    port = free_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
    server = subprocess.Popen(
        [command, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **keys}
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in keys.items():
                patch.setenv(name, value)
            _wait(server, port)
            yield Store(port)
    finally:
        server.kill()
        server.wait()


def _wait(server: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert server.poll() is None, "the S3 server has ended"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.05)
