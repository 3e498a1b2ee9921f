"""A hundred thousand requests: how much memory a replica has at every tenth of them.

Asked without HTTP, sixteen at a time, for one to four tokens of a small random Llama; every prompt is another. It keeps no earlier
prompts, whose memory is bounded by `prefix_tokens` alone and by default takes a tenth of what is free.
"""

import argparse
import asyncio
import logging
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import save
from hone.storage import Home
from serving.calls import ChatCall, Sampling
from serving.replica import Replica
from tests.serving_fixtures import publish_many
from tests.tiny import make_llama

CLIENTS = 16
ADAPTERS = 20


def main() -> None:
    """Measure and write results/served_memory.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as scratch:
        home, base = Home(Path(scratch, "home")), make_llama(Path(scratch, "base"))
        models = [
            str(made.ref) for made in publish_many(home, base, [f"a{n:02d}" for n in range(ADAPTERS)], r=8, target_modules="all-linear")
        ]
        replica = Replica(base=str(base), home=str(home.root), prefix_tokens=0)
        try:
            figures = asyncio.run(_measure(replica, models, requests=args.requests))
        finally:
            replica.stop()
    print(save("served_memory", unit="MiB of resident memory", figures=figures, notes={"clients": CLIENTS, "adapters": ADAPTERS}))  # noqa: T201


async def _measure(replica: Replica, models: list[str], *, requests: int) -> dict[str, Any]:
    drawn, tenth, began = random.Random(0), requests // 10, time.perf_counter()
    figures: dict[str, list[float]] = {"after requests": [], "replica": []}
    for part in range(1, 11):
        waiting = iter(range(tenth))
        await asyncio.gather(*(_client(replica, waiting, drawn, models) for _ in range(CLIENTS)))
        figures["after requests"].append(part * tenth)
        figures["replica"].append(_resident())
        print(f"{part * tenth:,}: {_resident():.0f} MiB, {part * tenth / (time.perf_counter() - began):.0f}/s", flush=True)  # noqa: T201
    return figures


async def _client(replica: Replica, waiting: Iterator[int], drawn: random.Random, models: list[str]) -> None:
    for _ in waiting:
        sampling = Sampling(max_tokens=drawn.randint(1, 4), temperature=0.0, top_p=1.0, seed=None, stop=())
        messages = [{"role": "user", "content": f"what is {drawn.random()}?"}]
        await replica.answer(ChatCall(model=drawn.choice(models), messages=messages, n=1, sampling=sampling))


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
