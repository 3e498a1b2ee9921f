"""The slot engine against transformers' own generate, one adapter at a time."""

from random import Random
from typing import Any

import pytest
import torch

from serving.base import Engine, Served
from serving.engine.decoding import Stack, StackedRows
from serving.engine.generation import Generation
from serving.engine.row import Ended, Event, Row, TextPiece, cancel
from serving.engine.sampling import make_chooser
from serving.engine.text import TextStream
from serving.errors import EngineError
from serving.loading import AdapterLoader
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
    def ended(self) -> Ended | None:
        return next((event for event in self.events if isinstance(event, Ended)), None)


def row(
    served: Served, prompt: list[int], *, max_tokens: int = TOKENS, ends: bool = True, stop: tuple[str, ...] = (), **sampling: Any
) -> Row:
    chooser = make_chooser(**{"temperature": 0.0, "top_p": 1.0, "seed": None, "choice": 0} | sampling)
    return Row(
        prompt=prompt,
        adapter=served.weights,
        chooser=chooser,
        text=TextStream(served.processor, stop),
        end_ids=served.end_ids if ends else frozenset(),
        max_tokens=max_tokens,
        emit=Recorder().events.append,
    )


def tokens_of(row: Row) -> list[int]:
    return row.made[:-1] if row.made[-1] in row.end_ids else row.made


def recorder(row: Row) -> Recorder:
    found = Recorder()
    row.emit = found.events.append
    return found


def run(generation: Generation) -> None:
    with torch.inference_mode():
        while generation.step():
            pass


@pytest.fixture
def generation(engine: Engine) -> Generation:
    """A generation of the test's own, stepped by hand (the engine's thread is idle meanwhile)."""
    assert engine.parts.decoder is not None
    return Generation(engine.parts.decoder, max_rows=4, max_context=engine.max_context)


@pytest.fixture(scope="session")
def everyone(engine: Engine, loader: AdapterLoader, chat_shelf: Shelf) -> dict[str, Served]:
    return {"base": engine.base, **{name: loader.load(manifest) for name, manifest in chat_shelf.manifests.items()}}


def prompt(random: Random, length: int) -> list[int]:
    return [random.randrange(3, 380) for _ in range(length)]


def reference(shelf: Shelf, name: str, prompt: list[int], *, end_ids: frozenset[int], tokens: int = TOKENS) -> list[int]:
    model = next(iter(shelf.peft.values())) if name == "base" else shelf.peft[name]
    if name == "base":
        with model.disable_adapter():
            return greedy_alone(model, prompt, tokens=tokens, end_ids=sorted(end_ids))
    return greedy_alone(model, prompt, tokens=tokens, end_ids=sorted(end_ids))


@pytest.mark.parametrize("seed", range(3))
def test_greedy_tokens_are_those_of_each_adapter_alone_whenever_rows_join(
    generation: Generation, everyone: dict[str, Served], chat_shelf: Shelf, seed: int
) -> None:
    random = Random(seed)
    names = [*everyone, *random.choices(list(everyone), k=5)]
    random.shuffle(names)
    rows = [
        row(everyone[name], prompt(random, random.randrange(1, 40)), max_tokens=random.randrange(3, TOKENS), ends=False) for name in names
    ]
    waiting = list(rows)
    with torch.inference_mode():
        while waiting or generation.running:
            joining, waiting = waiting[: (k := random.randrange(3))], waiting[k:]
            generation.add(joining)
            generation.step()
    for name, served_row in zip(names, rows, strict=True):
        wanted = reference(chat_shelf, name, list(served_row.prompt), end_ids=frozenset(), tokens=served_row.max_tokens)
        assert tokens_of(served_row) == wanted, name


def test_adapters_change_the_answer(everyone: dict[str, Served], chat_shelf: Shelf) -> None:
    ids = prompt(Random(0), 12)
    answers = {tuple(reference(chat_shelf, name, ids, end_ids=frozenset())) for name in everyone}
    assert len(answers) == len(everyone), "the equality test proves nothing where adapters agree"


def test_an_answer_ends_at_the_end_of_turn_token(generation: Generation, everyone: dict[str, Served], chat_shelf: Shelf) -> None:
    served, ids = everyone["wide"], prompt(Random(5), 9)
    free = reference(chat_shelf, "wide", ids, end_ids=frozenset())
    end = free[7]
    ended_row = row(served, ids)
    ended_row.end_ids = frozenset({end})
    heard = recorder(ended_row)
    generation.add([ended_row])
    run(generation)
    assert tokens_of(ended_row) == free[: free.index(end)]
    assert heard.ended == Ended("stop", free.index(end) + 1)


def test_a_seed_gives_the_same_text_in_any_company(generation: Generation, everyone: dict[str, Served]) -> None:
    ids = prompt(Random(1), 10)
    settings = {"temperature": 1.3, "top_p": 0.9, "ends": False}
    alone = row(everyone["wide"], ids, seed=7, **settings)
    generation.add([alone])
    run(generation)
    company = [
        row(everyone[name], prompt(Random(n), 5 + n), temperature=1.0, ends=False) for n, name in enumerate(["narrow", "wide", "base"])
    ]
    again, other = row(everyone["wide"], ids, seed=7, **settings), row(everyone["wide"], ids, seed=8, **settings)
    generation.add(company[:2])
    with torch.inference_mode():
        generation.step()
    generation.add([again, company[2], other])
    run(generation)
    assert tokens_of(again) == tokens_of(alone)
    assert tokens_of(other) != tokens_of(alone)


def test_a_tiny_temperature_is_greedy(generation: Generation, everyone: dict[str, Served], chat_shelf: Shelf) -> None:
    ids = prompt(Random(2), 8)
    cold = row(everyone["mixed"], ids, temperature=1e-6, ends=False)
    nucleus = row(everyone["mixed"], ids, temperature=2.0, top_p=1e-9, ends=False)
    generation.add([cold, nucleus])
    run(generation)
    assert tokens_of(cold) == tokens_of(nucleus) == reference(chat_shelf, "mixed", ids, end_ids=frozenset())


def test_a_cancelled_row_leaves_its_slot_and_the_others_go_on(
    generation: Generation, everyone: dict[str, Served], chat_shelf: Shelf
) -> None:
    random = Random(3)
    rows = [row(everyone[name], prompt(random, 6), ends=False) for name in ("narrow", "wide", "mixed", "base", "patterned")]
    heard = recorder(rows[1])
    generation.add(rows)
    with torch.inference_mode():
        generation.step()
        assert (generation.running, generation.waiting) == (4, 1)
        cancel([rows[1]])
        before = len(heard.events)
        generation.step()
        assert (generation.running, generation.waiting) == (4, 0)
    run(generation)
    assert len(heard.events) == before
    assert heard.ended is None
    for n, name in ((0, "narrow"), (2, "mixed"), (3, "base"), (4, "patterned")):
        assert tokens_of(rows[n]) == reference(chat_shelf, name, list(rows[n].prompt), end_ids=frozenset()), name


def test_answers_may_fill_the_whole_context(generation: Generation, everyone: dict[str, Served], chat_shelf: Shelf) -> None:
    ids = prompt(Random(4), 40)
    tokens = generation.max_context - len(ids)
    full = row(everyone["narrow"], ids, max_tokens=tokens, ends=False)
    generation.add([full])
    run(generation)
    assert tokens_of(full) == reference(chat_shelf, "narrow", ids, end_ids=frozenset(), tokens=tokens)


@pytest.mark.parametrize(("a_times", "b_times"), [(1.0, 1e38), (1e38, 1.0)])
def test_numbers_that_overflow_fail_their_own_row_alone(
    generation: Generation, everyone: dict[str, Served], chat_shelf: Shelf, a_times: float, b_times: float
) -> None:
    ids = prompt(Random(6), 8)
    weights = everyone["wide"].weights
    assert weights is not None
    wild = type(weights)({name: (a * a_times, b * b_times) for name, (a, b) in weights.layers.items()})
    good = [row(everyone["wide"], ids, ends=False), row(everyone["base"], ids, ends=False)]
    bad = row(everyone["wide"], ids, ends=False)
    bad.adapter = wild
    heard = recorder(bad)
    generation.add([good[0], bad, good[1]])
    run(generation)
    assert isinstance(heard.events[-1], EngineError)
    # Shorter prompts in the slot of a failed row, beside a longer one: what it left behind is masked and still read.
    alone = row(everyone["wide"], ids * 3, ends=False)
    alone.adapter = wild
    generation.add([alone])
    run(generation)
    later = [row(everyone["narrow"], ids[:length], ends=False) for length in (2, 3, 3, 8)]
    generation.add(later)
    run(generation)
    for name, served_row in (("wide", good[0]), ("base", good[1]), *(("narrow", each) for each in later)):
        assert tokens_of(served_row) == reference(chat_shelf, name, list(served_row.prompt), end_ids=frozenset()), name


def test_an_overflow_in_the_middle_of_an_answer_stays_in_its_row(everyone: dict[str, Served]) -> None:
    """Decode runs all adapters through one stack: another row's infinities must not come back as inf * 0."""
    weights = everyone["wide"].weights
    other = everyone["narrow"].weights
    assert weights is not None
    assert other is not None
    wild = type(weights)({name: (a * 1e38, b) for name, (a, b) in weights.layers.items()})
    name = next(iter(other.layers))
    x = torch.full((2, 1, weights.layers[name][0].shape[1]), 30.0)
    out = StackedRows([wild, other], Stack([wild, other]), x.device).add(name, x, torch.zeros(2, 1, weights.layers[name][1].shape[1]))
    assert not out[0].isfinite().all()
    assert out[1].isfinite().all()


def test_a_stop_string_ends_the_text_before_it(generation: Generation, everyone: dict[str, Served]) -> None:
    ids = prompt(Random(8), 8)
    free = row(everyone["narrow"], ids, ends=False)
    whole = recorder(free)
    generation.add([free])
    run(generation)
    stop = whole.text[5:8]
    stopped = row(everyone["narrow"], ids, ends=False, stop=("never there", stop))
    heard = recorder(stopped)
    generation.add([stopped])
    run(generation)
    assert heard.text == whole.text[: whole.text.index(stop)]
    assert heard.ended is not None
    assert heard.ended.reason == "stop"
    assert heard.ended.tokens < TOKENS
