"""What a failed worker leaves behind, and what the user is told of it."""

import errno
import json
from pathlib import Path

import pytest

from hone.errors import DataError, RunFailedError
from training.failures import raise_recorded_failure, record_failure


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DataError("train.jsonl:3: bad"), "train.jsonl:3: bad"),
        (OSError(errno.ENOSPC, "No space left on device", "/home/x"), "no disk left on /home/x"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "out of memory; lower train.micro_batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory; lower train.micro_batch_size"),
        (ValueError("odd"), "ValueError: odd"),
    ],
)
def test_a_failure_is_told_in_one_line_that_says_what_to_do(tmp_path: Path, error: Exception, said: str) -> None:
    assert record_failure(tmp_path, error, rank=1)
    with pytest.raises(RunFailedError) as caught:
        raise_recorded_failure(tmp_path)
    assert said in caught.value.message
    assert len(caught.value.message.splitlines()) == 1


def test_the_first_failure_is_kept_and_its_echo_on_other_workers_is_not_news(tmp_path: Path) -> None:
    echo = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
    assert not record_failure(tmp_path, echo, rank=0), "nobody wrote down a cause: a worker was lost, and a restart is worth it"
    assert record_failure(tmp_path, ValueError("cause"), rank=1)
    assert record_failure(tmp_path, echo, rank=0)
    assert json.loads((tmp_path / "failure.json").read_text())["message"] == "ValueError: cause"


def test_a_run_without_a_note_has_not_failed(tmp_path: Path) -> None:
    raise_recorded_failure(tmp_path)
