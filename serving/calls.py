"""What the ingress asks of a replica and what it hears back. Plain picklable values: they cross processes, and know no HTTP."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

from serving.catalog import BaseDescription
from serving.errors import RequestError


@dataclass(frozen=True)
class Sampling:
    """How an answer is made."""

    max_tokens: int | None
    """None is as many as the context has room for."""
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]


@dataclass(frozen=True)
class ChatCall:
    """`n` answers to a conversation."""

    model: str
    messages: list[dict[str, Any]]
    n: int
    sampling: Sampling


@dataclass(frozen=True)
class CompletionCall:
    """`n` continuations of each prompt, a text or token ids."""

    model: str
    prompts: list[str | list[int]]
    n: int
    sampling: Sampling


@dataclass(frozen=True)
class ClassifyCall:
    """The class of each text."""

    model: str
    inputs: list[str]


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


Event = Started | Piece | Done | Failed


@dataclass(frozen=True)
class Classified:
    """Labels of the head and, per input, its probabilities in that order."""

    served: str
    digest: str
    labels: tuple[str, ...]
    probabilities: list[list[float]]
    tokens: int


@dataclass(frozen=True)
class Status:
    """How busy a replica is."""

    running: int
    waiting: int
    completed: int
    """Answers generated to their end, since the start."""
    adapters: list[str]
    """In memory, least recently used first."""


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
