"""One token of each of 32 rows through one linear layer with LoRA: what each way of mixing adapters takes, by how many there are.

Microseconds beside the base's own product, for stacked matrices, copied ones, and rows sorted by adapter and run in segments. Where the
first two cross is `FEW` in serving/engine/decoding.py.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import interleave, save, summary
from serving.engine.decoding import CopiedRows, Copies, Stack, StackedRows
from serving.engine.lora import AdapterWeights, Rows, Segments

ROWS = 32
CALLS = 30
SIZES = [(256, 8), (256, 16), (1024, 8), (1024, 16)]
ADAPTERS = [1, 2, 4, 8, 16, 32]


def main() -> None:
    """Measure and write results/decode_plans.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    for hidden, rank in SIZES:
        for count in ADAPTERS:
            measured = interleave(_variants(hidden, rank, count), repeats=args.repeats)
            figures[f"hidden {hidden}, rank {rank}, adapters {count}"] = {name: summary(values) for name, values in measured.items()}
    path = save("decode_plans", unit="microseconds", figures=figures, notes={"rows": ROWS, "threads": torch.get_num_threads()})
    for name, figure in figures.items():
        told = ", ".join(f"{plan} {values['median']:.0f}" for plan, values in figure.items())
        print(f"{name}: {told}")  # noqa: T201
    print(path)  # noqa: T201


def _variants(hidden: int, rank: int, count: int) -> dict[str, Callable[[], float]]:
    torch.manual_seed(0)
    adapters = [AdapterWeights({"layer": (torch.randn(rank, hidden), torch.randn(rank, hidden))}) for _ in range(count)]
    rows = [adapters[n % count] for n in range(ROWS)]
    x, out, weight = torch.randn(ROWS, 1, hidden), torch.zeros(ROWS, 1, hidden), torch.randn(hidden, hidden)
    copies = Copies()
    copies.hold(rows)
    stacked, copied = StackedRows(rows, Stack(adapters), x.device), CopiedRows(rows, copies)
    return {
        "base": partial(_microseconds, lambda: torch.nn.functional.linear(x, weight)),
        "stacked": partial(_microseconds, lambda: stacked.add("layer", x, out)),
        "copied": partial(_microseconds, lambda: copied.add("layer", x, out)),
        "segments": partial(_microseconds, _sorted_segments(rows, x, out)),
    }


def _sorted_segments(rows: Rows, x: Tensor, out: Tensor) -> Callable[[], Tensor]:
    order = torch.tensor(sorted(range(len(rows)), key=lambda n: id(rows[n])))
    plan = Segments([rows[n] for n in order.tolist()])
    return lambda: out.index_copy_(0, order, plan.add("layer", x[order], out[order]))


def _microseconds(call: Callable[[], object]) -> float:
    with torch.inference_mode():
        call()
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        return (time.perf_counter() - began) / CALLS * 1e6


if __name__ == "__main__":
    main()
