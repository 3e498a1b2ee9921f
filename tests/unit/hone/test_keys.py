"""API keys in the store: shown once, kept as digests, told apart, ended."""

import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
from sqlalchemy import create_engine

from hone.errors import HoneError, ResourceError
from hone.keys import SHOWN, Keys, digest_of_key, matches
from tests.postgres import Postgres


@pytest.fixture
def keys(store_url: str) -> Keys:
    return Keys(store_url)


def test_a_key_is_found_by_its_digest_and_not_kept(keys: Keys) -> None:
    made, token = keys.create(
        "bot", project="support", adapters=["support-*"], requests_per_minute=60, tokens_per_minute=9_000_000_000, weight=0.5
    )
    assert keys.all() == [made]
    assert made.digest == digest_of_key(token)
    assert (made.label, made.prefix, made.state) == ("support/bot", token[:SHOWN], "active")
    assert token not in repr(made)
    assert len(token) - SHOWN >= 36, "what is hidden cannot be guessed"
    assert keys.create("other")[1] != token


def test_no_byte_of_a_keys_hidden_part_is_written(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'store.sqlite3'}"
    _, token = Keys(url).create("bot")
    connection = sqlite3.connect(tmp_path / "store.sqlite3")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert token[:SHOWN].encode() in written
    assert token[SHOWN:].encode() not in written


@pytest.mark.parametrize("named_by", ["id", "prefix", "name", "label"])
def test_a_revoked_key_is_kept_and_opens_nothing(keys: Keys, named_by: str) -> None:
    made, _ = keys.create("bot")
    other, _ = keys.create("other")
    revoked = keys.revoke(getattr(made, named_by))
    assert (revoked.id, revoked.state) == (made.id, "revoked")
    assert {key.id: key.state for key in keys.all()} == {made.id: "revoked", other.id: "active"}
    assert not revoked.is_active(time.time())
    with pytest.raises(HoneError, match="names none"):
        keys.revoke(made.id)


def test_a_name_is_free_again_once_its_key_is_revoked(keys: Keys) -> None:
    keys.create("bot")
    with pytest.raises(HoneError, match="has an active key 'bot'"):
        keys.create("bot")
    keys.create("bot", project="elsewhere")
    with pytest.raises(HoneError, match="default/bot"):
        keys.revoke("bot")  # two are meant
    keys.revoke("default/bot")
    keys.create("bot")


def test_a_key_ends_when_it_expires(keys: Keys) -> None:
    made, _ = keys.create("bot", expires_at=time.time() + 60)
    assert made.expires_at is not None
    assert made.is_active(made.expires_at - 1)
    assert not made.is_active(made.expires_at)
    assert replace(made, expires_at=1).state == "expired"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "Bot"}, "lower-case"),
        ({"name": "a/b"}, "lower-case"),
        ({"project": ""}, "lower-case"),
        ({"scopes": ["root"]}, "'root'"),
        ({"scopes": []}, "inference, metrics, admin"),
        ({"adapters": []}, "at least one pattern"),
        ({"requests_per_minute": 0}, "from 1 to"),
        ({"tokens_per_minute": -5}, "from 1 to"),
        ({"tokens_per_minute": 10**23}, "from 1 to"),
        ({"expires_at": 5.0}, "expired already"),
        ({"expires_at": 9e13}, "after the year 9999"),
        ({"weight": 0.0}, "above 0"),
        ({"weight": -1.0}, "above 0"),
        ({"weight": float("nan")}, "above 0"),
        ({"weight": float("inf")}, "above 0"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(keys: Keys, settings: dict[str, object], said: str) -> None:
    with pytest.raises(HoneError, match=said):
        keys.create(**{"name": "bot", **settings})  # type: ignore[arg-type]
    assert keys.all() == []


def test_scopes_open_what_they_say_and_admin_everything(keys: Keys) -> None:
    plain, _ = keys.create("a")
    admin, _ = keys.create("b", scopes=["admin"])
    assert (plain.has("inference"), plain.has("metrics"), plain.has("admin")) == (True, False, False)
    assert all(admin.has(scope) for scope in ("inference", "metrics", "admin"))


OLD = """
CREATE TABLE api_keys (
    id VARCHAR NOT NULL, name VARCHAR NOT NULL, project VARCHAR NOT NULL, prefix VARCHAR NOT NULL, digest VARCHAR NOT NULL,
    scopes JSON NOT NULL, adapters JSON NOT NULL, requests_per_minute BIGINT, tokens_per_minute BIGINT, created_at BIGINT NOT NULL,
    expires_at BIGINT, revoked_at BIGINT, PRIMARY KEY (id), UNIQUE (digest)
)
"""
"""As it was made before keys had weights."""
INSERT = """
INSERT INTO api_keys (id, name, project, prefix, digest, scopes, adapters, requests_per_minute, created_at)
VALUES ('{0}', '{0}', 'p', 'sk', '{0}', '["admin"]', '["*"]', 5, 1)
"""


@pytest.fixture
def old_store_url(store_url: str) -> Iterator[str]:
    """A store of before keys had weights, with a key."""
    engine = create_engine(store_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(OLD)
        connection.exec_driver_sql(INSERT.format("old"))
    yield store_url
    engine.dispose()


def test_keys_of_an_older_store_have_the_weight_of_everyone(old_store_url: str) -> None:
    keys = Keys(old_store_url)
    (old,) = keys.all()
    assert (old.id, old.requests_per_minute, old.state, old.weight) == ("old", 5, "active", 1.0)
    made, _ = keys.create("bot", weight=2.5)
    assert {key.name: key.weight for key in Keys(old_store_url).all()} == {"old": 1.0, "bot": 2.5}
    assert made.weight == 2.5
    keys.revoke("old")


def test_an_older_version_goes_on_writing_keys(old_store_url: str) -> None:
    keys = Keys(old_store_url)
    engine = create_engine(old_store_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(INSERT.format("older"))
    engine.dispose()
    assert {key.name: key.weight for key in keys.all()} == {"old": 1.0, "older": 1.0}


def test_processes_that_open_an_older_store_at_once_all_do(old_store_url: str) -> None:
    at_once = Barrier(8)

    def opened(_: int) -> list[float]:
        at_once.wait(timeout=30)
        return [key.weight for key in Keys(old_store_url).all()]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(opened, range(8))) == [[1.0]] * 8


def test_an_older_store_that_may_not_be_changed_is_said_in_one_line(postgres: Postgres) -> None:
    url = postgres.new_database()
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(OLD)
        connection.exec_driver_sql("DO 'BEGIN CREATE ROLE guest LOGIN; EXCEPTION WHEN duplicate_object THEN END'")
    engine.dispose()
    with pytest.raises(ResourceError, match="cannot be opened"):
        Keys(url.replace("tests@", "guest@"))


@pytest.mark.parametrize(
    ("patterns", "names", "allowed"),
    [
        (["*"], ["Qwen/Qwen3-0.6B"], True),
        (["support-*"], ["support-bot@3", "support-bot"], True),
        (["support-*"], ["prod", "sales@1", "sales"], False),
        (["support-bot@3"], ["support-bot", "support-bot@3"], True),
        (["support-bot@3"], ["support-bot", "support-bot@4"], False),
        (["Qwen/*"], ["Qwen/Qwen3-0.6B"], True),
        (["qwen/*"], ["Qwen/Qwen3-0.6B"], False),
        (["a", "prod"], ["prod", "b@1", "b"], True),
    ],
)
def test_patterns_mean_whole_names(patterns: list[str], names: list[str], allowed: bool) -> None:
    assert matches(patterns, names) is allowed
