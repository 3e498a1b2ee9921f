"""One base model on one replica: from a call to rows for the engine, and from the engine's thread back to the server's event loop.

An ordinary class; `serving.app` deploys it on Ray Serve.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from functools import partial

from transformers.utils import logging

from hone.base_model import BaseModel, find_base_model
from hone.chat import encode_prompt
from hone.errors import DataError, RegistryError
from hone.manifest import AdapterManifest
from hone.registry import Registry
from hone.storage import Home
from serving.adapters import AdapterPool
from serving.base import Served, load_engine
from serving.calls import ChatCall, Classified, ClassifyCall, CompletionCall, Done, Event, Failed, Piece, Sampling, Started, Status
from serving.catalog import BaseDescription, Catalog
from serving.engine.classifier import Text
from serving.engine.generation import Ended, Generation, Row, TextPiece, make_chooser
from serving.engine.generation import Event as RowEvent
from serving.engine.text import TextStream
from serving.errors import EngineError, RequestError
from serving.loading import AdapterLoader

CHARACTERS_PER_TOKEN = 256
"""No tokenizer's longest token comes near this; a text past it times the context is refused without tokenising it."""


class Replica:
    """Chat, completions and classification by one base and its adapters."""

    def __init__(
        self,
        *,
        base: str,
        home: str | None = None,
        revision: str | None = None,
        max_rows: int = 16,
        max_context: int | None = None,
        max_adapters: int = 64,
    ) -> None:
        """Load the base; everything else is loaded when it is first called.

        Raises:
            BaseModelError: the base is not there, or cannot be served.
        """
        # In a replica's log, the report of a head that adapters bring reads like a fault, and a progress bar like a hundred lines.
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        opened = Home(home)
        registry = Registry(opened)
        found = find_base_model(base, home=opened, revision=revision)
        published = _published(base, found, registry)
        name = str(published.ref) if published else found.id.name
        self._engine = load_engine(
            found, name=name, labels=published.labels if published else None, max_rows=max_rows, max_context=max_context
        )
        self._description = BaseDescription(
            id=found.id,
            task=self._engine.base.task,
            max_context=self._engine.max_context,
            created=int(time.time()),
            labels=self._engine.base.labels or None,
            published=name if published else None,
        )
        self._catalog = Catalog(registry, self._description)
        self._pool = AdapterPool(AdapterLoader(registry, self._engine).load, capacity=max_adapters)

    async def describe(self) -> BaseDescription:
        return self._description

    async def status(self) -> Status:
        generation = self._engine.generation
        running, waiting, completed = (generation.running, generation.waiting, generation.completed) if generation else (0, 0, 0)
        return Status(running, waiting + self._engine.classification.waiting, completed, self._pool.resident)

    async def check_health(self) -> None:
        """Serve asks now and then, and replaces a replica that raises."""
        if self._engine.thread.failure:
            raise self._engine.thread.failure

    def stop(self) -> None:
        """End the model's thread; requests that still run are told."""
        self._engine.thread.stop()

    async def generate(self, call: ChatCall | CompletionCall) -> AsyncIterator[list[Event]]:
        """See `Backend.generate`."""
        try:
            async with await self._served(call.model) as served:
                generation = self._generation(served)
                prompts = await asyncio.to_thread(self._encode, served, call)
                limits = [self._room(len(prompt), call.sampling) for prompt in prompts]
                queue: asyncio.Queue[tuple[int, RowEvent]] = asyncio.Queue()
                tell = partial(_tell, asyncio.get_running_loop(), queue)
                rows = [
                    self._row(served, prompt, limit, call.sampling, choice, partial(tell, n * call.n + choice))
                    for n, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
                    for choice in range(call.n)
                ]
                self._engine.thread.call(lambda: generation.add(rows))
                try:
                    yield [Started(served.name, served.digest, sum(map(len, prompts)))]
                    async for events in _events(queue, len(rows)):
                        yield events
                finally:
                    with suppress(EngineError):  # the thread has ended, and its rows with it
                        self._engine.thread.call(lambda: generation.cancel(rows))
        except RequestError as error:
            yield [Failed(error)]

    async def answer(self, call: ChatCall | CompletionCall) -> list[Event]:
        """See `Backend.answer`."""
        texts: dict[int, list[str]] = {}
        others: list[Event] = []
        async for events in self.generate(call):
            for event in events:
                if isinstance(event, Piece):
                    texts.setdefault(event.choice, []).append(event.text)
                else:
                    others.append(event)
        return [*others[:1], *(Piece(choice, "".join(parts)) for choice, parts in texts.items()), *others[1:]]

    async def classify(self, call: ClassifyCall) -> Classified | Failed:
        """See `Backend.classify`."""
        try:
            async with await self._served(call.model) as served:
                if not served.labels:
                    raise RequestError(f"{served.name} has no trained classification head; call a classification adapter", "model")
                encoded = await asyncio.to_thread(self._encode_texts, served, call.inputs)
                texts = [Text(ids, served.weights, Future()) for ids in encoded]
                self._engine.thread.call(lambda: self._engine.classification.add(texts))
                rows = await asyncio.gather(*(asyncio.wrap_future(text.result) for text in texts))
                cut = [row[: len(served.labels)] for row in rows]
                return Classified(served.name, served.digest, served.labels, cut, sum(map(len, encoded)))
        except RequestError as error:
            return Failed(error)

    async def _served(self, model: str) -> AbstractAsyncContextManager[Served]:
        """The base or the adapter of that name, pinned in memory inside the block."""
        manifest = await asyncio.to_thread(self._catalog.find, model)
        return self._pool.pinned(manifest) if manifest else nullcontext(self._engine.base)

    def _generation(self, served: Served) -> Generation:
        if served.task != "chat" or self._engine.generation is None:
            raise RequestError(f"{served.name} classifies and does not generate; POST /v1/classify", "model")
        return self._engine.generation

    def _encode(self, served: Served, call: ChatCall | CompletionCall) -> list[list[int]]:
        """Prompts as token ids."""
        if isinstance(call, ChatCall):
            self._refuse_endless(sum(len(message["content"]) for message in call.messages), "messages")
            try:
                prompt = encode_prompt(served.tokenizer, call.messages)
            except DataError as error:
                raise RequestError(error.message, "messages") from None
            return [self._known(prompt, "messages")]
        prompts = [self._tokens(served, prompt, "prompt") for prompt in call.prompts]
        if not all(prompts):
            raise RequestError("a prompt is empty; there must be at least one token to go on from", "prompt")
        return prompts

    def _encode_texts(self, served: Served, texts: list[str]) -> list[list[int]]:
        encoded = [self._tokens(served, text, "input") for text in texts]
        longest = max(map(len, encoded))
        if longest > self._engine.max_context:
            raise self._too_long(f"the longest input has {longest} tokens", "input")
        if not all(encoded):
            raise RequestError("an input is empty; there must be something to classify", "input")
        return encoded

    def _tokens(self, served: Served, text: str | list[int], param: str) -> list[int]:
        if isinstance(text, str):
            self._refuse_endless(len(text), param)
            text = list(served.tokenizer(text)["input_ids"])
        return self._known(text, param)

    def _known(self, ids: list[int], param: str) -> list[int]:
        """One id without an embedding would fail the whole batch, on a GPU the whole process."""
        if ids and max(ids) >= self._engine.vocabulary:
            raise RequestError(f"token id {max(ids)} is not in the vocabulary of {self._engine.vocabulary}", param)
        return ids

    def _refuse_endless(self, characters: int, param: str) -> None:
        if characters > CHARACTERS_PER_TOKEN * self._engine.max_context:
            raise self._too_long(f"{characters} characters were given", param)

    def _room(self, prompt: int, sampling: Sampling) -> int:
        """Tokens that the answer may have."""
        room = self._engine.max_context - prompt
        param = "messages" if sampling.max_tokens is None or room < 1 else "max_tokens"
        wanted = sampling.max_tokens or max(room, 1)
        if wanted > room:
            raise self._too_long(f"the prompt has {prompt} tokens and {wanted} more were asked for", param)
        return wanted

    def _too_long(self, what: str, param: str) -> RequestError:
        context = self._engine.max_context
        return RequestError(f"the context of this server is {context} tokens, and {what}; send less", param, "context_length_exceeded")

    def _row(self, served: Served, prompt: list[int], limit: int, sampling: Sampling, choice: int, emit: Callable[[RowEvent], None]) -> Row:
        return Row(
            prompt=prompt,
            adapter=served.weights,
            chooser=make_chooser(temperature=sampling.temperature, top_p=sampling.top_p, seed=sampling.seed, choice=choice),
            text=TextStream(served.tokenizer, sampling.stop),
            end_ids=served.end_ids,
            max_tokens=limit,
            emit=emit,
        )


def _tell(loop: asyncio.AbstractEventLoop, queue: "asyncio.Queue[tuple[int, RowEvent]]", choice: int, event: RowEvent) -> None:
    """Hand an event of the model's thread to the event loop."""
    with suppress(RuntimeError):  # the loop has closed: the server is going away, and nobody listens
        loop.call_soon_threadsafe(queue.put_nowait, (choice, event))


async def _events(queue: "asyncio.Queue[tuple[int, RowEvent]]", rows: int) -> AsyncIterator[list[Event]]:
    """Everything that is ready, each time something is, until every row has ended.

    Raises:
        EngineError: a row could not be finished.
    """
    while rows:
        ready = [await queue.get()]
        while not queue.empty():
            ready.append(queue.get_nowait())
        events: list[Event] = []
        for choice, event in ready:
            match event:
                case TextPiece(text):
                    events.append(Piece(choice, text))
                case Ended(reason, tokens):
                    events.append(Done(choice, reason, tokens))
                    rows -= 1
                case EngineError():
                    raise event
        yield events


def _published(name: str, base: BaseModel, registry: Registry) -> AdapterManifest | None:
    """The manifest of a base that is a published whole model."""
    try:
        manifest = registry.resolve(name)
    except RegistryError:
        return None
    return manifest if registry.path(manifest.ref) == base.folder else None
