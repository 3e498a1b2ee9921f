"""Tokens to text, piece by piece, without ever giving out half a character or part of a stop string."""

from collections.abc import Sequence
from typing import Any

HALF = "�"
LONGEST_HALF = 3
"""A UTF-8 character is at most four bytes, so an unfinished one is at most three tokens and three replacement characters."""


class TextStream:
    """The answer of one row so far."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        """Whether a stop string came; nothing from it on is given out."""
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._ids: list[int] = []
        self._context = 0
        """Decoding starts here and not at the beginning, so that a step costs the same however long the answer is."""
        self._read = 0
        """Tokens before this one are decoded for good; they are still context, since decoders treat a first token differently."""
        self._sent = 0
        """Characters of the decoded window that were taken."""
        self._held = ""
        """Text that may be the beginning of a stop string."""

    def push(self, token: int) -> str:
        """Take one token; return the text that is now certain."""
        self._ids.append(token)
        window = self._decode(self._context)
        run = len(window) - len(window.rstrip(HALF))
        # A run of replacement characters may still turn into text, and not only its end: decoders with byte fallback take back a good
        # character while the one after it is unfinished. Once more tokens than a character has have come, it is no text.
        may_resolve = len(self._ids) - self._read <= LONGEST_HALF
        settled = len(window) - (run if may_resolve else min(run, LONGEST_HALF))
        fresh = window[self._sent : settled]
        self._sent = max(self._sent, settled)
        if run == 0:
            self._context, self._read = self._read, len(self._ids)
            self._sent = len(self._decode(self._context))
        return self._without_stop(fresh)

    def finish(self) -> str:
        """The rest, at the end of the answer; a character that was cut in half is left out."""
        if self.stopped:
            return ""
        fresh = self._decode(self._context)[self._sent :].rstrip(HALF)
        text = self._without_stop(fresh)
        rest, self._held = self._held, ""
        return text if self.stopped else text + rest

    def _decode(self, start: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _without_stop(self, fresh: str) -> str:
        text = self._held + fresh
        found = min((at for at in (text.find(stop) for stop in self._stop) if at >= 0), default=None)
        if found is not None:
            self.stopped, self._held = True, ""
            return text[:found]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
