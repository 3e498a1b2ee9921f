"""A run that goes on with other workers than it began with is the run that it would have been, and its ledger proves it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hone.run_folder import attempts, read_events, read_metrics
from hone.storage import Home
from tests.disturbed import losses_of, proof_of
from tests.integration.test_zero_stages import SLOW_START, recipe, write_chats, write_labels
from tests.zero_matrix import failure, prepared, train_all
from training.job import Job
from training.ledger import LEDGER_FOLDER

STEPS = 20
PARTS = ((2, 7), (1, 7), (2, 0))
"""Workers, and after how many steps they are gone; each has a checkpoint of the step before."""
TRAIN = {"save_steps": 100, "eval_steps": 5}
FULL = {"optim": {"learning_rate": 1e-3}}
LITTLE = {"stage3_max_live_parameters": 20_000, "stage3_max_reuse_distance": 20_000}
"""Less than the model has, as it is of a large one."""
CASES: dict[str, dict[str, Any]] = {
    **{f"lora, {stage}": {"task": "chat", "method": {"type": "lora"}, "stage": stage} for stage in (0, 1, 2, 3)},
    **{f"full, {stage}": {"task": "chat", "method": {"type": "full"}, "stage": stage, **FULL} for stage in (0, 1, 2, 3)},
    "lora, average, 2": {"task": "chat", "method": {"type": "lora"}, "stage": 2, "train": {"ema_decay": 0.9}},
    "full, average, 3": {"task": "chat", "method": {"type": "full"}, "stage": 3, "train": {"ema_decay": 0.9}, **FULL},
    "full, offloaded, 3": {
        "task": "chat",
        "method": {"type": "full"},
        "stage": 3,
        "zero": {"offload_optimizer": True, "offload_param": True},
        **FULL,
    },
    "lora, little gathered, 3": {"task": "chat", "method": {"type": "lora"}, "stage": 3, "zero": LITTLE},
    "full, little gathered, average, 3": {
        "task": "chat",
        "method": {"type": "full"},
        "stage": 3,
        "zero": LITTLE,
        "train": {"ema_decay": 0.9},
        **FULL,
    },
    "gradual unfreezing, 0": {"task": "text-classification", "method": {"type": "full", **SLOW_START}, "stage": 0, **FULL},
    "gradual unfreezing, 3": {"task": "text-classification", "method": {"type": "full", **SLOW_START}, "stage": 3, **FULL},
}


@pytest.fixture(scope="module")
def runs(llama: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Job, Job]]:
    """Each case undisturbed, and with 2, 1 and 2 workers."""
    root = tmp_path_factory.mktemp("elastic")
    files = {"chat": write_chats(root / "chat.jsonl"), "text-classification": write_labels(root / "labels.jsonl")}
    bases, home = {"chat": llama, "text-classification": bert}, Home(root / "home")
    made = {}
    for n, (name, case) in enumerate(CASES.items()):
        chosen = recipe(bases[case["task"]], files[case["task"]], **{**case, "train": {**TRAIN, **case.get("train", {})}})
        made[name] = prepared(chosen, root / f"{n}-whole", home=home), prepared(chosen, root / f"{n}-parts", home=home)
    train_all(root, [whole for whole, _ in made.values()], timeout_s=400)
    for workers, steps in PARTS:
        train_all(root, [parts for _, parts in made.values()], timeout_s=400, workers=workers, steps=steps)
        assert not any(map(failure, (parts for _, parts in made.values())))
    return made


@pytest.mark.parametrize("name", CASES)
def test_two_then_one_then_two_workers_learn_the_same(runs: dict[str, tuple[Job, Job]], name: str) -> None:
    whole, parts = runs[name]
    assert not failure(whole)
    expected, found = ({m["step"]: m for m in read_metrics(job.folder) if "loss" in m} for job in (whole, parts))
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    assert max(abs(found[step]["loss"] - expected[step]["loss"]) for step in found) <= 1e-5
    assert abs(found[1]["loss"] - found[STEPS]["loss"]) > 0.02, "nothing was learnt, so equality shows nothing"
    evaluated = [[m["eval_loss"] for m in read_metrics(job.folder) if "eval_loss" in m] for job in (whole, parts)]
    assert evaluated[1] == pytest.approx(evaluated[0], abs=1e-5)
    assert [(a.step, a.world_size) for a in attempts(parts.folder)] == [(0, 2), (6, 1), (12, 2)]


@pytest.mark.parametrize("name", CASES)
def test_the_ledger_proves_it(runs: dict[str, tuple[Job, Job]], name: str) -> None:
    proof = proof_of(runs[name][1].folder)
    assert (proof.steps, proof.wrong) == (STEPS, [])
    assert proof.rows == sum(m["rows"] for m in read_metrics(runs[name][0].folder) if "rows" in m)
    assert proof.repeated == 2, "the last step of an attempt is done again by the next one"


def test_the_same_run_twice_is_the_same_to_the_bit(runs: dict[str, tuple[Job, Job]], tmp_path: Path) -> None:
    first = runs["lora, 2"][0]
    again = first.model_copy(update={"folder": tmp_path / "again"})
    again.folder.mkdir()
    again.save()
    train_all(tmp_path, [again], timeout_s=120)
    assert not failure(again)
    assert losses_of(again.folder) == losses_of(first.folder)
    files = [job.export_folder / "adapter_model.safetensors" for job in (first, again)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_adapter_is_one_small_file_and_a_model_a_part_a_rank(runs: dict[str, tuple[Job, Job]]) -> None:
    def newest(job: Job) -> list[str]:
        folder = max((job.folder / "checkpoints").iterdir())
        return sorted(path.name for path in folder.glob("*.safetensors"))

    assert newest(runs["lora, 3"][1]) == ["part-00000.safetensors"]
    assert [e["step"] for e in read_events(runs["full, 3"][1].folder) if e["event"] == "checkpoint"] == [6, 12]
    by_two = runs["full, 3"][1].folder / "checkpoints" / "step-00000006-0001"
    assert sorted(path.name for path in by_two.glob("*.safetensors")) == ["part-00000.safetensors", "part-00001.safetensors"]


@pytest.mark.parametrize("harm", ["cut", "bit", "gone", "index"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(runs: dict[str, tuple[Job, Job]], tmp_path: Path, harm: str) -> None:
    whole, parts = runs["full, 3"]
    job = copied(parts, tmp_path / "run", up_to=2)
    newest = max((job.folder / "checkpoints").iterdir())
    part = newest / "part-00000.safetensors"
    if harm == "cut":
        part.write_bytes(part.read_bytes()[:-100])
    elif harm == "bit":
        data = bytearray(part.read_bytes())
        data[-5] ^= 1
        part.write_bytes(data)
    elif harm == "gone":
        part.unlink()
    else:
        (newest / "checkpoint.json").write_text((newest / "checkpoint.json").read_text()[:100])
    train_all(tmp_path, [job], timeout_s=120)
    assert not failure(job)
    last = attempts(job.folder)[-1]
    assert (last.step, last.checkpoint) == (6, "step-00000006-0001")
    assert newest.name in last.passed_over[0]
    losses = [[m["loss"] for m in read_metrics(each.folder) if "loss" in m] for each in (whole, job)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert not proof_of(job.folder).wrong


def test_what_the_ledger_does_not_prove_is_not_gone_on_from(runs: dict[str, tuple[Job, Job]], tmp_path: Path) -> None:
    job = copied(runs["lora, 2"][1], tmp_path / "run", up_to=2)
    lines = job.folder / LEDGER_FOLDER / "rows-0001-00001.jsonl"
    kept = [json.loads(line) for line in lines.read_text().splitlines()]
    kept[2]["rows"] = kept[3]["rows"]
    lines.write_text("".join(json.dumps(line) + "\n" for line in kept))
    train_all(tmp_path, [job], timeout_s=120)
    assert "cannot be gone on from: step 3" in failure(job)
    assert any(line.startswith("step 3:") for line in proof_of(job.folder).wrong)


def copied(job: Job, folder: Path, *, up_to: int) -> Job:
    """A run as it was after so many attempts."""
    shutil.copytree(job.folder, folder)
    for path in [*folder.glob(f"{LEDGER_FOLDER}/*-{up_to + 1:04d}*"), *folder.glob("rank-*.json")]:
        path.unlink()
    moved = job.model_copy(update={"folder": folder})
    moved.save()
    return moved
