"""E-mail addresses, telephone and card numbers, and secrets in texts: found, and taken out when asked."""

import re
from collections.abc import Iterator
from typing import Any

EMAIL = re.compile(r"\b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})*\.[A-Za-z]{2,24}\b")
PHONE = re.compile(
    r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}|\(?\d{3}\)?[ .-]\d{3}[.-]\d{4})(?![\w-]|\.\d)"
)
CARD = re.compile(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d-]|\.\d)")
SECRET = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\bgh[pousr]_[A-Za-z0-9]{36,}\b"
    r"|\b(?:sk|pk|rk)[-_](?:live|test|proj|ant)[-_][A-Za-z0-9_-]{16,}"
    r"|\bsk-[A-Za-z0-9]{32,}\b"
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}"
    r"|\bhf_[A-Za-z0-9]{30,}\b"
    r"|\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"
    r"|\b(?:password|passwd|api[_-]?key|secret[_-]?key|access[_-]?token)\b[\"']?\s*[:=]\s*[\"']?[^\s\0\"',;]{8,}",
    re.IGNORECASE,
)
PATTERNS = {"secret": SECRET, "email": EMAIL, "card": CARD, "phone": PHONE}
"""In the order in which they are looked for: what one has taken is not looked at by the next."""
SHORTEST = 6
"""Characters of the shortest of them all, a@b.de."""
DIGITS = re.compile(r"\d(?:[ .()-]{0,3}\d){5}")
"""In every telephone and card number. Most texts have none, nor an @, nor one of these words, and are done with a glance."""
SECRET_WORDS = (
    *("private key", "akia", "asia", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "xox", "hf_", "eyj", "passw", "api", "secret", "access"),
    *(f"{kind}{joint}" for kind in ("sk", "pk", "rk") for joint in "-_"),
)
"""In every secret, in small letters."""


def kinds_in(text: str) -> set[str]:
    """Which kinds of private data a text holds."""
    return {kind for kind, _ in _spans(text)}


def redacted(value: Any) -> Any:
    """A row, or a part of one, with `[EMAIL]`, `[PHONE]`, `[CARD]`, `[SECRET]` in their places."""
    if isinstance(value, str):
        for kind, (start, end) in sorted(_spans(value), key=lambda found: -found[1][0]):
            value = f"{value[:start]}[{kind.upper()}]{value[end:]}"
        return value
    if isinstance(value, list):
        return [redacted(item) for item in value]
    return {key: redacted(item) for key, item in value.items()} if isinstance(value, dict) else value


def texts_in(value: Any) -> Iterator[str]:
    """Every text of a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)


def _spans(text: str) -> Iterator[tuple[str, tuple[int, int]]]:
    taken: list[tuple[int, int]] = []
    for kind, pattern in possible(text) if len(text) >= SHORTEST else ():
        for match in pattern.finditer(text):
            start, end = match.span()
            if any(start < other_end and other_start < end for other_start, other_end in taken):
                continue
            if kind == "card" and not _is_card(match.group()):
                continue
            taken.append((start, end))
            yield kind, (start, end)


def possible(text: str) -> Iterator[tuple[str, re.Pattern[str]]]:
    """The patterns that a glance does not rule out."""
    small, has_digits = text.lower(), DIGITS.search(text) is not None
    ruled_in = {"secret": any(word in small for word in SECRET_WORDS), "email": "@" in text, "card": has_digits, "phone": has_digits}
    return ((kind, pattern) for kind, pattern in PATTERNS.items() if ruled_in[kind])


def _is_card(text: str) -> bool:
    """By its check digit (ISO/IEC 7812-1, Luhn), and the first digits that card networks have."""
    digits = [int(character) for character in text if character.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return digits[0] in (2, 3, 4, 5, 6) and len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0
