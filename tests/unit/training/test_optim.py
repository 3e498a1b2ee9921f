"""Learning rates agree with the schedules of the same names in transformers."""

import pytest
import torch
from transformers import get_scheduler

from hone.recipe import OptimSettings
from training.optim import learning_rate


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_the_learning_rate_is_that_of_transformers_schedule(name: str) -> None:
    settings = OptimSettings(learning_rate=3e-3, lr_scheduler_type=name, warmup_ratio=0.1)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    theirs = get_scheduler(name if name != "constant" else "constant_with_warmup", optimizer, num_warmup_steps=4, num_training_steps=37)
    for step in range(37):
        assert learning_rate(step, 37, settings) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()
