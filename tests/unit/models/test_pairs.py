"""Every method on every task that it goes with, in one process: it learns, it is saved, and what is loaded answers alike."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hone.errors import RecipeError
from hone.methods import METHODS as METHOD_FACTS
from hone.methods import how_served, why_not
from hone.recipe import parse_recipe
from hone.storage import Home
from hone.tasks import TASKS as TASK_FACTS
from models.methods import METHODS
from models.tasks import TASKS, LossOptions
from tests.samples import multi_label, regression, write_sample
from tests.tiny import BASE_OF, MAKERS
from tests.zero_matrix import prepared
from training.export import gathered_state, golden_row
from training.job import Job
from training.model import build_model, load_trained
from training.optim import make_optimizer
from training.start import inputs_of
from training.token_rows import TokenRows

STEPS = 15
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in METHOD_FACTS),
    ("lora", {"init_lora_weights": "pissa"}),
    ("lora", {"use_dora": True, "use_rslora": True, "loraplus_lr_ratio": 4.0}),
    ("adapter", {"placement": "houlsby", "activation": "relu"}),
]
PAIRS = [(task, method, extra) for task in TASK_FACTS for method, extra in VARIANTS if not why_not(task, method)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def jobs(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    root = tmp_path_factory.mktemp("jobs")
    home = Home(root / "home")

    def make(task: str, method: str, extra: dict[str, Any], sample: Any = None) -> Job:
        rows = root / (sample.__name__ if sample else task)
        rows.mkdir(exist_ok=True)
        found = [*rows.iterdir()] or [write_sample(rows, task, make=sample)]
        rate = 2e-2 if method in ("prompt", "prefix", "ia3") else 5e-3
        recipe = parse_recipe(
            {
                "name": "pair",
                "task": task,
                "base": str(bases[BASE_OF[task]]),
                "data": {"train": str(found[0]), "validation_fraction": 0.2, "max_length": 64, "stop_on": []},
                "method": {"type": method, **extra},
                "optim": {"learning_rate": rate},
            },
            where="test",
        )
        shutil.rmtree(root / "run", ignore_errors=True)
        return prepared(recipe, root / "run", home=home)

    return make


def learn(job: Job) -> tuple[Any, list[float], dict[str, torch.Tensor]]:
    """The trained model, its losses, and a batch of golden rows."""
    task, method = TASKS[job.recipe.task], METHODS[job.recipe.method.type]
    model, heads = build_model(job, dtype=torch.float32)
    optimizer, groups = make_optimizer(model, job.recipe, heads=heads, steps_per_epoch=STEPS)
    rows, inputs = TokenRows(job.data, "train"), inputs_of(job)
    options = LossOptions(base=lambda: method.off(model) if METHOD_FACTS[job.recipe.method.type].keeps_base else nullcontext())
    batch, losses = task.collate(rows.take(np.arange(len(rows))), inputs=inputs, packed=False), []
    for step in range(STEPS):
        groups.set_step(optimizer, step, job.recipe.optim.learning_rate)
        loss, sums = task.loss(model.train(), batch, options)
        assert all(float(total) / len(rows) >= 0 for name, total in sums.items() if name.endswith("accuracy"))
        optimizer.zero_grad()
        (loss / int(rows.n_targets.sum())).backward()
        optimizer.step()
        losses.append(float(loss.detach()) / int(rows.n_targets.sum()))
    return model.eval(), losses, task.collate([golden_row(row) for row in rows.take(np.arange(4))], inputs=inputs, packed=False)


@pytest.mark.parametrize(("task", "method", "extra"), PAIRS, ids=lambda value: str(value) if value else "")
def test_it_learns_and_what_is_saved_answers_alike(jobs: Callable[..., Job], task: str, method: str, extra: dict[str, Any]) -> None:
    check(jobs(task, method, extra))


@pytest.mark.parametrize("sample", [multi_label, regression])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_classifier_learns_any_number_of_classes_or_a_number(jobs: Callable[..., Job], method: str, sample: Any) -> None:
    check(jobs("text-classification", method, {}, sample))


@pytest.mark.parametrize("method", ["lora", "adapter", "ia3", "prefix"])
def test_what_else_the_base_lacks_is_learnt_and_saved_like_the_head(
    jobs: Callable[..., Job], bases: dict[str, Path], tmp_path: Path, method: str
) -> None:
    """A base that was saved without its pooler, as masked language models are."""
    from safetensors.torch import load_file, save_file

    job = jobs("text-classification", method, {})
    shutil.copytree(bases["bert"], tmp_path / "bert")
    weights = load_file(tmp_path / "bert" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    assert len(kept) == len(weights) - 2
    save_file(kept, tmp_path / "bert" / "model.safetensors", metadata={"format": "pt"})
    check(job.model_copy(update={"base_folder": tmp_path / "bert"}))


def test_prompts_do_not_go_with_a_decoder_that_classifies(jobs: Callable[..., Job], bases: dict[str, Path]) -> None:
    job = jobs("text-classification", "prompt", {})
    with pytest.raises(RecipeError, match="finds where a row ends by its padding tokens"):
        build_model(job.model_copy(update={"base_folder": bases["llama"]}), dtype=torch.float32)


@torch.no_grad()
def check(job: Job) -> None:
    with torch.enable_grad():
        model, losses, golden = learn(job)
    task, method = TASKS[job.recipe.task], METHODS[job.recipe.method.type]
    assert losses[-1] < 0.97 * losses[0]
    wanted = task.outputs(model, golden)

    state = gathered_state(model, method, sharded=False, keep=True)
    folder = job.folder / "export"
    folder.mkdir()
    method.save(model, job.recipe.method, state, folder)
    again = load_trained(job, folder, dtype=torch.float32)
    torch.testing.assert_close(task.outputs(again, golden), wanted, atol=1e-4, rtol=1e-4)

    if METHOD_FACTS[job.recipe.method.type].keeps_base:
        with method.off(model):
            off = task.outputs(model, golden)
        assert not torch.allclose(off, wanted, atol=1e-3), "what was learnt changes nothing"
        torch.testing.assert_close(task.outputs(model, golden), wanted)  # it is on again
    served = how_served(job.recipe.task, job.recipe.method.type)
    if served == "alone":
        with pytest.raises(RecipeError, match="cannot be merged"):
            method.merge(again)
    else:
        torch.testing.assert_close(task.outputs(method.merge(again), golden), wanted, atol=1e-4, rtol=1e-4)


def test_every_task_and_method_that_a_recipe_may_name_is_there() -> None:
    assert set(TASKS) == set(TASK_FACTS)
    assert set(METHODS) == set(METHOD_FACTS)
    assert all(TASKS[name].shape == facts.shape for name, facts in TASK_FACTS.items())
