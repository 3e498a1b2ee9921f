"""Single values of a row: texts that a tokenizer can take, classes, numbers."""

import math
from typing import Any

from hone.errors import DataError


def checked_text(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    """The text.

    Raises:
        DataError: not a text, an empty one, or one that no tokenizer takes.
    """
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        raise DataError(f"{name!r} must be a text that is not empty")
    if "\0" in value:
        raise DataError(f"{name!r} holds a NUL character at {value.index(chr(0)) + 1}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # what `surrogateescape` makes of a byte
            raise DataError(f"{name!r} holds the byte {code - 0xDC00:#04x}, which is not UTF-8; save the file as UTF-8") from None
        raise DataError(f"{name!r} holds half of a surrogate pair at {error.start + 1}, which is no character") from None
    return value


def class_name(value: Any, name: str) -> str:
    """A class, given by name or number."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{name!r} must be a class name or number, not {value!r}")
    return checked_text(str(value), name)


def class_names(value: Any, name: str) -> list[str]:
    """Any number of classes, each once."""
    if not isinstance(value, list):
        raise DataError(f"{name!r} must be a list of class names, not {type(value).__name__}")
    return sorted({class_name(item, name) for item in value})


def number(value: Any, name: str) -> float:
    """A number that is neither infinite nor NaN."""
    try:
        made = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        made = math.nan
    if not math.isfinite(made):
        raise DataError(f"{name!r} must be a number, not {value!r:.80}")
    return made
