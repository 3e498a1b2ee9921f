"""fp16 on two workers: near fp32, overflows done again and written down, the loss scale taken up by a run that goes on."""

from pathlib import Path
from typing import Any

import pytest

from hone.errors import ResourceError
from hone.run_folder import attempts, read_events, read_metrics
from hone.storage import Home
from tests.disturbed import assert_proven, losses_of
from tests.integration.test_zero_stages import recipe, write_chats
from tests.zero_matrix import failure, prepared, train_all
from training.job import Job
from training.launch import prepare_job

STEPS = 20
CUT_AT = 12
HALF = "tests.half"
CASES: dict[str, dict[str, Any]] = {
    "lora, 2": {"method": {"type": "lora"}, "stage": 2},
    "full, 1": {"method": {"type": "full"}, "stage": 1},
    "full, 3": {"method": {"type": "full"}, "stage": 3},
}


@pytest.fixture(scope="module")
def runs(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Job]:
    """Each case in fp32, in fp16, and in fp16 by workers that are gone after some steps and then by others."""
    root = tmp_path_factory.mktemp("half")
    rows, home = write_chats(root / "chat.jsonl"), Home(root / "home")
    made = {
        (name, how): prepared(
            recipe(llama, rows, task="chat", **case, train={"precision": how.split()[0], "max_steps": STEPS}),
            root / f"{number}-{how.replace(' ', '-')}",
            home=home,
        )
        for number, (name, case) in enumerate(CASES.items())
        for how in ("fp32", "fp16", "fp16 cut")
    }
    full = recipe(llama, rows, task="chat", method={"type": "full"}, stage=0, train={"precision": "bf16", "max_steps": STEPS})
    made["full, 0", "bf16"] = prepared(full, root / "bf16", home=home)
    train_all(root, [job for (_, how), job in made.items() if "fp16" not in how], timeout_s=300)
    jobs = [job for (_, how), job in made.items() if "fp16" in how]
    steps = [CUT_AT if how == "fp16 cut" else 0 for (_, how) in made if "fp16" in how]
    train_all(root, jobs, timeout_s=500, steps=steps, main=HALF)
    train_all(root, [job for (_, how), job in made.items() if how == "fp16 cut"], timeout_s=300, main=HALF)
    return made


@pytest.mark.parametrize("name", CASES)
def test_losses_in_fp16_are_near_those_in_fp32(runs: dict[tuple[str, str], Job], name: str) -> None:
    whole, half = runs[name, "fp32"], runs[name, "fp16"]
    assert not failure(whole)
    assert not failure(half)
    expected, losses = losses_of(whole.folder), losses_of(half.folder)
    assert losses == pytest.approx(expected, rel=0.02)
    assert losses != expected
    assert losses[STEPS] < 0.9 * losses[1]
    assert_proven(half.folder, steps=STEPS)


def test_without_zero_losses_in_bf16_are_near_those_in_fp32(runs: dict[tuple[str, str], Job]) -> None:
    half = runs["full, 0", "bf16"]
    assert not failure(half)
    assert losses_of(half.folder) == pytest.approx(losses_of(runs["full, 1", "fp32"].folder), rel=0.03)


def test_a_step_whose_gradients_overflow_is_done_again_and_written_down(runs: dict[tuple[str, str], Job]) -> None:
    overflown = 0
    for (_, how), job in runs.items():
        told = [(event["step"], event["loss_scale"]) for event in read_events(job.folder) if event["event"] == "overflow"]
        steps = [line for line in read_metrics(job.folder) if "grad_norm" in line]
        assert len(steps) == STEPS
        assert ("loss_scale" in steps[0]) == ("fp16" in how)
        if how == "fp16":
            assert sum(line.get("overflows", 0) for line in steps) == len(told)
            assert steps[-1]["loss_scale"] == 2.0 ** (16 - len(told))
            overflown += len(told)
        assert not any(event["event"] in ("loss_spike", "stalled") for event in read_events(job.folder))
    assert overflown, "no case had an overflow, so nothing was seen of one"


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_goes_on_keeps_the_loss_scale(runs: dict[tuple[str, str], Job], name: str) -> None:
    quiet, cut = runs[name, "fp16"], runs[name, "fp16 cut"]
    assert not failure(cut)
    first, second = attempts(cut.folder)
    assert first.step == 0 < second.step <= CUT_AT
    scales = [{line["step"]: line["loss_scale"] for line in read_metrics(job.folder) if "loss_scale" in line} for job in (quiet, cut)]
    assert scales[0] == scales[1]
    assert losses_of(cut.folder) == pytest.approx(losses_of(quiet.folder), rel=1e-3)
    assert_proven(cut.folder, steps=STEPS)


@pytest.mark.usefixtures("local_ray")
def test_fp16_without_a_gpu_is_refused_before_a_run_is_made(llama: Path, tmp_path: Path, home: Home) -> None:
    chosen = recipe(llama, write_chats(tmp_path / "chat.jsonl"), task="chat", method={"type": "lora"}, stage=2, train={"precision": "fp16"})
    with pytest.raises(ResourceError, match=r"train\.precision fp16 is for GPUs"):
        prepare_job(chosen, home=home, run_id="r1")
    assert not (home.runs / "r1").exists()
