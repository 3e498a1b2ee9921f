"""`hone runs`, as it is typed, on the folders of runs that have been."""

import json
import os
from pathlib import Path

import pytest

from hone.recipe import with_overrides
from hone.run_folder import METRICS_FILE, tell
from hone.storage import Home
from hone.store import Store
from tests.runs import make_recipe, prepared, rows_for, written
from tests.unit.cluster.conftest import Hone
from training.batches import batch_plan
from training.job import Job
from training.ledger import Ledger, begin_attempt


@pytest.fixture
def run(llama: Path, tmp_path: Path) -> Job:
    """A run that was cut off after three steps, began again after the second, and did five in all."""
    home, rows = Home(tmp_path / ".hone"), written(tmp_path / "rows.jsonl", rows_for("chat"))
    home.runs.mkdir(parents=True)
    recipe = with_overrides(make_recipe(llama, rows, "chat"), {"train.global_batch_size": 2, "train.precision": "fp32"})
    job = prepared(recipe, home.runs / "bot-1", home=home)
    plan = batch_plan(job.recipe, job.data.sources)
    for after, steps in ((0, range(1, 4)), (2, range(3, 6))):
        number = begin_attempt(job.folder, step=after, world_size=1, passed_over=["step 3: its bytes have changed"] if after else []).number
        tell(job.folder, "attempt", number=number, step=after)
        with Ledger(job.folder, attempt=number, rank=0) as ledger:
            for step in steps:
                ledger.write(step, [plan.rows(step - 1)], loss=2.0 / step, seed=0)
    lines = [{"step": 0, "total_steps": plan.total_steps}, *({"step": step, "loss": 2.0 / step} for step in range(1, 6))]
    (job.folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    store = Store(home.store_url)
    store.add_job("bot-1", kind="train", recipe="recipe.yaml", status="running")
    store.move_job("bot-1", "failed", message="a machine went away")
    store.close()
    return job


@pytest.mark.usefixtures("run")
def test_the_list_says_how_far_each_is(hone: Hone) -> None:
    done = hone("runs", "list")
    assert done.returncode == 0, done.stderr
    assert "bot-1  failed  5/" in done.stdout
    assert "a machine went away" in done.stdout
    (found,) = json.loads(hone("runs", "list", "--json").stdout)
    assert (found["id"], found["step"], found["loss"], len(found["attempts"])) == ("bot-1", 5, 0.4, 2)


@pytest.mark.usefixtures("run")
def test_showing_one_says_what_happened(hone: Hone) -> None:
    said = hone("runs", "show", "bot-1").stdout
    for part in (
        "bot-1: failed (a machine went away), step 5 of",
        "chat by lora on",
        "its bytes have changed",
        "attempt",
        "number 2, step 2",
    ):
        assert part in said, part


def test_a_run_is_proven_until_its_ledger_is_touched(hone: Hone, run: Job) -> None:
    done = hone("runs", "verify", "bot-1")
    assert done.returncode == 0, done.stderr
    assert "proven: 5 of" in done.stdout
    assert "1 steps were done again, with losses that differ by 0e+00 at most" in done.stdout
    lines = run.folder / "ledger" / "rows-0002-00000.jsonl"
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[1:]))
    done = hone("runs", "verify", "bot-1")
    assert done.returncode == 1
    assert done.stderr == "bot-1: step 3: nothing is written of it\n"
    assert json.loads(hone("runs", "verify", "bot-1", "--json").stdout)["wrong"] == ["step 3: nothing is written of it"]


@pytest.mark.usefixtures("run")
def test_tail_gives_what_there_is_of_a_run_that_is_over(hone: Hone) -> None:
    said = hone("runs", "tail", "bot-1").stdout.splitlines()
    assert said[-1] == "step 5  loss 0.4"
    assert any("attempt  number 2" in line for line in said)


@pytest.mark.usefixtures("run")
def test_stopping_what_has_ended_says_how_it_ended(hone: Hone) -> None:
    assert hone("runs", "stop", "bot-1").stdout == "bot-1: failed\n"


def test_a_run_whose_process_is_gone_is_lost(hone: Hone, run: Job, tmp_path: Path) -> None:
    store = Store(Home(tmp_path / ".hone").store_url)
    store.reopen_job("bot-1")
    store.close()
    (run.folder / "driver.json").write_text(json.dumps({"host": os.uname().nodename, "pid": os.getpid(), "started": "1"}))
    assert "bot-1: lost (the process that ran it is gone" in hone("runs", "show", "bot-1").stdout


def test_two_runs_differ_in_what_was_set(hone: Hone, run: Job, tmp_path: Path) -> None:
    home = Home(tmp_path / ".hone")
    prepared(with_overrides(run.recipe, {"train.seed": 3}), home.runs / "bot-2", home=home)
    lines = [line.split() for line in hone("runs", "compare", "bot-1", "bot-2").stdout.splitlines()]
    assert ["train.seed", "0", "3"] in lines
    assert not any(line[:1] == ["task"] for line in lines)


@pytest.mark.parametrize("command", ["show", "verify", "tail", "resume", "stop", "compare"])
def test_a_run_that_is_not_there_is_one_line(hone: Hone, command: str) -> None:
    done = hone("runs", command, "nobody")
    assert done.returncode == 1
    assert done.stderr.startswith("hone: no run 'nobody' in ")
    assert len(done.stderr.splitlines()) == 1
