"""Curves of each kind, and what is said of them."""

from itertools import pairwise
from typing import Any

import pytest

from hone.recipe import Recipe, parse_recipe
from training.verdict import Remark, smoothed, verdict

Line = dict[str, Any]
REASON = "eval_loss has not been better for 1 validations"


def recipe(**sections: Any) -> Recipe:
    tree = {"name": "bot", "task": "chat", "base": "./base", "data": {"train": "rows.jsonl"}}
    return parse_recipe({**tree, **sections}, where="test")


def run(training: list[float], validation: list[float], *, published: int | None = None, every: int = 10, **more: Any) -> list[Line]:
    """Metrics of a run: training loss from one validation to the next in a straight line; the first validation is before any step."""
    made: list[Line] = [{"step": 0, "total_steps": every * (len(training) - 1)}, {"step": 0, "eval_loss": validation[0]}]
    for n, (start, end) in enumerate(pairwise(training)):
        made += [{"step": n * every + k, "loss": start + (end - start) * k / every} for k in range(1, every + 1)]
        made.append({"step": (n + 1) * every, "eval_loss": validation[n + 1], **{name: values[n] for name, values in more.items()}})
    last = every * (len(training) - 1)
    return [*made, {"step": last, "published_step": last if published is None else published}]


def kinds(remarks: list[Remark]) -> list[str]:
    return [remark.kind for remark in remarks]


def test_a_healthy_run() -> None:
    found = verdict(run([4, 2, 1.5, 1.4, 1.38], [4, 2.1, 1.6, 1.5, 1.49]), recipe())
    assert kinds(found) == ["healthy", "forgetting", "published"]
    assert found[0].level == "good"
    assert "validation loss from 4.0000 to 1.4900" in found[0].says
    assert "not measured" in found[1].says
    assert found[2].says == "What is published are the weights of the last step, 40, where eval_loss is 1.4900."


@pytest.mark.parametrize(("published", "level", "cure"), [(20, "note", "published is step 20"), (40, "bad", "guard.publish=best")])
def test_overfitting_and_the_step_where_the_curves_part(published: int, level: str, cure: str) -> None:
    found = verdict(run([4, 2, 1.2, 0.6, 0.2], [4, 2.2, 1.9, 2.3, 2.9], published=published), recipe())[0]
    assert (found.kind, found.level) == ("overfitting", level)
    assert "from step 20 on validation loss rises, from 1.9000 to 2.9000 at step 40" in found.says
    assert "the gap between them grows from 0.3400 to 2.5200" in found.says
    assert cure in found.says


def test_a_little_noise_at_the_end_is_not_overfitting() -> None:
    assert verdict(run([4, 2, 1.5, 1.3, 1.25], [4, 2.1, 1.6, 1.5, 1.51]), recipe())[0].kind == "healthy"


def test_a_validation_that_rises_together_with_training_is_unstable() -> None:
    assert verdict(run([4, 2, 1.5, 2.2, 2.6], [4, 2.1, 1.6, 2.3, 2.8]), recipe())[0].kind == "unstable"


def test_still_improving_at_the_end() -> None:
    found = verdict(run([4, 3.5, 3, 2.5, 2], [4, 3.5, 3, 2.5, 2]), recipe())[0]
    assert found.kind == "still_improving"
    assert "the last 10 steps brought 25% of it" in found.says


def test_next_to_nothing_was_learnt() -> None:
    found = verdict(run([4, 3.99, 3.98, 3.97, 3.97], [4, 3.99, 3.98, 3.975, 3.975]), recipe())[0]
    assert (found.kind, found.level) == ("underfitting", "bad")


def test_no_better_than_before() -> None:
    found = verdict(run([4, 3.9, 3.5, 3, 2], [1, 1.1, 1.2, 1.5, 2]), recipe())[0]
    assert (found.kind, found.level) == ("no_better", "bad")


@pytest.mark.parametrize("losses", [[4.0, 3, 6, 8, 9], [4.0, 3, float("nan"), float("nan"), float("nan")]], ids=["rising", "no number"])
def test_diverged(losses: list[float]) -> None:
    found = verdict(run(losses, [4, 3.5, 7, 8, 9]), recipe())[0]
    assert (found.kind, found.level) == ("diverged", "bad")


def test_a_validation_that_is_no_number_is_a_divergence() -> None:
    assert verdict(run([4, 3, 2], [4, 3, float("nan")]), recipe())[0].kind == "diverged"


def test_without_validation_rows() -> None:
    lines = [line for line in run([4, 2, 1.5], [4, 2, 1.5]) if "eval_loss" not in line]
    found = verdict(lines, recipe())[0]
    assert found.kind == "unmeasured"
    assert "no validation rows; training loss from 3.8000 to 1.5000" in found.says


@pytest.mark.parametrize(
    ("increase", "budget", "kind", "level"),
    [
        (-0.2, None, "retained", "good"),
        (0.005, None, "retained", "good"),
        (0.05, None, "forgetting", "note"),
        (0.5, None, "forgetting", "bad"),
        (0.05, 0.1, "retained", "good"),
        (0.15, 0.1, "forgetting", "bad"),
    ],
)
def test_forgetting_at_the_step_that_is_published(increase: float, budget: float | None, kind: str, level: str) -> None:
    more = {"retain_loss": [1.0, 2.0], "retain_loss_increase": [increase, 9.0], "retain_kl": [0.25, 9.0]}
    guard = {} if budget is None else {"guard": {"max_retain_loss_increase": budget}}
    data = {"train": "rows.jsonl", "retain": "general.jsonl"}
    found = next(
        each for each in verdict(run([4, 2, 1], [4, 2, 1.9], published=10, **more), recipe(data=data, **guard)) if each.kind == kind
    )
    assert found.level == level
    assert "at step 10" in found.says
    assert f"{abs(increase):.4f} {'above' if increase > 0 else 'below'} the base's" in found.says
    assert "KL divergence from the base 0.2500" in found.says
    assert ("the budget of 0.1" in found.says) == (budget is not None)


def test_an_early_stop_is_told_with_its_reason() -> None:
    lines = [
        *run([4, 2, 1.5, 1.4], [4, 2.1, 1.6, 1.7], published=20),
        {"step": 30, "stopped": REASON},
    ]
    assert [each.says for each in verdict(lines, recipe()) if each.kind == "stopped"] == [f"Stopped early at step 30: {REASON}."]
    assert [each.says for each in verdict(lines, recipe()) if each.kind == "published"] == [
        "What is published are the weights of step 20 of 30, where eval_loss is 1.6000."
    ]


def test_a_smoothed_curve_begins_where_the_curve_does() -> None:
    assert smoothed([4.0, 2.0, 3.0], 2) == [4.0, 3.0, 2.5]
