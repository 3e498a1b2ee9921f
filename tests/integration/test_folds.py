"""`python -m training RECIPE --folds K` for real: every row validates once, and what is published learnt from all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hone.registry import Registry
from hone.storage import Home
from tests.samples import write_sample


@pytest.mark.timeout(400)
def test_folds_side_by_side_and_then_everything(bert: Path, tmp_path: Path, home: Home) -> None:
    rows = write_sample(tmp_path, "text-classification", rows=60)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "name": "sentiment",
                "task": "text-classification",
                "base": str(bert),
                "data": {"train": str(rows), "max_length": 32},
                "optim": {"learning_rate": 5e-3},
                "train": {"num_train_epochs": 4, "global_batch_size": 8},
                "guard": {"metric": "eval_accuracy", "mode": "max", "early_stopping_patience": 2},
            }
        )
    )
    argv = [sys.executable, "-m", "training", str(recipe), "--folds", "3", "--home", str(home.root), "--run-id", "cv", "--address", "local"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    folds = json.loads((home.runs / "cv" / "folds.json").read_text())
    assert folds["k"] == 3
    assert folds["pooled_rows"] == 60
    spread = folds["metrics"]["eval_accuracy"]
    assert len(spread["values"]) == 3
    assert spread["low"] <= spread["mean"] <= spread["high"]
    pooled = {metric["name"]: metric["tuned"] for metric in folds["pooled"]}
    assert pooled["accuracy"]["value"] == pytest.approx(spread["mean"])  # the folds are of one size
    assert pooled["accuracy"]["value"] > 0.8
    assert "60 training rows, 0 validation rows" in done.stdout
    manifest = Registry(home).resolve("sentiment")
    assert manifest.lineage.folds is not None
    assert manifest.lineage.folds["metrics"]["eval_accuracy"]["mean"] == spread["mean"]
    assert "3-fold cross-validation" in (Registry(home).path(manifest.ref) / "README.md").read_text()


def test_a_class_that_a_fold_would_never_see_is_named_before_any_worker_starts(bert: Path, tmp_path: Path, home: Home) -> None:
    rows = [{"text": f"row {n}", "label": "rare" if n == 7 else "ab"[n % 2]} for n in range(30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    tree = {"name": "r", "task": "text-classification", "base": str(bert), "data": {"train": str(path), "stop_on": []}}
    recipe.write_text(yaml.safe_dump(tree))
    argv = [sys.executable, "-m", "training", str(recipe), "--folds", "3", "--home", str(home.root), "--run-id", "cv", "--address", "local"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 1
    assert "class 'rare' is in no training row of fold" in done.stderr
    assert not list(home.runs.glob("cv/trials/*"))
