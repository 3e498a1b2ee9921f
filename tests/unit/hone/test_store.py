"""The store: a job's state and its events change together, in whichever process."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from hone.errors import HoneError, ResourceError
from hone.store import Store


@pytest.fixture
def store(store_url: str) -> Store:
    return Store(store_url)


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


def test_another_process_sees_what_was_written(store: Store, store_url: str) -> None:
    store.add_job("a", kind="train", recipe="r.yaml", status="running")
    assert [job.id for job in Store(store_url).jobs()] == ["a"]


def test_an_unknown_job_is_an_error(store: Store) -> None:
    with pytest.raises(HoneError, match="no job 'b'"):
        store.move_job("b", "running")


def test_a_database_out_of_reach_is_said_in_one_line() -> None:
    with pytest.raises(ResourceError, match="cannot be opened"):
        Store("sqlite:////proc/nowhere.sqlite3")


def test_processes_that_open_an_empty_store_at_once_all_do(store_url: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert [opened.jobs() for opened in pool.map(Store, [store_url] * 8)] == [[]] * 8


def test_a_driver_that_is_not_there_is_named() -> None:
    with pytest.raises(ResourceError, match=r"hone\[postgres\]"):
        Store("postgresql+nodriver://host/db")
