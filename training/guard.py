"""Which validation was the best so far, whether it is worth going on, and whether the budget of forgetting is spent."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from hone.errors import RecipeError, RunFailedError
from hone.recipe import Recipe
from training.job import PreparedData


@dataclass
class Guard:
    """Decides by what all ranks measured alike, so that all decide alike. Its fields go into checkpoints."""

    best: float | None = None
    """The best value of `guard.metric` within the budget."""
    best_step: int = 0
    since_best: int = 0
    """Validations since the last one that was better by `early_stopping_min_delta`."""
    reason: str = ""
    """Why training stopped before its last step."""

    def look(self, step: int, measured: dict[str, float], recipe: Recipe) -> bool:
        """Take in a validation; whether its weights are the best so far."""
        guard = recipe.guard
        if not self._is_within_budget(measured, recipe):
            return False
        is_best = self._compare(step, measured, recipe)
        if guard.publish == "last" or guard.metric not in measured:  # then the last weights within the budget
            self.best_step = step
            return guard.max_retain_loss_increase is not None
        return is_best

    def _is_within_budget(self, measured: dict[str, float], recipe: Recipe) -> bool:
        guard, increase = recipe.guard, measured.get("retain_loss_increase", 0.0)
        if guard.max_retain_loss_increase is None or increase <= guard.max_retain_loss_increase:
            return True
        if guard.over_budget == "stop":
            self.reason = f"the loss on data.retain is {increase:.3f} above the base's, past guard.max_retain_loss_increase"
        return False

    def _compare(self, step: int, measured: dict[str, float], recipe: Recipe) -> bool:
        """Whether this validation is the best; and whether there have been too many that were not."""
        guard, value = recipe.guard, measured.get(recipe.guard.metric, math.nan)
        if guard.metric not in measured:
            return False
        gain = math.inf if self.best is None else self.best - value if guard.mode == "min" else value - self.best
        if not math.isfinite(value):
            gain = -math.inf  # no number is no best
        self.since_best = 0 if gain > guard.early_stopping_min_delta else self.since_best + 1
        if gain > 0:
            self.best, self.best_step = value, step
        if guard.early_stopping_patience and self.since_best >= guard.early_stopping_patience:
            self.reason = f"{guard.metric} has not been better for {self.since_best} validations"
        return gain > 0

    def state(self) -> dict[str, Any]:
        return asdict(self)


def picks_best(recipe: Recipe, *, has_validation: bool) -> bool:
    """Whether what is published are the weights of a validation, and not simply the last."""
    return (recipe.guard.publish == "best" and has_validation) or recipe.guard.max_retain_loss_increase is not None


def check_guard(recipe: Recipe, data: PreparedData) -> None:
    """Refuse what the rows show to be impossible.

    Raises:
        RecipeError: a metric that rows with such answers do not have, or a comparison of probabilities where there are none.
    """
    guard, is_number = recipe.guard, data.problem_type == "regression"
    if data.problem_type and guard.metric == ("eval_accuracy" if is_number else "eval_mean_absolute_error"):
        raise RecipeError(f"guard.metric {guard.metric} is not measured where rows have {'numbers' if is_number else 'classes'}")
    if is_number and (guard.kl_penalty or guard.max_retain_loss_increase is not None):
        key = "kl_penalty" if guard.kl_penalty else "max_retain_loss_increase"
        raise RecipeError(f"guard.{key} compares the base's probabilities, and rows with numbers have none; leave it out")


def refuse_without_best(guard: Guard, recipe: Recipe) -> None:
    """Raise RunFailedError where no validation can be published from."""
    if not guard.best_step and recipe.guard.max_retain_loss_increase is None:
        raise RunFailedError(
            f"{recipe.guard.metric} was a finite number at no validation, so nothing is published; lower optim.learning_rate"
        )
    if not guard.best_step:
        raise RunFailedError(
            f"at no validation was the loss on data.retain within guard.max_retain_loss_increase {recipe.guard.max_retain_loss_increase:g} "
            "of the base's, so nothing is published; lower optim.learning_rate, raise data.retain_fraction or guard.kl_penalty, or "
            "validate more often (train.eval_steps)"
        )
