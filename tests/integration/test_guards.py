"""Guards at work on two workers: against overfitting, against forgetting, and against a loss that is no number."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from hone.recipe import parse_recipe
from hone.run_folder import read_metrics
from hone.storage import Home
from tests.samples import WORDS, completion, text_classification
from tests.zero_matrix import failure, prepared, train_all
from training.job import Job

NONSENSE = random.Random(0)
LM: dict[str, Any] = {
    "task": "completion",
    "optim": {"learning_rate": 1e-2},
    "train": {"max_steps": 24, "eval_steps": 3, "global_batch_size": 8},
    "method": {"type": "full"},
}


def general(n: int) -> dict[str, Any]:
    return {"text": f"{n} green hills near an old {WORDS[n % 4]} house, thank you"}


def unlearnable(n: int) -> dict[str, Any]:
    return {"text": f"row {n} " + "".join(NONSENSE.choices("abcdefgh ", k=12)), "label": NONSENSE.choice("ab")}


def regression(n: int) -> dict[str, Any]:
    return {"text": f"row {n}", "number": 1e30 if n == 6 else 1.0}


@pytest.fixture(scope="module")
def runs(llama: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    root = tmp_path_factory.mktemp("guards")
    files = {
        make.__name__: write(root / f"{make.__name__}.jsonl", [make(n) for n in range(count)])
        for make, count in ((completion, 64), (general, 40), (unlearnable, 60), (regression, 16), (text_classification, 40))
    }
    target = {"train": files["completion"], "max_length": 48, "stop_on": [], "near_duplicate_rows": 0}
    watched = {**target, "retain": files["general"], "retain_fraction": 0.0}
    replayed = {**watched, "retain_fraction": 0.3}
    classified = {"train": files["unlearnable"], "validation_fraction": 0.3, "stop_on": []}
    cases: dict[str, dict[str, Any]] = {
        "unwatched": {**LM, "data": watched},
        "replay": {**LM, "data": replayed},
        "penalty": {**LM, "data": replayed, "guard": {"kl_penalty": 2.0}},
        "penalty, lora, 3": {**LM, "data": replayed, "guard": {"kl_penalty": 2.0}, "method": {"type": "lora"}, "zero": {"stage": 3}},
        "budget": {**LM, "data": watched, "guard": {"max_retain_loss_increase": 0.08}},
        "spent": {**LM, "data": watched, "guard": {"max_retain_loss_increase": 1e-4}, "method": {"type": "prompt"}},
        "overfits": {
            "task": "text-classification",
            "data": classified,
            "method": {"type": "full"},
            "optim": {"learning_rate": 5e-3},
            "train": {"max_steps": 60, "num_train_epochs": 60, "eval_steps": 3, "global_batch_size": 8},
            "guard": {"early_stopping_patience": 3},
        },
        "no number": {
            "task": "text-classification",
            "data": {"train": files["regression"], "validation_fraction": 0, "stop_on": [], "near_duplicate_rows": 0},
            "train": {"max_steps": 4, "global_batch_size": 16},
            "zero": {"stage": 3},
        },
    }
    jobs = {}
    for n, (name, case) in enumerate(cases.items()):
        base = llama if case["task"] == "completion" else bert
        tree = {"name": "guard", "base": str(base), "scaling": {"num_workers": 2}, **case}
        jobs[name] = prepared(parse_recipe(tree, where="test"), root / str(n), home=Home(root / "home"))
    train_all(root, list(jobs.values()), timeout_s=400)
    return jobs


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def last(job: Job, metric: str) -> float:
    return float([line[metric] for line in read_metrics(job.folder) if metric in line][-1])


def test_replay_and_penalty_each_keep_more_of_what_was_known(runs: dict[str, Job]) -> None:
    for name in ("unwatched", "replay", "penalty", "penalty, lora, 3"):
        assert not failure(runs[name])
        lines = read_metrics(runs[name].folder)
        assert lines[1]["retain_loss_increase"] == pytest.approx(0, abs=1e-4)
        assert lines[1]["retain_kl"] == pytest.approx(0, abs=1e-4)
        assert last(runs[name], "eval_loss") < lines[1]["eval_loss"]
    forgotten, replayed, held = (last(runs[name], "retain_loss_increase") for name in ("unwatched", "replay", "penalty"))
    assert replayed < forgotten
    assert last(runs["penalty"], "retain_kl") < last(runs["unwatched"], "retain_kl")
    assert held < forgotten
    assert last(runs["penalty, lora, 3"], "kl") >= 0


def test_training_stops_when_the_budget_is_spent_and_keeps_what_was_within_it(runs: dict[str, Job]) -> None:
    job = runs["budget"]
    assert not failure(job)
    lines = read_metrics(job.folder)
    [stopped] = [line for line in lines if "stopped" in line]
    [kept] = [line for line in lines if "published_step" in line]
    increases = {line["step"]: line["retain_loss_increase"] for line in lines if "retain_loss_increase" in line}
    assert "past guard.max_retain_loss_increase" in stopped["stopped"]
    assert increases[stopped["step"]] > 0.08 >= increases[kept["published_step"]]
    assert stopped["step"] < 24
    assert (job.export_folder / "golden.safetensors").exists()


def test_a_budget_that_is_spent_before_the_first_step_ends_the_run(runs: dict[str, Job]) -> None:
    assert "exceeded before the first step" in failure(runs["spent"])


def test_training_stops_when_validation_gets_no_better_and_the_best_is_kept(runs: dict[str, Job]) -> None:
    job = runs["overfits"]
    assert not failure(job)
    lines = read_metrics(job.folder)
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line and line["step"]}
    [stopped] = [line for line in lines if "stopped" in line]
    [kept] = [line for line in lines if "published_step" in line]
    assert stopped["step"] < 60
    assert losses[kept["published_step"]] == min(losses.values())
    assert kept["published_step"] < stopped["step"]


def test_a_loss_that_is_no_number_names_step_and_row(runs: dict[str, Job]) -> None:
    said = failure(runs["no number"])
    assert "step 1: the loss is not a finite number on " in said
    assert "regression.jsonl:7;" in said
    assert not runs["no number"].export_folder.exists()
