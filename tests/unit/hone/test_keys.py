"""API keys in the store: shown once, kept as digests, told apart, ended."""

import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hone.errors import HoneError
from hone.keys import SHOWN, Keys, digest_of_key, matches


@pytest.fixture
def keys(store_url: str) -> Keys:
    return Keys(store_url)


def test_a_key_is_found_by_its_digest_and_not_kept(keys: Keys) -> None:
    made, token = keys.create("bot", project="support", adapters=["support-*"], requests_per_minute=60, tokens_per_minute=9_000_000_000)
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
        ({"requests_per_minute": 0}, "at least 1"),
        ({"tokens_per_minute": -5}, "at least 1"),
        ({"expires_at": 5.0}, "expired already"),
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
