"""Two workers under each ZeRO stage follow one plain process, step by step."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hone.recipe import Recipe, parse_recipe
from hone.run_folder import read_metrics
from hone.storage import Home
from models.tasks import TASKS, LossOptions
from tests.zero_matrix import failure, prepared, train_all
from training.batches import batch_plan
from training.job import Job
from training.launch import fit, prepare_job
from training.model import build_model
from training.optim import learning_rate, make_optimizer
from training.start import inputs_of
from training.token_rows import TokenRows

STEPS = 20


def recipe(base: Path, data: Path, *, task: str, method: dict[str, Any], stage: int, **sections: dict[str, Any]) -> Recipe:
    return parse_recipe(
        {
            "name": "equal",
            "task": task,
            "base": str(base),
            "data": {"train": str(data), "validation_fraction": 0.1, "max_length": 64},
            "method": method,
            "optim": {"learning_rate": 5e-3, "warmup_ratio": 0.1, **sections.get("optim", {})},
            "train": {
                "max_steps": STEPS,
                "num_train_epochs": 20,
                "global_batch_size": 8,
                "micro_batch_size": 2,
                "precision": "fp32",
                **sections.get("train", {}),
            },
            "zero": {"stage": stage, **sections.get("zero", {})},
            "scaling": {"num_workers": 2, "max_failures": 0},
        },
        where="test",
    )


def write_chats(path: Path) -> Path:
    rows = [
        [("user", f"what is {n} plus {n}?"), ("assistant", f"it is {2 * n}, because {'and '.join(['one '] * (n % 7 + 1))}")]
        for n in range(45)  # 41 training rows: the sixth step of each epoch has one row for two workers
    ]
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in row]}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_labels(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": f"row {n} {'good ' * (n % 5 + 1)}", "label": f"c{n % 3}"}) + "\n" for n in range(45)))
    return path


def plain_steps(job: Job) -> list[tuple[float, float]]:
    """Loss, and norm of the gradient, at each step of the same recipe in one process of ordinary torch."""
    chosen = job.recipe
    rows, task = TokenRows(job.data, "train"), TASKS[chosen.task]
    plan = batch_plan(chosen, job.data.sources)
    model, heads = build_model(job, dtype=torch.float32)
    model.train()
    optimizer, groups = make_optimizer(model, chosen, heads=heads, steps_per_epoch=plan.steps_per_epoch)
    steps = []
    for step in range(plan.total_steps):
        groups.set_step(optimizer, step, learning_rate(step, plan.total_steps, chosen.optim))
        batch = task.collate(rows.take(plan.rows(step)), inputs=inputs_of(job), packed=False)
        total, _ = task.loss(model, batch, LossOptions(label_smoothing=chosen.train.label_smoothing_factor))
        loss = total / int(rows.n_targets[plan.rows(step)].sum())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], chosen.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((loss.item(), norm.item()))
    return steps


SLOW_START = {"gradual_unfreezing": {"every_steps": 6}}
CASES: dict[str, dict[str, Any]] = {
    "chat, lora, 0": {"task": "chat", "method": {"type": "lora"}, "stage": 0},
    "chat, lora, 1": {"task": "chat", "method": {"type": "lora"}, "stage": 1},
    "chat, lora, 3": {"task": "chat", "method": {"type": "lora"}, "stage": 3},
    "chat, full, 3": {"task": "chat", "method": {"type": "full"}, "stage": 3},
    "chat, lora, 2, optimiser offloaded": {"task": "chat", "method": {"type": "lora"}, "stage": 2, "zero": {"offload_optimizer": True}},
    "chat, full, 3, all offloaded": {
        "task": "chat",
        "method": {"type": "full"},
        "stage": 3,
        "zero": {"offload_optimizer": True, "offload_param": True},
    },
    "new head, lora, 3": {"task": "text-classification", "method": {"type": "lora"}, "stage": 3},
    **{
        f"new head, gradual unfreezing, {stage}": {"task": "text-classification", "method": {"type": "full", **SLOW_START}, "stage": stage}
        for stage in (0, 1, 2, 3)
    },
    "chat, frozen, gradual unfreezing, 3": {"task": "chat", "method": {"type": "freeze", "freeze_layers": 1, **SLOW_START}, "stage": 3},
    "chat, layer-wise rates, LoRA+, 2": {
        "task": "chat",
        "method": {"type": "lora", "loraplus_lr_ratio": 4.0},
        "stage": 2,
        "optim": {"layerwise_lr_decay": 0.8, "lr_scheduler_type": "wsd"},
        "train": {"label_smoothing_factor": 0.1},
    },
}


@pytest.fixture(scope="module")
def runs(llama: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """All of them, by one pair of workers."""
    root = tmp_path_factory.mktemp("equal")
    files = {"chat": write_chats(root / "chat.jsonl"), "text-classification": write_labels(root / "labels.jsonl")}
    bases, home = {"chat": llama, "text-classification": bert}, Home(root / "home")
    jobs = {}
    for n, (name, case) in enumerate(CASES.items()):
        chosen = recipe(bases[case["task"]], files[case["task"]], **case)
        jobs[name] = prepared(chosen, root / str(n), home=home)
    train_all(root, list(jobs.values()), timeout_s=400)
    return jobs


@pytest.mark.parametrize("name", CASES)
def test_two_workers_follow_one_plain_process(runs: dict[str, Job], name: str) -> None:
    assert not failure(runs[name])
    assert_same_steps(runs[name])


@pytest.mark.usefixtures("local_ray")
def test_so_do_two_workers_of_ray_train(llama: Path, tmp_path: Path, home: Home) -> None:
    chosen = recipe(llama, write_chats(tmp_path / "chat.jsonl"), task="chat", method={"type": "lora"}, stage=2)
    job = prepare_job(chosen, home=home, run_id="equal")
    fit(job)
    assert_same_steps(job)


def assert_same_steps(job: Job) -> None:
    measured = [(m["loss"], m["grad_norm"]) for m in read_metrics(job.folder) if "loss" in m]
    expected = plain_steps(job)
    assert len(measured) == STEPS
    worst = max(abs(a - b) for (a, _), (b, _) in zip(measured, expected, strict=True))
    assert worst <= 1e-5, f"losses part by {worst:.1e}"
    assert [norm for _, norm in measured] == pytest.approx([norm for _, norm in expected], rel=1e-3)
    assert not math.isclose(measured[0][0], measured[-1][0], rel_tol=0.02), "nothing was learnt, so equality shows nothing"
