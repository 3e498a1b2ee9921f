"""What a request gives, as the rows that its model reads; and what the model says, as an answer."""

import math
import re
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hone.chat import encode_prompt
from hone.errors import DataError
from models.tasks import TASKS
from models.tasks.audio_classification import features, samples_of
from models.tasks.task import IGNORED, Encoded, TokenRow
from models.tasks.token_classification import word_tokens
from serving.base import Served
from serving.calls import Answer, ChatCall, CompletionCall, Media, Number, Sampling, Scores, Word
from serving.engine.classifier import Asked
from serving.engine.fairness import EVERYONE, Tenant
from serving.engine.heads import Heads
from serving.errors import RequestError
from serving.kinds import medium_of

CHARACTERS_PER_TOKEN = 256
"""No tokenizer's longest token comes near this; a text past it times the context is refused without tokenising it."""
LONGEST_SOUND_S = 60
"""Attention of a wav2vec2 over this is 3,000 by 3,000; models with a window of their own (Whisper, AST) cut sounds sooner."""
TOKENS_PER_S = 50
"""Of a sound, about: the speech models' frames are 20 ms."""
PIXELS_PER_TOKEN = 16 * 16
SAID = {"text": "text", "image": "picture", "audio": "sound"}
Span = tuple[int, int]


@dataclass(frozen=True)
class Question:
    """One input of a request, on its way to the model."""

    asked: Asked
    tokens: int = 0
    text: str = ""
    words: Sequence[Span] = ()
    """Where in the text the words begin and end of which there are answers."""


class Reader:
    """Requests of one base and its adapters."""

    def __init__(self, vocabulary: int) -> None:
        """`vocabulary` is how many token ids the base has an embedding for."""
        self._vocabulary = vocabulary

    def prompts(self, served: Served, call: ChatCall | CompletionCall) -> list[list[int]]:
        """Prompts as token ids.

        Raises:
            RequestError: one is empty, or too long; or the call names tokens that there are not.
        """
        self._known([*call.sampling.logit_bias], "logit_bias")
        if isinstance(call, ChatCall):
            return [self._conversation(served, call.messages, call.tools.definitions if call.tools else ())]
        prompts = [self._tokens(served, prompt, "prompt") for prompt in call.prompts]
        if not all(prompts):
            raise RequestError("a prompt is empty; there must be at least one token to go on from", "prompt")
        return prompts

    def tokens(self, served: Served, text: str | list[dict[str, Any]], *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text or a conversation.

        Raises:
            RequestError: this model reads no text, or it is too long by far.
        """
        if medium_of(served.task) != "text":
            raise RequestError(f"{served.name} reads a {SAID[medium_of(served.task)]}, which has no tokens", "model")
        if not isinstance(text, str):
            return self._conversation(served, text)
        _refuse_endless(served, len(text), "prompt")
        return list(served.processor(text, add_special_tokens=add_special_tokens)["input_ids"])

    def questions(
        self, served: Served, inputs: Sequence[str | Media], *, tenant: Tenant = EVERYONE, deadline: float = math.inf
    ) -> list[Question]:
        """What is to be classified, for whom, and until when.

        Raises:
            RequestError: an input that this model does not read, that is empty, broken, or too long.
        """
        found = [self._question(served, value, f"input[{n}]") for n, value in enumerate(inputs)]
        return [replace(question, asked=replace(question.asked, tenant=tenant, deadline=deadline)) for question in found]

    def texts(
        self, served: Served, inputs: Sequence[str | list[int]], heads: Heads, *, tenant: Tenant = EVERYONE, deadline: float = math.inf
    ) -> list[Asked]:
        """What is to become vectors, likewise.

        Raises:
            RequestError: an input is empty or too long, or names tokens that there are not.
        """
        asked = []
        for value in inputs:
            ids = self._tokens(served, value, "input")
            _refuse_unfit(served, ids)
            row: TokenRow = {"input_ids": ids, "labels": None}
            asked.append(Asked(row, len(ids), heads, served.weights, Future(), tenant=tenant, deadline=deadline))
        return asked

    def _question(self, served: Served, value: str | Media, where: str) -> Question:
        wanted, given = medium_of(served.task), "text" if isinstance(value, str) else value.kind
        if given != wanted:
            raise RequestError(f"{where} is a {SAID[given]}, and {served.name} reads a {SAID[wanted]}", "input")
        if isinstance(value, str):
            return self._words(served, value) if served.task == "token-classification" else self._text(served, value)
        encoded = _decoded(served, value, where)
        if value.kind == "audio":
            made = features(samples_of({"content": encoded.content}), served.processor)
            row = {"features": made, "labels": None}
            return Question(_asked(served, row, encoded.cost * TOKENS_PER_S // served.processor.sampling_rate, alike=made.shape))
        pixels = {"content": encoded.content, "parts": encoded.parts, "labels": None}
        return Question(_asked(served, pixels, len(encoded.content or b"") // 3 // PIXELS_PER_TOKEN, alike=tuple(encoded.parts or ())))

    def _text(self, served: Served, text: str) -> Question:
        ids = self._tokens(served, text, "input")
        _refuse_unfit(served, ids)
        return Question(_asked(served, {"input_ids": ids, "labels": None}, len(ids), alike=_width(served, ids)), len(ids))

    def _words(self, served: Served, text: str) -> Question:
        """A text split at white space, each word of which is answered at its first token, as it was trained."""
        _refuse_endless(served, len(text), "input")
        spans = [match.span() for match in re.finditer(r"\S+", text)]
        if not spans:
            raise RequestError("an input is empty; there must be something to classify", "input")
        [(ids, words)] = word_tokens(served.processor, [[text[start:end] for start, end in spans]])
        _refuse_unfit(served, self._known(ids, "input"))
        places = [at for at, word in enumerate(words) if word != IGNORED]
        asked = _asked(served, {"input_ids": ids, "labels": words}, len(ids), alike=_width(served, ids), places=places)
        # A word of which the tokenizer makes nothing has no answer.
        return Question(asked, len(ids), text, [spans[words[at]] for at in places])

    def _conversation(self, served: Served, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        _refuse_endless(served, sum(len(message["content"]) for message in messages), "messages")
        shown, given = list(messages), None
        if tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
            shown, given = served.tool_form.shown(messages, tools)
        try:
            return self._known(encode_prompt(served.processor, shown, tools=given), "messages")
        except DataError as error:
            raise RequestError(error.message, "messages") from None

    def _tokens(self, served: Served, text: str | list[int], param: str) -> list[int]:
        if isinstance(text, str):
            _refuse_endless(served, len(text), param)
            text = list(served.processor(text)["input_ids"])
        return self._known(text, param)

    def _known(self, ids: list[int], param: str) -> list[int]:
        """One id without an embedding would fail the whole batch, on a GPU the whole process."""
        if ids and max(ids) >= self._vocabulary:
            raise RequestError(f"token id {max(ids)} is not in the vocabulary of {self._vocabulary}", param)
        return ids


def room(served: Served, prompt: int, sampling: Sampling) -> int:
    """Tokens that the answer may have. An encoder-decoder reads in one context and writes in another.

    Raises:
        RequestError: there is none left, or fewer than were asked for.
    """
    left = served.max_context - prompt
    if served.task == "seq2seq" and left >= 0:
        left = served.max_context
    param = "messages" if sampling.max_tokens is None or left < 1 else "max_tokens"
    wanted = sampling.max_tokens or max(left, 1)
    if wanted > left:
        raise _too_long(served, f"the prompt has {prompt} tokens and {wanted} more were asked for", param)
    return wanted


def answer(served: Served, question: Question, logits: Tensor) -> Answer:
    """What the logits of one input say, by what the head was trained for."""
    if served.problem_type == "regression":
        return Number(float(logits[0]))
    own = logits[..., : len(served.labels)]
    if served.task != "token-classification":
        shares = own.sigmoid() if served.problem_type == "multi_label_classification" else own.softmax(-1)
        return Scores(shares.tolist())
    scores, best = own.softmax(-1).max(-1)
    return [
        Word(question.text[start:end], start, end, served.labels[label], score)
        for (start, end), label, score in zip(question.words, best.tolist(), scores.tolist(), strict=True)
    ]


def _asked(served: Served, row: TokenRow, cost: int, *, alike: tuple[int, ...] = (), places: Sequence[int] | None = None) -> Asked:
    assert served.heads is not None, "the caller checks that the model classifies"
    return Asked(row, cost, served.heads, served.weights, Future(), places, alike)


def _width(served: Served, ids: Sequence[int]) -> tuple[int, ...]:
    """What texts that share a forward pass have the same of."""
    return () if served.heads and served.heads.pads else (len(ids),)


def _decoded(served: Served, media: Media, where: str) -> Encoded:
    """A picture or sound as training encodes it."""
    row: dict[str, Any] = {media.kind: media.content, "labels": []}
    [made] = TASKS[served.task].encode([row], served.processor, max_length=1000 * LONGEST_SOUND_S)
    if isinstance(made, DataError):
        raise RequestError(f"{where}.{media.kind}: {made.message}", "input")
    [encoded] = made
    if encoded.is_cut:
        raise RequestError(f"{where}.{media.kind}: the sound is longer than {LONGEST_SOUND_S} s; send it in parts", "input")
    return encoded


def _refuse_unfit(served: Served, ids: Sequence[int]) -> None:
    if len(ids) > served.max_context:
        raise _too_long(served, f"the longest input has {len(ids)} tokens", "input")
    if not ids:
        raise RequestError("an input is empty; there must be something to classify", "input")


def _refuse_endless(served: Served, characters: int, param: str) -> None:
    if characters > CHARACTERS_PER_TOKEN * served.max_context:
        raise _too_long(served, f"{characters} characters were given", param)


def _too_long(served: Served, what: str, param: str) -> RequestError:
    context = served.max_context
    return RequestError(f"the context of this server is {context} tokens, and {what}; send less", param, "context_length_exceeded")
