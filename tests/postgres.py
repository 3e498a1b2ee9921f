"""A PostgreSQL of this session's own, on a socket in a folder of its own: no port, nothing of the machine's own servers."""

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.processes import end

NUMBERS = count(1)


@dataclass(frozen=True)
class Postgres:
    """A running server."""

    folder: Path

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://tests@/{database}?host={self.folder}"

    def new_database(self) -> str:
        """URL of an empty one."""
        import psycopg

        name = f"store_{next(NUMBERS)}"
        with psycopg.connect(host=str(self.folder), user="tests", dbname="postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)


def running_postgres() -> Iterator[Postgres]:
    """One for as long as the generator is open; a skip says what is missing."""
    pytest.importorskip("psycopg", reason="psycopg is not installed; hone[postgres] brings it")
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path(found).parent for found in [shutil.which("postgres")] if found]
    if not binaries:
        pytest.skip("PostgreSQL is not on this machine")
    folder = Path(tempfile.mkdtemp(prefix="hone-pg-", dir="/tmp"))  # a socket's path is at most 107 bytes
    server: subprocess.Popen[bytes] | None = None
    try:
        run: dict[str, Any] = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        if os.getuid() == 0:  # which PostgreSQL refuses to run as
            unprivileged = pwd.getpwnam("nobody")
            os.chown(folder, unprivileged.pw_uid, unprivileged.pw_gid)
            run |= {"user": unprivileged.pw_uid, "group": unprivileged.pw_gid}
        data = folder / "data"
        initdb = [binaries[-1] / "initdb", "-D", data, "-U", "tests", "-A", "trust", "--no-sync", "-E", "UTF8"]
        subprocess.run(initdb, check=True, timeout=120, **run)
        options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
        server = subprocess.Popen([binaries[-1] / "postgres", "-D", data, *options], **run)
        _wait(folder, server)
        yield Postgres(folder)
    finally:
        if server is not None:
            end(server, within_s=20)
        shutil.rmtree(folder, ignore_errors=True)


def _wait(folder: Path, server: "subprocess.Popen[bytes]") -> None:
    import psycopg

    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(host=str(folder), user="tests", dbname="postgres").close()
            return
        except psycopg.OperationalError:
            assert server.poll() is None, "PostgreSQL ended by itself"
            assert time.monotonic() < deadline, "PostgreSQL does not answer"
            time.sleep(0.1)
