"""The thread that owns the model. Everything that touches the model or its rows runs here, so none of it needs a lock.

Other threads hand work over as calls; between two steps of the model the calls that have come are run. A Python thread of its own keeps
the server's event loop answering while the model computes (torch releases the interpreter's lock inside its kernels).
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import torch

from serving.errors import EngineError, StoppingError
from serving.priority import go_first

T = TypeVar("T")


class Work(Protocol):
    """A kind of work that the model does in steps."""

    def step(self) -> bool:
        """Do one bounded piece; False where there is nothing to do. An exception ends the thread."""
        ...

    def abandon(self, error: EngineError) -> None:
        """Tell everyone who waits that nothing will come."""
        ...


class ModelThread:
    """Runs calls and steps until stopped, or until a step fails."""

    def __init__(self, works: Sequence[Work], *, name: str = "model") -> None:
        self._works = works
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._closing = threading.Lock()
        self._closed: EngineError | None = None
        self._thread.start()

    @property
    def failure(self) -> EngineError | None:
        """Why the thread ended; None while it runs."""
        return self._closed

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run `function` between two steps of the model.

        Raises:
            EngineError: the thread has ended.
        """
        future: Future[T] = Future()
        with self._closing:
            if self._closed:
                raise self._closed
            self._calls.put((function, future))
        return future

    def stop(self) -> None:
        """End the thread after the step it is in; whoever waits is told."""
        self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        error: EngineError = StoppingError("this replica is stopping; send the request again")
        go_first()
        try:
            with torch.inference_mode():
                busy = False
                while self._run_calls(wait=not busy):
                    busy = sum(work.step() for work in self._works) > 0
        except Exception as cause:
            error = EngineError(f"the model stopped working ({type(cause).__name__}: {cause}); the replica is being replaced")
            error.__cause__ = cause
        finally:
            self._close(error)

    def _run_calls(self, *, wait: bool) -> bool:
        """Run what has come, first waiting for something where there is nothing else to do. False: it is time to stop."""
        while wait or not self._calls.empty():
            wait = False
            item = self._calls.get()
            if item is None:
                return False
            function, future = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
        return True

    def _close(self, error: EngineError) -> None:
        with self._closing:
            self._closed = error
        for work in self._works:
            work.abandon(error)
        while not self._calls.empty():
            item = self._calls.get()
            if item and item[1].set_running_or_notify_cancel():
                item[1].set_exception(error)
