"""What Weights & Biases and MLflow are told of a run, by their own libraries: each step once, in one run, whatever happens between."""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hone.errors import ResourceError
from hone.ports import free_port
from hone.recipe import with_overrides
from hone.run_folder import read_events
from hone.storage import Home
from tests.disturbed import write_rows
from tests.runs import make_recipe
from tests.zero_matrix import prepared
from training.job import Job
from training.metrics import MetricsFile
from training.tracking import Tracking, check_trackers

# These libraries warn of their own next versions, when they are imported.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

LOG_BLOCK = 32 * 2**10
FULL, LAST = 1, 4


@pytest.fixture(scope="module")
def trained(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    root = tmp_path_factory.mktemp("tracked")
    return prepared(make_recipe(llama, write_rows(root), "chat"), root / "r1", home=Home(root / "home"))


@pytest.fixture
def job(trained: Job, tmp_path: Path) -> Job:
    """A prepared run, in a folder of its own."""
    return trained.model_copy(update={"folder": tmp_path, "run_id": "bot-1"})


def tracked(job: Job, *services: str) -> Job:
    return job.model_copy(update={"recipe": with_overrides(job.recipe, {"track.to": list(services), "track.project": "bots"})})


def train(job: Job, *, begin: int, end: int) -> None:
    """Write what a training writes of its steps."""
    with MetricsFile(job.folder, rank=0, keep_steps=begin, total_steps=9) as metrics:
        for step in range(begin + 1, end + 1):
            metrics.write({"step": step, "loss": 1 / step})
            if step % 3 == 0:
                metrics.write({"step": step, "eval_loss": 2 / step})


def interrupted_and_resumed(job: Job) -> None:
    """Steps 1 to 5, of which 4 and 5 are lost; then 4 to 9."""
    with pytest.raises(KeyboardInterrupt):
        interrupted(job)
    with Tracking(job):
        train(job, begin=3, end=9)
    assert not [event for event in read_events(job.folder) if event["event"] == "tracking_failed"]


def interrupted(job: Job) -> None:
    with Tracking(job):
        train(job, begin=0, end=5)
        raise KeyboardInterrupt


@pytest.fixture
def mlflow_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install -c constraints.txt 'hone[mlflow]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri := f"sqlite:///{tmp_path}/mlflow.db")
    return uri


def test_mlflow_has_every_step_of_a_resumed_run_once(job: Job, mlflow_uri: str) -> None:
    from mlflow import MlflowClient

    interrupted_and_resumed(tracked(job, "mlflow"))
    client = MlflowClient(tracking_uri=mlflow_uri)
    experiment = client.get_experiment_by_name("bots")
    assert experiment
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("bot-1", "FINISHED")
    assert run.data.params["optim.learning_rate"] == "0.0002"
    assert run.data.tags["hone.run_id"] == "bot-1"
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in losses] == [(step, pytest.approx(1 / step)) for step in range(1, 10)]
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "eval_loss")] == [3, 6, 9]


def test_wandb_offline_has_every_step_of_a_resumed_run_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install -c constraints.txt 'hone[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    interrupted_and_resumed(tracked(job, "wandb"))
    written = sorted((job.folder / "wandb").glob("offline-run-*-bot-1/run-bot-1.wandb"))
    assert len(written) == 2, "one folder for each time that it was begun, both of one run"
    rows = [row for path in written for row in history(path)]
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert losses == [(step, pytest.approx(1 / step)) for step in range(1, 10)]
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6, 9]


def history(path: Path) -> Iterator[dict[str, Any]]:
    """What was logged, as `wandb sync` would read it."""
    from wandb.proto import wandb_internal_pb2

    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            yield {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}


def records(data: bytes) -> Iterator[bytes]:
    """A LevelDB log (https://github.com/google/leveldb/blob/main/doc/log_format.md) behind W&B's own seven bytes."""
    place, record = 7, b""
    while place + 7 <= len(data):
        if LOG_BLOCK - place % LOG_BLOCK < 7:  # too little for a header
            place += LOG_BLOCK - place % LOG_BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (FULL, LAST):
            yield record
            record = b""


def test_a_service_that_fails_is_told_once_and_the_run_goes_on(job: Job, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mlflow_uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with Tracking(tracked(job, "mlflow")):
        train(job, begin=0, end=9)
    [event] = [event for event in read_events(job.folder) if event["event"] == "tracking_failed"]
    assert event["tracker"] == "mlflow"
    assert "MlflowException" in event["why"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_missing_is_said_before_anything_starts(job: Job, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ResourceError, match=rf"^track.to {name}: its package is not installed; `pip install 'hone\[{name}\]'`"):
        check_trackers(tracked(job, name).recipe)


def test_wandb_without_a_key_is_said_before_anything_starts(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install -c constraints.txt 'hone[wandb]'")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text("machine elsewhere login user password x\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ResourceError, match="there is no key; run `wandb login`"):
        check_trackers(tracked(job, "wandb").recipe)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    check_trackers(tracked(job, "wandb").recipe)
