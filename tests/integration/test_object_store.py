"""Runs whose rows and checkpoints are in an S3 server: gone on from, at another number of workers, past torn and damaged uploads."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hone.errors import ResourceError
from hone.folder import Folder
from hone.recipe import with_overrides
from hone.run_folder import attempts, read_events
from hone.storage import Home
from tests.disturbed import assert_proven, losses_of
from tests.integration.test_zero_stages import STEPS, recipe, write_chats
from tests.s3 import Store
from tests.zero_matrix import failure, prepared, train_all
from training.checkpoints.files import INDEX, find
from training.job import Job

pytestmark = pytest.mark.timeout(1300)

TORN = "part-00000.safetensors"
UPLOAD = """
import sys, time
from hone.folder import Folder
file = Folder(sys.argv[1]).writer(sys.argv[2])
for _ in range(4):
    file.write(bytes(6 * 2**20))
print("begun", flush=True)
time.sleep(600)
"""
"""More than a part of a multipart upload, which is never completed."""


@pytest.fixture(scope="module")
def bucket(store: Store) -> str:
    return store.new_bucket()


@pytest.fixture(scope="module")
def runs(llama: Path, store: Store, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Job]:
    """One with everything here; one with everything there, whose two workers were gone after 7 steps and after 14."""
    root = tmp_path_factory.mktemp("s3")
    rows, home = write_chats(root / "chat.jsonl"), Home(root / "home")
    Folder(store.uri(bucket)).write("rows/chat.jsonl", rows.read_bytes())
    settings: dict[str, Any] = {"task": "chat", "method": {"type": "full"}, "stage": 3, "train": {"save_steps": 3, "eval_steps": STEPS}}
    chosen = recipe(llama, rows, **settings)
    here = prepared(chosen, root / "here", home=home)
    away = {"data.train": store.uri(f"{bucket}/rows/chat.jsonl"), "checkpoints.uri": store.uri(f"{bucket}/checkpoints")}
    there = prepared(with_overrides(chosen, away), root / "there", home=home)
    train_all(root, [there], timeout_s=400, steps=7)
    tear(there)
    train_all(root, [there], timeout_s=400, workers=1, steps=7)
    damage(there)
    train_all(root, [here, there], timeout_s=400)
    assert not failure(here)
    return here, there


def tear(job: Job) -> None:
    """Kill a process in the middle of an upload, of what would be the newest checkpoint."""
    folder = job.recipe.checkpoints.uri
    assert folder
    uri, _, query = folder.partition("?")
    argv = [sys.executable, "-c", UPLOAD, f"{uri}/{job.run_id}/step-00000099-0001?{query}", TORN]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        process.kill()


def damage(job: Job) -> None:
    """Change a bit of the newest checkpoint."""
    root = job.checkpoints
    newest = root.below(find(root)[0])
    data = bytearray(newest.read(TORN))
    data[-5] ^= 1
    newest.write(TORN, bytes(data))


def test_a_run_goes_on_from_the_store_with_other_workers_as_if_nothing_had_happened(runs: tuple[Job, Job]) -> None:
    here, there = runs
    assert not failure(there)
    begun = attempts(there.folder)
    assert [attempt.world_size for attempt in begun] == [2, 1, 2]
    assert 0 < begun[1].step <= 6  # the one that is begun with a step's notice may not be whole in a slow store
    assert losses_of(there.folder) == pytest.approx(losses_of(here.folder), abs=1e-5)
    assert_proven(there.folder, steps=STEPS)
    assert (here.folder / "checkpoints").is_dir()
    assert not (there.folder / "checkpoints").exists()


def test_a_torn_upload_is_no_file_and_is_not_gone_on_from(runs: tuple[Job, Job]) -> None:
    root = runs[1].checkpoints
    assert root.below("step-00000099-0001").size(TORN) is None
    assert "step-00000099-0001" not in find(root)
    assert not any("step-00000099" in why for attempt in attempts(runs[1].folder) for why in attempt.passed_over)


def test_a_damaged_checkpoint_in_the_store_is_passed_over_for_the_one_before(runs: tuple[Job, Job]) -> None:
    last = attempts(runs[1].folder)[-1]
    [why] = last.passed_over
    assert "its bytes have changed since it was written" in why
    assert why.startswith(f"{runs[1].checkpoints}/step-")
    assert last.checkpoint
    assert f"step-{last.step:08d}" in last.checkpoint
    assert last.checkpoint < why.split("/")[-2]


def test_only_the_newest_checkpoints_stay_in_the_store(runs: tuple[Job, Job]) -> None:
    job = runs[1]
    saved = [event["step"] for event in read_events(job.folder) if event["event"] == "checkpoint"]
    assert len(saved) > 3
    kept = find(job.checkpoints)
    assert [int(name.split("-")[1]) for name in kept] == [18, 15]
    assert json.loads(job.checkpoints.below(kept[0]).read(INDEX))["step"] == 18


def test_a_store_that_is_not_there_is_said_before_anything_is_prepared(llama: Path, tmp_path: Path, home: Home, store: Store) -> None:
    rows = write_chats(tmp_path / "chat.jsonl")
    chosen = with_overrides(recipe(llama, rows, task="chat", method={"type": "lora"}, stage=0), {"checkpoints.uri": store.uri("nowhere/x")})
    with pytest.raises(ResourceError, match=r"^checkpoints.uri s3://nowhere/x: cannot be written"):
        prepared(chosen, tmp_path / "run", home=home)
    assert not (tmp_path / "run").exists()
    assert not home.datasets.exists() or not list(home.datasets.iterdir())
