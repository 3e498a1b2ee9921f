"""One base model on one replica: from a call to rows for the engine, and from the engine's thread back to the server's event loop.

An ordinary class; `serving.app` deploys it on Ray Serve.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers.utils import logging as transformers_logging

from hone.base_model import BaseModel, find_base_model
from hone.errors import RegistryError
from hone.manifest import AdapterManifest
from hone.recipe.serving import EngineName, VllmSettings
from hone.registry import Registry
from hone.storage import Home
from hone.tasks import TASKS
from hone.usage import Used
from serving.adapters import AdapterPool
from serving.base import Served, free_memory
from serving.calls import (
    ROUTES,
    Call,
    ChatCall,
    Classified,
    ClassifyCall,
    CompletionCall,
    EmbedCall,
    Embedded,
    Event,
    Failed,
    Started,
    Status,
    TokenizeCall,
    Tokenized,
)
from serving.catalog import BaseDescription, Catalog
from serving.contract import ServingEngine
from serving.disk import DISK_BYTES, AdapterDisk
from serving.engine.classifier import Asked
from serving.engine.constraint import Constraint
from serving.engine.generation import PREFILL_TOKENS
from serving.engine.row import Event as RowEvent
from serving.engine.row import Row
from serving.engine.sampling import make_chooser
from serving.engine.text import TextStream
from serving.engines import start_engine
from serving.errors import RequestError
from serving.grammar import Grammars
from serving.kinds import routes_of
from serving.measured import Measured, measured
from serving.memory import CPU, SHARE, AdapterMemory
from serving.metering import Meter
from serving.outgoing import Told, events_of, joined_pieces
from serving.reading import Reader, answer, room
from serving.registry_reads import RegistryReads
from serving.tool_grammar import answer_grammar
from serving.tool_stream import ToolStream

logger = logging.getLogger("ray.serve")

PAUSE_S = 0.01
"""For each answer in the making: about what Ray Serve and the ingress compute for one piece of one answer (docs/decisions/0022)."""
LONGEST_PAUSE_S = 0.2
"""Five pieces a second still read as a text that is being written."""
NEVER_S = 86_400.0
SWITCH_S = 0.0005
"""How long a thread of this process may keep the interpreter from the model's, which asks for it again after every kernel; Python's own
5 ms are as long as a step."""


class Replica:
    """Everything that one base and its adapters answer."""

    def __init__(
        self,
        *,
        base: str,
        home: str | None = None,
        revision: str | None = None,
        engine: EngineName | ServingEngine = "slots",
        vllm: VllmSettings | None = None,
        max_rows: int | None = None,
        max_context: int | None = None,
        max_adapters: int = 64,
        max_copies: int = 2,
        adapter_memory: int | None = None,
        adapter_disk: str | None = None,
        adapter_disk_bytes: int = DISK_BYTES,
        prefill_tokens: int = PREFILL_TOKENS,
        prefix_tokens: int | None = None,
        name: str = "local",
        is_metered: bool = False,
    ) -> None:
        """Load the base; everything else is loaded when it is first called.

        Args:
            engine: What makes the answers: by its name, or running already; the settings of how it is to run are then not read.
            name: What it is called in metrics.
            is_metered: Whether usage goes to the store of the home.
            (the others): As in `serving.app.ServeArgs`.

        Raises:
            BaseModelError: the base is not there, or cannot be served.
            ResourceError: the engine's package is not installed.
        """
        # In a replica's log, the report of a head that adapters bring reads like a fault, and a progress bar like a hundred lines.
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        opened = Home(home)
        registry = Registry(opened)
        found = find_base_model(base, home=opened, revision=revision)
        published = _published(base, found, registry)
        self._name = name
        self._engine: ServingEngine = (
            engine
            if not isinstance(engine, str)
            else start_engine(
                engine,
                found,
                published=published,
                max_rows=max_rows,
                max_context=max_context,
                max_adapters=max_adapters,
                prefill_tokens=prefill_tokens,
                prefix_tokens=prefix_tokens,
                vllm=vllm,
            )
        )
        self._description = BaseDescription(
            id=found.id,
            task=self._engine.base.task,
            max_context=self._engine.max_context,
            created=int(time.time()),
            tasks=self._engine.tasks,
            mixed_tasks=self._engine.mixed_tasks,
            max_copies=max_copies if self._engine.keeps_copies else 0,
            engine=self._engine.name,
            labels=self._engine.base.labels or None,
            published=self._engine.base.name if published else None,
        )
        self._catalog = Catalog(registry, self._description)
        self._reads = RegistryReads()
        self._reader = Reader(self._engine.vocabulary)
        self._grammars = Grammars()
        self._memory = AdapterMemory(capacity=int(free_memory(CPU) * SHARE) if adapter_memory is None else adapter_memory)
        loader = self._engine.loader(
            registry,
            memory=self._memory,
            disk=AdapterDisk(Path(adapter_disk).expanduser(), capacity=adapter_disk_bytes) if adapter_disk else None,
        )
        self._mixed = AdapterPool(loader.load, capacity=max_adapters, unload=loader.unload)
        self._copies = AdapterPool(loader.load, capacity=max_copies, unload=loader.unload)
        self._meter = Meter(opened.store_url if is_metered else None)

    async def describe(self) -> BaseDescription:
        return self._description

    async def status(self) -> Status:
        engine = self._engine
        return Status(
            running=engine.running,
            waiting=engine.waiting,
            completed=engine.completed,
            adapters=self._mixed.resident,
            copies=self._copies.resident,
        )

    def where(self, manifest: AdapterManifest) -> str:
        """Where the adapter is nearest: `device`, `memory` or `files`."""
        if str(manifest.ref) in self._mixed.resident:
            return "device"
        return "memory" if (str(manifest.ref), manifest.digest) in self._memory else "files"

    async def measured(self) -> list[Measured]:
        """See `Backend.measured`."""
        return [measured(self._name, self._engine, (self._mixed, self._copies), self._memory, self._meter)]

    async def check_health(self) -> None:
        """Serve asks now and then, and replaces a replica that raises."""
        if self._engine.failure:
            raise self._engine.failure

    def stop(self) -> None:
        """End the engine; requests that still run are told, and what was used is written."""
        self._engine.stop()
        self._meter.stop()

    async def generate(self, call: ChatCall | CompletionCall, *, in_pieces: bool = True) -> AsyncIterator[list[Event]]:
        """See `Backend.generate`. Where it is not to come `in_pieces`, what follows the first text waits for an end."""
        asked_at = time.monotonic()
        deadline = math.inf if call.sampling.timeout_s is None else asked_at + call.sampling.timeout_s
        try:
            async with await self._served(call, deadline) as served:
                prompts = await asyncio.to_thread(self._reader.prompts, served, call)
                constraints = await asyncio.to_thread(self._constraints, served, call)
                limits = [room(served, len(prompt), call.sampling) for prompt in prompts]
                told = Told()
                tell = partial(told.tell, asyncio.get_running_loop())
                rows = [
                    _row(served, prompt, limit, call, choice, constraints[choice], partial(tell, n * call.n + choice), asked_at, deadline)
                    for n, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
                    for choice in range(call.n)
                ]
                self._engine.add(served, rows)
                try:
                    # With the first text and not before: until then, a status can still say what went wrong, and clients try again by it.
                    begun: list[Event] = [Started(served.name, served.digest, sum(map(len, prompts)))]
                    pause_s = self._pause_s if in_pieces else lambda: NEVER_S
                    async for events in events_of(told, len(rows), _tool_streams(served, call), pause_s=pause_s):
                        yield [*begun, *events]
                        begun = []
                finally:
                    self._engine.cancel(rows)
                    self._count(call, served, rows, time.monotonic() - asked_at)
        except RequestError as error:
            yield [Failed(error)]

    def _pause_s(self) -> float:
        """Between two pieces of one answer: what carries them to the client costs more than a token, so the more answers there are, the
        more tokens go together."""
        return min(PAUSE_S * self._engine.running, LONGEST_PAUSE_S)

    async def answer(self, call: ChatCall | CompletionCall) -> list[Event]:
        """See `Backend.answer`."""
        first, *others = [event async for events in self.generate(call, in_pieces=False) for event in events]
        return [first, *joined_pieces(others)]

    async def classify(self, call: ClassifyCall) -> Classified | Failed:
        """See `Backend.classify`."""
        tenant, deadline = call.caller.tenant, time.monotonic() + (call.timeout_s or math.inf)
        try:
            async with await self._served(call, deadline) as served:
                if served.heads is None:
                    other = ", or POST /v1/embeddings for a vector" if self._engine.embedding else ""
                    raise RequestError(f"{served.name} has no trained classification head; call a classification adapter{other}", "model")
                questions = await asyncio.to_thread(self._reader.questions, served, call.inputs, tenant=tenant, deadline=deadline)
                tokens = [question.tokens for question in questions]
                logits = await self._asked(call, served, [question.asked for question in questions], tokens)
                if isinstance(logits, Failed):
                    return logits
                answers = [answer(served, question, row) for question, row in zip(questions, logits, strict=True)]
                return Classified(served.name, served.digest, served.labels, served.problem_type, answers, sum(tokens))
        except RequestError as error:
            return Failed(error)

    async def embed(self, call: EmbedCall) -> Embedded | Failed:
        """See `Backend.embed`."""
        tenant, deadline = call.caller.tenant, time.monotonic() + (call.timeout_s or math.inf)
        try:
            async with await self._served(call, deadline) as served:
                heads = self._engine.embedding
                if heads is None or (served.weights is None and served is not self._engine.base):
                    raise RequestError(f"{served.name} makes no vectors of texts; call an encoder, or a LoRA adapter of one", "model")
                asked = await asyncio.to_thread(self._reader.texts, served, call.inputs, heads, tenant=tenant, deadline=deadline)
                tokens = [each.cost for each in asked]
                vectors = await self._asked(call, served, asked, tokens)
                if isinstance(vectors, Failed):
                    return vectors
                return Embedded(served.name, served.digest, [vector.tolist() for vector in vectors], sum(tokens))
        except RequestError as error:
            return Failed(error)

    async def _asked(
        self, call: ClassifyCall | EmbedCall, served: Served, asked: Sequence[Asked], tokens: Sequence[int]
    ) -> list[Tensor] | Failed:
        """What the model says to each of them, which have so many `tokens`. However it ends, those that it has read are metered."""
        self._engine.ask(asked)
        try:
            return await asyncio.gather(*(asyncio.wrap_future(each.result) for each in asked))
        except RequestError as error:
            return Failed(error, _read(asked, tokens))
        finally:
            self._meter.add(call.caller, served.name, Used(1, _read(asked, tokens)))

    async def tokenize(self, call: TokenizeCall) -> Tokenized | Failed:
        """See `Backend.tokenize`."""
        try:
            async with await self._served(call) as served:
                ids = await asyncio.to_thread(self._reader.tokens, served, call.text, add_special_tokens=call.add_special_tokens)
                return Tokenized(served.name, served.digest, ids, served.processor.convert_ids_to_tokens(ids), served.max_context)
        except RequestError as error:
            return Failed(error)

    async def _served(self, call: Call, deadline: float = math.inf) -> AbstractAsyncContextManager[Served]:
        """The base or the adapter that a call names, pinned in memory inside the block."""
        find, known = partial(self._catalog.find, call.model), partial(self._catalog.known, call.model)
        manifest = await self._reads.read(find, known, within_s=max(0.0, deadline - time.monotonic()))
        base = self._engine.base
        name, task = (str(manifest.ref), manifest.task) if manifest else (base.name, base.task)
        call.caller.check(call.alias or call.model, call.model, *self._catalog.names(manifest))
        # The base says itself that it has no head, `embed` what has no vectors, and `tokenize` what has no tokens.
        is_told_later = isinstance(call, EmbedCall | TokenizeCall) or (manifest is None and isinstance(call, ClassifyCall))
        if ROUTES[type(call)] not in routes_of(task) and not is_told_later:
            raise RequestError(f"{name} is for {task} and does not answer here; POST {TASKS[task].route}", "model")
        if manifest is None:
            return nullcontext(base)
        return (self._mixed if self._engine.mixes(manifest) else self._copies).pinned(manifest, deadline=deadline)

    def _constraints(self, served: Served, call: ChatCall | CompletionCall) -> Sequence[Constraint | None]:
        """Of the answers to each prompt. Compiles, which may take a while."""
        if isinstance(call, CompletionCall) or (call.tools is None and call.schema is None):
            return [None] * call.n
        grammar = answer_grammar(call.schema, call.tools, served.tool_form, served.processor)
        return self._grammars.constraints(served, grammar, call.n)

    def _count(self, call: ChatCall | CompletionCall, served: Served, rows: Sequence[Row], seconds: float) -> None:
        """Meter a request, however it ended: each prompt that the model began with once, and every token that was made."""
        begun = [row for row in rows[:: call.n] if row.read]
        used = Used(1, sum(len(row.prompt) for row in begun), sum(row.kept for row in begun), sum(len(row.made) for row in rows))
        self._meter.add(call.caller, served.name, used, [row.first_token_s for row in rows if row.first_token_s is not None])
        # Serve writes the request's id before each line.
        logger.info(
            "%s for %s: %d prompt tokens, %d of them kept, %d made, in %.3f s",
            served.name,
            call.caller.label,
            used.prompt_tokens,
            used.cached_tokens,
            used.completion_tokens,
            seconds,
        )


def _row(
    served: Served,
    prompt: list[int],
    limit: int,
    call: ChatCall | CompletionCall,
    choice: int,
    constraint: Constraint | None,
    emit: Callable[[RowEvent], None],
    asked_at: float,
    deadline: float,
) -> Row:
    sampling = call.sampling
    return Row(
        prompt=prompt,
        adapter=served.weights,
        chooser=make_chooser(
            seed=sampling.seed,
            choice=choice,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            logit_bias=sampling.logit_bias,
            logprobs=sampling.logprobs,
            constraint=constraint,
        ),
        # The tags of calls may be special tokens; beyond them a grammar of calls allows none but those that end the answer.
        text=TextStream(served.processor, sampling.stop, shows_special=isinstance(call, ChatCall) and call.tools is not None),
        end_ids=served.end_ids,
        max_tokens=limit,
        emit=emit,
        tenant=call.caller.tenant,
        asked_at=asked_at,
        deadline=deadline,
    )


def _read(asked: Sequence[Asked], tokens: Sequence[int]) -> int:
    """Tokens of those that the model has answered."""
    done = [each.result.done() and not each.result.cancelled() and not each.result.exception() for each in asked]
    return sum(n for n, is_done in zip(tokens, done, strict=True) if is_done)


def _tool_streams(served: Served, call: ChatCall | CompletionCall) -> list[ToolStream]:
    """What finds calls of tools in each answer; none where there are no tools."""
    if isinstance(call, CompletionCall) or call.tools is None:
        return []
    must_call, must_follow = call.tools.must_call, call.schema is not None
    return [ToolStream(served.tool_form, must_call=must_call, must_follow=must_follow) for _ in range(call.n)]


def _published(name: str, base: BaseModel, registry: Registry) -> AdapterManifest | None:
    """The manifest of a base that is a published whole model."""
    try:
        manifest = registry.resolve(name)
    except RegistryError:
        return None
    return manifest if registry.path(manifest.ref) == base.folder else None
