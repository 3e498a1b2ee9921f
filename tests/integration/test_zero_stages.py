"""Two workers under each ZeRO stage follow one plain process, step by step."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hone.base_model import find_base_model
from hone.recipe import Recipe, parse_recipe
from hone.storage import Home
from models.tasks import TASKS
from training.data import prepare_data
from training.launch import fit, prepare_job
from training.metrics import read_metrics
from training.model import build_model
from training.optim import learning_rate, make_optimizer
from training.start import batch_plan, inputs_of
from training.token_rows import TokenRows

STEPS = 20


def recipe(base: Path, data: Path, *, task: str, method: str, stage: int) -> Recipe:
    return parse_recipe(
        {
            "name": "equal",
            "task": task,
            "base": str(base),
            "data": {"train": str(data), "validation_fraction": 0.1, "max_length": 64},
            "method": {"type": method},
            "optim": {"learning_rate": 5e-3, "warmup_ratio": 0.1},
            "train": {"max_steps": STEPS, "num_train_epochs": 20, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
            "zero": {"stage": stage},
            "scaling": {"num_workers": 2, "max_failures": 0},
        },
        where="test",
    )


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    rows = [
        [("user", f"what is {n} plus {n}?"), ("assistant", f"it is {2 * n}, because {'and '.join(['one '] * (n % 7 + 1))}")]
        for n in range(45)  # 41 training rows: the sixth step of each epoch has one row for two workers
    ]
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in row]}) for row in rows]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def label_file(tmp_path: Path) -> Path:
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {n} {'good ' * (n % 5 + 1)}", "label": f"c{n % 3}"}) + "\n" for n in range(45)))
    return path


def plain_losses(chosen: Recipe, home: Home, job: Any) -> list[float]:
    """The same recipe in one process of ordinary torch: no Ray, no DeepSpeed, one batch a step."""
    prepared = prepare_data(chosen, find_base_model(chosen.base, home=home), home=home)
    rows, task = TokenRows(prepared, "train"), TASKS[chosen.task]
    plan = batch_plan(chosen, prepared.sources)
    model = build_model(job, dtype=torch.float32, sharded=False).train()
    heads = task.head_modules(model.get_base_model() if hasattr(model, "get_base_model") else model)
    optimizer, groups = make_optimizer(model, chosen, heads=heads, steps_per_epoch=plan.steps_per_epoch)
    losses = []
    for step in range(plan.total_steps):
        groups.set_step(optimizer, step, learning_rate(step, plan.total_steps, chosen.optim))
        batch = task.collate(rows.take(plan.rows(step)), inputs=inputs_of(job), packed=False)
        total, _ = task.loss(model, batch)
        loss = total / int(rows.n_targets[plan.rows(step)].sum())
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], chosen.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("method", "stage"), [("lora", 0), ("lora", 1), ("lora", 2), ("lora", 3), ("full", 3)])
@pytest.mark.usefixtures("local_ray")
def test_two_workers_follow_one_plain_process_in_chat(llama: Path, chat_file: Path, home: Home, stage: int, method: str) -> None:
    assert_same_losses(recipe(llama, chat_file, task="chat", method=method, stage=stage), home)


@pytest.mark.parametrize("stage", [3])
@pytest.mark.usefixtures("local_ray")
def test_two_workers_follow_one_plain_process_with_a_new_head(bert: Path, label_file: Path, home: Home, stage: int) -> None:
    assert_same_losses(recipe(bert, label_file, task="text-classification", method="lora", stage=stage), home)


def assert_same_losses(chosen: Recipe, home: Home) -> None:
    job = prepare_job(chosen, home=home, run_id="equal")
    fit(job)
    measured = [m["loss"] for m in read_metrics(job.folder) if "loss" in m]
    expected = plain_losses(chosen, home, job)
    assert len(measured) == STEPS
    worst = max(abs(a - b) for a, b in zip(measured, expected, strict=True))
    assert worst <= 1e-5, f"losses part by {worst:.1e}"
    assert not math.isclose(measured[0], measured[-1], rel_tol=0.02), "nothing was learnt, so equality shows nothing"
