"""Learning rates agree with the schedules of the same names in transformers; which parameters learn how fast, and from when."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from hone.recipe import OptimSettings, Recipe, parse_recipe
from models.methods import METHODS, Applying
from models.tasks import TASKS, Head
from training.optim import Group, learning_rate, make_optimizer


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_the_learning_rate_is_that_of_transformers_schedule(name: str) -> None:
    settings = OptimSettings(learning_rate=3e-3, lr_scheduler_type=name, warmup_ratio=0.1)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    theirs = get_scheduler(name if name != "constant" else "constant_with_warmup", optimizer, num_warmup_steps=4, num_training_steps=37)
    for step in range(37):
        assert learning_rate(step, 37, settings) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def recipe(**sections: Any) -> Recipe:
    return parse_recipe({"name": "o", "task": "text-classification", "base": "b", "data": {"train": "t"}, **sections}, where="test")


@pytest.fixture(scope="module")
def classifier(bert: Path) -> Any:
    torch.manual_seed(0)
    model, _ = TASKS["text-classification"].load_model(
        bert, head=Head(["a", "b"], "single_label_classification"), dtype=torch.float32, pad_token_id=0
    )
    return model


def groups_by_name(model: Any, chosen: Recipe, *, steps_per_epoch: int = 10) -> dict[str, Group]:
    model.requires_grad_(True)
    made = METHODS[chosen.method.type].apply(model, chosen.method, Applying(TASKS[chosen.task], ["classifier"]))
    optimizer, groups = make_optimizer(made, chosen, heads=["classifier"], steps_per_epoch=steps_per_epoch)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [group.weight_decay for group in groups.groups]
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    return {names[id(p)]: group for group, parameters in zip(groups.groups, groups.parameters, strict=True) for p in parameters}


def test_wsd_holds_the_rate_and_falls_at_the_end() -> None:
    settings = OptimSettings(learning_rate=1.0, lr_scheduler_type="wsd", warmup_ratio=0.1, decay_ratio=0.2)
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[5] == pytest.approx(0.5)
    assert set(rates[10:80]) == {1.0}
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)


def test_norms_and_biases_do_not_decay(classifier: Any) -> None:
    found = groups_by_name(classifier, recipe(method={"type": "full"}, optim={"weight_decay": 0.1}))
    assert {name for name, group in found.items() if group.weight_decay == 0} == {
        name for name in found if name.endswith("bias") or "LayerNorm" in name
    }


def test_lower_layers_learn_slower_and_the_head_at_its_own_rate(classifier: Any) -> None:
    optim = {"learning_rate": 1e-3, "layerwise_lr_decay": 0.5, "head_learning_rate": 1e-2}
    found = groups_by_name(classifier, recipe(method={"type": "full"}, optim=optim))
    assert found["classifier.weight"].scale == pytest.approx(10)
    assert found["bert.pooler.dense.weight"].scale == 1
    assert found["bert.encoder.layer.1.output.dense.weight"].scale == 0.5
    assert found["bert.encoder.layer.0.output.dense.weight"].scale == 0.25
    assert found["bert.embeddings.word_embeddings.weight"].scale == 0.125


def test_layers_thaw_from_above_one_after_another(classifier: Any) -> None:
    method = {"type": "full", "gradual_unfreezing": {"every_steps": 7}}
    found = groups_by_name(classifier, recipe(method=method))
    assert found["classifier.bias"].thaws_at == found["bert.pooler.dense.weight"].thaws_at == 0
    assert found["bert.encoder.layer.1.output.dense.weight"].thaws_at == 7
    assert found["bert.encoder.layer.0.output.dense.weight"].thaws_at == 14
    assert found["bert.embeddings.word_embeddings.weight"].thaws_at == 21
    frozen = {**method, "type": "freeze", "freeze_layers": 1}
    assert {name for name in found if name not in groups_by_name(classifier, recipe(method=frozen))} == {
        name for name in found if "embeddings" in name or ".layer.0." in name
    }


def test_what_has_not_thawed_stays_to_the_bit(classifier: Any) -> None:
    chosen = recipe(method={"type": "full", "gradual_unfreezing": {"every_steps": 2}}, optim={"learning_rate": 1e-2})
    model = copy.deepcopy(classifier).requires_grad_(True)
    optimizer, groups = make_optimizer(model, chosen, heads=["classifier"], steps_per_epoch=1)
    lowest = model.bert.encoder.layer[0].output.dense.weight
    ids, labels = torch.arange(12).reshape(2, 6), torch.tensor([0, 1])
    moved = []
    for step in range(6):
        groups.set_step(optimizer, step, 1e-2)
        before = lowest.detach().clone()
        torch.nn.functional.cross_entropy(model(input_ids=ids).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append(bool((lowest != before).any()))
    assert moved == [False] * 4 + [True] * 2
