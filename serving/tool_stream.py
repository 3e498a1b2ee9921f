"""Calls of tools in an answer's text, as it comes.

The grammar (`serving.tool_grammar`) has seen to it that what begins like a call is one, so this only finds its parts.
"""

import secrets
import string
from dataclasses import dataclass
from typing import Literal

from serving.engine.text import overlap
from serving.tools import ToolForm

ID_LENGTH = 9
"""Mistral's templates take ids of 9 letters and digits alone; the others take any."""


@dataclass(frozen=True)
class CallPiece:
    """More of one call."""

    index: int
    """Which of the answer's calls."""
    id: str | None
    """In the first piece of a call, as is the name."""
    name: str | None
    arguments: str


class ToolStream:
    """One answer."""

    def __init__(self, form: ToolForm, *, must_call: bool, must_follow: bool = False) -> None:
        """`must_call`: no text comes before the calls. `must_follow`: what is no call is JSON, in which a tag is a word like any other."""
        self._form = form
        self._state: Literal["start", "text", "plain", "name", "arguments", "after"] = "text"
        """Of text, calls may come behind it, or not (`plain`), or it is not known yet whether there is some (`start`)."""
        if must_call:
            self._state = "name"
        elif must_follow or form.trigger is None:
            self._state = "start"
        self._text = ""
        """That is not told yet."""
        self._begun = self._complete = 0
        """Calls."""
        self._object = _JsonObject()

    def push(self, text: str) -> tuple[str, list[CallPiece]]:
        """Take more of the answer; return what of it is certain to be content, and what is of calls."""
        self._text += text
        content, pieces = self._content(), []
        while self._state == "name" or (self._state == "arguments" and self._text) or self._another():
            piece = self._name() if self._state == "name" else self._arguments()
            if piece is None:
                break
            pieces.append(piece)
        return content, pieces

    def finish(self, reason: str) -> tuple[str, str]:
        """The rest of the content, and why the answer really ended."""
        rest = self._text if self._state in ("start", "text", "plain") else ""
        is_called = reason == "stop" and self._complete > 0 and self._complete == self._begun
        return rest, "tool_calls" if is_called else reason

    def _content(self) -> str:
        begins = self._form.trigger or self._form.opening[0]
        if self._state == "start" and not (begins.startswith(self._text) or self._text.startswith(begins)):
            self._state = "plain"
        if self._state in ("start", "text") and (found := self._text.find(begins)) >= 0:
            # Blanks before a call are no content.
            content, self._text, self._state = self._text[:found].rstrip(), self._text[found:], "name"
            return content
        certain = len(self._text) if self._state == "plain" else 0
        if self._state == "text":
            certain = len(self._text[: len(self._text) - overlap(self._text, begins)].rstrip())
        content, self._text = self._text[:certain], self._text[certain:]
        return content

    def _another(self) -> bool:
        """Whether one more call begins after those that are complete."""
        begins = self._form.trigger or self._form.opening
        found = self._text.find(begins, len(self._form.closing)) if self._state == "after" else -1
        if found < 0:
            return False
        self._text, self._state = self._text[found:], "name"
        return True

    def _name(self) -> CallPiece | None:
        rest = self._text[len(self._form.opening) :]
        name, between, after = rest.partition(self._form.between)
        if not between:
            return None
        self._text, self._state, self._object = after, "arguments", _JsonObject()
        self._begun += 1
        return CallPiece(self._begun - 1, "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(ID_LENGTH)), name, "")

    def _arguments(self) -> CallPiece | None:
        end = self._object.end(self._text)
        taken = len(self._text) if end is None else end
        piece = CallPiece(self._begun - 1, None, None, self._text[:taken])
        self._text = self._text[taken:]
        if end is not None:
            self._state = "after"
            self._complete += 1
        return piece


class _JsonObject:
    """Finds where a JSON object ends."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._is_escaped = False

    def end(self, text: str) -> int | None:
        """How much of this text, which follows what came before, is the object's; None where it goes on."""
        for n, character in enumerate(text, 1):
            if self._in_string:
                self._in_string = self._is_escaped or character != '"'
                self._is_escaped = character == "\\" and not self._is_escaped
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return n
        return None


def joined(pieces: list[CallPiece]) -> list[CallPiece]:
    """Each call in one piece."""
    whole: dict[int, CallPiece] = {}
    for piece in pieces:
        known = whole.get(piece.index)
        whole[piece.index] = piece if known is None else CallPiece(known.index, known.id, known.name, known.arguments + piece.arguments)
    return list(whole.values())
