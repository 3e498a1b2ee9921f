"""What HTTP adds to an answer, and where: requests for one token, to the engine itself and from ever further away.

`engine`: a replica in this process. `handle`: a replica behind Ray Serve, asked through Serve's handle. `http`: the same over HTTP, through
the ingress, which checks the key and the request, finds the adapter's version and forms the answer. `refused`: HTTP as far as that, as the
model does not exist. One request after another for the latency, sixteen at once for the rate; a small random Llama and one LoRA adapter.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from ray import serve

from benchmarks.harness import Figures, interleave, save, summary
from benchmarks.served import served
from hone.storage import Home
from serving.app import ServeArgs
from serving.calls import CompletionCall, Failed, Sampling
from serving.replica import Replica
from tests.serving_fixtures import publish
from tests.tiny import make_llama

PROMPT = [5, 6, 7, 8] * 4
ONE_TOKEN = Sampling(max_tokens=1, temperature=0.0, top_p=1.0, seed=None, stop=())
AT_ONCE = 16

Ask = Callable[[], Awaitable[None]]


def main() -> None:
    """Measure and write results/ingress.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, default=160)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home, base = Home(Path(scratch, "home")), make_llama(Path(scratch, "base"), hidden_size=256)
        model = str(publish(home, base, "one", seed=0, r=8, target_modules="all-linear").ref)
        replica = Replica(base=str(base), home=str(home.root), max_rows=AT_ONCE)
        try:
            with served(ServeArgs(base=str(base), home=str(home.root))) as url:
                measured = asyncio.run(_measure(_ways(replica, url, model), repeats=args.repeats, requests=args.requests))
        finally:
            replica.stop()
    figures = {name: summary(values) for name, values in measured.items()}
    print(save("ingress", unit="milliseconds of one request, or requests a second", figures=figures, notes={"at_once": AT_ONCE}))  # noqa: T201
    for name, figure in figures.items():
        print(f"{name}: {figure['median']:.2f} ({figure['min']:.2f} to {figure['max']:.2f})")  # noqa: T201


def _ways(replica: Replica, url: str, model: str) -> dict[str, Ask]:
    handle = serve.get_deployment_handle("Replica", app_name="hone")
    client = httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=AT_ONCE))
    call = CompletionCall(model, [PROMPT], 1, ONE_TOKEN)
    return {
        "engine": lambda: _answered(replica.answer(call)),
        "handle": lambda: _answered(handle.answer.remote(call)),
        "http": partial(_post, client, model, 200),
        "refused": partial(_post, client, "nobody", 404),
    }


async def _answered(answer: Awaitable[Any]) -> None:
    failed = [event.error for event in await answer if isinstance(event, Failed)]
    if failed:
        raise failed[0]


async def _post(client: httpx.AsyncClient, model: str, status: int) -> None:
    asked = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0.0}
    response = await client.post("/completions", json=asked)
    if response.status_code != status:
        raise RuntimeError(f"{response.status_code}, not {status}: {response.text[:500]}")


async def _measure(ways: dict[str, Ask], *, repeats: int, requests: int) -> Figures:
    loop = asyncio.get_running_loop()
    for ask in ways.values():
        await _at_once(ask, requests)  # the first ones also load the adapter and open connections

    def measured(timed: Callable[[Ask, int], Awaitable[float]], ask: Ask) -> float:
        return asyncio.run_coroutine_threadsafe(timed(ask, requests), loop).result()  # type: ignore[arg-type]

    variants: dict[str, Callable[[], float]] = {f"{name} (ms)": partial(measured, _one_by_one, ask) for name, ask in ways.items()}
    variants |= {f"{name} (requests/s)": partial(measured, _at_once, ask) for name, ask in ways.items()}
    return await asyncio.to_thread(interleave, variants, repeats=repeats)


async def _one_by_one(ask: Ask, requests: int) -> float:
    """Milliseconds of one, on average."""
    began = time.perf_counter()
    for _ in range(requests):
        await ask()
    return (time.perf_counter() - began) / requests * 1000


async def _at_once(ask: Ask, requests: int) -> float:
    """Requests a second."""
    waiting = iter(range(requests))

    async def client() -> None:
        for _ in waiting:
            await ask()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    return requests / (time.perf_counter() - began)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
