"""Answers whose tokens come from an engine that batches by itself: whose turn it is, time limits, cancelling and measures are done here.

All of it runs on one thread with an event loop of its own, so none of it needs a lock and the replica's loop stays free. No more rows are
handed over than are made at once: the rest wait here, where tenants share by tokens, and not in the other engine's own queue.
"""

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from serving.engine.fairness import FairQueue, Tenant
from serving.engine.measures import Measures
from serving.engine.row import Row, cancel, is_out
from serving.engine.sampling import Chosen
from serving.errors import EngineError, LostEngineError, RequestError, StoppingError
from serving.priority import go_first

T = TypeVar("T")


@dataclass(frozen=True)
class LoraFiles:
    """A LoRA adapter in PEFT's format, checked."""

    name: str
    """`name@version`."""
    digest: str
    folder: Path
    rank: int


@dataclass(frozen=True)
class Step:
    """One or several tokens of an answer."""

    tokens: Sequence[Chosen]
    kept: int = 0
    """Prompt tokens that were found read already."""


class TokenSource(Protocol):
    """An engine that answers many prompts at once. Called on the thread of `Streams` alone."""

    max_context: int
    """Tokens of one row."""
    dtype: torch.dtype
    """What it computes in."""

    def answer(self, row: Row, adapter: LoraFiles | None) -> AsyncGenerator[Step, None]:
        """The tokens of one answer up to the first in `row.end_ids`, or `row.max_tokens`, as they come. Closing it gives the answer up.
        Where the row has a constraint, they follow its `grammar`; the constraint itself is not the source's to move.

        Raises:
            LostEngineError: nothing will be answered any more.
            RequestError: this answer cannot be made.
        """
        ...

    async def logprobs(self, prompt: Sequence[int], tokens: Sequence[int], adapter: LoraFiles | None) -> list[float]:
        """Log probabilities that each of `tokens` comes next."""
        ...

    async def load(self, adapter: LoraFiles) -> None:
        """Make an adapter ready.

        Raises:
            ValueError: it does not take it.
        """
        ...

    async def unload(self, adapter: LoraFiles) -> None: ...

    def stop(self) -> None: ...


@dataclass(eq=False)
class _Answer:
    row: Row
    adapter: LoraFiles | None
    task: "asyncio.Task[None] | None" = None

    @property
    def tenant(self) -> Tenant:
        return self.row.tenant


class Streams:
    """The answers in the making, and those that wait."""

    def __init__(self, start: Callable[[Measures], Awaitable[TokenSource]], *, max_rows: int) -> None:
        """Start the thread, and on it the source; blocks until that is there.

        Raises:
            Exception: whatever `start` raises.
        """
        self.max_rows = max_rows
        self.completed = 0
        self.measures = Measures()
        self._running: list[_Answer] = []
        self._waiting: FairQueue[_Answer] = FairQueue()
        self._failure: EngineError | None = None
        self._closing = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="streams", daemon=True)
        self._thread.start()

        async def started() -> TokenSource:
            return await start(self.measures)

        try:
            self.source = asyncio.run_coroutine_threadsafe(started(), self._loop).result()
        except BaseException:
            self._end_loop()
            raise

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def active_adapters(self) -> int:
        return len({answer.adapter.digest for answer in list(self._running) if answer.adapter})

    @property
    def failure(self) -> EngineError | None:
        return self._failure

    def call(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run a coroutine on the thread.

        Raises:
            EngineError: nothing is answered any more.
        """
        with self._closing:
            if self._failure:
                coroutine.close()
                raise self._failure
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def add(self, rows: Sequence[Row], adapter: LoraFiles | None) -> None:
        """Queue rows.

        Raises:
            EngineError: nothing is answered any more.
        """
        with self._closing:
            if self._failure:
                raise self._failure
            self._loop.call_soon_threadsafe(self._queue, [_Answer(row, adapter) for row in rows])

    def cancel(self, rows: Sequence[Row]) -> None:
        """Give up those that are not complete."""
        cancel(rows)
        with self._closing:
            if not self._failure:
                self._loop.call_soon_threadsafe(self._forget)

    def load(self, adapter: LoraFiles) -> None:
        """Make an adapter ready; blocks until it is.

        Raises:
            EngineError: nothing is answered any more.
            ValueError: the source does not take it.
        """
        self.call(self.source.load(adapter)).result()

    def unload(self, adapter: LoraFiles) -> None:
        """Let go of an adapter, soon."""
        with suppress(EngineError):  # it is gone with everything else
            self.call(self.source.unload(adapter))

    def logprobs(self, prompt: Sequence[int], tokens: Sequence[int], adapter: LoraFiles | None) -> list[float]:
        """See `TokenSource.logprobs`; blocks."""
        return self.call(self.source.logprobs(prompt, tokens, adapter)).result()

    def stop(self) -> None:
        """End the source and the thread; whoever waits is told."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result()
            self._end_loop()

    def _run(self) -> None:
        go_first()  # and what the source starts from here with it
        self._loop.run_forever()

    def _queue(self, answers: Sequence[_Answer]) -> None:
        if self._failure:
            for answer in answers:
                answer.row.emit(self._failure)
            return
        self._waiting.extend(answers)
        for deadline in {answer.row.deadline for answer in answers if answer.row.deadline < math.inf}:
            self._loop.call_at(deadline, self._expire, deadline)  # the loop's clock is time.monotonic
        self._pump()

    def _pump(self) -> None:
        """Hand rows over as far as there is room."""
        while self._waiting and len(self._running) < self.max_rows:
            answer = self._waiting.pop()
            if is_out(answer.row, time.monotonic()):
                self._waiting.done(answer)
                continue
            answer.row.begin(self.measures)
            self._waiting.charge(answer.tenant, len(answer.row.prompt))
            self._running.append(answer)
            answer.task = self._loop.create_task(self._make(answer))
            # Not in the task itself, which never begins where it is cancelled first.
            answer.task.add_done_callback(partial(self._leave, answer))

    def _expire(self, deadline: float) -> None:
        now = max(time.monotonic(), deadline)  # a loop's timer may come a hair early
        self._waiting.remove(lambda answer: is_out(answer.row, now))

    def _forget(self) -> None:
        self._waiting.remove(lambda answer: answer.row.cancelled)
        for answer in self._running:
            if answer.row.cancelled and answer.task:
                answer.task.cancel()

    async def _make(self, answer: _Answer) -> None:
        """One answer from beginning to end."""
        row = answer.row
        try:
            async with asyncio.timeout_at(row.deadline if row.deadline < math.inf else None) as limit:
                await self._read(answer)
        except RequestError as error:
            row.emit(error)
            if isinstance(error, LostEngineError):
                self._close(error)
        except TimeoutError as cause:
            if limit.expired():
                is_out(row, row.deadline)
            else:
                row.emit(_failed(cause))
        except asyncio.CancelledError:
            pass  # by `_forget` or `_close`: nobody waits, or everybody was told
        except Exception as cause:
            row.emit(_failed(cause))

    def _leave(self, answer: _Answer, _: object) -> None:
        self._running.remove(answer)
        self._waiting.done(answer)
        self._pump()

    async def _read(self, answer: _Answer) -> None:
        # Closed at once and not by the garbage collector: what stops at a stop string has no more tokens made for it.
        async with aclosing(self.source.answer(answer.row, answer.adapter)) as steps:
            async for step in steps:
                if answer.row.cancelled or self._take(answer.row, step):
                    return
        raise EngineError("the engine ended this answer before it was complete; send the request again")

    def _take(self, row: Row, step: Step) -> bool:
        """Give a row its tokens, and say whether its answer is complete."""
        if not row.is_read:
            row.read, row.kept = len(row.prompt), step.kept
            self.measures.cached_tokens += step.kept
        now = time.monotonic()
        constraint = row.chooser.constraint
        for chosen in step.tokens:
            row.timed(self.measures, now)
            self._waiting.charge(row.tenant, 1)
            if constraint is not None and not constraint.take(chosen.token):
                raise EngineError("the engine left the form that this request's schema or tools ask for; send the request again")
            if row.take(chosen):
                self.completed += 1
                return True
        return False

    def _close(self, error: EngineError) -> None:
        with self._closing:
            if self._failure:
                return
            self._failure = error
        current = asyncio.current_task()
        for answer in [*self._running, *self._waiting]:
            if answer.task is None or answer.task is not current:
                answer.row.emit(error)
                answer.row.cancelled = True
            if answer.task and answer.task is not current:
                answer.task.cancel()
        self._waiting.remove(lambda _: True)

    async def _finish(self) -> None:
        self._close(StoppingError("this replica is stopping; send the request again"))
        tasks = [answer.task for answer in self._running if answer.task]
        await asyncio.gather(*tasks, return_exceptions=True)
        self.source.stop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _failed(cause: Exception) -> EngineError:
    return EngineError(f"the engine failed on this request ({type(cause).__name__}: {cause})")
