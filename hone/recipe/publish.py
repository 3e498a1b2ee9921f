"""What becomes of a result: publishing, and what an alias asks of a version before it moves there."""

from pydantic import Field, model_validator

from hone.metrics import OF_PROBLEM, OF_TASK
from hone.recipe.settings import Name, NotNegative, Settings
from hone.tasks import TASKS, TaskName


class Bounds(Settings):
    """What a metric must reach, or may not pass."""

    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "Bounds":
        if self.at_least is None and self.at_most is None:
            raise ValueError("give at_least, at_most or both")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least {self.at_least:g} is above at_most {self.at_most:g}")
        return self


class GateSettings(Settings):
    """What must hold before any alias moves to the version. Metrics are those of the exported weights on the validation rows, as
    `hone evaluate` measures them, with eval_ before their names."""

    metrics: dict[str, Bounds] = Field(default={})
    """Bounds by metric: {eval_accuracy: {at_least: 0.8}, eval_loss: {at_most: 1.2}}."""
    no_worse_than_alias: dict[str, NotNegative] = Field(default={})
    """By metric, by how much it may be worse than that of the version which the alias means: {eval_loss: 0.02}. Where both have 95%
    intervals, worse is what chance does not explain: the interval of the difference lies past the margin."""
    max_retain_loss_increase: float | None = Field(default=None, ge=0)
    """How much the loss on `data.retain` may be above the base's (nats a target)."""


class PublishSettings(Settings):
    """What happens to the result."""

    enabled: bool = True
    alias: Name | None = None
    """Alias moved to the new version once it is published."""
    gate: GateSettings | None = None
    """What the version must hold to, or the alias stays where it is; the version is published either way."""


def gate_metrics(task: TaskName) -> list[str]:
    """Every metric that a gate of this task may name."""
    measured = [OF_TASK[task]] if task in OF_TASK else list(OF_PROBLEM.values())
    names = [name for group in (*measured, TASKS[task].metrics, ("loss",)) for name in group]
    return [f"eval_{name}" for name in dict.fromkeys(names)]
