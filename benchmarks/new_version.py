"""From publishing to an answer over HTTP: how long a new version takes until a running server has answered with it, without a restart.

A small random Llama is served on this machine; versions of a rank-16 LoRA adapter on all its linear layers are published one after
another, and the first answer of each is timed from the moment `Registry.publish` returns, beside a second answer of the same version.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from openai import OpenAI

from benchmarks.harness import Figures, save, summary
from cluster.connect import local_ray
from cluster.deploy import deploy_locally
from hone.ports import free_port
from hone.storage import Home
from tests.serving_fixtures import publish
from tests.tiny import make_llama

NAME = "fresh"


def main() -> None:
    """Measure and write results/new_version.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home, base = Home(Path(scratch, "home")), make_llama(Path(scratch, "base"), hidden_size=256, max_position_embeddings=512)
        with local_ray() as ray:
            port = free_port()
            deploy_locally(ray, base=str(base), home=str(home.root), host="127.0.0.1", port=port)
            client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            figures: Figures = {"first_answer": [], "second_answer": []}
            for n in range(args.repeats + 1):
                manifest = publish(home, base, NAME, seed=n, r=16, target_modules="all-linear")
                for times in figures.values():
                    times.append(_seconds(client, str(manifest.ref)))
    warm = {name: summary(values[1:]) for name, values in figures.items()}  # the very first also warms the server up
    print(save("new_version", unit="seconds to an answer of one token", figures=warm))  # noqa: T201
    for name, figure in warm.items():
        print(f"{name}: {figure['median']:.3f} s ({figure['min']:.3f} to {figure['max']:.3f})")  # noqa: T201


def _seconds(client: Any, model: str) -> float:
    began = time.perf_counter()
    answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hello"}], max_tokens=1, temperature=0)
    assert answer.model == model
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
