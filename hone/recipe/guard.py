"""What is watched while a model learns, and what is done about it."""

from typing import Literal

from pydantic import Field

from hone.recipe.settings import Settings


class GuardSettings(Settings):
    """Guards against overfitting (validation rows) and against forgetting (`data.retain`)."""

    metric: str = "eval_loss"
    """What says which checkpoint is best: eval_loss, or another metric of the task with eval_ before it."""
    mode: Literal["min", "max"] = "min"
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after so many validations in a row in which the metric is not better; by default never."""
    early_stopping_min_delta: float = Field(default=0.0, ge=0)
    """By how much the metric has to be better to count."""
    publish: Literal["best", "last"] = "best"
    """Which weights are published: those of the best validation, or of the last step. Without validation rows, the last."""
    max_retain_loss_increase: float | None = Field(default=None, ge=0)
    """How much the loss on `data.retain` may rise above the base's (nats a target). Weights past it are never published."""
    over_budget: Literal["stop", "go_on"] = "stop"
    """Once the retained loss is past it: stop training, or go on and publish the best weights within it."""
    kl_penalty: float = Field(default=0.0, ge=0)
    """Weight of a penalty on moving away from the base, the KL divergence from its predictions: on the rows of `data.retain` that are
    mixed in, or on all rows where there is no `retain`."""


class HealthSettings(Settings):
    """What is noticed while workers run."""

    stall_s: float = Field(default=45, gt=0)
    """After so long without progress of any rank, the rank to blame is named, with every rank's stack."""
    end_stalled_after_s: float = Field(default=300, ge=0)
    """After so much longer the workers are started again from the last checkpoint."""
    spike_spread: float = Field(default=8, ge=0)
    """A loss so many times the usual distance above the median of the last 50 steps is told, with its rows; 0 for never."""
