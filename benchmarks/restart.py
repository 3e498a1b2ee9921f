"""From SIGKILL of a worker to the next step that training had not done, and from the command to the first step, piece by piece.

LoRA on a small random Llama, two workers under Ray Train on this machine, a checkpoint every five steps. The pieces are those between the
events that a run leaves in its folder.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import yaml

from benchmarks.harness import Figures, save, summary
from hone.run_folder import attempts, read_events, read_metrics
from tests.tiny import make_llama

KILL_AT = 30
STEPS = 400
PIECES = {
    "command to data prepared": ("command", "prepared"),
    "to workers asked for": ("prepared", "launching"),
    "to workers there": ("launching", "workers_began"),
    "to model and optimiser there": ("workers_began", "attempt"),
    "to the first step done": ("attempt", "first_step"),
    "in all": ("command", "first_step"),
}


def main() -> None:
    """Measure and write results/restart.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    figures: Figures = {"killed to next new step": [], **{name: [] for name in PIECES}}
    with tempfile.TemporaryDirectory() as scratch:
        recipe = _recipe(Path(scratch))
        for repeat in range(args.repeats):
            measured = _run(recipe, Path(scratch, "home"), f"r{repeat}")
            for name, value in measured.items():
                figures[name].append(value)
            print(json.dumps(measured), flush=True)  # noqa: T201
    print(save("restart", unit="seconds", figures={name: summary(values) for name, values in figures.items()}))  # noqa: T201


def _recipe(scratch: Path) -> Path:
    rows = scratch / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"what is {n}?", "completion": f"the number {n}"}) + "\n" for n in range(200)))
    path = scratch / "recipe.yaml"
    tree = {
        "name": "restart",
        "task": "chat",
        "base": str(make_llama(scratch / "base", hidden_size=128)),
        "data": {"train": str(rows), "validation_fraction": 0.1, "max_length": 64},
        "train": {"max_steps": STEPS, "num_train_epochs": 100, "global_batch_size": 8, "save_steps": 5, "eval_steps": STEPS},
        "scaling": {"num_workers": 2},
        "publish": {"enabled": False},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def _run(recipe: Path, home: Path, run_id: str) -> dict[str, float]:
    folder, began = home / "runs" / run_id, time.time()
    argv = [sys.executable, "-m", "training", str(recipe), "--home", str(home), "--run-id", run_id, "--quiet"]
    driver = subprocess.Popen(argv, env={**os.environ, "TQDM_DISABLE": "1"})
    before = _wait_for_step(folder, KILL_AT)
    os.kill(int(attempts(folder)[0].workers[1].rpartition(":")[2]), signal.SIGKILL)
    killed = time.time()
    while len(attempts(folder)) < 2:
        time.sleep(0.01)
    _wait_for_step(folder, before + 1)
    again = time.time()
    if driver.wait():
        sys.exit(f"{folder}: the run failed")
    at = {"command": began}
    for event in read_events(folder):
        at.setdefault(event["event"], datetime.fromisoformat(event["at"]).timestamp())
    return {"killed to next new step": again - killed, **{name: at[end] - at[start] for name, (start, end) in PIECES.items()}}


def _wait_for_step(folder: Path, step: int) -> int:
    """Until the metrics have that step; the last one that they have."""
    while True:
        last = max((m["step"] for m in read_metrics(folder)), default=0)
        if last >= step:
            return last
        time.sleep(0.01)


if __name__ == "__main__":
    main()
