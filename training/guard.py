"""Which validation was the best so far, whether it is worth going on, and whether the budget of forgetting is spent."""

from dataclasses import asdict, dataclass
from typing import Any

from hone.errors import RunFailedError
from hone.recipe import Recipe


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
        increase = measured.get("retain_loss_increase", 0.0)
        if guard.max_retain_loss_increase is not None and increase > guard.max_retain_loss_increase:
            if guard.over_budget == "stop":
                self.reason = f"the loss on data.retain is {increase:.3f} above the base's, past guard.max_retain_loss_increase"
            return False
        value = measured.get(guard.metric)
        if value is None:  # no validation rows: the last weights within the budget
            self.best_step = step
            return guard.max_retain_loss_increase is not None
        gain = None if self.best is None else (self.best - value if guard.mode == "min" else value - self.best)
        self.since_best = 0 if gain is None or gain > guard.early_stopping_min_delta else self.since_best + 1
        is_best = gain is None or gain > 0
        if is_best:
            self.best, self.best_step = value, step
        if guard.early_stopping_patience and self.since_best >= guard.early_stopping_patience:
            self.reason = f"{guard.metric} has not been better for {self.since_best} validations"
        return is_best

    def state(self) -> dict[str, Any]:
        return asdict(self)


def picks_best(recipe: Recipe, *, has_validation: bool) -> bool:
    """Whether what is published are the weights of a validation, and not simply the last."""
    return (recipe.guard.publish == "best" and has_validation) or recipe.guard.max_retain_loss_increase is not None


def refuse_without_best(guard: Guard, recipe: Recipe) -> None:
    """Raise RunFailedError where no validation was within the budget, so that there is nothing to publish."""
    if not guard.best_step:
        raise RunFailedError(
            f"at no validation was the loss on data.retain within guard.max_retain_loss_increase {recipe.guard.max_retain_loss_increase:g} "
            "of the base's, so nothing is published; lower optim.learning_rate, raise data.retain_fraction or guard.kl_penalty, or "
            "validate more often (train.eval_steps)"
        )
