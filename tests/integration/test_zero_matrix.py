"""Every allowed pair of task and method under ZeRO-0, 2 and 3 on two workers: the loss falls, the metric beats the untrained one, and the
saved adapter answers in a clean process as it did."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hone.methods import METHODS, why_not
from hone.recipe import parse_recipe
from hone.storage import Home
from hone.tasks import TASKS
from tests.samples import write_sample
from tests.tiny import BASE_OF, MAKERS
from tests.zero_matrix import failure, prepared, train_all
from training.job import Job
from training.launch import final_metrics

STEPS = 32
RATES = {"ia3": 1e-1, "prompt": 1e-1, "prefix": 5e-1}
"""A few small numbers have far to go in so few steps."""
SOME = {
    ("chat", "lora"),
    ("seq2seq", "adapter"),
    ("text-classification", "freeze"),
    ("image-classification", "ia3"),
    ("preference", "prefix"),
}
"""What is tried in every run of the tests; `make test-matrix` tries all."""
ALL = os.environ.get("HONE_TEST_MATRIX") == "all"
PAIRS = [(task, method, {}) for task in TASKS for method in METHODS if not why_not(task, method)]
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("chat", "lora", {"method.init_lora_weights": "pissa"}),
    ("text-classification", "lora", {"method.init_lora_weights": "pissa", "train.ema_decay": 0.8}),
    ("chat", "lora", {"method.use_dora": True, "method.use_rslora": True}),
    ("text-classification", "full", {"method.gradual_unfreezing": {"every_steps": 4}, "optim.layerwise_lr_decay": 0.9}),
    ("chat", "full", {"guard.kl_penalty": 0.05, "train.label_smoothing_factor": 0.1, "train.dropout": 0.1}),
    ("chat", "adapter", {"guard.kl_penalty": 0.05, "train.ema_decay": 0.8}),
]
Case = tuple[str, str, dict[str, Any], int]
CASES: list[Case] = [
    (task, method, extra, stage)
    for task, method, extra in [*PAIRS, *VARIANTS]
    for stage in (0, 2, 3)
    if (ALL or (task, method) in SOME or (extra and stage))
    and not (stage == 3 and (extra.get("method.use_dora") or (method == "full" and "guard.kl_penalty" in extra)))
]


def name_of(case: Case) -> str:
    task, method, extra, stage = case
    return "-".join([task, method, *(key.rsplit(".", 1)[-1] for key in extra), f"zero{stage}"])


def tree(case: Case, base: Path, rows: Path) -> dict[str, Any]:
    task, method, extra, stage = case
    made: dict[str, Any] = {
        "name": "matrix",
        "task": task,
        "base": str(base),
        "data": {"train": str(rows), "validation_fraction": 0.25, "max_length": 64, "stop_on": []},
        "method": {"type": method},
        "optim": {"learning_rate": RATES.get(method, 1e-2)},
        "train": {"max_steps": STEPS, "num_train_epochs": STEPS, "global_batch_size": 16, "micro_batch_size": 8, "eval_steps": STEPS // 2},
        "zero": {"stage": stage},
        "scaling": {"num_workers": 2},
    }
    for key, value in extra.items():
        section, field = key.split(".")
        made.setdefault(section, {})[field] = value
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """All cases, trained by one pair of workers; and the difference of each saved adapter, found by one clean process."""
    root = tmp_path_factory.mktemp("matrix")
    home = Home(root / "home")
    bases = {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}
    files = {task: write_sample(root, task) for task in TASKS}
    jobs: dict[str, Job] = {}
    for case in CASES:
        recipe = parse_recipe(tree(case, bases[BASE_OF[case[0]]], files[case[0]]), where="test")
        jobs[name_of(case)] = prepared(recipe, root / name_of(case), home=home)
    train_all(root, list(jobs.values()), timeout_s=2400 if ALL else 500)
    subprocess.run([sys.executable, "-c", CHECK_ALL, str(root)], check=True, timeout=1200)
    return jobs


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_it_learns_and_is_saved(runs: dict[str, Job], case: Case) -> None:
    job = runs[name_of(case)]
    assert not failure(job)
    metrics = final_metrics(job.folder)
    assert metrics["loss"] < first_loss(job)
    assert metrics["eval_loss"] < metrics["base_eval_loss"]
    accuracy = next((name for name in metrics if name.startswith("eval_") and name.endswith("accuracy")), None)
    if accuracy:
        assert metrics[accuracy] > metrics[f"base_{accuracy}"] or metrics[f"base_{accuracy}"] == 1
    assert float((job.folder / "difference").read_text()) < 1e-3


def first_loss(job: Job) -> float:
    lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    return float(next(line["loss"] for line in lines if "loss" in line))


CHECK_ALL = """
import json, sys
from pathlib import Path
from training.check import difference
from training.job import Job
for folder in map(Path, json.loads((Path(sys.argv[1]) / "cases.json").read_text())["folders"]):
    if (folder / "export").exists():
        (folder / "difference").write_text(str(difference(Job.load(folder))))
"""
