"""The model's thread: calls run between steps, and nobody waits for a thread that has ended."""

import threading
import time
from collections import deque
from typing import Any

import pytest
import torch

from serving.engine.alone import AT_ONCE, Alone
from serving.engine.generation import FAILURES_AT_MOST, Generation
from serving.engine.row import Event, Row, cancel
from serving.engine.sampling import make_chooser
from serving.engine.text import TextStream
from serving.engine.thread import ModelThread
from serving.errors import DeadlineError, EngineError


class Counting:
    """Work that counts its steps."""

    def __init__(self) -> None:
        self.left = 0
        self.steps: list[str] = []
        self.abandoned: EngineError | None = None

    def step(self) -> bool:
        if self.left:
            self.left -= 1
            self.steps.append(threading.current_thread().name)
        return self.left > 0

    def abandon(self, error: EngineError) -> None:
        self.abandoned = error


class LostDevice:
    """A decoder whose GPU is gone."""

    device = torch.device("cpu")

    def prefill(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("device lost")


def row(emit: Any) -> Row:
    chooser = make_chooser(temperature=0, top_p=1, seed=None, choice=0)
    return Row([1], None, chooser, TextStream(None), frozenset(), max_tokens=4, emit=emit)


def test_calls_and_steps_run_on_one_thread_of_its_own() -> None:
    work = Counting()
    thread = ModelThread([work], name="its-own")
    thread.call(lambda: setattr(work, "left", 3)).result(timeout=5)
    assert thread.call(lambda: threading.current_thread().name).result(timeout=5) == "its-own"
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 / 0).result(timeout=5)
    thread.stop()
    assert set(work.steps) == {"its-own"}
    assert work.abandoned is thread.failure
    with pytest.raises(EngineError, match="stopping"):
        thread.call(lambda: None)


def test_a_model_that_keeps_failing_ends_the_thread_and_tells_everyone() -> None:
    generation: Any = Generation(LostDevice(), max_rows=1, max_context=8)  # type: ignore[arg-type]
    thread = ModelThread([generation])
    events: deque[Event] = deque()
    ended = threading.Event()
    rows = [row(events.append) for _ in range(FAILURES_AT_MOST)]
    last = row(lambda event: (events.append(event), ended.set()))
    thread.call(lambda: generation.add([*rows, last])).result(timeout=5)
    assert ended.wait(5)
    assert len(events) == FAILURES_AT_MOST + 1
    assert all(isinstance(event, EngineError) for event in events)
    assert thread.failure is not None
    assert "device lost" in thread.failure.message


def test_one_failing_batch_does_not_end_the_thread() -> None:
    generation: Any = Generation(LostDevice(), max_rows=1, max_context=8)  # type: ignore[arg-type]
    thread = ModelThread([generation])
    ended = threading.Event()
    thread.call(lambda: generation.add([row(lambda _: ended.set())])).result(timeout=5)
    assert ended.wait(5)
    assert thread.call(lambda: generation.running).result(timeout=5) == 0
    assert thread.failure is None
    thread.stop()


class LostModel:
    """A model of its own whose GPU is gone."""

    def get_base_model(self) -> Any:
        raise RuntimeError("device lost")

    config = property(get_base_model)


def test_an_answer_of_a_model_of_its_own_that_fails_is_told_and_leaves() -> None:
    alone = Alone(torch.device("cpu"))
    heard: deque[Event] = deque()
    alone.add(LostModel(), [row(heard.append) for _ in range(FAILURES_AT_MOST - 1)])
    assert not alone.step()
    assert [type(event) for event in heard] == [EngineError] * (FAILURES_AT_MOST - 1)
    alone.add(LostModel(), [row(heard.append)])
    with pytest.raises(RuntimeError, match="device lost"):
        alone.step()
    assert (alone.running, alone.waiting) == (0, 0)


def test_a_cancelled_answer_of_a_model_of_its_own_is_forgotten() -> None:
    alone = Alone(torch.device("cpu"))
    heard: deque[Event] = deque()
    rows = [row(heard.append) for _ in range(AT_ONCE + 1)]
    alone.add(LostModel(), rows)
    assert alone.waiting == AT_ONCE + 1
    cancel(rows)
    assert not alone.step()
    assert (alone.running, alone.waiting, list(heard)) == (0, 0, [])


def test_an_answer_of_a_model_of_its_own_is_given_up_at_its_deadline() -> None:
    alone = Alone(torch.device("cpu"))
    heard: deque[Event] = deque()
    rows = [row(heard.append) for _ in range(AT_ONCE + 1)]
    for each in rows:
        each.deadline = time.monotonic()
    alone.add(LostModel(), rows)
    assert not alone.step()
    assert [type(event) for event in heard] == [DeadlineError] * (AT_ONCE + 1)
