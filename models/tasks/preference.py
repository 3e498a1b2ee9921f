"""`preference`: direct preference optimisation (https://arxiv.org/abs/2305.18290). The reference is the base, with the adapter off."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from hone.chat import encode_chats
from hone.data.formats import Row
from hone.errors import DataError
from models.tasks import causal
from models.tasks.causal import CausalTask
from models.tasks.task import IGNORED, PLAIN, Batch, Encoded, Inputs, LossOptions, Sums, TokenRow


class Preference(CausalTask):
    """The chosen answer is to become likelier than the rejected one, as against the base; averaged over the pairs."""

    name: ClassVar[str] = "preference"
    shape: ClassVar[str] = "preference"

    def encode(self, rows: Sequence[Row], processor: Any, *, max_length: int) -> list[list[Encoded] | DataError]:
        sides = [encode_chats(processor, [_conversation(row, side) for row in rows]) for side in ("chosen", "rejected")]
        return [_encoded(chosen, rejected, max_length) for chosen, rejected in zip(*sides, strict=True)]

    def nothing(self, inputs: Inputs) -> TokenRow:
        return {"input_ids": [inputs.pad_token_id] * 4, "labels": [IGNORED] * 4, "parts": [2, 2]}

    def collate(self, rows: Sequence[TokenRow], *, inputs: Inputs, packed: bool) -> Batch:
        """A pair is two sequences, the chosen one first; `counts` [pairs] says which pairs are there at all."""
        sequences = [part for row in rows for part in _parted(row)]
        batch = causal.collate(sequences, pad_token_id=inputs.pad_token_id, packed=packed)
        counts = torch.tensor([bool((np.asarray(row["labels"]) != IGNORED).any()) for row in rows])
        return {**batch, "counts": counts}

    def loss(self, model: Any, batch: Batch, options: LossOptions = PLAIN) -> tuple[torch.Tensor, Sums]:
        """Summed -log sigmoid(margin) over the pairs; how many margins are above 0, and their sum."""
        with torch.no_grad(), options.base():
            base = _log_likelihoods(model, batch)
        rewards = options.beta * (_log_likelihoods(model, batch) - base)
        margins, counts = rewards[0::2] - rewards[1::2], batch["counts"]
        smoothed = (1 - options.label_smoothing) * logsigmoid(margins) + options.label_smoothing * logsigmoid(-margins)
        held = (margins.detach() * counts).sum()
        return -(smoothed * counts).sum(), {"reward_accuracy": ((margins > 0) & counts).sum(), "reward_margin": held}

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        return causal.logits_at(model, batch, batch["last"][0::2])


def _log_likelihoods(model: Any, batch: Batch) -> torch.Tensor:
    """Of the answer of each sequence, summed over its tokens: [sequences]."""
    logits = causal.logits_at(model, batch, batch["predicted_at"]).float()
    of_tokens = logits.log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]
    return of_tokens.new_zeros(len(batch["last"])).index_add(0, batch["row_of_target"], of_tokens)


def _conversation(row: Row, side: str) -> Row:
    """What is learnt from is the answer alone, whatever the prompt's own assistant turns are."""
    return {"messages": [*({**message, "weight": 0} for message in row["prompt"]), *row[side]]}


def _encoded(chosen: Any, rejected: Any, max_length: int) -> list[Encoded] | DataError:
    for side, chat in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(chat, DataError):
            return DataError(f"{side}: {chat.message}")
    if np.array_equal(chosen.input_ids, rejected.input_ids):
        return DataError("chosen and rejected are the same tokens, so there is nothing to prefer")
    ids, targets = [], []
    for chat in (chosen, rejected):
        ids.append(chat.input_ids[:max_length])
        is_target = chat.is_target[:max_length].copy()
        is_target[:1] = False
        targets.append(is_target)
    both, length = np.concatenate(ids), max(len(chosen.input_ids), len(rejected.input_ids))
    labels = np.where(np.concatenate(targets), both, IGNORED).astype(np.int32)
    parts = tuple(map(len, ids))
    # Where max_length leaves nothing of an answer there is no pair to learn from.
    has_both = all(is_target.any() for is_target in targets)
    return [Encoded(both, labels, int(has_both), length=length, cost=len(both), is_cut=length > max_length, parts=parts)]


def _parted(row: TokenRow) -> list[TokenRow]:
    first = int(row["parts"][0])
    return [{name: row[name][part] for name in ("input_ids", "labels")} for part in (slice(first), slice(first, None))]
