"""What the model still knows: loss on the rows of `data.retain` that were held out, and how far its predictions are from the base's.

The base's predictions are recorded before the first step, as the likeliest outcomes of each target with the rest as one, so that every
method can be compared with a base that may be there no longer. Merging outcomes never makes a KL divergence larger, so what is told is a
lower bound, and exact where there are no more outcomes than are kept.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hone.errors import RunFailedError
from training.forward import Batcher, sum_over_workers
from training.token_rows import TokenRows
from training.worker import Worker

KEPT_OUTCOMES = 256


@dataclass(frozen=True)
class _Predictions:
    """Of the base, for the targets of one batch."""

    outcomes: torch.Tensor
    """[targets, kept] int64, the likeliest ones."""
    log_probs: torch.Tensor
    """[targets, kept + 1] float32, those and the rest."""


class Retention:
    """Measures forgetting. Every rank takes part in all of it."""

    def __init__(
        self, engine: Any, rows: TokenRows, batcher: Batcher, worker: Worker, *, has_probabilities: bool, keeps_base: bool
    ) -> None:
        """Record the base, as which `engine` still answers, or does with its adapter off."""
        self._engine, self._rows, self._batcher, self._worker = engine, rows, batcher, worker
        self._portions = batcher.portions(np.arange(len(rows)), rows.lengths)
        self._wants = ("base_log_probs" if keeps_base else "log_probs") if has_probabilities else ""
        self._base_loss = 0.0
        self._base: list[_Predictions] = []
        if has_probabilities:
            self._base_loss, self._base = self._record()

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """`retain_loss`, `retain_loss_increase` above the base's, and `retain_kl` from the base, means over the targets."""
        self._engine.eval()
        totals = torch.zeros(2, dtype=torch.float64)
        for n, portion in enumerate(self._portions):
            batch = self._batcher.batch(self._rows.take(portion))
            totals[0] += self._engine(batch)[0].double().cpu()
            if self._base:
                now, _ = self._engine(batch, wants="log_probs")
                totals[1] += _divergence(self._base[n], now)
        loss, divergence = (sum_over_workers(totals, device=self._engine.device, worker=self._worker) / self._n_targets).tolist()
        if not self._base:
            return {"retain_loss": loss}
        return {"retain_loss": loss, "retain_loss_increase": loss - self._base_loss, "retain_kl": divergence}

    @property
    def _n_targets(self) -> int:
        return int(self._rows.n_targets.sum())

    @torch.no_grad()
    def _record(self) -> tuple[float, list[_Predictions]]:
        """The base's loss (the mean over targets of what it gives them), and its predictions."""
        self._engine.eval()
        made, loss = [], torch.zeros(1, dtype=torch.float64)
        for portion in self._portions:
            batch = self._batcher.batch(self._rows.take(portion))
            log_probs, _ = self._engine(batch, wants=self._wants)
            made.append(_likeliest(log_probs))
            loss += _likelihood_loss(log_probs, batch)
        total = sum_over_workers(loss, device=self._engine.device, worker=self._worker)
        return float(total) / self._n_targets, made


def refuse_broken_budget(measured: dict[str, float], budget: float | None) -> None:
    """Say so where the budget is spent before the first step.

    Raises:
        RunFailedError: it is.
    """
    increase = measured.get("retain_loss_increase", 0.0)
    if budget is not None and increase > budget:
        raise RunFailedError(
            f"guard.max_retain_loss_increase {budget:g} is exceeded before the first step: the loss on data.retain is {increase:.3f} above "
            "the base's with what the method begins from; raise it, or use a method that begins as the base (lora, ia3, adapter)"
        )


def _likelihood_loss(log_probs: torch.Tensor, batch: dict[str, torch.Tensor]) -> float:
    targets = batch["targets"] if "targets" in batch else batch["labels"].flatten()
    if targets.dtype != torch.int64:  # any number of classes: [rows, classes] of 0 and 1, two outcomes each
        targets = targets[~targets.isnan()]
        return -float(torch.where(targets > 0.5, log_probs[:, 0], log_probs[:, 1]).sum()) / batch["labels"].shape[1]
    targets = targets[targets >= 0]
    return -float(log_probs[: len(targets)].gather(1, targets[:, None]).sum())


def _likeliest(log_probs: torch.Tensor) -> _Predictions:
    kept = min(KEPT_OUTCOMES, log_probs.shape[1])
    best, outcomes = log_probs.topk(kept, -1)
    return _Predictions(outcomes.cpu(), _with_rest(best).cpu())


def _divergence(base: _Predictions, now: torch.Tensor) -> float:
    q = _with_rest(now.gather(1, base.outcomes.to(now.device)))
    p = base.log_probs.to(now.device)
    return float((p.exp() * (p - q)).sum())


def _with_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """Beside the outcomes, all others as one; never quite 0, so that logarithms stay finite."""
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp_min(1e-9).log()
    return torch.cat([log_probs, rest], -1)
