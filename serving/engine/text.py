"""Tokens to text, piece by piece, without ever giving out half a character or part of a stop string."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

HALF = "�"
WINDOW = 16
"""Tokens that are decoded together, before decoding goes on from a later one: to move on takes a decoding of its own."""
LONGEST_HALF = 3
"""A UTF-8 character is at most four bytes, so an unfinished one is at most three tokens and three replacement characters."""


BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
"""How byte-level BPE writes a byte in its vocabulary."""
FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece writes a byte."""


@dataclass(frozen=True)
class TokenText:
    """A token by itself."""

    text: str
    """With replacement characters where it is part of a character."""
    bytes: tuple[int, ...]


def token_text(tokenizer: Any, token: int) -> TokenText:
    """What one token stands for; the bytes of an answer's tokens, laid end to end, are its text."""
    written = str(tokenizer.convert_ids_to_tokens(token))
    match = FALLBACK.fullmatch(written)
    if match:
        content = bytes([int(match[1], 16)])
    elif token not in tokenizer.all_special_ids and "ByteLevel" in repr(getattr(tokenizer, "backend_tokenizer", tokenizer).decoder):
        content = bytes(BYTE_OF[character] for character in written) if set(written) <= BYTE_OF.keys() else written.encode()
    else:
        content = written.replace("▁", " ").encode()
    return TokenText(content.decode(errors="replace"), tuple(content))


class TextStream:
    """The answer of one row so far."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), *, shows_special: bool = False) -> None:
        """`shows_special`: write special tokens too (some templates mark calls of tools by them)."""
        self._shows_special = shows_special
        self.stopped = False
        """Whether a stop string came; nothing from it on is given out."""
        self.settled = 0
        """Characters that are certain, those of a stop string included."""
        self.tokenizer = tokenizer
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
            if len(self._ids) - self._context >= WINDOW:
                self._context = self._read
                self._sent = len(self._decode(self._context))
            self._read = len(self._ids)
        self.settled += len(fresh)
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
        return str(
            self.tokenizer.decode(self._ids[start:], skip_special_tokens=not self._shows_special, clean_up_tokenization_spaces=False)
        )

    def _without_stop(self, fresh: str) -> str:
        text = self._held + fresh
        found = min((at for at in (text.find(stop) for stop in self._stop) if at >= 0), default=None)
        if found is not None:
            self.stopped, self._held = True, ""
            return text[:found]
        keep = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
