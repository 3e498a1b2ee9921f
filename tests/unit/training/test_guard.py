"""What the guard decides by what was measured, and what the recipe refuses before anything is read."""

from typing import Any

import pytest

from hone.errors import RecipeError, RunFailedError
from hone.recipe import Recipe, parse_recipe
from tests.manifests import prepared_data
from training.guard import Guard, check_guard, picks_best, refuse_without_best


def recipe(**sections: Any) -> Recipe:
    plain: dict[str, Any] = {"name": "g", "task": "chat", "base": "b", "data": {"train": "t.jsonl", "retain": "r.jsonl"}}
    return parse_recipe({**plain, **sections}, where="test")


def looked(values: list[dict[str, float]], **guard: Any) -> tuple[Guard, list[bool]]:
    """The guard after these validations, 10 steps apart, and which of them were the best so far."""
    made, chosen = Guard(), recipe(guard=guard)
    bests = []
    for n, measured in enumerate(values, start=1):
        bests.append(made.look(10 * n, measured, chosen))
        if made.reason:
            break
    return made, bests


def losses(*values: float) -> list[dict[str, float]]:
    return [{"eval_loss": value} for value in values]


def test_the_best_validation_is_kept_and_not_the_last() -> None:
    guard, bests = looked(losses(3.0, 2.0, 2.5, 2.6))
    assert (guard.best_step, guard.best, bests) == (20, 2.0, [True, True, False, False])


def test_patience_counts_validations_that_are_not_better_by_the_delta() -> None:
    guard, bests = looked(losses(3.0, 2.95, 2.94, 1.0), early_stopping_patience=2, early_stopping_min_delta=0.1)
    assert guard.reason == "eval_loss has not been better for 2 validations"
    assert (guard.best_step, bests) == (30, [True, True, True])  # a little better is still the best there is


def test_an_accuracy_is_better_when_it_is_higher() -> None:
    values = [{"eval_loss": 1.0, "eval_token_accuracy": value} for value in (0.5, 0.7, 0.6)]
    guard, bests = looked(values, metric="eval_token_accuracy", mode="max")
    assert (guard.best_step, bests) == (20, [True, True, False])


def test_weights_past_the_budget_are_never_the_best() -> None:
    values = [{"eval_loss": loss, "retain_loss_increase": increase} for loss, increase in ((3.0, 0.05), (2.0, 0.3), (2.5, 0.1))]
    stopped, _ = looked(values, max_retain_loss_increase=0.2)
    assert stopped.best_step == 10
    assert "0.300 above the base's, past guard.max_retain_loss_increase" in stopped.reason
    went_on, bests = looked(values, max_retain_loss_increase=0.2, over_budget="go_on")
    assert (went_on.best_step, bests, went_on.reason) == (30, [True, False, True], "")


def test_without_anything_within_the_budget_nothing_is_published() -> None:
    chosen = recipe(guard={"max_retain_loss_increase": 0.1, "over_budget": "go_on"})
    guard = Guard()
    assert not guard.look(10, {"eval_loss": 1.0, "retain_loss_increase": 0.5}, chosen)
    with pytest.raises(RunFailedError, match=r"nothing is published; lower optim\.learning_rate"):
        refuse_without_best(guard, chosen)


def test_what_is_no_number_is_never_the_best() -> None:
    guard, bests = looked(losses(float("nan"), 1.0, float("nan"), 0.5))
    assert (guard.best_step, bests) == (40, [False, True, False, True])
    spent, _ = looked([{"eval_loss": 1.0, "retain_loss_increase": float("nan")}], max_retain_loss_increase=0.1)
    assert spent.best_step == 0
    assert spent.reason


def test_the_last_weights_within_the_budget_where_the_last_are_wanted() -> None:
    values = [{"eval_loss": loss, "retain_loss_increase": 0.0} for loss in (1.0, 2.0)]
    guard, bests = looked(values, max_retain_loss_increase=0.1, publish="last")
    assert (guard.best_step, bests) == (20, [True, True])


def test_a_metric_of_other_answers_is_refused_once_the_rows_are_read() -> None:
    data = prepared_data(problem_type="regression")
    for guard, said in (
        ({"metric": "eval_accuracy", "mode": "max"}, "where rows have numbers"),
        ({"kl_penalty": 1.0}, "rows with numbers"),
    ):
        with pytest.raises(RecipeError, match=said):
            check_guard(recipe(task="text-classification", guard=guard), data)


def test_its_state_survives_a_checkpoint() -> None:
    guard, _ = looked(losses(3.0, 2.0, 2.5), early_stopping_patience=3)
    again = Guard(**guard.state())
    assert again == guard
    assert again.look(40, {"eval_loss": 1.0}, recipe())


def test_the_last_weights_are_published_where_nothing_says_which_are_best() -> None:
    assert not picks_best(recipe(), has_validation=False)
    assert not picks_best(recipe(guard={"publish": "last"}), has_validation=True)
    assert picks_best(recipe(), has_validation=True)
    assert picks_best(recipe(guard={"max_retain_loss_increase": 1.0}), has_validation=False)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"guard": {"metric": "eval_accuracy"}}, "is not measured by task chat; there are eval_loss, eval_token_accuracy"),
        ({"guard": {"metric": "eval_loss", "mode": "max"}}, "guard.mode max would choose the highest eval_loss"),
        ({"guard": {"metric": "eval_token_accuracy"}}, "set guard.mode: max"),
        ({"guard": {"early_stopping_patience": 1}, "data": {"train": "t", "validation_fraction": 0}}, "needs validation rows"),
        ({"guard": {"max_retain_loss_increase": 0.1}, "data": {"train": "t"}}, "measured on data.retain, and there is none"),
        ({"guard": {"kl_penalty": 1}, "method": {"type": "full"}, "zero": {"stage": 3}}, "use zero.stage 2 or lower"),
        ({"guard": {"kl_penalty": 1}, "data": {"train": "t", "retain": "r", "retain_fraction": 0}}, "data.retain_fraction is 0"),
        ({"task": "preference", "method": {"type": "full"}}, "method full does not go with task preference: .* use lora"),
        ({"task": "image-classification", "method": {"type": "prompt"}}, "What does: lora, full, freeze, ia3, adapter"),
        ({"method": {"use_dora": True}, "zero": {"stage": 3}}, "method.use_dora needs each weight whole"),
        ({"method": {"init_lora_weights": "pissa", "use_dora": True}}, "pissa changes the frozen weights"),
        ({"method": {"type": "prefix"}, "train": {"gradient_checkpointing": True}}, "method prefix puts before theirs"),
        ({"method": {"type": "freeze", "freeze_layers": -3}}, "freeze_layers"),
        ({"task": "preference", "guard": {"max_retain_loss_increase": 0.1}}, "relative to the base already"),
        ({"search": {"space": {"train.seed": {"type": "choice", "categories": [1]}}, "metric": "eval_los"}}, "search.metric 'eval_los'"),
        ({"preference": {"beta": 0.5}}, "is for the task preference, and this is chat"),
        ({"data": {"train": "t", "augment": {"image": {}}}}, "data.augment.image is for the task image-classification"),
        ({"task": "image-classification", "data": {"train": "t", "augment": {"image": {"crop_scale": [0.9, 0.5]}}}}, "is not a range"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(**sections)
