"""Workers that share one sequence: `python -m tests.sliced FOLDER` under torchrun's variables.

Each architecture's loss and gradients on packed rows are made whole on every worker, and then over slices, by groups of each size; what
rank 0's group found is written to FOLDER/found.json.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hone.ports import free_port
from hone.recipe import TrainSettings
from models.slices import slice_of, why_not_sliced
from models.tasks import TASKS, Inputs
from tests.unit.models.test_packing import ARCHITECTURES, ragged_rows, tiny
from training.forward import choose_packing
from training.sequence import SequenceGroup, sequence_group
from training.worker import TorchrunWorker
from training.zero import prepare_deepspeed

WORKERS = 4
SIZES = (2, 4)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, settings) for name, settings in ARCHITECTURES.items()},
    "one head of keys and values": ("llama", {"num_key_value_heads": 1}),
    "six heads, three of keys and values": (
        "llama",
        {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 24, "head_dim": 4},
    ),
}
INPUTS = Inputs(0)


def found(folder: Path) -> dict[str, Any]:
    """Run the workers; what they found of each case and size."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(WORKERS), "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(WORKERS):
        with (folder / f"worker-{rank}.log").open("wb") as log:
            environment = {**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            argv = [sys.executable, "-W", "ignore", "-m", "tests.sliced", str(folder)]
            started.append(subprocess.Popen(argv, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [worker.wait(timeout=300) for worker in started]
    finally:
        for worker in started:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
    assert not any(codes), (folder / f"worker-{codes.index(next(filter(None, codes)))}.log").read_text()[-3000:]
    made: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return made


def look_at(name: str, settings: dict[str, Any], groups: dict[int, SequenceGroup]) -> dict[int, dict[str, Any]]:
    """Of each size, how far loss and gradients over slices are from those of the whole, and how many tokens the layers saw."""
    batch = TASKS["chat"].collate(ragged_rows(), inputs=Inputs(0), packed=True)
    whole = tiny(name, **settings)
    assert choose_packing(whole, TASKS["chat"], TrainSettings())
    expected, told = gradients(whole, batch), {}
    for size, group in groups.items():
        model = tiny(name, **settings)
        if why_not_sliced(model, of=size):
            continue
        assert choose_packing(model, TASKS["chat"], TrainSettings(), group)
        seen = _tokens_seen(model)
        made = gradients(model, slice_of(batch, number=group.rank, of=size, pad_token_id=0))
        for tensor in made.values():
            dist.all_reduce(tensor, group=group.process_group)
        far = {key: float((made[key] - expected[key]).abs().max() / expected[key].abs().max().clamp_min(1.0)) for key in expected}
        told[size] = {"far": far, "tokens": sorted(seen), "of": batch["input_ids"].shape[1]}
    return told


def _tokens_seen(model: Any) -> set[int]:
    """How many tokens each layer makes something of, filled while the model runs."""
    seen = set[int]()
    for part in model.modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Embedding) and part is not model.get_output_embeddings():
            part.register_forward_hook(lambda _module, _inputs, output: seen.add(output.shape[-2]))
    return seen


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of every parameter, and the loss among them."""
    loss, _ = TASKS["chat"].loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    made = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach(), **made}


def main() -> None:
    """Look at every case."""
    prepare_deepspeed(use_gpu=False)
    worker = TorchrunWorker()
    groups = {size: sequence_group(worker, size=size) for size in SIZES}
    told = {title: look_at(name, settings, groups) for title, (name, settings) in CASES.items()}
    if worker.rank == 0:
        (Path(sys.argv[1]) / "found.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
