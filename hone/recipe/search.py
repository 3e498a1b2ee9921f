"""What `hone tune` tries."""

from typing import Annotated, Any, Literal

from pydantic import Field

from hone.recipe.settings import Settings


class LogUniform(Settings):
    """Between lower and upper, evenly in the exponent."""

    type: Literal["loguniform"]
    lower: float = Field(gt=0)
    upper: float


class Uniform(Settings):
    """Between lower and upper."""

    type: Literal["uniform"]
    lower: float
    upper: float


class RandInt(Settings):
    """A whole number from lower up to but not upper."""

    type: Literal["randint"]
    lower: int
    upper: int


class Choice(Settings):
    """One of the categories at random."""

    type: Literal["choice"]
    categories: list[Any] = Field(min_length=1)


class GridSearch(Settings):
    """Every value in turn; num_samples counts whole grids."""

    type: Literal["grid_search"]
    values: list[Any] = Field(min_length=1)


Distribution = Annotated[LogUniform | Uniform | RandInt | Choice | GridSearch, Field(discriminator="type")]


class AshaScheduler(Settings):
    """Asynchronous successive halving (https://arxiv.org/abs/1810.05934), counted in validations."""

    type: Literal["asha"] = "asha"
    grace_period: int = Field(default=1, ge=1)
    """Validations every trial is given."""
    reduction_factor: float = Field(default=3, gt=1)
    """At each rung, one trial in this many goes on."""


class SearchSettings(Settings):
    """What `hone tune` tries."""

    space: dict[str, Distribution] = Field(min_length=1)
    """Recipe key in dotted form -> where its value is drawn from, as Ray Tune names it."""
    num_samples: int = Field(default=8, ge=1)
    metric: str = "eval_loss"
    mode: Literal["min", "max"] = "min"
    max_concurrent_trials: int | None = Field(default=None, ge=1)
    """By default as many as the cluster holds."""
    scheduler: AshaScheduler = AshaScheduler()
