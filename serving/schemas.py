"""Requests on the wire, as OpenAI's client sends them.

Types are strict: a number in quotes is an error. Parameters that would change the answer and that this version does not do are refused by
name; those that change nothing (`metadata`, `store`) are accepted.
"""

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serving.calls import ChatCall, ClassifyCall, CompletionCall, EmbedCall, Media, Sampling, TokenizeCall
from serving.errors import RequestError
from serving.tool_schemas import TOOLS_AT_MOST, ResponseFormat, Text, Tool, ToolCall, ToolChoice, encodable, tools_of

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": (),
    "functions": ([],),
    "guided_choice": ([],),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_logprobs": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
"""Parameters of OpenAI's or vLLM's that this version does not do -> the values that ask for nothing (null always does)."""
CHOICES_AT_MOST = 16
BIASES_AT_MOST = 1024
LIMIT = 2**31
"""Past what any model has or makes; a number of hundreds of digits is more than arithmetic takes."""
ROWS_AT_MOST = 256
"""Prompts, or texts, pictures and sounds, in one request."""
DATA_URI = re.compile(r"data:[^,]{0,200};base64,")


TextsOrTokens = str | list[str] | list[int] | list[list[int]]
"""As it comes; each request makes a list of it."""
Classifiable = str | dict[Literal["image", "audio"], str]


class Request(BaseModel):
    """What every request has."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: Text = Field(min_length=1)
    user: Text | None = None
    safety_identifier: Text | None = None
    """Whom the caller asks for; the newer name of `user`."""

    @property
    def asked_for(self) -> str | None:
        return self.safety_identifier or self.user

    @model_validator(mode="after")
    def _asks_for_nothing_unsupported(self) -> "Request":
        for name, value in (self.model_extra or {}).items():
            if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
                raise RequestError(f"{name} is not supported by this server; leave it out", name, "unsupported_parameter")
        return self


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class TimedRequest(Request):
    """One that may take long."""

    timeout_s: float | None = Field(default=None, gt=0)
    """Ours: how long the caller waits for the whole answer."""


class GenerateRequest(TimedRequest):
    """Settings that chat and completions share."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int | None = Field(default=None, ge=1, le=CHOICES_AT_MOST)
    stop: list[Text] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(default=None, ge=1, lt=LIMIT)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(default=None, max_length=BIASES_AT_MOST)
    top_k: int | None = Field(default=None, ge=0, lt=LIMIT)
    """Not OpenAI's; vLLM's name for it. The same holds for `min_p`."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before", json_schema_input_type=str | list[str] | None)
    @classmethod
    def _stop_as_list(cls, value: Any) -> Any:
        stop = [value] if isinstance(value, str) else value
        if isinstance(stop, list) and len(stop) > 4:
            raise ValueError(f"at most 4 stop strings; there are {len(stop)}")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _biased_tokens(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        unknown = next((key for key in value or {} if not (key.isascii() and key.isdigit() and len(key) < 10)), None)
        if unknown is not None:
            raise ValueError(f"keys are token ids; {unknown[:50]!r} is none")
        return value

    @property
    def with_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, max_tokens: int | None, *, logprobs: int | None) -> Sampling:
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(text for text in self.stop or [] if text),
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            logprobs=logprobs,
            timeout_s=self.timeout_s,
        )


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    """Only an assistant's that calls tools may be left out."""
    name: Text | None = None
    tool_calls: list[ToolCall] | None = Field(default=None, max_length=TOOLS_AT_MOST)
    tool_call_id: Text | None = None

    @field_validator("content", mode="before", json_schema_input_type=str | list[dict[str, Any]] | None)
    @classmethod
    def _parts_as_text(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError('every part of a message must be {"type": "text", "text": ...}; this server reads text only')
        return "\n".join(str(text) for text in texts)

    @model_validator(mode="after")
    def _calls_no_functions(self) -> "Message":
        if (self.model_extra or {}).get("function_call"):
            raise RequestError(
                "function_call in a message is not supported by this server; use tool_calls", "messages", "unsupported_parameter"
            )
        return self

    def as_row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.name:
            row["name"] = self.name
        if self.tool_calls:
            row["tool_calls"] = [call.as_row() for call in self.tool_calls]
        if self.role == "tool":
            row["tool_call_id"] = self.tool_call_id
        return row


def rows_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A conversation as templates read it.

    Raises:
        RequestError: a message lacks its content, or results and calls do not go together.
    """
    called: set[str] = set()
    for n, message in enumerate(messages):
        where = f"messages[{n}]"
        if message.content is None and not message.tool_calls:
            raise RequestError(f"{where}.content is required", f"{where}.content")
        if message.tool_calls and message.role != "assistant":
            raise RequestError(f"{where}.tool_calls: only an assistant calls tools", f"{where}.tool_calls")
        called |= {call.id for call in message.tool_calls or []}
        if message.role == "tool" and message.tool_call_id not in called:
            says = "is required" if message.tool_call_id is None else "is that of no call in the messages before it"
            raise RequestError(f"{where}.tool_call_id {says}", f"{where}.tool_call_id")
    return [message.as_row() for message in messages]


class ChatRequest(GenerateRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=LIMIT)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(default=None, max_length=TOOLS_AT_MOST)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit; give one of them")
        return self

    @model_validator(mode="after")
    def _top_of_something(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        return self

    def call(self) -> ChatCall:
        limit = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        sampling = self.sampling(limit, logprobs=(self.top_logprobs or 0) if self.logprobs else None)
        return ChatCall(
            self.model,
            rows_of(self.messages),
            self.n or 1,
            sampling,
            user=self.asked_for,
            tools=tools_of(self.tools, self.tool_choice, parallel=self.parallel_tool_calls is not False),
            schema=self.response_format.followed if self.response_format else None,
        )


class CompletionRequest(GenerateRequest):
    """POST /v1/completions."""

    prompt: list[str | list[int]] = Field(min_length=1, max_length=ROWS_AT_MOST)
    logprobs: int | None = Field(default=None, ge=0, le=5)

    @field_validator("prompt", mode="before", json_schema_input_type=TextsOrTokens)
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return _texts_or_tokens(value, "a prompt")

    def call(self) -> CompletionCall:
        # OpenAI's completions stop after 16 tokens where nothing is said.
        limit = 16 if self.max_tokens is None else self.max_tokens
        return CompletionCall(self.model, self.prompt, self.n or 1, self.sampling(limit, logprobs=self.logprobs), user=self.asked_for)


class EmbeddingsRequest(TimedRequest):
    """POST /v1/embeddings."""

    input: list[str | list[int]] = Field(min_length=1, max_length=ROWS_AT_MOST)
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = None
    """Vectors are as long as the encoder's are."""

    @field_validator("input", mode="before", json_schema_input_type=TextsOrTokens)
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return _texts_or_tokens(value, "an input")

    def call(self) -> EmbedCall:
        return EmbedCall(self.model, self.input, self.timeout_s, user=self.asked_for)


class TokenizeRequest(Request):
    """POST /tokenize, as vLLM has it."""

    prompt: Text | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either a prompt or messages", "prompt")
        return self

    def call(self) -> TokenizeCall:
        text = rows_of(self.messages) if self.messages else self.prompt or ""
        return TokenizeCall(self.model, text, self.add_special_tokens, user=self.asked_for)


class ClassifyRequest(TimedRequest):
    """POST /v1/classify."""

    input: list[str | Media] = Field(min_length=1, max_length=ROWS_AT_MOST)

    @field_validator("input", mode="before", json_schema_input_type=Classifiable | list[Classifiable])
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        inputs = value if isinstance(value, list) else [value]
        if len(inputs) > ROWS_AT_MOST:
            raise ValueError(f"at most {ROWS_AT_MOST} inputs in one request; there are {len(inputs)}")
        return [_classifiable(each, f"input[{n}]" if isinstance(value, list) else "input") for n, each in enumerate(inputs)]

    def call(self) -> ClassifyCall:
        return ClassifyCall(self.model, self.input, self.timeout_s, user=self.asked_for)


def _classifiable(value: Any, where: str) -> str | Media:
    if isinstance(value, str):
        return encodable(value)
    kind = next(iter(value)) if isinstance(value, dict) and len(value) == 1 else None
    if kind not in ("image", "audio"):
        raise ValueError('an input is a text, {"image": "<base64>"} or {"audio": "<base64>"}')
    return Media(kind, _decoded(value[kind], f"{where}.{kind}"))


def _decoded(text: Any, where: str) -> bytes:
    """The bytes of a file in base64, or in a data: URI of it. No address is ever followed: a request must not make the server read what
    the caller cannot."""
    encoded = text.removeprefix(match[0]) if isinstance(text, str) and (match := DATA_URI.match(text)) else text
    try:
        content = base64.b64decode(encoded, validate=True) if isinstance(encoded, str) else b""
    except (binascii.Error, ValueError):
        content = b""
    if not content:
        raise RequestError(f"{where} is not base64 of a file, nor a data: URI of it; addresses and paths are not read", where)
    return content


def _texts_or_tokens(value: Any, what: str) -> list[str | list[int]]:
    is_one = isinstance(value, str) or (isinstance(value, list) and value and all(type(item) is int for item in value))
    several = [value] if is_one else value
    if not isinstance(several, list) or not all(isinstance(each, str) or _is_tokens(each) for each in several):
        raise ValueError(f"{what} is a text, a list of texts, a list of token ids, or a list of such lists")
    return [encodable(each) if isinstance(each, str) else each for each in several]


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and item >= 0 for item in value)
