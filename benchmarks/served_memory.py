"""A hundred thousand requests over HTTP: how much memory each of the processes that serve has at every tenth of them.

Sixteen at a time, half of them streamed, for one to four tokens of a small random Llama; every prompt is another. The replica keeps no
earlier prompts, whose memory is bounded by `prefix_tokens` alone and by default takes a tenth of what is free.
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.harness import save
from benchmarks.served import served
from hone.storage import Home
from serving.app import ServeArgs
from tests.serving_fixtures import publish_many
from tests.tiny import make_llama

CLIENTS = 16
ADAPTERS = 20
PROCESSES = {"replica": "ray::ServeReplica:hone:Replica", "ingress": "ray::ServeReplica:hone:Ingress", "HTTP server": "ray::ProxyActor"}


def main() -> None:
    """Measure and write results/served_memory.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home, base = Home(Path(scratch, "home")), make_llama(Path(scratch, "base"))
        models = [
            str(made.ref) for made in publish_many(home, base, [f"a{n:02d}" for n in range(ADAPTERS)], r=8, target_modules="all-linear")
        ]
        with served(ServeArgs(base=str(base), home=str(home.root), prefix_tokens=0)) as url:
            figures = asyncio.run(_measure(url, models, _processes(), requests=args.requests))
    print(save("served_memory", unit="MiB of resident memory", figures=figures, notes={"clients": CLIENTS, "adapters": ADAPTERS}))  # noqa: T201


def _processes() -> dict[str, psutil.Process]:
    ours = {"".join(process.cmdline()[:1]): process for process in psutil.Process().children(recursive=True)}
    return {name: ours[title] for name, title in PROCESSES.items()}


async def _measure(url: str, models: Sequence[str], processes: dict[str, psutil.Process], *, requests: int) -> dict[str, Any]:
    drawn, tenth, began = random.Random(0), requests // 10, time.perf_counter()
    figures: dict[str, list[float]] = {"after requests": [], **{name: [] for name in processes}}
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=CLIENTS)) as client:
        for part in range(1, 11):
            waiting = iter(range(tenth))
            await asyncio.gather(*(_asks(client, waiting, drawn, models) for _ in range(CLIENTS)))
            figures["after requests"].append(part * tenth)
            for name, process in processes.items():
                figures[name].append(process.memory_info().rss / 2**20)
            said = ", ".join(f"{name} {figures[name][-1]:.0f} MiB" for name in processes)
            print(f"{part * tenth:,}: {said}; {part * tenth / (time.perf_counter() - began):.0f}/s", flush=True)  # noqa: T201
    return figures


async def _asks(client: httpx.AsyncClient, waiting: Iterator[int], drawn: random.Random, models: Sequence[str]) -> None:
    for _ in waiting:
        asked = {
            "model": drawn.choice(models),
            "messages": [{"role": "user", "content": f"what is {drawn.random()}?"}],
            "max_tokens": drawn.randint(1, 4),
            "temperature": 0.0,
            "stream": drawn.random() < 0.5,
        }
        response = await client.post("/chat/completions", json=asked)
        if not response.is_success or b'"error"' in response.content:
            raise RuntimeError(f"{response.status_code}: {response.text[:500]}")


if __name__ == "__main__":
    main()
