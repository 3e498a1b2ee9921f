"""From the command to the first step done: hone, and what one writes without it (`benchmarks.plain_route`).

LoRA on a small random Llama under ZeRO-2, two workers under Ray Train on this machine, a Ray of its own each time. `new machine` begins
without what DeepSpeed compiles when it is first used, as every new node of a cluster does; hone lets it compile nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import yaml

from benchmarks.harness import interleave, ratios, save, summary
from hone.run_folder import read_events
from tests.processes import end
from tests.tiny import make_llama

GIVEN_UP_S = 300


def main() -> None:
    """Measure and write results/start.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        base, rows = make_llama(scratch / "base", hidden_size=128), scratch / "rows.jsonl"
        rows.write_text("".join(json.dumps({"prompt": f"what is {n}?", "completion": f"the number {n}"}) + "\n" for n in range(200)))
        numbers = count()
        variants = {
            "hone, new machine": partial(_hone, scratch, base, rows, numbers, compiled=None),
            "plain, new machine": partial(_plain, scratch, base, rows, numbers, compiled=None),
            "hone": partial(_hone, scratch, base, rows, numbers, compiled=scratch / "compiled"),
            "plain": partial(_plain, scratch, base, rows, numbers, compiled=scratch / "compiled"),
        }
        _plain(scratch, base, rows, numbers, compiled=scratch / "compiled")
        measured = interleave(variants, repeats=args.repeats)
    figures = {
        **{name: summary(values) for name, values in measured.items()},
        "ratio, new machine": ratios(measured, of="hone, new machine", to="plain, new machine"),
        "ratio": ratios(measured, of="hone", to="plain"),
    }
    print(save("start", unit="seconds from the command to the first step done", figures=figures))  # noqa: T201
    for name, figure in figures.items():
        print(f"{name}: {figure['median']:.2f} ({figure['min']:.2f} to {figure['max']:.2f})")  # noqa: T201


def _hone(scratch: Path, base: Path, rows: Path, numbers: "count[int]", *, compiled: Path | None) -> float:
    folder = scratch / f"run-{next(numbers)}"
    folder.mkdir()
    recipe = {
        "name": "start",
        "task": "chat",
        "base": str(base),
        "data": {"train": str(rows), "validation_fraction": 0, "max_length": 64},
        "train": {"max_steps": 400, "num_train_epochs": 100, "global_batch_size": 8, "micro_batch_size": 4},
        "zero": {"stage": 2},
        "scaling": {"num_workers": 2},
        "publish": {"enabled": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    argv = [sys.executable, "-m", "training", str(folder / "recipe.yaml"), "--home", str(folder / "home"), "--run-id", "r", "--quiet"]
    return _timed(argv, folder, compiled, lambda: any(e["event"] == "first_step" for e in read_events(folder / "home" / "runs" / "r")))


def _plain(scratch: Path, base: Path, rows: Path, numbers: "count[int]", *, compiled: Path | None) -> float:
    folder = scratch / f"run-{next(numbers)}"
    folder.mkdir()
    mark = folder / "first-step"
    return _timed([sys.executable, "-m", "benchmarks.plain_route", str(base), str(rows), str(mark)], folder, compiled, mark.exists)


def _timed(argv: list[str], folder: Path, compiled: Path | None, is_there: Callable[[], bool]) -> float:
    extensions = compiled or folder / "compiled"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(extensions), "TQDM_DISABLE": "1"}
    began = time.perf_counter()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(argv, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        while not is_there():
            if process.poll() is not None or time.perf_counter() - began > GIVEN_UP_S:
                sys.exit(f"{' '.join(argv)} came to no first step: {(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.01)
        return time.perf_counter() - began
    finally:
        end(process, asked_by=signal.SIGINT, within_s=60)


if __name__ == "__main__":
    main()
