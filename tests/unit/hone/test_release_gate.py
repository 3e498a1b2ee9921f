"""`publish.gate`: an alias moves only to what holds to it."""

import json
from pathlib import Path
from typing import Any

import pytest

from hone.errors import CorruptAdapterError, GateError, RecipeError
from hone.promotion import Wishes, promote, roll_back
from hone.recipe import parse_recipe
from hone.registry import Registry
from hone.storage import Home
from tests.manifests import Describe, weights

Interval = tuple[float, float, float]
"""Value, low, high."""


class Shelf:
    """A registry to publish measured adapters in."""

    def __init__(self, home: Home, folder: Path) -> None:
        self.registry = Registry(home)
        self._folder = folder

    def publish(
        self, gate: dict[str, Any] | None = None, evaluation: dict[str, Interval] | None = None, data: str = "d", **metrics: float
    ) -> str:
        folder = weights(self._folder / str(len(list(self._folder.iterdir()))))
        (folder / "recipe.json").write_text(json.dumps({"name": "bot", "publish": {"alias": "prod"} | ({"gate": gate} if gate else {})}))
        if evaluation:
            found = [{"name": n, "tuned": dict(zip(("value", "low", "high"), each, strict=True))} for n, each in evaluation.items()]
            (folder / "evaluation.json").write_text(json.dumps({"metrics": found}))

        describe = Describe("bot", task="text-classification", metrics=metrics, data_digest=data)
        return str(self.registry.publish(folder, "bot", describe=describe).ref)


@pytest.fixture
def shelf(home: Home, tmp_path: Path) -> Shelf:
    folder = tmp_path / "weights"
    folder.mkdir()
    return Shelf(home, folder)


@pytest.mark.parametrize(
    ("gate", "why"),
    [
        ({"metrics": {"eval_accuracy": {"at_least": 0.8}}}, ""),
        ({"metrics": {"eval_accuracy": {"at_least": 0.81}}}, r"eval_accuracy 0\.8 \[0\.7, 0\.9\] is not at least 0\.81"),
        ({"metrics": {"eval_loss": {"at_most": 0.4}}}, r"eval_loss 0\.5 is not at most 0\.4"),
        ({"metrics": {"eval_f1_macro": {"at_least": 0.1}}}, "eval_f1_macro was not measured"),
        ({"metrics": {"eval_ece": {"at_most": 0.1}}}, "eval_ece was not measured"),
        ({"max_retain_loss_increase": 0.1}, ""),
        ({"max_retain_loss_increase": 0.01}, r"retain_loss_increase 0\.05 is not at most 0\.01"),
    ],
)
def test_bounds_are_held_against_what_was_measured(shelf: Shelf, gate: dict[str, Any], why: str) -> None:
    nothing: Any = None
    measured = {"accuracy": (0.8, 0.7, 0.9), "ece": (nothing, nothing, nothing)}
    version = shelf.publish(gate, measured, eval_accuracy=0.99, eval_loss=0.5, retain_loss_increase=0.05)
    if not why:
        promote(shelf.registry, "prod", version)
        assert shelf.registry.aliases() == {"prod": version}
        return
    with pytest.raises(GateError, match=rf"bot@1: {why}; there is no 'prod' yet"):
        promote(shelf.registry, "prod", version)
    assert shelf.registry.aliases() == {}
    assert shelf.registry.resolve(version).version == 1, "it is published all the same"


@pytest.mark.parametrize(
    ("metric", "margin", "old", "new", "passes"),
    [
        ("accuracy", 0.0, (0.80, 0.78, 0.82), (0.81, 0.79, 0.83), True),
        ("accuracy", 0.0, (0.80, 0.78, 0.82), (0.79, 0.77, 0.81), True),  # chance may explain it
        ("accuracy", 0.0, (0.80, 0.78, 0.82), (0.70, 0.68, 0.72), False),
        ("accuracy", 0.2, (0.80, 0.78, 0.82), (0.70, 0.68, 0.72), True),
        # 0.1 worse, of which chance explains sqrt(0.06^2 + 0.08^2) = 0.1
        ("accuracy", 0.0, (0.80, 0.745, 0.9), (0.70, 0.1, 0.775), False),
        ("accuracy", 0.0, (0.80, 0.735, 0.9), (0.70, 0.1, 0.785), True),
        ("loss", 0.0, (0.50, 0.48, 0.52), (0.60, 0.58, 0.62), False),
        ("loss", 0.0, (0.60, 0.58, 0.62), (0.50, 0.48, 0.52), True),
    ],
)
def test_worse_than_the_alias_is_past_the_margin_and_past_chance(
    shelf: Shelf, metric: str, margin: float, old: Interval, new: Interval, passes: bool
) -> None:
    promote(shelf.registry, "prod", shelf.publish(evaluation={metric: old}))
    version = shelf.publish({"no_worse_than_alias": {f"eval_{metric}": margin}}, {metric: new})
    if passes:
        promote(shelf.registry, "prod", version)
        return
    with pytest.raises(
        GateError, match=rf"eval_{metric} {new[0]:.4g} .* is worse than .* of bot@1 by more than 0; 'prod' goes on meaning bot@1"
    ):
        promote(shelf.registry, "prod", version)
    assert shelf.registry.aliases() == {"prod": "bot@1"}


def test_without_intervals_the_difference_itself_counts(shelf: Shelf) -> None:
    promote(shelf.registry, "prod", shelf.publish(eval_loss=0.5))
    gate = {"no_worse_than_alias": {"eval_loss": 0.02}}
    promote(shelf.registry, "prod", shelf.publish(gate, eval_loss=0.51))
    with pytest.raises(
        GateError, match=r"0\.54 is worse than 0\.51 of bot@2 by more than 0\.02 \(each on the validation rows of its own data\)"
    ):
        promote(shelf.registry, "prod", shelf.publish(gate, data="other", eval_loss=0.54))
    with pytest.raises(GateError, match="eval_loss was not measured"):
        promote(shelf.registry, "prod", shelf.publish(gate))
    promote(shelf.registry, "elsewhere", shelf.publish(gate, eval_loss=9.0))  # there is nothing to be worse than


def test_a_canary_is_held_against_what_answers_beside_it(shelf: Shelf) -> None:
    promote(shelf.registry, "prod", shelf.publish(eval_loss=0.5))
    version = shelf.publish({"no_worse_than_alias": {"eval_loss": 0.0}}, eval_loss=0.6)
    with pytest.raises(GateError):
        promote(shelf.registry, "prod", version, wishes=Wishes(share=0.1))
    promote(shelf.registry, "prod", version, wishes=Wishes(share=0.9), force=True)
    with pytest.raises(GateError, match="of bot@1"):
        promote(shelf.registry, "prod", version)


def test_what_is_forced_is_kept_in_the_history_and_going_back_asks_no_gate(shelf: Shelf) -> None:
    version = shelf.publish({"metrics": {"eval_loss": {"at_most": 0.1}}}, eval_loss=0.5)
    assert promote(shelf.registry, "prod", version, force=True).current.forced == ("eval_loss 0.5 is not at most 0.1",)
    assert promote(shelf.registry, "prod", shelf.publish(), force=True).current.forced == ()
    assert roll_back(shelf.registry, "prod").current.main.version == version


def test_a_version_that_gets_no_more_than_it_had_is_not_asked_again(shelf: Shelf) -> None:
    version = shelf.publish({"metrics": {"eval_loss": {"at_most": 0.1}}}, eval_loss=0.5)
    other = shelf.publish()
    promote(shelf.registry, "prod", version, force=True)
    promote(shelf.registry, "prod", version, wishes=Wishes(shadow=(other, 0.5)))
    promote(shelf.registry, "prod", other, wishes=Wishes(share=0.5))
    with pytest.raises(GateError):
        promote(shelf.registry, "prod", version, wishes=Wishes(share=0.6))


@pytest.mark.parametrize("file", ["evaluation.json", "recipe.json"])
def test_what_cannot_be_read_is_no_pass(shelf: Shelf, file: str) -> None:
    version = shelf.publish({"metrics": {"eval_loss": {"at_most": 1}}}, {"loss": (0.5, 0.4, 0.6)})
    path = shelf.registry.path(shelf.registry.resolve(version).ref) / file
    for content in ("{", "[]", "{}" if file == "evaluation.json" else '{"publish": {"gate": {"odd": 1}}}'):
        path.write_text(content)
        with pytest.raises(CorruptAdapterError, match=file):
            promote(shelf.registry, "prod", version)


@pytest.mark.parametrize(
    ("gate", "why"),
    [
        ({"metrics": {"accuracy": {"at_least": 0.8}}}, "did you mean eval_accuracy"),
        ({"metrics": {"eval_chrf": {"at_least": 0.8}}}, "not measured by task text-classification"),
        ({"metrics": {"eval_accuracy": {}}}, "give at_least, at_most or both"),
        ({"metrics": {"eval_accuracy": {"at_least": 0.9, "at_most": 0.1}}}, "is above at_most"),
        ({"no_worse_than_alias": {"eval_loss": -1}}, "no_worse_than_alias"),
        ({"max_retain_loss_increase": 0.1}, "data.retain"),
    ],
)
def test_a_gate_that_cannot_be_measured_is_refused_with_the_recipe(gate: dict[str, Any], why: str) -> None:
    tree: dict[str, Any] = {"name": "bot", "task": "text-classification", "base": "b", "data": {"train": "t", "validation_fraction": 0.1}}
    parse_recipe({**tree, "publish": {"gate": {"metrics": {"eval_f1_micro": {"at_least": 0.8}}}}}, where="recipe.yaml")
    with pytest.raises(RecipeError, match=why):
        parse_recipe({**tree, "publish": {"gate": gate}}, where="recipe.yaml")


def test_a_gate_needs_validation_rows() -> None:
    tree = {"name": "bot", "task": "chat", "base": "b", "data": {"train": "t", "validation_fraction": 0}}
    with pytest.raises(RecipeError, match=r"publish\.gate needs validation rows"):
        parse_recipe({**tree, "publish": {"gate": {"metrics": {"eval_loss": {"at_most": 1}}}}}, where="recipe.yaml")
