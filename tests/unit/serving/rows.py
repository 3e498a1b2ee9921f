"""Rows for the engine's tests, and what transformers' own generate says of them."""

import math
from collections.abc import Sequence
from random import Random
from typing import Any

import torch

from serving.base import Engine, Served
from serving.engine.fairness import EVERYONE, Tenant
from serving.engine.generation import Generation
from serving.engine.row import Ended, Event, Row, TextPiece, TokenScore
from serving.engine.sampling import make_chooser
from serving.engine.text import TextStream
from tests.serving_fixtures import greedy_alone
from tests.unit.serving.conftest import Shelf

TOKENS = 24


class Recorder:
    """Collects a row's events, and the tokens behind its text."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TextPiece))

    @property
    def scores(self) -> list[TokenScore]:
        return [score for event in self.events if isinstance(event, TextPiece) for score in event.scores]

    @property
    def ended(self) -> Ended | None:
        return next((event for event in self.events if isinstance(event, Ended)), None)


def row(
    served: Served,
    prompt: list[int],
    *,
    max_tokens: int = TOKENS,
    ends: bool = True,
    stop: tuple[str, ...] = (),
    tenant: Tenant = EVERYONE,
    deadline: float = math.inf,
    **sampling: Any,
) -> Row:
    chooser = make_chooser(**{"temperature": 0.0, "seed": None, "choice": 0} | sampling)
    return Row(
        prompt=prompt,
        adapter=served.weights,
        chooser=chooser,
        text=TextStream(served.processor, stop),
        end_ids=served.end_ids if ends else frozenset(),
        max_tokens=max_tokens,
        emit=Recorder().events.append,
        tenant=tenant,
        deadline=deadline,
    )


def tokens_of(row: Row) -> list[int]:
    return row.made[:-1] if row.made[-1] in row.end_ids else row.made


def recorder(row: Row) -> Recorder:
    found = Recorder()
    row.emit = found.events.append
    return found


def run(generation: Generation, rows: Sequence[Row] = ()) -> None:
    """Answer these, and everything that is there."""
    generation.add(rows)
    with torch.inference_mode():
        while generation.step():
            pass


def step(generation: Generation) -> None:
    with torch.inference_mode():
        generation.step()


def prompt(random: Random, length: int) -> list[int]:
    return [random.randrange(3, 380) for _ in range(length)]


def reference(shelf: Shelf, name: str, prompt: list[int], *, end_ids: frozenset[int], tokens: int = TOKENS) -> list[int]:
    model = next(iter(shelf.peft.values())) if name == "base" else shelf.peft[name]
    if name == "base":
        with model.disable_adapter():
            return greedy_alone(model, prompt, tokens=tokens, end_ids=sorted(end_ids))
    return greedy_alone(model, prompt, tokens=tokens, end_ids=sorted(end_ids))


def generation_of(engine: Engine, *, max_rows: int = 4, **settings: int) -> Generation:
    """A generation of the test's own, stepped by hand (the engine's thread is idle meanwhile)."""
    assert engine.parts.decoder is not None
    return Generation(engine.parts.decoder, max_rows=max_rows, max_context=engine.max_context, **settings)
