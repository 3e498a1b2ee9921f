"""A whole run told to MLflow and to Weights & Biases offline, by the driver that runs it."""

from pathlib import Path

import pytest

from hone.recipe import with_overrides
from hone.run_folder import read_events, read_metrics
from hone.storage import Home
from tests.disturbed import write_rows
from tests.integration.test_training import recipe
from training.launch import fit, prepare_job

# These libraries warn of their own next versions, when they are imported.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.mark.usefixtures("local_ray")
def test_what_a_run_measures_is_in_both(llama: Path, tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install -c constraints.txt 'hone[mlflow]'")
    pytest.importorskip("wandb", reason="wandb is not installed: pip install -c constraints.txt 'hone[wandb]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("WANDB_MODE", "offline")
    chosen = with_overrides(recipe(llama, write_rows(tmp_path)), {"track.to": ["mlflow", "wandb"]})
    job = prepare_job(chosen, home=home, run_id="r1")
    fit(job)
    assert not [event for event in read_events(job.folder) if event["event"] == "tracking_failed"]
    assert len(list((job.folder / "wandb").glob("offline-run-*-r1/run-r1.wandb"))) == 1
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("hone")
    assert experiment
    [run] = client.search_runs([experiment.experiment_id])
    for name in ("loss", "eval_loss"):
        expected = {line["step"]: line[name] for line in read_metrics(job.folder) if name in line}
        assert {each.step: each.value for each in client.get_metric_history(run.info.run_id, name)} == pytest.approx(expected)
