"""A hundred thousand requests over HTTP: how much memory the server's processes have at every tenth of them.

Sixteen clients ask a small random Llama for one to four tokens; there are more adapters than fit on the device, every prompt is another,
and every tenth answer is streamed.
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.harness import save
from cluster.connect import local_ray
from cluster.deploy import deploy_locally
from hone.ports import free_port
from hone.storage import Home
from tests.serving_fixtures import publish_many
from tests.tiny import make_llama

CLIENTS = 16
ADAPTERS = 100
PARTS = {"replica": "ray::ServeReplica:hone:Replica", "ingress": "ray::ServeReplica:hone:Ingress", "HTTP server": "ray::ProxyActor"}
"""By the titles that Ray Serve gives its processes."""
PAUSE_S = 2.0
"""Until what was asked last is settled."""


def main() -> None:
    """Measure and write results/served_memory.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home, base = Home(Path(scratch, "home")), make_llama(Path(scratch, "base"))
        models = [
            str(made.ref) for made in publish_many(home, base, [f"a{n:03d}" for n in range(ADAPTERS)], r=8, target_modules="all-linear")
        ]
        with local_ray() as ray:
            port = free_port()
            deploy_locally(ray, base=str(base), home=str(home.root), host="127.0.0.1", port=port)
            figures = asyncio.run(_measure(f"http://127.0.0.1:{port}/v1", models, requests=args.requests))
    print(save("served_memory", unit="MiB of resident memory", figures=figures, notes={"clients": CLIENTS, "adapters": ADAPTERS}))  # noqa: T201


async def _measure(url: str, models: list[str], *, requests: int) -> dict[str, Any]:
    drawn, tenth, began = random.Random(0), requests // 10, time.perf_counter()
    figures: dict[str, list[float]] = {name: [] for name in PARTS}
    done: list[int] = []
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=CLIENTS)) as client:
        for _ in range(10):
            waiting = iter(range(tenth))
            await asyncio.gather(*(_client(client, waiting, drawn, models) for _ in range(CLIENTS)))
            await asyncio.sleep(PAUSE_S)
            done.append(tenth * (len(done) + 1))
            for name, mebibytes in _resident().items():
                figures[name].append(mebibytes)
            rate = done[-1] / (time.perf_counter() - began)
            print(f"{done[-1]:,} requests, {rate:.0f}/s: { ({name: round(values[-1]) for name, values in figures.items()}) }", flush=True)  # noqa: T201
    return {"after requests": done, **figures}


async def _client(client: httpx.AsyncClient, waiting: Iterator[int], drawn: random.Random, models: list[str]) -> None:
    for n in waiting:
        asked = {
            "model": drawn.choice(models),
            "messages": [{"role": "user", "content": f"what is {drawn.random()}?"}],
            "max_tokens": drawn.randint(1, 4),
            "temperature": 0.0,
            "stream": n % 10 == 0,
        }
        response = await client.post("/chat/completions", json=asked)
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {response.text[:500]}")


def _resident() -> dict[str, float]:
    found = {}
    for process in psutil.process_iter(["cmdline", "memory_info"]):
        title = " ".join(process.info["cmdline"] or [])
        for name, start in PARTS.items():
            if title.startswith(start):
                found[name] = process.info["memory_info"].rss / 2**20
    return found


if __name__ == "__main__":
    main()
