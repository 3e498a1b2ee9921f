"""The slot engine against transformers' own generate, one adapter at a time."""

import time
from random import Random

import pytest
import torch

from serving.base import Engine, Served
from serving.engine.decoding import Stack, StackedRows
from serving.engine.generation import Generation
from serving.engine.row import Ended, cancel
from serving.errors import DeadlineError, EngineError
from tests.unit.serving.conftest import Shelf
from tests.unit.serving.rows import TOKENS, generation_of, prompt, recorder, reference, row, run, step, tokens_of


@pytest.fixture
def generation(engine: Engine) -> Generation:
    return generation_of(engine)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_tokens_are_those_of_each_adapter_alone_whenever_rows_join_and_however_prompts_are_cut(
    engine: Engine, everyone: dict[str, Served], chat_shelf: Shelf, seed: int
) -> None:
    random = Random(seed)
    generation = generation_of(engine, prefill_tokens=random.choice([1, 7, 24, 100]), prefix_tokens=random.choice([0, 64, 10_000]))
    names = [*everyone, *random.choices(list(everyone), k=9)]
    random.shuffle(names)
    beginnings = [prompt(random, 32) for _ in range(2)]
    prompts = [random.choice([[], *beginnings]) + prompt(random, random.randrange(1, 40)) for _ in names]
    rows = [row(everyone[name], ids, max_tokens=random.randrange(1, TOKENS), ends=False) for name, ids in zip(names, prompts, strict=True)]
    waiting = list(rows)
    with torch.inference_mode():
        while waiting or generation.running or generation.waiting:
            joining, waiting = waiting[: (k := random.randrange(3))], waiting[k:]
            generation.add(joining)
            generation.step()
    for name, served_row in zip(names, rows, strict=True):
        wanted = reference(chat_shelf, name, list(served_row.prompt), end_ids=frozenset(), tokens=served_row.max_tokens)
        assert tokens_of(served_row) == wanted, name


def test_a_long_prompt_does_not_hold_up_the_answers_of_others(engine: Engine, everyone: dict[str, Served], chat_shelf: Shelf) -> None:
    generation = generation_of(engine, prefill_tokens=8)
    random = Random(11)
    others = [row(everyone[name], prompt(random, 4), ends=False, max_tokens=30) for name in ("narrow", "wide")]
    generation.add(others)
    step(generation)
    long = row(everyone["mixed"], prompt(random, 100), ends=False)
    generation.add([long])
    for steps in range(1, 13):
        before = [len(other.made) for other in others]
        step(generation)
        assert long.read == 8 * steps
        assert not long.made
        assert [len(other.made) for other in others] == [made + 1 for made in before], "one token a step, whatever is being read"
    run(generation)
    for name, each in (("narrow", others[0]), ("wide", others[1]), ("mixed", long)):
        assert tokens_of(each) == reference(chat_shelf, name, list(each.prompt), end_ids=frozenset(), tokens=each.max_tokens), name


def test_rows_that_leave_make_room_for_the_one_that_is_being_read(engine: Engine, everyone: dict[str, Served], chat_shelf: Shelf) -> None:
    generation = generation_of(engine, prefill_tokens=8)
    random = Random(12)
    short = [row(everyone[name], prompt(random, 4), ends=False, max_tokens=n + 1) for n, name in enumerate(("narrow", "wide", "base"))]
    long = row(everyone["mixed"], prompt(random, 60), ends=False)
    run(generation, [*short, long])
    for name, each in (("narrow", short[0]), ("wide", short[1]), ("base", short[2]), ("mixed", long)):
        assert tokens_of(each) == reference(chat_shelf, name, list(each.prompt), end_ids=frozenset(), tokens=each.max_tokens), name


def test_adapters_change_the_answer(everyone: dict[str, Served], chat_shelf: Shelf) -> None:
    ids = prompt(Random(0), 12)
    answers = {tuple(reference(chat_shelf, name, ids, end_ids=frozenset())) for name in everyone}
    assert len(answers) == len(everyone), "the equality test proves nothing where adapters agree"


def test_the_size_of_pieces_does_not_change_a_seeded_text(engine: Engine, everyone: dict[str, Served]) -> None:
    ids = prompt(Random(21), 40)
    answers = []
    for size in (1, 9, 512):
        seeded = row(everyone["wide"], ids, seed=5, temperature=1.2, top_p=0.95, ends=False)
        run(generation_of(engine, prefill_tokens=size), [seeded])
        answers.append(tokens_of(seeded))
    assert answers[0] == answers[1] == answers[2]


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


def test_a_row_is_dropped_wherever_it_is_once_nobody_waits(engine: Engine, everyone: dict[str, Served], chat_shelf: Shelf) -> None:
    generation = generation_of(engine, prefill_tokens=8)
    random = Random(13)
    rows = [
        row(everyone["wide"], prompt(random, 4), ends=False),
        *(row(everyone["wide"], prompt(random, 60), ends=False) for _ in range(2)),
    ]
    heard = [recorder(each) for each in rows]
    generation.add(rows)
    step(generation)
    step(generation)
    assert (len(rows[0].made), rows[1].read, generation.running, generation.waiting) == (3, 8, 2, 1)
    cancel(rows)
    before = [len(each.events) for each in heard]
    step(generation)
    assert (generation.running, generation.waiting) == (0, 0)
    assert [len(each.events) for each in heard] == before
    after = row(everyone["narrow"], prompt(random, 30), ends=False)
    run(generation, [after])
    assert tokens_of(after) == reference(chat_shelf, "narrow", list(after.prompt), end_ids=frozenset())


def test_a_deadline_that_has_passed_ends_a_row_wherever_it_is_with_an_error(engine: Engine, everyone: dict[str, Served]) -> None:
    generation = generation_of(engine, prefill_tokens=8)
    random = Random(14)
    rows = [row(everyone["wide"], prompt(random, length), ends=False, deadline=time.monotonic() + 3600) for length in (4, 60, 60)]
    heard = [recorder(each) for each in rows]
    other = row(everyone["wide"], prompt(random, 5), ends=False)
    generation.add([*rows, other])
    step(generation)
    step(generation)
    for each in rows:
        each.deadline = time.monotonic()
    run(generation)
    assert all(isinstance(each.events[-1], DeadlineError) for each in heard)
    assert [sum(isinstance(event, DeadlineError) for event in each.events) for each in heard] == [1, 1, 1]
    assert "after 3 tokens" in heard[0].events[-1].message  # type: ignore[union-attr]
    assert len(tokens_of(other)) == TOKENS


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
