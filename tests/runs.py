"""A finished run without the training: prepared data, and an export of weights that were moved at random, with its golden outputs."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from hone.recipe import Recipe, parse_recipe
from hone.storage import Home
from models.methods import METHODS
from models.tasks import TASKS
from tests.zero_matrix import prepared
from training.export import GOLDEN_FILE, gathered_state
from training.job import Job
from training.model import build_model
from training.token_rows import TokenRows
from training.trained import trained_by

CLASSES = ("cat", "dog", "rain")


def written(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_for(task: str, count: int = 24) -> list[dict[str, Any]]:
    """Rows of a task; a classifier can tell them apart."""
    kinds: dict[str, Any] = {
        "chat": lambda n: {"prompt": f"what is {n}?", "completion": f"the number {n % 7}"},
        "completion": lambda n: {"text": f"the cat {n} sat on a mat and the dog ran to the river"},
        "preference": lambda n: {"prompt": f"what is {n}?", "chosen": f"the number {n % 7}", "rejected": "no idea"},
        "text-classification": lambda n: {"text": f"the {CLASSES[n % 3]} sat on <b>{n}</b>", "label": CLASSES[n % 3]},
        "token-classification": lambda n: {"tokens": ["the", CLASSES[n % 3], "sat", str(n)], "labels": ["O", CLASSES[n % 3], "O", "N"]},
        "seq2seq": lambda n: {"source": f"what is {n}?", "target": f"the number {n % 7}"},
    }
    return [kinds[task](n) for n in range(count)]


def make_recipe(base: Path, train: Path, task: str, method: str | dict[str, Any] = "lora", **sections: Any) -> Recipe:
    """A recipe for rows of `rows_for`; `method` is its name, or the whole section."""
    tree = {
        "name": "bot",
        "task": task,
        "base": str(base),
        "data": {"train": str(train), "validation_fraction": 0.5, "max_length": 64, "near_duplicate_rows": 0},
        "method": {"type": method} if isinstance(method, str) else method,
    }
    merged = {name: {**tree.get(name, {}), **value} if isinstance(value, dict) else value for name, value in sections.items()}  # type: ignore[dict-item]
    return parse_recipe({**tree, **merged}, where="test")


def make_run(folder: Path, recipe: Recipe, home: Home, *, moved: float = 0.02) -> Job:
    """A run whose weights moved by as much as a training might."""
    job = prepared(recipe, folder, home=home)
    model, method, task = build_model(job, dtype=torch.float32)[0].eval(), METHODS[recipe.method.type], TASKS[recipe.task]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if method.trained(name, parameter):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * moved)
    job.export_folder.mkdir()
    state = gathered_state(model, method, sharded=False, keep=True)
    method.save(model, recipe.method, state, job.export_folder)
    rows = TokenRows(job.data, "validation")
    batch = task.collate(rows.take(np.arange(2)), inputs=trained_by(job).inputs(), packed=False)
    with torch.no_grad():
        golden = {**batch, "logits": task.outputs(model, batch)}
    save_file({name: tensor.contiguous() for name, tensor in golden.items()}, job.export_folder / GOLDEN_FILE)
    return job


def lines(steps: int = 4) -> list[dict[str, Any]]:
    """Metrics of a short and healthy run."""
    made: list[dict[str, Any]] = [{"step": 0, "total_steps": steps}, {"step": 0, "eval_loss": 3.0, "retain_loss": 2.0, **_retained(0)}]
    for step in range(1, steps + 1):
        fallen = 1 - 4.0**-step
        made.append({"step": step, "loss": 3.0 - 1.7 * fallen, "learning_rate": 1e-3 * (1 - step / steps)})
        made.append({"step": step, "eval_loss": 3.0 - 1.6 * fallen, "retain_loss": 2 + 0.01 * step, **_retained(0.01 * step)})
    return [*made, {"step": steps, "published_step": steps}]


def _retained(increase: float) -> dict[str, float]:
    return {"retain_loss_increase": increase, "retain_kl": increase / 2}
