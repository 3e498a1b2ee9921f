"""Moments as they are written on a command line: `30d`, `12h`, `45min`, or an ISO date or time."""

import re
import time
from datetime import UTC, datetime

from hone.errors import HoneError

UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 604800}


def moment(text: str, *, ahead: bool) -> float:
    """Unix time of `text`; a length of time counts from now, into the future where `ahead`. Times without a zone are UTC.

    Raises:
        HoneError: it says no moment.
    """
    match = re.fullmatch(r"(\d{1,9})(s|min|h|d|w)", text)
    if match:
        length = int(match[1]) * UNITS[match[2]]
        return time.time() + (length if ahead else -length)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise HoneError(f"{text!r} is no moment; write 30d, 12h, 45min, 2027-01-31 or 2027-01-31T18:00") from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def written(seconds: float | None) -> str:
    """Unix time as `2027-01-31 18:00`, UTC."""
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"
