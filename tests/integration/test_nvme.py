"""Optimiser state and weights in files on NVMe: a run learns as with all in memory, goes on with other workers, and leaves no file."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hone.recipe import Recipe
from hone.run_folder import attempts, read_events, read_metrics
from hone.storage import Home
from tests.disturbed import proof_of
from tests.integration.test_zero_stages import STEPS, recipe, write_chats
from tests.tiny import make_llama
from tests.zero_matrix import failure, prepared, train_all
from training.job import Job

pytestmark = [
    pytest.mark.skipif(not os.environ.get("HONE_TEST_HEAVY"), reason="builds DeepSpeed's async_io, for up to ten minutes: make test-heavy"),
    pytest.mark.skipif(not Path("/usr/include/libaio.h").exists(), reason="DeepSpeed's async_io needs libaio-dev"),
]

PARTS = ((2, 7), (1, 7), (2, 0))
"""Workers, and after how many steps they are gone; each has a checkpoint of the step before."""
LEARNING_RATE = {"full": 2e-5, "lora": 1e-4}
"""So low that rounding, which differs by what is updated at once, does not grow from step to step."""
AT_ONCE = 300_000
"""Elements of a sub-group: above the 1 MiB below which DeepSpeed leaves state in memory, and less than a rank has."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("base"), hidden_size=768)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("rows") / "chat.jsonl")


def asked(base: Path, rows: Path, nvme: Path | None, *, method: str, moved: tuple[str, ...] = ()) -> Recipe:
    zero = {**dict.fromkeys(moved, "nvme"), "nvme_path": str(nvme), "sub_group_size": AT_ONCE} if nvme else {}
    train = {"save_steps": 100, "eval_steps": 5}
    return recipe(
        base, rows, task="chat", method={"type": method}, stage=3, zero=zero, train=train, optim={"learning_rate": LEARNING_RATE[method]}
    )


def losses(job: Job) -> list[float]:
    return [m["loss"] for m in read_metrics(job.folder) if "loss" in m]


@contextmanager
def seen_files(folder: Path) -> Iterator[set[str]]:
    """The folders' names of all files that are in a folder at any time in the block."""
    seen: set[str] = set()
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.2):
            seen.update(file.parents[1].name for file in folder.rglob("*.swp"))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield seen
    finally:
        is_over.set()
        looking.join()


@pytest.mark.parametrize(
    ("method", "moved"), [("full", ("offload_optimizer",)), ("full", ("offload_optimizer", "offload_param")), ("lora", ("offload_param",))]
)
def test_a_run_is_the_one_that_it_would_have_been(
    base: Path, rows: Path, tmp_path: Path, home: Home, method: str, moved: tuple[str, ...]
) -> None:
    nvme = tmp_path / "nvme"
    whole = prepared(asked(base, rows, None, method=method), tmp_path / "whole", home=home)
    swapped = prepared(asked(base, rows, nvme, method=method, moved=moved), tmp_path / "swapped", home=home)
    parts = prepared(asked(base, rows, nvme, method=method, moved=moved), tmp_path / "parts", home=home)
    with seen_files(nvme) as files:
        train_all(tmp_path, [whole, swapped], timeout_s=1800)
    assert ("float32params" in files) == ("offload_param" in moved)
    assert not failure(whole)
    assert not failure(swapped)
    for workers, steps in PARTS:
        train_all(tmp_path, [parts], timeout_s=300, workers=workers, steps=steps)
        assert not failure(parts, workers=workers)
    assert losses(swapped) == pytest.approx(losses(whole), rel=1e-5)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    assert len(losses(parts)) == STEPS
    assert losses(whole)[0] - losses(whole)[-1] > 0.02, "nothing was learnt, so equality shows nothing"
    assert [(a.step, a.world_size) for a in attempts(parts.folder)] == [(0, 2), (6, 1), (12, 2)]
    proof = proof_of(parts.folder)
    assert (proof.steps, proof.wrong) == (STEPS, [])
    saved = [event for event in read_events(parts.folder) if event["event"] == "checkpoint"]
    assert [event["step"] for event in saved] == [6, 12]
    assert not list(nvme.iterdir()), "files of runs that have ended"


def test_a_folder_that_cannot_be_written_is_said(base: Path, rows: Path, tmp_path: Path, home: Home) -> None:
    (tmp_path / "file").touch()
    job = prepared(asked(base, rows, tmp_path / "file", method="lora", moved=("offload_param",)), tmp_path / "run", home=home)
    train_all(tmp_path, [job], timeout_s=300)
    assert f"the folder zero.nvme_path {tmp_path / 'file'} cannot be written on this machine" in failure(job)
