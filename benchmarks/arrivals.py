"""Requests that arrive at random over HTTP: hone with 16 adapters in one batch, beside `transformers serve` with the base alone.

A random Llama (6 layers, hidden 256), prompts of 16 to 128 tokens, 64 new tokens, greedy, streamed; the arrivals are a Poisson process, the
same for every server. `heavy` sends more than any of them can take: tokens a second until the last answer is there. `light` sends what
all can take: seconds to the first token. `transformers serve` has no adapters, so it answers with the base, which is the easier work; it is
measured as it is by default and with its continuous batching. All servers stay up and take turns; clients share their cores. Every round
has prompts of its own, the same for every server, so that none is known from before.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.harness import interleave, ratios, save, summary
from cluster.connect import local_ray
from cluster.deploy import deploy_locally
from hone.ports import free_port
from hone.storage import Home
from tests.processes import end
from tests.serving_fixtures import publish_many
from tests.tiny import make_llama

ADAPTERS = 16
NEW_TOKENS = 64
SHORTEST, LONGEST = 16, 128
STARTING_S = 120.0
GIVEN_UP_S = 600.0
LETTERS = "abcdefghijklmnopqrstuvwxyz "


@dataclass(frozen=True)
class Server:
    """Where a server answers."""

    url: str
    models: Sequence[str]
    """What requests ask for, in turn."""
    options: dict[str, Any]
    """What it has to be told so that the last chunk says how many tokens there were."""


@dataclass(frozen=True)
class Load:
    """Requests of one kind."""

    requests: int
    a_second: float
    """On average."""


def main() -> None:
    """Measure and write results/arrivals.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--heavy", type=float, nargs=2, default=(160, 40.0), metavar=("REQUESTS", "A_SECOND"))
    parser.add_argument("--light", type=float, nargs=2, default=(60, 1.0), metavar=("REQUESTS", "A_SECOND"))
    args = parser.parse_args()
    heavy, light = (Load(int(requests), a_second) for requests, a_second in (args.heavy, args.light))
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        base = _base(Path(scratch, "base"))
        servers = {
            "hone": stack.enter_context(_hone(base, Path(scratch, "home"))),
            "transformers": stack.enter_context(_transformers(base, Path(scratch, "serve.log"))),
            "transformers, continuous": stack.enter_context(_transformers(base, Path(scratch, "batching.log"), "--continuous-batching")),
        }
        for server in servers.values():  # the first answers also compile and allocate
            _ask(server, Load(16, 8.0), "before")
        rates = interleave(
            {name: partial(_tokens_a_second, server, heavy, count()) for name, server in servers.items()}, repeats=args.repeats
        )
        firsts: dict[str, list[float]] = {name: [] for name in servers}
        for round_number in range(args.repeats):
            for name, server in servers.items():
                firsts[name] += [answer.first for answer in _ask(server, light, f"light {round_number}")]
                print(f"{name}: {_quantiles(firsts[name])}", flush=True)  # noqa: T201
    figures = {
        "heavy (tokens a second)": {name: summary(values) for name, values in rates.items()},
        "heavy, hone to": {name: ratios(rates, of="hone", to=name) for name in list(servers)[1:]},
        "light (seconds to the first token)": {name: _quantiles(times) for name, times in firsts.items()},
    }
    loads = {name: {"requests": load.requests, "a second": load.a_second} for name, load in (("heavy", heavy), ("light", light))}
    notes = {"adapters": ADAPTERS, "new_tokens": NEW_TOKENS, "prompt_tokens": [SHORTEST, LONGEST], **loads}
    print(save("arrivals", unit="as said", figures=figures, notes=notes))  # noqa: T201
    for name, figure in figures["heavy, hone to"].items():
        print(f"hone, times {name}: {figure['median']:.2f} ({figure['min']:.2f} to {figure['max']:.2f})")  # noqa: T201


def _base(folder: Path) -> Path:
    """One that never ends its answer, so that all answers are of one length."""
    make_llama(folder, hidden_size=256, max_position_embeddings=512, num_hidden_layers=6)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[model.config.eos_token_id] = 0.0  # never the largest of hundreds of random logits
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def _hone(base: Path, root: Path) -> Iterator[Server]:
    home, port = Home(root), free_port()
    manifests = publish_many(home, base, [f"a{n:02d}" for n in range(ADAPTERS)], r=8, target_modules="all-linear")
    with local_ray() as ray:
        deploy_locally(ray, base=str(base), home=str(home.root), host="127.0.0.1", port=port)
        names = [str(manifest.ref) for manifest in manifests]
        yield Server(f"http://127.0.0.1:{port}/v1", names, {"stream_options": {"include_usage": True}})


@contextmanager
def _transformers(base: Path, log: Path, *options: str) -> Iterator[Server]:
    port = free_port()
    argv = [str(Path(sys.executable).with_name("transformers")), "serve", str(base), "--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("wb") as said:
        process = subprocess.Popen(
            [*argv, "--device", "cpu"], stdout=said, stderr=subprocess.STDOUT, env={**os.environ, "TQDM_DISABLE": "1"}
        )
    try:
        _await(f"http://127.0.0.1:{port}/health", process, log)
        yield Server(f"http://127.0.0.1:{port}/v1", [str(base)], {})
    finally:
        end(process)


def _await(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < STARTING_S:
        try:
            if httpx.get(url, timeout=5).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    sys.exit(f"{url} does not answer: {log.read_text()[-2000:]}")


@dataclass(frozen=True)
class Answer:
    """What came of one request."""

    first: float
    """Seconds from the request to the first text."""
    tokens: int


def _tokens_a_second(server: Server, load: Load, rounds: Iterator[int]) -> float:
    began = time.perf_counter()
    answers = _ask(server, load, f"heavy {next(rounds)}")
    return sum(answer.tokens for answer in answers) / (time.perf_counter() - began)


def _ask(server: Server, load: Load, seed: str) -> list[Answer]:
    return asyncio.run(_ask_all(server, load, seed))


async def _ask_all(server: Server, load: Load, seed: str) -> list[Answer]:
    drawn = random.Random(seed)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=GIVEN_UP_S, limits=limits) as client:
        waiting = []
        for n in range(load.requests):
            prompt = "".join(drawn.choices(LETTERS, k=drawn.randint(SHORTEST, LONGEST)))
            waiting.append(asyncio.create_task(_answer(client, server, server.models[n % len(server.models)], prompt)))
            await asyncio.sleep(drawn.expovariate(load.a_second))
        return await asyncio.gather(*waiting)


async def _answer(client: httpx.AsyncClient, server: Server, model: str, prompt: str) -> Answer:
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0.0,
        "stream": True,
    }
    began, first, tokens = time.perf_counter(), 0.0, 0
    async with client.stream("POST", f"{server.url}/chat/completions", json=asked | server.options) as response:
        if not response.is_success:
            raise RuntimeError(f"{response.status_code}: {(await response.aread())[:500]!r}")
        async for chunk in _chunks(response):
            if "error" in chunk:
                raise RuntimeError(chunk)
            if not first and any(choice["delta"].get("content") for choice in chunk["choices"]):
                first = time.perf_counter() - began
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    if tokens != NEW_TOKENS:
        raise RuntimeError(f"{model} answered with {tokens} tokens and not {NEW_TOKENS}; nothing was measured")
    return Answer(first, tokens)


async def _chunks(response: httpx.Response) -> AsyncIterator[Any]:
    """Random text has all of Unicode's line ends in it, at which `aiter_lines` would cut."""
    kept = b""
    async for received in response.aiter_bytes():
        *lines, kept = (kept + received).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                yield json.loads(line.removeprefix(b"data: "))


def _quantiles(times: list[float]) -> dict[str, float]:
    return {f"p{q}": float(np.percentile(times, q)) for q in (50, 99)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
