"""What a replica needs of whatever makes its answers. Everything above it is the same for every engine: routes, aliases, releases, keys,
limits, usage, metrics.

Two satisfy it: the slot engine (`serving.base.Engine`), and `serving.streamed.StreamedEngine`, in front of an engine that gives tokens as
they come, such as vLLM. A row says itself what it has so far and tells whoever waits for it (`serving.engine.row`), so text, stop strings
and log probabilities are the same whoever chose the tokens.
"""

from collections.abc import Sequence
from typing import Protocol

from hone.manifest import AdapterManifest
from hone.recipe.serving import EngineName
from hone.registry import Registry
from hone.tasks import TaskName
from serving.base import Served
from serving.disk import AdapterDisk
from serving.engine.classifier import Asked
from serving.engine.heads import Heads
from serving.engine.measures import Measures
from serving.engine.row import Row
from serving.errors import EngineError
from serving.memory import AdapterMemory


class Loader(Protocol):
    """Brings published adapters to an engine. Thread safe."""

    def load(self, manifest: AdapterManifest) -> Served:
        """One adapter, checked and ready to answer. Blocks for as long as that takes.

        Raises:
            RequestError: it cannot be served; the message says why.
        """
        ...

    def unload(self, served: Served) -> None:
        """The adapter has left the pool and no request uses it. Returns at once."""
        ...


class ServingEngine(Protocol):
    """One base model, loaded. Any thread may call any of it; what a row is told, it is told on a thread of the engine's."""

    @property
    def name(self) -> EngineName: ...

    @property
    def base(self) -> Served:
        """The base itself, ready to answer."""
        ...

    @property
    def max_context(self) -> int:
        """Tokens of one row."""
        ...

    @property
    def tasks(self) -> tuple[TaskName, ...]:
        """What adapters of it may be for."""
        ...

    @property
    def mixed_tasks(self) -> tuple[TaskName, ...]:
        """Tasks whose LoRA adapters share a batch."""
        ...

    @property
    def keeps_copies(self) -> bool:
        """Whether adapters that share no batch are answered from copies of the base."""
        ...

    @property
    def vocabulary(self) -> int:
        """Token ids that the embedding has rows for."""
        ...

    @property
    def embedding(self) -> Heads | None:
        """What makes vectors of texts, where something does."""
        ...

    @property
    def measures(self) -> Measures: ...

    @property
    def max_rows(self) -> int:
        """Answers that are made at once."""
        ...

    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    @property
    def completed(self) -> int:
        """Answers that were made to their end, since the start."""
        ...

    @property
    def active_adapters(self) -> int: ...

    @property
    def prefix_blocks(self) -> int: ...

    @property
    def failure(self) -> EngineError | None:
        """Why it does not answer any more; None while it does. A replica with one is replaced."""
        ...

    def mixes(self, manifest: AdapterManifest) -> bool:
        """Whether the adapter shares a batch with others."""
        ...

    def add(self, served: Served, rows: Sequence[Row]) -> None:
        """Queue answers of the base or an adapter; prompt and max_tokens of each row fit the context.

        Raises:
            EngineError: it does not answer any more.
        """
        ...

    def cancel(self, rows: Sequence[Row]) -> None:
        """Nobody waits for these any more, whether they are complete or not."""
        ...

    def ask(self, asked: Sequence[Asked]) -> None:
        """Queue what is to be classified or to become a vector; only where something has heads for it."""
        ...

    def loader(self, registry: Registry, *, memory: AdapterMemory, disk: AdapterDisk | None) -> Loader:
        """What brings adapters here; `memory` is for an engine that keeps none itself."""
        ...

    def stop(self) -> None:
        """End it; requests that still run are told."""
        ...
