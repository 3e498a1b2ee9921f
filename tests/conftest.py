"""Fixtures that every test may use: small models made once, a home of one's own, a local Ray shared by a session."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before anything imports them: nothing may reach for a hub, and a local Ray says nothing of its defaults.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest

from hone.storage import Home
from tests.postgres import Postgres, running_postgres
from tests.s3 import Store, running_store
from tests.tiny import make_ast, make_bart, make_bert, make_llama, make_t5, make_vit

# A job in a shell's background starts with SIGINT ignored, and so would every command that a test starts and then interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="session")
def ast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ast(tmp_path_factory.mktemp("ast"))


@pytest.fixture(scope="session")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bart(tmp_path_factory.mktemp("bart"))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip("the real data sets (../shared/data) are not beside this checkout")
    return SHARED / "data"


@pytest.fixture(scope="session")
def store() -> Iterator[Store]:
    """An S3 server of this session's own, on loopback."""
    yield from running_store()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL of this session's own."""
    yield from running_postgres()


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of this module's own, ended with it."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="warning")
    yield
    ray.shutdown()
