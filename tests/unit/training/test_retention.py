"""What is said of forgetting agrees with the definition, for as many outcomes as there are."""

from typing import Any

import numpy as np
import pytest
import torch

from hone.errors import RunFailedError
from training import retention
from training.retention import Retention, refuse_broken_budget

TARGETS, VOCABULARY = 6, 50


class Rows:
    """Three rows of two targets each."""

    lengths = np.array([2, 2, 2])
    n_targets = np.array([2, 2, 2])

    def __len__(self) -> int:
        return 3

    def take(self, rows: Any) -> list[Any]:
        return list(rows)


class Batcher:
    def portions(self, rows: Any, lengths: Any) -> list[Any]:  # noqa: ARG002
        return [rows[:2], rows[2:]]

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        at = torch.tensor([2 * row + n for row in rows for n in range(2)])
        return {"at": at, "targets": at % VOCABULARY}


class Engine:
    """Answers with the logits that it is given."""

    device = torch.device("cpu")

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def eval(self) -> None: ...

    def __call__(self, batch: dict[str, torch.Tensor], wants: str = "loss") -> Any:
        log_probs = self.logits[batch["at"]].log_softmax(-1)
        if wants != "loss":
            return log_probs, batch["at"] // 2
        return -log_probs.gather(1, batch["targets"][:, None]).sum(), {}, torch.zeros(())


class Worker:
    rank, world_size, local_rank = 0, 1, 0


def measured(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    engine = Engine(before)
    made = Retention(engine, Rows(), Batcher(), Worker(), has_probabilities=True, keeps_base=False)  # type: ignore[arg-type]
    engine.logits = after
    return made.measure()


def logits(seed: int) -> torch.Tensor:
    return torch.randn(TARGETS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def test_nothing_is_forgotten_by_the_base_itself() -> None:
    found = measured(logits(0), logits(0))
    assert found["retain_loss_increase"] == pytest.approx(0, abs=1e-6)
    assert found["retain_kl"] == pytest.approx(0, abs=1e-6)


def test_loss_and_divergence_are_those_of_the_whole_distributions() -> None:
    before, after = logits(0), logits(1)
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    targets = torch.arange(TARGETS)
    found = measured(before, after)
    assert found["retain_loss"] == pytest.approx(float(-q[targets, targets].mean()), rel=1e-5)
    assert found["retain_loss_increase"] == pytest.approx(float((p - q)[targets, targets].mean()), rel=1e-4)
    assert found["retain_kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_with_fewer_outcomes_the_divergence_is_a_lower_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(logits(0), logits(1))["retain_kl"]
    bounds = []
    for kept in (1, 5, 20):
        monkeypatch.setattr(retention, "KEPT_OUTCOMES", kept)
        bounds.append(measured(logits(0), logits(1))["retain_kl"])
    assert 0 < bounds[0] < bounds[1] < bounds[2] < whole


def test_a_budget_that_is_broken_before_the_first_step_is_said() -> None:
    refuse_broken_budget({"retain_loss_increase": 0.1}, 0.2)
    refuse_broken_budget({"retain_loss_increase": 0.1}, None)
    with pytest.raises(RunFailedError, match=r"exceeded before the first step: the loss on data\.retain is 0\.300 above"):
        refuse_broken_budget({"retain_loss_increase": 0.3}, 0.2)
