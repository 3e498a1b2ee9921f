"""What a model writes by itself, greedily, and what it should have written.

| task | is given | is to write |
| --- | --- | --- |
| chat | the conversation up to the last turn that counts | that turn |
| completion | the first half of a text | what follows, up to so many tokens |
| seq2seq | the source | the target |
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from hone.chat import end_of_turn_ids
from models.tasks.causal import learns_prompt
from models.tasks.task import IGNORED, TokenRow
from training.batches import Rows
from training.evaluation.predict import portions
from training.evaluation.watch import Watch
from training.token_rows import TokenRows

CONTINUED_TOKENS = 32
"""How much of a text is to be written on."""
SPARE = 1.5
"""Tokens that may be written, as a multiple of what is wanted: an answer that goes on has gone wrong already."""


@dataclass(frozen=True)
class Asked:
    """One row as a question, in tokens."""

    prompt: list[int]
    wanted: list[int]


@dataclass(frozen=True)
class Written:
    """What was wanted and what came."""

    prompt: str
    wanted: str
    answer: str


def question_of(task: str, row: TokenRow) -> Asked:
    """What of a row the model is given, and what it is to write."""
    ids, labels = np.asarray(row["input_ids"]), np.asarray(row["labels"])
    if task == "seq2seq":
        return Asked(ids.tolist(), labels.tolist())
    if task == "completion":
        half = max(1, len(ids) // 2)
        return Asked(ids[:half].tolist(), ids[half : half + CONTINUED_TOKENS].tolist())
    places = np.flatnonzero(labels != IGNORED)
    breaks = np.flatnonzero(np.diff(places) > 1)
    start = int(places[breaks[-1] + 1] if len(breaks) else places[0])
    return Asked(ids[:start].tolist(), ids[start : int(places[-1]) + 1].tolist())


@torch.no_grad()
def write(
    model: Any, rows: TokenRows, chosen: Rows, *, task: str, tokenizer: Any, most_tokens: int, what: str, watch: Watch
) -> list[Written]:
    """What the model writes for some rows, each wanted answer and its own cut to `most_tokens`.

    Args:
        model: In evaluation mode, on whatever device.
        rows: The rows there are.
        chosen: Which of them, by their places in `rows`.
        task: chat, completion or seq2seq.
        tokenizer: The base's.
        most_tokens: Tokens of one answer at most.
        what: What to call this when telling how far it is.
        watch: Told how far it is.
    """
    ends = {tokenizer.eos_token_id} - {None} if task == "seq2seq" else end_of_turn_ids(tokenizer)
    asked = [question_of(task, row) for row in rows.take(chosen)]
    asked = [Asked(each.prompt, each.wanted[:most_tokens]) for each in asked]
    written: list[Written | None] = [None] * len(asked)
    done = 0
    for places in _groups(asked, alike=learns_prompt(model)):
        watch(what, done, len(asked))
        group = [asked[n] for n in places]
        for n, answer in zip(places, _answers(model, group, task, tokenizer, ends, most_tokens), strict=True):
            written[n] = _decoded(asked[n], answer, tokenizer, ends)
        done += len(places)
    watch(what, done, len(asked))
    return [each for each in written if each is not None]


def _groups(asked: Sequence[Asked], *, alike: bool) -> Iterator[Rows]:
    """Places of questions that are answered together; of one length if `alike`, so that nothing is padded."""
    lengths = np.array([len(each.prompt) + len(each.wanted) for each in asked])
    prompts = np.array([len(each.prompt) if alike else 0 for each in asked])
    for length in np.unique(prompts):
        there = np.flatnonzero(prompts == length)
        yield from (there[places] for places in portions(lengths[there], counts_tokens=True))


def _answers(model: Any, asked: Sequence[Asked], task: str, tokenizer: Any, ends: set[int], most_tokens: int) -> list[list[int]]:
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id or 0
    prompts = [torch.tensor(each.prompt) for each in asked]
    # Padded on the left, so that what is written follows the prompt; an encoder does not mind.
    ids = pad_sequence([prompt.flip(0) for prompt in prompts], batch_first=True, padding_value=pad).flip(1)
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True).flip(1)
    longest = max(len(each.wanted) for each in asked)
    with warnings.catch_warnings():
        # Of learnt vectors before the words, which have the first places: rows are not padded then, so positions are plain.
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        made = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=min(most_tokens, int(SPARE * longest) + 1),
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
        )
    start = 1 if task == "seq2seq" else ids.shape[1]
    return [row[start:].tolist() for row in made.cpu()]


def _decoded(asked: Asked, answer: list[int], tokenizer: Any, ends: set[int]) -> Written:
    prompt, wanted, said = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (asked.prompt, asked.wanted, answer))
    # Where the wanted answer was cut, or is the beginning of a longer text, the answer counts up to the same place.
    if not ends & set(asked.wanted[-1:]):
        said = tokenizer.decode(answer[: len(asked.wanted)], skip_special_tokens=True).strip()
    return Written(prompt, wanted, said)
