"""Answers as OpenAI writes them: chats and completions, whole and in pieces, each with its own form of log probabilities; vectors."""

import base64
import struct
import uuid
from collections.abc import Sequence
from typing import Any

from serving.calls import Embedded, Piece
from serving.engine.row import TokenScore
from serving.tool_stream import CallPiece

LEAST = -9999.0
"""What OpenAI writes for a probability of zero, whose logarithm JSON cannot spell."""


class ChatShape:
    """Chat answers."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, *, with_usage: bool, with_logprobs: bool = False) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.with_usage = with_usage
        self._with_logprobs = with_logprobs

    def choice(self, piece: Piece, reason: str) -> dict[str, Any]:
        """All of an answer."""
        message: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None}
        if piece.calls:
            message["content"] = piece.text or None
            message["tool_calls"] = [_call(call) for call in piece.calls]
        return {"index": piece.choice, "message": message, "logprobs": self._logprobs(piece), "finish_reason": reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def delta(self, piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": piece.text} if piece.text or not piece.calls else {}
        if piece.calls:
            delta["tool_calls"] = [{"index": call.index, **_call(call)} for call in piece.calls]
        return {"index": piece.choice, "delta": delta, "logprobs": self._logprobs(piece), "finish_reason": None}

    def closing(self, index: int, reason: str) -> dict[str, Any]:
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        content = [{**_scored(score), "top_logprobs": [_scored(other) for other in score.likeliest]} for score in piece.scores]
        return {"content": content, "refusal": None}


class CompletionShape:
    """Completions."""

    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, *, with_usage: bool, with_logprobs: bool = False) -> None:
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self.with_usage = with_usage
        self._with_logprobs = with_logprobs

    def choice(self, piece: Piece, reason: str | None) -> dict[str, Any]:
        """All of an answer."""
        logprobs = _in_columns(piece.scores) if self._with_logprobs else None
        return {"index": piece.choice, "text": piece.text, "logprobs": logprobs, "finish_reason": reason}

    def opening(self, index: int) -> dict[str, Any] | None:  # noqa: ARG002 - completions open with their first text
        return None

    def delta(self, piece: Piece) -> dict[str, Any]:
        return self.choice(piece, None)

    def closing(self, index: int, reason: str) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}


Shape = ChatShape | CompletionShape


def embeddings_list(embedded: Embedded, *, as_base64: bool) -> dict[str, Any]:
    """Vectors as numbers, or as the little-endian float32 bytes that OpenAI's client asks for by itself."""
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if as_base64 else vector,
        }
        for index, vector in enumerate(embedded.vectors)
    ]
    usage = {"prompt_tokens": embedded.tokens, "total_tokens": embedded.tokens}
    return {"object": "list", "data": data, "model": embedded.served, "usage": usage}


def _call(call: CallPiece) -> dict[str, Any]:
    """A call of a tool, or more of its arguments."""
    if call.id is None:
        return {"function": {"arguments": call.arguments}}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _scored(score: TokenScore) -> dict[str, Any]:
    return {"token": score.token.text, "bytes": list(score.token.bytes), "logprob": max(score.logprob, LEAST)}


def _in_columns(scores: Sequence[TokenScore]) -> dict[str, Any]:
    """Each of the likeliest, and the chosen token where it is none of them."""
    return {
        "tokens": [_name(score) for score in scores],
        "token_logprobs": [max(score.logprob, LEAST) for score in scores],
        "top_logprobs": [{_name(each): max(each.logprob, LEAST) for each in (*score.likeliest, score)} for score in scores],
        "text_offset": [score.begins for score in scores],
    }


def _name(score: TokenScore) -> str:
    """A token as a key: half characters by their bytes, since all of them would be one replacement character."""
    text = score.token.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in score.token.bytes) if "\N{REPLACEMENT CHARACTER}" in text else text
