"""A model over rows: the loss of each row, and what is answered where answers can be counted (classes, numbers, pairs)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from models.tasks import Batch, Inputs, Task
from models.tasks.causal import inputs_of, logits_at, split_head
from models.tasks.task import ProblemType
from training.batches import Rows
from training.evaluation.watch import Watch
from training.token_rows import TokenRows

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Kind = Literal["classes", "many", "number", "tokens", "pairs"]
"""What is answered: one class (of a row, or of each word), any number of classes, a number, tokens, or which of a pair is better."""
ROWS_AT_ONCE = 32
TOKENS_AT_ONCE = 4096
LOGITS_AT_ONCE = 1024
"""Tokens whose logits over the whole vocabulary are held at once."""


@dataclass(frozen=True)
class Predicted:
    """What a model makes of some rows; the arrays that a kind of answer does not have are empty."""

    kind: Kind
    loss: Floats
    """[rows], the mean over a row's targets."""
    n_targets: Ints
    right: Ints
    """[rows], how many targets were predicted right."""
    row_of: Ints
    """[decisions], the place of the row among these."""
    targets: npt.NDArray[Any]
    """[decisions] classes; [rows, classes] of 0 and 1; or [rows] numbers."""
    answers: npt.NDArray[Any]
    """As targets, what the model says."""
    probabilities: npt.NDArray[np.float32]
    """[decisions, classes]; or [rows, classes], each by itself."""
    likelihoods: Floats
    """[rows, 2], log-likelihoods of the chosen answer and of the rejected one."""

    def __len__(self) -> int:
        return len(self.loss)


def kind_of(task: Task, problem_type: ProblemType | None) -> Kind:
    """What a task answers with."""
    if task.name == "preference":
        return "pairs"
    if task.peft_task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return "tokens"
    kinds: dict[str | None, Kind] = {"multi_label_classification": "many", "regression": "number"}
    return kinds.get(problem_type, "classes")


@torch.no_grad()
def predict(model: Any, rows: TokenRows, chosen: Rows, *, task: Task, kind: Kind, inputs: Inputs, what: str, watch: Watch) -> Predicted:
    """A model over some rows.

    Args:
        model: In evaluation mode, on whatever device.
        rows: The rows there are.
        chosen: Which of them, by their places in `rows`.
        task: What the model does.
        kind: What it answers with.
        inputs: What turns rows into tensors.
        what: What to call this when telling how far it is.
        watch: Told how far it is.
    """
    device = next(model.parameters()).device
    made: list[tuple[Rows, Predicted]] = []
    done = 0
    for places in portions(rows.lengths[chosen], counts_tokens=task.unit == "tokens"):
        watch(what, done, len(chosen))
        batch = {name: tensor.to(device) for name, tensor in task.collate(rows.take(chosen[places]), inputs=inputs, packed=False).items()}
        made.append((places, _of_batch(model, batch, task, kind, len(places))))
        done += len(places)
    watch(what, done, len(chosen))
    return _joined(made)


def with_reference(model: Predicted, base: Predicted, *, beta: float) -> Predicted:
    """Pairs with DPO's loss against the base: -log sigmoid of the margin."""
    margins = beta * np.subtract(*(model.likelihoods - base.likelihoods).T)
    return replace(model, loss=np.logaddexp(0, -margins), right=(margins > 0).astype(np.int64), answers=margins)


def portions(lengths: Rows, *, counts_tokens: bool) -> Iterator[Rows]:
    """Places of rows that go through the model together: of like length, the longest first, so that what does not fit fails at once."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        fit = TOKENS_AT_ONCE // max(1, int(lengths[order[start]])) if counts_tokens else ROWS_AT_ONCE
        size = min(ROWS_AT_ONCE, max(1, fit))
        yield order[start : start + size]
        start += size


def _of_batch(model: Any, batch: Batch, task: Task, kind: Kind, n_rows: int) -> Predicted:
    if kind == "classes":
        return _classes(model, batch, task, n_rows)
    if kind in ("many", "number"):
        return _outputs(model, batch, task, kind)
    log_probs, right, row_of = _token_log_probs(model, batch, task)
    n_sequences = 2 * n_rows if kind == "pairs" else n_rows
    summed, n_right, counts = (
        torch.zeros(n_sequences, dtype=torch.float64, device=row_of.device).index_add(0, row_of, values.double())
        for values in (log_probs, right, torch.ones_like(log_probs))
    )
    if kind == "pairs":
        ones = np.ones(n_rows, dtype=np.int64)
        return _made(kind, loss=np.zeros(n_rows), n_targets=ones, right=ones, likelihoods=_floats(summed.view(-1, 2)))
    return _made(kind, loss=_floats(-summed / counts), n_targets=_ints(counts), right=_ints(n_right))


def _classes(model: Any, batch: Batch, task: Task, n_rows: int) -> Predicted:
    log_probs, row_of = task.log_probs(model, batch)
    targets = batch["labels"].flatten()
    targets = targets[targets >= 0]
    losses = -log_probs.gather(1, targets[:, None])[:, 0]
    answers = log_probs.argmax(-1)
    summed, right, counts = (
        torch.zeros(n_rows, dtype=torch.float64, device=row_of.device).index_add(0, row_of, values.double())
        for values in (losses, answers == targets, torch.ones_like(losses))
    )
    return _made(
        "classes",
        loss=_floats(summed / counts),
        n_targets=_ints(counts),
        right=_ints(right),
        row_of=_ints(row_of),
        targets=_ints(targets),
        answers=_ints(answers),
        probabilities=log_probs.exp().cpu().numpy(),
    )


def _outputs(model: Any, batch: Batch, task: Task, kind: Kind) -> Predicted:
    logits, wanted = task.outputs(model, batch).float(), batch["labels"]
    ones = np.ones(len(logits), dtype=np.int64)
    if kind == "number":
        errors = _floats(logits[:, 0] - wanted[:, 0])
        numbers = {"targets": _floats(wanted[:, 0]), "answers": _floats(logits[:, 0])}
        return _made(kind, loss=errors**2, n_targets=ones, right=0 * ones, **numbers)
    losses = binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(-1)
    answers = logits > 0
    is_right = (answers == (wanted > 0.5)).all(-1)
    return _made(
        kind,
        loss=_floats(losses),
        n_targets=ones,
        right=_ints(is_right),
        targets=_ints(wanted),
        answers=_ints(answers),
        probabilities=logits.sigmoid().cpu().numpy(),
    )


def _token_log_probs(model: Any, batch: Batch, task: Task) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each target token: its log-probability, whether it is the likeliest, and its row (or sequence, where a row has two)."""
    if "predicted_at" not in batch:
        log_probs, row_of = task.log_probs(model, batch)
        targets = batch["labels"][batch["labels"] >= 0]
        return log_probs.gather(1, targets[:, None])[:, 0], log_probs.argmax(-1) == targets, row_of
    parts, targets = split_head(model), batch["targets"]
    if parts is None:
        of_tokens, head = logits_at(model, batch, batch["predicted_at"]), torch.nn.Identity()
    else:
        hidden = parts.backbone(**inputs_of(batch), use_cache=False).last_hidden_state.flatten(0, 1)
        of_tokens, head = hidden[batch["predicted_at"]], parts.head
    chosen, right = [], []
    for some, wanted in zip(torch.split(of_tokens, LOGITS_AT_ONCE), torch.split(targets, LOGITS_AT_ONCE), strict=True):
        logits = head(some).float()
        chosen.append(logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0])
        right.append(logits.argmax(-1) == wanted)
    return torch.cat(chosen), torch.cat(right), batch["row_of_target"]


def _made(kind: Kind, *, loss: Floats, n_targets: Ints, right: Ints, **arrays: npt.NDArray[Any]) -> Predicted:
    empty: dict[str, npt.NDArray[Any]] = {
        "row_of": np.empty(0, dtype=np.int64),
        "targets": np.empty(0),
        "answers": np.empty(0),
        "probabilities": np.empty((0, 0), dtype=np.float32),
        "likelihoods": np.empty((0, 2)),
    }
    return Predicted(kind, loss, n_targets, right, **{**empty, **arrays})


def _joined(made: list[tuple[Rows, Predicted]]) -> Predicted:
    """Batches as one, the rows in the order in which they were asked for."""
    places = np.concatenate([rows for rows, _ in made])
    back = np.argsort(places)
    first = made[0][1]
    arrays = {name: np.concatenate([getattr(each, name) for _, each in made]) for name in ("loss", "n_targets", "right")}
    arrays = {name: values[back] for name, values in arrays.items()}
    of_decisions = ("targets", "answers", "probabilities")
    others = {name: np.concatenate([getattr(each, name) for _, each in made]) for name in (*of_decisions, "likelihoods")}
    if first.kind == "classes":
        row_of = np.concatenate([rows[each.row_of] for rows, each in made])
        order = np.argsort(row_of, kind="stable")
        return Predicted(
            first.kind, **arrays, row_of=row_of[order], likelihoods=others["likelihoods"], **{n: others[n][order] for n in of_decisions}
        )
    ordered = {name: values[back] if len(values) == len(back) else values for name, values in others.items()}
    return Predicted(first.kind, **arrays, row_of=first.row_of, **ordered)


def _floats(tensor: torch.Tensor) -> Floats:
    made: Floats = tensor.double().cpu().numpy()
    return made


def _ints(tensor: torch.Tensor) -> Ints:
    made: Ints = tensor.long().cpu().numpy()
    return made
