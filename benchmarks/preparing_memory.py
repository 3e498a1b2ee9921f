"""Peak memory of preparing a data set, and of preparing one of ten times the size: it should not matter.

Chat rows put together from math_word_problems at random, about 20 and 200 million tokens of them, are prepared by two processes over Ray
Data. Memory is what the driver and all of Ray's processes hold of their own at once (RssAnon in /proc, each tenth of a second), without
files that are mapped. Needs ../shared/data beside the checkout, and 4 GB of disk.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import save
from benchmarks.word_problems import conversations, find_data, make_base

SIZES = (20_000_000, 200_000_000)
TURNS = 3
POLL_S = 0.1


def main() -> None:
    """Measure, or (`--child FOLDER`) be the measured process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=SIZES)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(_prepare(args.child)))  # noqa: T201
        return
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        make_base(Path(scratch) / "base", find_data())
        for tokens in args.tokens:
            figures[str(tokens)] = _measured(Path(scratch), tokens)
            print(tokens, figures[str(tokens)], flush=True)  # noqa: T201
    peaks = [figure["peak_mib"] for figure in figures.values()]
    figures["ratio"] = peaks[-1] / peaks[0]
    print(f"{figures['ratio']:.2f} times the memory", save("preparing_memory", unit="MiB", figures=figures))  # noqa: T201


def _measured(scratch: Path, tokens: int) -> dict[str, float]:
    folder = scratch / str(tokens)
    folder.mkdir()
    (folder / "base").symlink_to(scratch / "base")
    _write_rows(folder / "rows.jsonl", tokens)
    began, peak, parts = time.perf_counter(), 0.0, {}
    command = [sys.executable, "-m", "benchmarks.preparing_memory", "--child", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        now = dict(_private_mib(process.pid))
        if sum(now.values()) > peak:
            peak, parts = sum(now.values()), now
        time.sleep(POLL_S)
    assert process.stdout is not None
    said = json.loads(process.stdout.read().splitlines()[-1])
    driver = parts.get(process.pid, 0.0)
    return {"peak_mib": round(peak), "driver_mib": round(driver), "processes": len(parts), "seconds": time.perf_counter() - began, **said}


def _private_mib(pid: int) -> Iterator[tuple[int, float]]:
    """What each process of a tree holds of its own."""
    with suppress(psutil.Error):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with suppress(OSError, psutil.Error):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                yield process.pid, sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def _write_rows(path: Path, tokens: int) -> None:
    """About so many tokens, at 3.6 characters each."""
    rows, draw, left = conversations(find_data()), random.Random(0), tokens * 3.6
    with path.open("w", encoding="utf-8") as file:
        number = 0
        while left > 0:
            number += 1
            chosen = [message for row in draw.sample(rows, TURNS) for message in row]
            asked = {**chosen[0], "content": f"{number}. {chosen[0]['content']}"}
            left -= sum(len(message["content"]) for message in chosen)
            file.write(json.dumps({"messages": [asked, *chosen[1:]]}) + "\n")


def _prepare(folder: Path) -> dict[str, float]:
    import ray

    from hone.base_model import find_base_model
    from hone.recipe import parse_recipe
    from hone.storage import Home
    from training.data import prepare_data
    from training.token_rows import TokenRows

    data = {"train": str(folder / "rows.jsonl"), "validation_fraction": 0.01}
    recipe = parse_recipe({"name": "b", "task": "chat", "base": str(folder / "base"), "data": data}, where="preparing_memory")
    home = Home(folder / "home")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="warning")
    prepared = prepare_data(recipe, find_base_model(recipe.base, home=home), home=home)
    tokens = sum(int(TokenRows(prepared, part).lengths.sum()) for part in ("train", "validation"))
    ray.shutdown()
    return {"tokens": tokens, "rows": prepared.train_rows + prepared.validation_rows, "shards": len(prepared.shards)}


if __name__ == "__main__":
    main()
