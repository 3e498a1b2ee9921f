"""What a run's curves say, in plain words and with the figures: did it learn, memorise, forget, and was it long enough."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hone.recipe import Recipe

Level = Literal["good", "note", "bad"]
Line = dict[str, Any]

NOTHING = 0.02
"""A loss that fell by less than this share has learnt next to nothing."""
RISE = 0.05
"""Share of what was gained that has to be lost again to be called overfitting, and not noise."""
LAST_GAIN = 0.05
"""Share of the whole gain that the last stretch has to bring for more steps to be worth trying."""
MOST_NATS = 700.0
"""exp of more is no float."""
FORGOT_LITTLE, FORGOT_MUCH = 0.01, 0.1
"""Nats that a retained target may cost more: perplexity 1% and 11% above the base's."""


@dataclass(frozen=True)
class Remark:
    """One thing that the curves say."""

    kind: str
    """diverged, no_better, overfitting, unstable, still_improving, underfitting, healthy, unmeasured, forgetting, retained, stopped or
    published."""
    level: Level
    says: str


@dataclass(frozen=True)
class Stretch:
    """A validation, and the training loss of the steps that led to it."""

    step: int
    validation: float
    training: float


def verdict(lines: Sequence[Line], recipe: Recipe) -> list[Remark]:
    """What to say of a run, the most important first.

    Args:
        lines: Its metrics (training/metrics.py).
        recipe: What it ran by.
    """
    losses = [(int(line["step"]), float(line["loss"])) for line in lines if "loss" in line]
    published = next((int(line["published_step"]) for line in reversed(lines) if "published_step" in line), 0)
    fit = _fit(lines, losses, published, recipe)
    return [*fit, *_forgetting(lines, published, recipe), *_stopped(lines), *_published(lines, published, recipe)]


def stretches(lines: Sequence[Line]) -> list[Stretch]:
    """Every validation after the first step, beside the mean training loss since the one before it."""
    made, since = [], [math.nan]
    for line in lines:
        if "loss" in line:
            since.append(float(line["loss"]))
        if "eval_loss" in line and line["step"]:
            known = [loss for loss in since if math.isfinite(loss)]
            made.append(Stretch(int(line["step"]), float(line["eval_loss"]), sum(known) / len(known) if known else math.nan))
            since = []
    return made


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """Means over the last `window` values; fewer at the beginning."""
    return [sum(part) / len(part) for n in range(len(losses)) if (part := losses[max(0, n + 1 - window) : n + 1])]


def smoothing_window(steps: int) -> int:
    """How many steps a smoothed training loss is the mean of: a twentieth of all, within reason."""
    return min(max(1, steps // 20), 50)


def _fit(lines: Sequence[Line], losses: list[tuple[int, float]], published: int, recipe: Recipe) -> list[Remark]:
    diverged = _diverged(losses)
    if diverged:
        return [diverged]
    before = next((float(line["eval_loss"]) for line in lines if line["step"] == 0 and "eval_loss" in line), None)
    measured = stretches(lines)
    if before is None or not measured:
        return [_without_validation(losses)]
    lost = next((each.step for each in measured if not math.isfinite(each.validation)), None)
    if lost is not None:
        return [Remark("diverged", "bad", f"Diverged: validation loss at step {lost} is not a finite number. Lower optim.learning_rate.")]
    best = min(measured, key=lambda each: each.validation)
    gain = before - best.validation
    if gain <= 0:
        says = (
            f"No better than before: validation loss {before:.4f} before the first step, {best.validation:.4f} at best (step {best.step})"
        )
        return [Remark("no_better", "bad", f"{says}. Lower optim.learning_rate, or look at the data.")]
    found = _after_the_best(measured, best, gain, published)
    if found:
        return [found]
    if gain < NOTHING * abs(before):
        says = f"Learnt next to nothing: validation loss from {before:.4f} to {best.validation:.4f} at step {best.step}"
        return [Remark("underfitting", "bad", f"{says}. Raise optim.learning_rate, the method's size, or train.num_train_epochs.")]
    return [_at_the_end(measured, before, gain, recipe)]


def _diverged(losses: list[tuple[int, float]]) -> Remark | None:
    """The loss is no number any more, or ended above where it began."""
    lost = next((step for step, loss in losses if not math.isfinite(loss)), None)
    if lost is not None:
        return Remark("diverged", "bad", f"Diverged: the training loss at step {lost} is not a finite number. Lower optim.learning_rate.")
    values = [loss for _, loss in losses]
    window = max(1, len(values) // 10)
    if len(values) < 2:
        return None
    first, last = sum(values[:window]) / window, sum(values[-window:]) / window
    low = min(smoothed(values, window)[window - 1 :])
    if last > first * (1 + RISE) and last > low * (1 + 2 * RISE):
        return Remark(
            "diverged",
            "bad",
            f"Diverged: the training loss began at {first:.4f}, fell no lower than {low:.4f} and ended at {last:.4f} (means of {window} "
            f"step{'s' * (window > 1)}). Lower optim.learning_rate, or set optim.max_grad_norm lower.",
        )
    return None


def _after_the_best(measured: list[Stretch], best: Stretch, gain: float, published: int) -> Remark | None:
    """Validation rose again: overfitting where the training loss went on falling, and else an unstable run."""
    last = measured[-1]
    lost = last.validation - best.validation
    if lost < RISE * gain:
        return None
    figures = (
        f"from step {best.step} on validation loss rises, from {best.validation:.4f} to {last.validation:.4f} at step {last.step}, "
        f"while training loss goes from {best.training:.4f} to {last.training:.4f}; the gap between them grows from "
        f"{best.validation - best.training:.4f} to {last.validation - last.training:.4f}"
    )
    is_spared = published < last.step
    cure = f"What is published is step {published}." if is_spared else "Set guard.publish=best by guard.metric=eval_loss, or train less."
    if last.training < best.training:
        return Remark("overfitting", "note" if is_spared else "bad", f"Overfitting: {figures}. {cure}")
    return Remark("unstable", "note", f"Unstable: {figures}. {cure} A lower optim.learning_rate may help.")


def _at_the_end(measured: list[Stretch], before: float, gain: float, recipe: Recipe) -> Remark:
    last = measured[-1]
    previous = measured[-2].validation if len(measured) > 1 else before
    gap = last.validation - last.training
    apart = "" if recipe.train.label_smoothing_factor else f", {abs(gap):.4f} {'above' if gap > 0 else 'below'} the training loss there"
    figures = f"validation loss from {before:.4f} to {last.validation:.4f}{apart}"
    if len(measured) > 1 and previous - last.validation > LAST_GAIN * gain:
        share = (previous - last.validation) / gain
        more = f"the last {last.step - measured[-2].step} steps brought {share:.0%} of it"
        return Remark("still_improving", "note", f"Still improving at the end: {figures}; {more}. More epochs may help.")
    return Remark("healthy", "good", f"Healthy: {figures}, and no rise.")


def _without_validation(losses: list[tuple[int, float]]) -> Remark:
    if not losses:
        return Remark("unmeasured", "note", "No steps were taken.")
    figures = f"training loss from {losses[0][1]:.4f} to {losses[-1][1]:.4f}"
    return Remark("unmeasured", "note", f"Overfitting was not measured, as there are no validation rows; {figures}.")


def _forgetting(lines: Sequence[Line], published: int, recipe: Recipe) -> list[Remark]:
    measured = [line for line in lines if "retain_loss" in line and line["step"]]
    if not measured:
        return [Remark("forgetting", "note", "Forgetting was not measured; name rows of what must stay in data.retain.")]
    at = next((line for line in measured if line["step"] == published), measured[-1])
    if "retain_loss_increase" not in at:
        return [Remark("retained", "note", f"Loss on the retained rows at step {at['step']} is {at['retain_loss']:.4f}.")]
    increase, budget = float(at["retain_loss_increase"]), recipe.guard.max_retain_loss_increase
    figures = (
        f"at step {at['step']} the loss on the retained rows is {abs(increase):.4f} {'above' if increase > 0 else 'below'} the base's "
        f"(perplexity times {math.exp(min(increase, MOST_NATS)):.3g}), KL divergence from the base {at['retain_kl']:.4f}"
    )
    if budget is not None:
        over = increase > budget
        figures += f"; {'past' if over else 'within'} the budget of {budget:g}"
        return [Remark("forgetting" if over else "retained", "bad" if over else "good", f"{'Forgot' if over else 'Retained'}: {figures}.")]
    if increase > FORGOT_MUCH:
        cure = "Mix in more (data.retain_fraction), or set guard.kl_penalty or guard.max_retain_loss_increase."
        return [Remark("forgetting", "bad", f"Forgot much: {figures}. {cure}")]
    level: Level = "note" if increase > FORGOT_LITTLE else "good"
    kind, amount = ("forgetting", "a little") if level == "note" else ("retained", "nothing")
    return [Remark(kind, level, f"Forgot {amount}: {figures}.")]


def _stopped(lines: Sequence[Line]) -> list[Remark]:
    found = next((line for line in lines if "stopped" in line), None)
    return [Remark("stopped", "note", f"Stopped early at step {found['step']}: {found['stopped']}.")] if found else []


def _published(lines: Sequence[Line], published: int, recipe: Recipe) -> list[Remark]:
    if not published:
        return []
    last = max(int(line["step"]) for line in lines)
    at = next((line for line in lines if line["step"] == published and recipe.guard.metric in line), None)
    figure = f", where {recipe.guard.metric} is {at[recipe.guard.metric]:.4f}" if at else ""
    which = f"the last step, {last}" if published == last else f"step {published} of {last}"
    return [Remark("published", "good", f"What is published are the weights of {which}{figure}.")]
