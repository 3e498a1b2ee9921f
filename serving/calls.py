"""What the ingress asks of a replica and what it hears back. Plain picklable values: they cross processes, and know no HTTP."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from hone.tasks import TASKS
from models.tasks.task import ProblemType
from serving.callers import ANONYMOUS, Caller
from serving.catalog import BaseDescription
from serving.engine.row import TokenScore
from serving.errors import RequestError
from serving.measured import Measured
from serving.tool_stream import CallPiece


@dataclass(frozen=True)
class Sampling:
    """How an answer is made; `serving.engine.sampling.Chooser` says what each setting does."""

    max_tokens: int | None
    """None is as many as the context has room for."""
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    timeout_s: float | None = None
    """From when the replica has the request; an answer that is not complete by then is given up."""


@dataclass(frozen=True)
class Tools:
    """What an answer may call."""

    definitions: Sequence[dict[str, Any]]
    """As OpenAI writes them; never none."""
    choice: str = "auto"
    """`auto`, `required`, or the name of the one to call."""
    parallel: bool = True
    """Whether one answer may have several calls."""

    @property
    def must_call(self) -> bool:
        return self.choice != "auto"

    @property
    def many(self) -> bool:
        return self.parallel and self.choice in ("auto", "required")


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """Who asks."""

    caller: Caller = ANONYMOUS
    user: str | None = None
    """Whom the caller asks for, by which an alias may stick to a version."""
    alias: str | None = None
    """What `model` was called by, where the ingress has put the version for it."""


@dataclass(frozen=True)
class ChatCall(_Asked):
    """`n` answers to a conversation."""

    model: str
    messages: list[dict[str, Any]]
    n: int
    sampling: Sampling
    tools: Tools | None = None
    schema: dict[str, Any] | None = None
    """Of JSON, that the answers must follow; None is any text."""


@dataclass(frozen=True)
class CompletionCall(_Asked):
    """`n` continuations of each prompt, a text or token ids."""

    model: str
    prompts: list[str | list[int]]
    n: int
    sampling: Sampling


@dataclass(frozen=True)
class Media:
    """A picture or a sound as it was sent: the bytes of a file."""

    kind: Literal["image", "audio"]
    content: bytes


@dataclass(frozen=True)
class ClassifyCall(_Asked):
    """What each text, picture or sound is classified as."""

    model: str
    inputs: list[str | Media]
    timeout_s: float | None = None
    """As of an answer; see `Sampling`."""


@dataclass(frozen=True)
class EmbedCall(_Asked):
    """A vector of each text, or list of token ids."""

    model: str
    inputs: list[str | list[int]]
    timeout_s: float | None = None


@dataclass(frozen=True)
class TokenizeCall(_Asked):
    """What a model reads a text, or a conversation, as."""

    model: str
    text: str | list[dict[str, Any]]
    """A conversation goes through the model's template, up to where the answer begins."""
    add_special_tokens: bool = True
    """Of a text: what the tokenizer puts round it."""


Call = ChatCall | CompletionCall | ClassifyCall | EmbedCall | TokenizeCall
ROUTES: dict[type[Call], str] = {
    ChatCall: TASKS["chat"].route,
    CompletionCall: TASKS["completion"].route,
    ClassifyCall: TASKS["text-classification"].route,
    EmbedCall: "/v1/embeddings",
    TokenizeCall: "/tokenize",
}
"""Where each kind of call comes in."""


@dataclass(frozen=True)
class Started:
    """The request is accepted; first of all events."""

    served: str
    """`name@version` of the adapter that answers, or the base's name."""
    digest: str
    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """More text of one choice."""

    choice: int
    text: str
    scores: tuple[TokenScore, ...] = ()
    """Of the tokens that begin in it, where they were asked for."""
    tokens: int = 0
    """That this choice has so far."""
    calls: tuple[CallPiece, ...] = ()
    """Of tools."""


@dataclass(frozen=True)
class Done:
    """One choice is complete."""

    choice: int
    reason: str
    tokens: int


@dataclass(frozen=True)
class Failed:
    """The request cannot be answered (any further). A value and not an exception, so that a caller's mistake is not a replica's crash."""

    error: RequestError
    tokens: int = 0
    """That the model read for it nevertheless, of inputs to classify or to make vectors of."""


Event = Started | Piece | Done | Failed


@dataclass(frozen=True)
class Scores:
    """A probability for each label: together 1, or each by itself where an input may have any number of classes."""

    probabilities: list[float]


@dataclass(frozen=True)
class Number:
    """What a regression answers."""

    value: float


@dataclass(frozen=True)
class Word:
    """The class of one word of a text, and where in the text it stands."""

    text: str
    start: int
    end: int
    label: str
    score: float


Answer = Scores | Number | list[Word]


@dataclass(frozen=True)
class Classified:
    """Labels of the head and an answer per input."""

    served: str
    digest: str
    labels: tuple[str, ...]
    problem_type: ProblemType | None
    answers: list[Answer]
    tokens: int
    """Of all texts together."""


@dataclass(frozen=True)
class Embedded:
    """A vector of length 1 per input."""

    served: str
    digest: str
    vectors: list[list[float]]
    tokens: int
    """Of all texts together."""


@dataclass(frozen=True)
class Tokenized:
    """What was read."""

    served: str
    digest: str
    tokens: list[int]
    strings: list[str]
    """Each token as the vocabulary spells it."""
    max_context: int


@dataclass(frozen=True)
class Status:
    """How busy a replica is."""

    running: int
    waiting: int
    completed: int
    """Answers generated to their end, since the start."""
    adapters: list[str]
    """In memory beside the base, least recently used first."""
    copies: list[str]
    """In memory on a copy of the base of their own, likewise."""


class Backend(Protocol):
    """What the routes need: a replica behind a Serve handle, or one in the same process."""

    async def describe(self) -> BaseDescription: ...

    async def status(self) -> Status: ...

    def generate(self, call: ChatCall | CompletionCall) -> AsyncIterator[list[Event]]:
        """Events as they come, several at once where several are ready. Closing the iterator cancels the request."""
        ...

    async def answer(self, call: ChatCall | CompletionCall) -> list[Event]:
        """All events of a request, each choice's text in one piece."""
        ...

    async def classify(self, call: ClassifyCall) -> Classified | Failed: ...

    async def embed(self, call: EmbedCall) -> Embedded | Failed: ...

    async def tokenize(self, call: TokenizeCall) -> Tokenized | Failed: ...

    async def measured(self) -> list[Measured]:
        """What every replica that answers has measured."""
        ...
