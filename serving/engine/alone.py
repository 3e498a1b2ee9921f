"""Answers of models that share no batch with others: a copy of the base with an adapter that cannot be mixed, an encoder-decoder, or a
decoder whose rows cannot share one.

Each answer is a batch of its own, and all of them take turns of one token, among themselves and with whatever else the thread does.
Tokens are chosen and become text as in continuous batching, so a seed or a stop string acts the same.
"""

import inspect
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from hone.errors import BaseModelError
from models.tasks.causal import learns_prompt
from serving.engine.capability import PROBE_TOKENS, tolerance
from serving.engine.fairness import FairQueue, Tenant
from serving.engine.generation import FAILURES_AT_MOST
from serving.engine.measures import Measures
from serving.engine.row import Row, failure, is_out
from serving.engine.sampling import Chosen, choose
from serving.errors import EngineError

AT_ONCE = 4
"""Answers in the making. They share no forward pass, so more would finish no sooner and hold more keys and values."""

Steps = Generator[Tensor, int, None]
"""Gives the logits of the next token [1, vocabulary] float32, and is sent the token that was chosen."""


def steps(model: Any, prompt: Sequence[int], *, device: torch.device) -> Steps:
    """The forward passes of one answer. The first goes through the whole model, where PEFT adds what it learnt before the words (or to
    the cache); what follows goes to the base's own class, since the cache holds that by then."""
    inner = model.get_base_model() if learns_prompt(model) else model
    ids = torch.tensor([list(prompt)], device=device)
    if inner.config.is_encoder_decoder:
        start = torch.tensor([[inner.config.decoder_start_token_id]], device=device)
        out = model(input_ids=ids, decoder_input_ids=start, use_cache=True)
        name, others = "decoder_input_ids", {"encoder_outputs": BaseModelOutput(out.encoder_last_hidden_state)}
    else:
        keeps = "logits_to_keep" in inspect.signature(inner.forward).parameters
        out = model(input_ids=ids, use_cache=True, **({"logits_to_keep": 1} if keeps else {}))
        name, others = "input_ids", {}
    while True:
        token = yield out.logits[:, -1].float()
        inputs = {name: torch.tensor([[token]], device=device)}
        out = inner(**inputs, **others, past_key_values=out.past_key_values, use_cache=True)


@torch.inference_mode()
def check_steps(model: Any, device: torch.device) -> None:
    """Compare answering token by token with the model's own forward pass over all tokens.

    Raises:
        BaseModelError: they differ, or it cannot be asked so.
    """
    name, vocabulary = type(model).__name__, model.config.get_text_config().vocab_size
    answers = torch.randint(vocabulary, (2, PROBE_TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    try:
        stepping = [steps(model, tokens[:-2], device=device) for tokens in answers]
        got = [[next(each) for each in stepping]]
        for n in (-2, -1):  # in turns, as a model that kept something in itself would mix them up
            got.append([each.send(tokens[n]) for each, tokens in zip(stepping, answers, strict=True)])
    except Exception as error:
        raise BaseModelError(f"{name} cannot be asked token by token here ({error}), so it is not served") from error
    wanted = [model(input_ids=torch.tensor([tokens], device=device)).logits[0, -3:].float() for tokens in answers]
    expected = torch.cat(wanted)
    difference = float((torch.cat([torch.cat(each) for each in zip(*got, strict=True)]) - expected).norm() / expected.norm())
    if not difference <= tolerance(model.dtype):
        raise BaseModelError(f"{name} gives other numbers token by token than at once (relative difference {difference:.2g}): not served")


@dataclass(eq=False)
class _Answer:
    row: Row
    steps: Steps
    first: int | None
    """What every answer of the model begins with (the language that it is to write), where its folder says so."""

    @property
    def tenant(self) -> Tenant:
        return self.row.tenant

    def logits(self) -> Tensor:
        return self.steps.send(self.row.made[-1]) if self.row.made else next(self.steps)


class Alone:
    """The answers in the making, and those that wait. All of it on the model's thread."""

    def __init__(self, device: torch.device, measures: Measures | None = None) -> None:
        self._measures = Measures() if measures is None else measures
        self.completed = 0
        self._device = device
        self._answers: list[_Answer] = []
        self._waiting: FairQueue[_Answer] = FairQueue()
        self._failures = 0

    @property
    def running(self) -> int:
        return len(self._answers)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def add(self, model: Any, rows: Sequence[Row]) -> None:
        """Queue rows that `model` answers."""
        first = getattr(getattr(model, "generation_config", None), "forced_bos_token_id", None)
        self._waiting.extend(_Answer(row, steps(model, row.prompt, device=self._device), first) for row in rows)

    def step(self) -> bool:
        now = time.monotonic()
        self._waiting.remove(lambda answer: is_out(answer.row, now))
        for answer in [answer for answer in self._answers if is_out(answer.row, now)]:
            self._leave(answer)
        while self._waiting and len(self._answers) < AT_ONCE:
            self._answers.append(self._waiting.pop())
            self._answers[-1].row.begin(self._measures)
            self._waiting.charge(self._answers[-1].tenant, len(self._answers[-1].row.prompt))
        for answer in list(self._answers):
            if not self._advance(answer):
                self._leave(answer)
        return bool(self._answers or self._waiting)

    def abandon(self, error: EngineError) -> None:
        for answer in [*self._answers, *self._waiting]:
            answer.row.emit(error)
        self._answers.clear()
        self._waiting = FairQueue()

    def _leave(self, answer: _Answer) -> None:
        self._answers.remove(answer)
        self._waiting.done(answer)

    def _advance(self, answer: _Answer) -> bool:
        """Give an answer its next token; False where that was the last."""
        row = answer.row
        try:
            [token] = choose(answer.logits(), [row.chooser])
        except Exception as cause:
            self._failures += 1
            row.emit(EngineError(f"the model failed on this request ({type(cause).__name__}: {cause})"))
            if self._failures >= FAILURES_AT_MOST:
                self._leave(answer)
                raise
            return False
        self._failures = 0
        if token is None:
            row.emit(failure(row))
            return False
        self._waiting.charge(row.tenant, 1)
        row.timed(self._measures, time.monotonic())
        ended = row.take(Chosen(answer.first) if answer.first is not None and not row.made else token)
        self.completed += ended
        return not ended
