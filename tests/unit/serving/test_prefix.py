"""Beginnings that are kept: the same answers with and without them, never across adapters, and never more than was allowed."""

from random import Random

import pytest
import torch

from serving.base import Engine, Served
from serving.engine.cache import SlotCache
from serving.engine.prefix import BLOCK, PrefixCache
from tests.unit.serving.conftest import Shelf
from tests.unit.serving.rows import generation_of, prompt, reference, row, run, tokens_of


def test_a_prompt_that_begins_as_another_is_read_from_there(engine: Engine, everyone: dict[str, Served], chat_shelf: Shelf) -> None:
    generation = generation_of(engine, prefix_tokens=1000)
    beginning = prompt(Random(0), 3 * BLOCK + 5)
    for end in ([7, 8, 9], [10] * 20, []):
        ids = [*beginning, *end]
        before = generation.prefixes.hit_tokens
        answered = row(everyone["wide"], ids, ends=False)
        run(generation, [answered])
        assert generation.prefixes.hit_tokens - before == (0 if end == [7, 8, 9] else 3 * BLOCK)
        assert tokens_of(answered) == reference(chat_shelf, "wide", ids, end_ids=frozenset())


def test_the_same_prompt_is_answered_by_each_adapter_alone(engine: Engine, everyone: dict[str, Served], chat_shelf: Shelf) -> None:
    """Whatever was read before with another adapter: keys and values differ, and would give other answers."""
    ids = prompt(Random(1), 4 * BLOCK + 1)
    generation = generation_of(engine, prefix_tokens=10_000)
    wanted = {name: reference(chat_shelf, name, ids, end_ids=frozenset()) for name in everyone}
    assert len({tuple(tokens) for tokens in wanted.values()}) == len(everyone)
    for turn in range(2):
        before = generation.prefixes.hit_tokens
        for name, served in everyone.items():
            answered = row(served, ids, ends=False)
            run(generation, [answered])
            assert tokens_of(answered) == wanted[name], (turn, name)
        assert generation.prefixes.hit_tokens - before == turn * 4 * BLOCK * len(everyone)


def test_a_conversation_goes_on_from_its_last_answer(engine: Engine, everyone: dict[str, Served], chat_shelf: Shelf) -> None:
    generation = generation_of(engine, prefix_tokens=1000)
    ids = prompt(Random(2), BLOCK)
    answered = row(everyone["narrow"], ids, ends=False, max_tokens=2 * BLOCK + 1)
    run(generation, [answered])
    longer = [*ids, *answered.made, 5, 6]
    again = row(everyone["narrow"], longer, ends=False)
    run(generation, [again])
    assert generation.prefixes.hit_tokens == 3 * BLOCK
    assert tokens_of(again) == reference(chat_shelf, "narrow", longer, end_ids=frozenset())


def test_answers_to_one_prompt_read_it_once(engine: Engine, everyone: dict[str, Served], chat_shelf: Shelf) -> None:
    for size in (512, 16):
        generation = generation_of(engine, prefix_tokens=1000, prefill_tokens=size)
        ids = prompt(Random(3), 5 * BLOCK + 3)
        rows = [row(everyone["wide"], ids, ends=False) for _ in range(4)]
        run(generation, rows)
        assert generation.prefixes.hit_tokens == 3 * 5 * BLOCK
        wanted = reference(chat_shelf, "wide", ids, end_ids=frozenset())
        assert all(tokens_of(each) == wanted for each in rows)


def test_without_a_digest_nothing_is_kept(engine: Engine, everyone: dict[str, Served]) -> None:
    generation = generation_of(engine, prefix_tokens=1000)
    weights = everyone["wide"].weights
    assert weights is not None
    rows = [row(everyone["wide"], prompt(Random(4), 40), ends=False) for _ in range(2)]
    for each in rows:
        each.adapter = type(weights)(weights.layers)
    run(generation, rows)
    assert (len(generation.prefixes), generation.prefixes.hit_tokens) == (0, 0)


def test_running_out_of_memory_drops_what_is_kept_and_not_the_answer(
    engine: Engine, everyone: dict[str, Served], chat_shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = generation_of(engine, prefix_tokens=1000)
    ids = prompt(Random(5), 40)

    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr("serving.engine.cache.BlockStore.save", exhausted)
        run(generation, [row(everyone["wide"], ids, ends=False)])
        assert len(generation.prefixes) == 0
    for _ in range(2):
        answered = row(everyone["wide"], ids, ends=False)
        run(generation, [answered])
        assert tokens_of(answered) == reference(chat_shelf, "wide", ids, end_ids=frozenset())
    assert generation.prefixes.hit_tokens == 2 * BLOCK


@pytest.mark.parametrize("blocks", [1, 2, 5, 40])
def test_memory_is_bounded_and_what_is_found_is_what_was_kept(blocks: int) -> None:
    """Against a plain record of every slot's contents: each position's key is a number of (digest, all tokens up to there)."""
    cache = SlotCache(slots=2, max_context=128)
    keys = torch.zeros(2, 1, 128, 1)
    cache.reach(128)
    cache.aim(first=0, positions=torch.arange(128).expand(2, -1), width=128)
    cache.update(keys, keys, 0)
    layer = cache.layers[0]
    prefixes = PrefixCache(cache, max_tokens=blocks * BLOCK + 3)
    random = Random(blocks)
    beginnings = [[random.randrange(3) for _ in range(BLOCK)] for _ in range(4)]
    numbers: dict[tuple[str, tuple[int, ...]], float] = {}
    hits = 0
    for _ in range(400):
        key = random.choice(["", "a", "b"])
        tokens = [token for _ in range(random.randrange(1, 6)) for token in random.choice(beginnings)] + [9] * random.randrange(BLOCK)
        wanted = [numbers.setdefault((key, tuple(tokens[: n + 1])), float(len(numbers) + 1)) for n in range(len(tokens))]
        known = prefixes.known(key, tokens)
        assert prefixes.load(key, tokens, slot=1) == known < len(tokens)
        hits += known > 0
        assert layer.keys[1, 0, :known, 0].tolist() == wanted[:known]
        assert layer.values[1, 0, :known, 0].tolist() == [-number for number in wanted[:known]]
        layer.keys[0, 0, : len(tokens), 0] = torch.tensor(wanted)
        layer.values[0, 0, : len(tokens), 0] = -torch.tensor(wanted)
        prefixes.save(key, tokens, slot=0)
        assert len(prefixes) <= blocks
        assert prefixes.known(key, [*tokens, 1]) == min(len(tokens) // BLOCK, blocks) * BLOCK
    assert hits > 20
