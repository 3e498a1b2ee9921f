"""What is measured of a trained model, by task: names, meanings and which way is better. How is in `training/evaluation`."""

from collections.abc import Sequence
from dataclasses import dataclass

from hone.errors import RecipeError
from hone.tasks import TASKS, TaskName


@dataclass(frozen=True)
class MetricFacts:
    """One metric."""

    says: str
    higher_is_better: bool = True
    generates: bool = False
    """Whether the model has to write answers for it, which takes a while."""


METRICS: dict[str, MetricFacts] = {
    "loss": MetricFacts("mean loss of a target", higher_is_better=False),
    "accuracy": MetricFacts("share of rows answered right"),
    "f1_macro": MetricFacts("F1, the mean of the classes"),
    "f1_micro": MetricFacts("F1 over all decisions"),
    "ece": MetricFacts("expected calibration error: how far confidence is from accuracy", higher_is_better=False),
    "mean_absolute_error": MetricFacts("mean distance from the number wanted", higher_is_better=False),
    "root_mean_squared_error": MetricFacts("root of the mean squared distance", higher_is_better=False),
    "r2": MetricFacts("share of the variance that is explained"),
    "perplexity": MetricFacts("exp of the loss of a token", higher_is_better=False),
    "token_accuracy": MetricFacts("share of tokens (or words) predicted right"),
    "exact_match": MetricFacts("share of answers written exactly as wanted", generates=True),
    "chrf": MetricFacts("chrF of what is written, 0 to 100", generates=True),
    "bleu": MetricFacts("BLEU of what is written, 0 to 100", generates=True),
    "rouge1": MetricFacts("ROUGE-1 F-measure of what is written", generates=True),
    "rouge2": MetricFacts("ROUGE-2 F-measure of what is written", generates=True),
    "rougeL": MetricFacts("ROUGE-L F-measure of what is written", generates=True),
    "reward_accuracy": MetricFacts("share of pairs whose chosen answer gained more on the base than the rejected one"),
    "reward_margin": MetricFacts("how much more it gained, times beta"),
    "chosen_likelier": MetricFacts("share of pairs whose chosen answer is the likelier one"),
}
GROUPS = {"f1": ("f1_macro", "f1_micro"), "rouge": ("rouge1", "rouge2", "rougeL"), "calibration": ("ece",)}
"""Names for several, of which a task has some."""
CLASSES = ("accuracy", "f1_macro", "ece", "loss")
MANY_CLASSES = ("accuracy", "f1_micro", "f1_macro", "loss")
NUMBER = ("mean_absolute_error", "root_mean_squared_error", "r2", "loss")
OF_TASK: dict[TaskName, tuple[str, ...]] = {
    "chat": ("perplexity", "token_accuracy", "loss", "exact_match"),
    "completion": ("perplexity", "token_accuracy", "loss", "exact_match"),
    "preference": ("reward_accuracy", "reward_margin", "chosen_likelier", "loss"),
    "token-classification": ("token_accuracy", "f1_macro", "ece", "loss"),
    "seq2seq": ("perplexity", "token_accuracy", "loss", "chrf", "bleu", "rouge1", "rouge2", "rougeL"),
}
OF_PROBLEM = {None: CLASSES, "single_label_classification": CLASSES, "multi_label_classification": MANY_CLASSES, "regression": NUMBER}


def metrics_of(task: TaskName, problem_type: str | None = None) -> tuple[str, ...]:
    """Every metric that a task has, the one that says most first."""
    return OF_TASK.get(task) or OF_PROBLEM[problem_type]


def chosen_metrics(wanted: Sequence[str] | None, *, task: TaskName, problem_type: str | None = None) -> tuple[str, ...]:
    """The metrics of a task that are wanted, by name or group; all without a wish.

    Raises:
        RecipeError: the task does not have one, or nothing is called so.
    """
    there = metrics_of(task, problem_type)
    if not wanted:
        return there
    found: set[str] = set()
    for name in wanted:
        named = {each for each in GROUPS.get(name, (name,)) if each in there}
        if not named:
            what = {"multi_label_classification": " with any number of classes", "regression": " with numbers"}.get(problem_type or "", "")
            odd = f"task {task}{what} does not have it" if name in METRICS or name in GROUPS else "there is no metric of that name"
            raise RecipeError(f"--metrics {name}: {odd}; it has {', '.join(there)}")
        found |= named
    return tuple(name for name in there if name in found)


assert set(OF_TASK) <= set(TASKS)
assert {name for names in (*OF_TASK.values(), *OF_PROBLEM.values()) for name in names} == set(METRICS)
