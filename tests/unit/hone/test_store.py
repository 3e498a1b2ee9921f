"""The store: a job's state and its events change together, in whichever process."""

from pathlib import Path

import pytest

from hone.errors import HoneError, ResourceError
from hone.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"sqlite:///{tmp_path / 'store.sqlite3'}")


def test_every_change_of_state_has_its_event(store: Store) -> None:
    store.add_job("a", kind="train", recipe="r.yaml", status="submitted", address="http://x")
    assert store.move_job("a", "running")
    assert store.move_job("a", "succeeded", message="bot@1")
    assert [(e.status, e.message) for e in store.events("a")] == [("submitted", "created"), ("running", ""), ("succeeded", "bot@1")]
    job = store.job("a")
    assert job is not None
    assert (job.status, job.result) == ("succeeded", "bot@1")


def test_a_job_that_has_ended_stays_as_it_ended(store: Store) -> None:
    store.add_job("a", kind="train", recipe="r.yaml", status="running")
    store.move_job("a", "failed", message="no disk left")
    assert not store.move_job("a", "running")
    assert [e.status for e in store.events("a")] == ["running", "failed"]


def test_another_process_sees_what_was_written(store: Store, tmp_path: Path) -> None:
    store.add_job("a", kind="train", recipe="r.yaml", status="running")
    assert [job.id for job in Store(f"sqlite:///{tmp_path / 'store.sqlite3'}").jobs()] == ["a"]


def test_an_unknown_job_is_an_error(store: Store) -> None:
    with pytest.raises(HoneError, match="no job 'b'"):
        store.move_job("b", "running")


def test_a_database_out_of_reach_is_said_in_one_line() -> None:
    with pytest.raises(ResourceError, match="cannot be opened"):
        Store("sqlite:////proc/nowhere.sqlite3")
