"""`hone keys` and `hone usage`, and who may come in where `hone serve` binds."""

import json
import time
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.deploy import access_at
from cluster.moments import moment, written
from hone.errors import HoneError, ResourceError
from hone.keys import Keys, digest_of_key
from hone.storage import Home
from hone.usage import HOUR, Slot, Usage, Used, hour_of


def said(home: Home, *arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments, "--home", str(home.root)])
    assert done.exit_code == 0, done.output
    return done.stdout


def as_json(home: Home, *arguments: str) -> Any:
    return json.loads(said(home, *arguments, "--json"))


def test_a_key_is_made_shown_once_listed_and_revoked(home: Home) -> None:
    token = said(home, "keys", "create", "bot", "--project", "acme", "--adapter", "a*", "--adapter", "prod").strip()
    (kept,) = Keys(home.store_url).all()
    assert (kept.digest, kept.adapters, kept.scopes) == (digest_of_key(token), ("a*", "prod"), ("inference",))
    made = as_json(
        home,
        "keys",
        "create",
        "root",
        "--scope",
        "admin",
        "--requests-per-minute",
        "60",
        "--tokens-per-minute",
        "9000",
        "--expires",
        "90d",
        "--weight",
        "2.5",
    )
    assert made["key"].startswith(made["prefix"])
    assert made["expires_at"] == pytest.approx(time.time() + 90 * 86400, abs=60)
    listed = as_json(home, "keys", "list")
    assert {key["name"]: key["state"] for key in listed} == {"root": "active", "bot": "active"}
    for text in (said(home, "keys", "list"), json.dumps(listed)):
        assert token not in text
        assert kept.digest not in text
    assert {key["name"]: key["weight"] for key in listed} == {"root": 2.5, "bot": 1.0}
    assert "60 requests, 9,000 tokens  2.5 " in said(home, "keys", "list")
    assert as_json(home, "keys", "revoke", "acme/bot")["state"] == "revoked"
    assert {key["name"]: key["state"] for key in as_json(home, "keys", "list")} == {"root": "active", "bot": "revoked"}


def test_usage_is_summed_by_what_is_asked(home: Home) -> None:
    key, _ = Keys(home.store_url).create("bot", project="acme")
    now = hour_of()
    Usage(home.store_url).write(
        "w",
        {
            Slot(now, key.id, "a@1"): Used(2, 1000, 100, 50),
            Slot(now, "anonymous", "a@1"): Used(1, 10, 0, 5),
            Slot(now - 48 * HOUR, key.id, "b@1"): Used(1, 1, 0, 1),
        },
    )
    assert as_json(home, "usage", "--by", "key", "--since", "24h") == [
        {"key": key.id, "key_name": "acme/bot", "requests": 2, "prompt_tokens": 1000, "cached_tokens": 100, "completion_tokens": 50},
        {"key": "anonymous", "key_name": "", "requests": 1, "prompt_tokens": 10, "cached_tokens": 0, "completion_tokens": 5},
    ]
    assert [each["adapter"] for each in as_json(home, "usage", "--by", "adapter")] == ["a@1", "b@1"]
    assert len(as_json(home, "usage")) == 3
    text = said(home, "usage")
    assert "acme/bot" in text
    assert "1,011" in text, "the total"
    assert "nothing was used" in said(home, "usage", "--since", "2099-01-01")


@pytest.mark.parametrize(
    ("text", "ahead", "seconds"), [("30d", True, 30 * 86400), ("12h", False, -12 * 3600), ("45min", True, 2700), ("1w", False, -7 * 86400)]
)
def test_lengths_of_time_count_from_now(text: str, ahead: bool, seconds: float) -> None:
    assert moment(text, ahead=ahead) - time.time() == pytest.approx(seconds, abs=60)


def test_dates_are_utc_and_nonsense_is_said() -> None:
    assert written(moment("2027-01-31", ahead=True)) == "2027-01-31 00:00"
    assert written(moment("2027-01-31T18:00+02:00", ahead=True)) == "2027-01-31 16:00"
    with pytest.raises(HoneError, match="write 30d"):
        moment("soon", ahead=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_on_loopback_the_first_key_decides(home: Home, host: str) -> None:
    assert access_at(host, home, allow_anonymous=False) == "auto"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_an_address_that_others_reach_takes_an_active_key_or_a_plain_word(home: Home, host: str) -> None:
    with pytest.raises(ResourceError, match="hone keys create NAME"):
        access_at(host, home, allow_anonymous=False)
    Keys(home.store_url).create("bot")
    assert access_at(host, home, allow_anonymous=False) == "required"
    Keys(home.store_url).revoke("bot")
    with pytest.raises(ResourceError):
        access_at(host, home, allow_anonymous=False)
    assert access_at(host, home, allow_anonymous=True) == "off"
