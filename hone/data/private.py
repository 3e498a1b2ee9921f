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
    r"|\b(?:password|passwd|api[_-]?key|secret[_-]?key|access[_-]?token)\b[\"']?\s*[:=]\s*[\"']?[^\s\"',;]{8,}",
    re.IGNORECASE,
)
PATTERNS = {"secret": SECRET, "email": EMAIL, "card": CARD, "phone": PHONE}
"""In the order in which they are looked for: what one has taken is not looked at by the next."""


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
    for kind, pattern in PATTERNS.items():
        for match in pattern.finditer(text):
            start, end = match.span()
            if any(start < other_end and other_start < end for other_start, other_end in taken):
                continue
            if kind == "card" and not _is_card(match.group()):
                continue
            taken.append((start, end))
            yield kind, (start, end)


def _is_card(text: str) -> bool:
    """By its check digit (ISO/IEC 7812-1, Luhn), and the first digits that card networks have."""
    digits = [int(character) for character in text if character.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return digits[0] in (2, 3, 4, 5, 6) and len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0
