"""Adapters that are not on the device: how long their first token takes, and a thousand of them on one replica.

A random Llama of hidden size 256 and LoRA adapters of rank 16 on all its linear layers, asked through the replica itself, without HTTP.
`cold`: never loaded by this replica, so its files are read, digested, proven and laid beside the others'. `warm`: asked again at once. Then
as many requests as asked for go to a thousand published adapters, drawn by Zipf's law, several at a time, where 64 fit on the device and
256 into memory. And what each of two hundred adapters adds to the resident set; a CPU is its own device.
"""

import argparse
import asyncio
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import save, summary
from hone.registry import Registry
from hone.storage import Home
from serving.calls import CompletionCall, Failed, Piece, Sampling
from serving.replica import Replica
from tests.serving_fixtures import publish_many
from tests.tiny import make_llama

PROMPT_TOKENS = 128
ON_DEVICE = 64
IN_MEMORY = 256
AT_ONCE = 8
ZIPF = 1.0
FIRST = 50
"""Adapters after which a process has grown by all but what further ones take."""
FURTHER = 200
SAMPLING = Sampling(max_tokens=8, temperature=0.0, top_p=1.0, seed=1, stop=(), logit_bias={2: -100.0})


def main() -> None:
    """Measure and write results/adapters.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--cold", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        home, base = Home(Path(scratch, "home")), make_llama(Path(scratch, "base"), hidden_size=256, max_position_embeddings=512)
        names = [f"a{n:04d}" for n in range(args.adapters)]
        publish_many(home, base, names, r=16, target_modules="all-linear")
        # First, while there is no memory of others that it could have.
        figures: dict[str, Any] = {"bytes of a resident adapter": asyncio.run(_each_resident(base, home, names[: FIRST + FURTHER]))}
        figures |= asyncio.run(_cold_and_warm(base, home, names[: args.cold]))
        figures |= asyncio.run(_zipf(base, home, names, requests=args.requests))
    print(save("adapters", unit="seconds to the first token, where nothing else is said", figures=figures))  # noqa: T201


async def _cold_and_warm(base: Path, home: Home, names: list[str]) -> dict[str, Any]:
    replica = _replica(base, home, on_device=len(names), memory=0)
    try:
        await _first_token(replica, names[-1])
        pairs = [(await _first_token(replica, name), await _first_token(replica, name)) for name in names[:-1]]
    finally:
        replica.stop()
    cold, warm = (sorted(values) for values in zip(*pairs, strict=True))
    ratio = float(np.median(cold) / np.median(warm))
    print(f"cold {np.median(cold):.4f} s, warm {np.median(warm):.4f} s, {ratio:.2f} times", flush=True)  # noqa: T201
    return {"cold": summary(cold), "warm": summary(warm), "cold to warm, medians": ratio}


async def _zipf(base: Path, home: Home, names: list[str], *, requests: int) -> dict[str, Any]:
    probe = _replica(base, home, on_device=1, memory=10**9)
    await _first_token(probe, names[0])
    size = int((await probe.measured())[0].gauges["adapter_memory_bytes"])
    probe.stop()

    replica = _replica(base, home, on_device=ON_DEVICE, memory=IN_MEMORY * size)
    weights = 1 / np.arange(1, len(names) + 1) ** ZIPF
    drawn = np.random.default_rng(0).choice(len(names), size=requests, p=weights / weights.sum())
    waiting, times, found = iter(drawn.tolist()), list[float](), Counter[str]()

    async def client() -> None:
        for n in waiting:
            manifest = Registry(home).resolve(names[n])
            found[replica.where(manifest)] += 1
            times.append(await _first_token(replica, names[n]))

    try:
        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(AT_ONCE)))
        seconds = time.perf_counter() - began
    finally:
        replica.stop()
    shares = {place: count / requests for place, count in found.items()}
    quantiles = {f"p{q}": float(np.percentile(times, q)) for q in (50, 90, 99)}
    print(f"{len(names)} adapters, {shares}, {quantiles}, {requests / seconds:.1f} requests/s", flush=True)  # noqa: T201
    return {
        f"{len(names)} adapters by Zipf": {
            "found (shares)": shares,
            **quantiles,
            "requests a second": requests / seconds,
            "bytes of an adapter": size,
        }
    }


async def _each_resident(base: Path, home: Home, names: list[str]) -> float:
    """By how many bytes one more adapter makes the process larger."""
    replica = _replica(base, home, on_device=len(names), memory=0)
    try:
        for name in names[:FIRST]:
            await _first_token(replica, name)
        before = _resident_bytes()
        for name in names[FIRST:]:
            await _first_token(replica, name)
        return (_resident_bytes() - before) / (len(names) - FIRST)
    finally:
        replica.stop()


def _replica(base: Path, home: Home, *, on_device: int, memory: int) -> Replica:
    return Replica(base=str(base), home=str(home.root), max_rows=AT_ONCE, max_adapters=on_device, adapter_memory=memory, prefix_tokens=0)


async def _first_token(replica: Replica, model: str) -> float:
    """Seconds until the first token is there; the rest of the answer is awaited too."""
    prompt = np.random.default_rng(len(model)).integers(5, 200, PROMPT_TOKENS).tolist()
    began, first = time.perf_counter(), 0.0
    async for events in replica.generate(CompletionCall(model, [prompt], 1, SAMPLING)):
        failed = [event.error for event in events if isinstance(event, Failed)]
        if failed:
            raise failed[0]
        if not first and any(isinstance(event, Piece) for event in events):
            first = time.perf_counter() - began
    return first


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
