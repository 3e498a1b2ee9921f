"""Choosing tokens: every setting against a plain computation of what it says."""

from collections import Counter
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from serving.base import Engine, Served
from serving.engine.sampling import Chooser, choose, make_chooser
from tests.unit.serving.conftest import Shelf
from tests.unit.serving.rows import TOKENS, generation_of, prompt, recorder, row, run

DRAWS = 6000


def logits() -> Tensor:
    return torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2


def chosen(scores: Tensor, choosers: list[Chooser]) -> list[int]:
    found = choose(scores, choosers)
    assert all(each is not None for each in found)
    return [each.token for each in found if each]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_k": 1},
        {"top_k": 100},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 1.7, "top_k": 8, "top_p": 0.9, "min_p": 0.1},
        {"temperature": 2.0, "top_p": 0.7, "min_p": 0.3},
    ],
    ids=str,
)
def test_draws_have_the_distribution_of_transformers_own_filters(settings: dict[str, Any]) -> None:
    warpers = [TemperatureLogitsWarper(float(settings.get("temperature", 1.0)))]
    warpers += [TopKLogitsWarper(settings["top_k"])] if "top_k" in settings else []
    warpers += [TopPLogitsWarper(settings["top_p"])] if "top_p" in settings else []
    warpers += [MinPLogitsWarper(settings["min_p"])] if "min_p" in settings else []
    wanted = LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.long), logits()).softmax(-1)[0]
    counts = Counter(chosen(logits().expand(DRAWS, -1), [make_chooser(seed=n, choice=0, **settings) for n in range(DRAWS)]))
    assert set(counts) <= set(wanted.nonzero()[:, 0].tolist())
    for token, share in enumerate(wanted.tolist()):
        assert counts[token] / DRAWS == pytest.approx(share, abs=0.03), token


def test_each_row_follows_its_own_settings() -> None:
    settings: list[dict[str, Any]] = [{"temperature": 0.0}, {}, {"top_k": 2}, {"min_p": 0.5}, {"top_p": 0.5}, {"logit_bias": {3: 100.0}}]
    alone = [chosen(logits(), [make_chooser(seed=1, choice=0, **each)])[0] for each in settings]
    assert chosen(logits().expand(len(settings), -1), [make_chooser(seed=1, choice=0, **each) for each in settings]) == alone


def test_numbers_that_overflow_choose_nothing_and_leave_the_other_rows_alone() -> None:
    bad = logits().clone()
    bad[0, 3] = float("nan")
    both = torch.cat([bad, logits()])
    found = choose(both, [make_chooser(seed=1, choice=0, logprobs=2) for _ in range(2)])
    assert found[0] is None
    assert found[1] == choose(logits(), [make_chooser(seed=1, choice=0, logprobs=2)])[0]


@pytest.mark.parametrize("settings", [{"logit_bias": {7: 100.0}}, {"logit_bias": {7: 100.0}, "temperature": 1.0, "top_k": 5}], ids=str)
def test_a_bias_decides(settings: dict[str, Any]) -> None:
    assert chosen(logits(), [make_chooser(seed=0, choice=0, **settings)]) == [7]
    best = int(logits().argmax())
    banned = [make_chooser(seed=n, choice=0, logit_bias={best: -100.0}) for n in range(200)]
    assert best not in chosen(logits().expand(200, -1), banned)


@pytest.mark.parametrize(
    "settings",
    [
        {"frequency_penalty": 0.8},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -0.5, "presence_penalty": 0.7, "logit_bias": {50: 2.0, 60: -4.0}},
    ],
    ids=str,
)
def test_penalties_and_biases_are_those_of_openais_formula(
    engine: Engine, everyone: dict[str, Served], chat_shelf: Shelf, settings: dict[str, Any]
) -> None:
    ids = prompt(Random(30), 9)
    answered, free = row(everyone["wide"], ids, ends=False, **settings), row(everyone["wide"], ids, ends=False)
    run(generation_of(engine), [answered, free, row(everyone["narrow"], ids, ends=False)])
    tokens: list[int] = []
    for _ in range(TOKENS):
        with torch.no_grad():
            scores = chat_shelf.peft["wide"](torch.tensor([[*ids, *tokens]])).logits[0, -1]
        for token, count in Counter(tokens).items():
            scores[token] -= count * settings.get("frequency_penalty", 0) + settings.get("presence_penalty", 0)
        for token, bias in settings.get("logit_bias", {}).items():
            scores[token] += bias
        tokens.append(int(scores.argmax()))
    assert answered.made == tokens
    assert answered.made != free.made, "the settings decide nothing here, so the test proves nothing"


@pytest.mark.parametrize("size", [4, 512])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "top_k": 9, "seed": 3, "frequency_penalty": 1.0}], ids=str)
def test_log_probabilities_are_those_of_the_plain_model(
    engine: Engine, everyone: dict[str, Served], chat_shelf: Shelf, settings: dict[str, Any], size: int
) -> None:
    ids = prompt(Random(31), 11)
    rows = {name: row(everyone[name], ids, ends=False, logprobs=5, **settings) for name in ("narrow", "wide", "mixed")}
    silent = row(everyone["patterned"], ids, ends=False, **settings)
    heard = {name: recorder(each) for name, each in rows.items()}
    quiet = recorder(silent)
    run(generation_of(engine, prefill_tokens=size), [*rows.values(), silent])
    assert quiet.scores == []
    for name, each in rows.items():
        with torch.no_grad():
            whole = chat_shelf.peft[name](torch.tensor([[*ids, *each.made]])).logits[0].log_softmax(-1)
        wanted = whole[len(ids) - 1 : -1]
        scores = heard[name].scores
        assert [score.logprob for score in scores] == pytest.approx(
            [float(wanted[n, token]) for n, token in enumerate(each.made)], abs=1e-3
        )
        for score, at in zip(scores, wanted, strict=True):
            values = at.topk(5).values.tolist()
            assert [other.logprob for other in score.likeliest] == pytest.approx(values, abs=1e-3)
        content = b"".join(bytes(score.token.bytes) for score in scores)
        assert content.decode(errors="replace").startswith(heard[name].text)
