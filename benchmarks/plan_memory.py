"""What `hone plan` estimates for a worker's memory, and what real workers needed at most: random Llamas made on the spot, LoRA and full.

Each case is a run of its own: two workers under gloo, two steps of two portions each, every row as long as max_length, from the start of
the process to the exported weights, with a checkpoint that waits to be written until the second step is done, as one does for a slow
store: how much of that step its copy is there for would be chance otherwise. Measured is the highest resident set (VmHWM), of the rank
where it is higher.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import last_figures, save
from hone.base_model import find_base_model
from hone.ports import free_port
from hone.recipe import Recipe, parse_recipe
from hone.storage import Home, write_text
from tests.tiny import WORDS, make_tokenizer
from training.job import Job
from training.launch import prepare_job
from training.plan.choose import choices
from training.plan.hardware import Cluster, load_hardware
from training.plan.memory import Memory
from training.plan.plan import ask, dtype_on
from training.resources import without_cluster

WORKERS = 2
PEAK_FILE = "peak-{rank}.txt"
MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """A Llama."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    vocab_size: int


SHAPES = {
    "5M": Shape(256, 640, 5, 4, 3000),
    "21M": Shape(384, 1024, 10, 6, 6000),
    "38M": Shape(512, 1408, 10, 8, 8000),
    "132M": Shape(768, 2304, 16, 12, 16000),
}


@dataclass(frozen=True)
class Case:
    """What is trained."""

    shape: str
    method: str
    stage: int
    rows: int
    length: int
    recomputes: bool = False
    shared_by: int = 1
    """Workers that share each row."""

    @property
    def name(self) -> str:
        again = ", checkpointing" if self.recomputes else ""
        shared = f", rows shared by {self.shared_by}" if self.shared_by > 1 else ""
        return f"{self.shape}, {self.method}, ZeRO-{self.stage}, {self.rows} x {self.length} tokens{again}{shared}"


CASES = (
    Case("5M", "full", 2, 4, 128),
    Case("132M", "lora", 2, 1, 128),
    Case("21M", "full", 0, 4, 128),
    Case("38M", "lora", 2, 2, 256),
    Case("38M", "full", 2, 1, 256, recomputes=True),
    Case("21M", "full", 1, 4, 128),
    Case("21M", "lora", 3, 4, 128),
    Case("38M", "lora", 2, 8, 128, recomputes=True),
    Case("21M", "full", 2, 4, 128),
    Case("21M", "full", 3, 4, 128),
    Case("21M", "lora", 0, 4, 128),
    Case("5M", "lora", 2, 8, 128),
    Case("132M", "full", 2, 1, 128, recomputes=True),
)


def main() -> None:
    """Measure what is asked for and write results/plan_memory.json; or (`--worker FOLDER`) be a measured worker."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="cases whose name has this in it; the others are kept as they were measured before")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _work(args.worker)
        return
    figures = {name: figure for name, figure in last_figures("plan_memory").items() if name in {case.name for case in CASES}}
    with tempfile.TemporaryDirectory() as scratch:
        for number, case in enumerate(CASES):
            if not args.only or args.only in case.name:
                figures[case.name] = compared(case, Path(scratch), name=str(number))
                print(case.name, figures[case.name], flush=True)  # noqa: T201
                ordered = {case.name: figures[case.name] for case in CASES if case.name in figures}
                save("plan_memory", unit="MiB", figures=ordered, notes={"workers": WORKERS})


def compared(case: Case, folder: Path, *, name: str) -> dict[str, Any]:
    """One case: MiB estimated, by what for, and measured."""
    recipe, home = _recipe(case, folder), Home(folder / "home")
    job = prepare_job(recipe, home=home, run_id=name, plan=without_cluster)
    held = estimated(job, home)
    measured = measure(job)
    parts = ("weights", "gradients", "optimizer", "activations", "checkpoint", "allocator", "process")
    return {
        "estimated": round(held.total / MIB),
        "measured": round(measured),
        "ratio": round(held.total / MIB / measured, 3),
        "parts": {part: round(getattr(held, part) / MIB) for part in parts},
    }


def estimated(job: Job, home: Home) -> Memory:
    """What the plan says of a prepared job's workers, on a CPU."""
    recipe, cluster = job.recipe, Cluster(nodes=1, per_node=job.recipe.scaling.fewest, kind="CPU", memory=2**40)
    base = find_base_model(recipe.base, home=home)
    asked = ask(recipe, base, job.data, on_gpu=False, dtype=dtype_on(recipe, cluster))
    made = choices(asked, workers=[recipe.scaling.fewest], cluster=cluster, hardware=load_hardware(), stages=(recipe.zero.stage,))  # type: ignore[arg-type]
    return made[0].memory


def measure(job: Job) -> float:
    """MiB of resident memory that a rank of a prepared job takes at most, the highest of all."""
    workers = job.recipe.scaling.fewest
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(workers), "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(workers):
        environment = {**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        argv = [sys.executable, "-W", "ignore", "-m", "benchmarks.plan_memory", "--worker", str(job.folder)]
        with (job.folder / f"worker-{rank}.log").open("wb") as log:
            started.append(subprocess.Popen(argv, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [worker.wait(timeout=600) for worker in started]
    finally:
        for worker in started:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
    if any(codes):
        raise RuntimeError((job.folder / f"worker-{codes.index(max(codes))}.log").read_text()[-3000:])
    return max(float((job.folder / PEAK_FILE.format(rank=rank)).read_text()) for rank in range(workers))


def _work(folder: Path) -> None:
    """Train, then write down the highest resident set. That of `wait4` would begin with what the parent had when it forked."""
    import torch.distributed as dist

    from training.checkpoints import files, writer
    from training.loop import train
    from training.worker import TorchrunWorker

    stepped, write_part = threading.Event(), files.write_part

    class Counting(TorchrunWorker):
        """Is asked at the end of each step."""

        steps = 0

        def noticed(self) -> bool:
            self.steps += 1
            if self.steps == 2:
                stepped.set()
            return False

    def late(*args: Any) -> Any:
        stepped.wait(timeout=600)
        return write_part(*args)

    writer.write_part = late  # type: ignore[attr-defined, assignment]
    worker = Counting()
    train(Job.load(folder), worker)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    write_text(folder / PEAK_FILE.format(rank=worker.rank), str(peak))
    dist.destroy_process_group()


def _recipe(case: Case, folder: Path) -> Recipe:
    tree: dict[str, Any] = {
        "name": "plan",
        "task": "completion",
        "base": str(_base(case.shape, folder)),
        "data": {"train": str(_rows(folder)), "validation_fraction": 0, "max_length": case.length, "stop_on": []},
        "method": {"type": case.method},
        "train": {
            "max_steps": 2,
            "save_steps": 1,
            "global_batch_size": 2 * WORKERS // case.shared_by * case.rows,
            "micro_batch_size": case.rows,
            "gradient_checkpointing": case.recomputes,
        },
        "zero": {"stage": case.stage},
        "scaling": {"num_workers": WORKERS, "sequence_parallel_size": case.shared_by},
    }
    return parse_recipe(tree, where="plan_memory")


def _base(name: str, folder: Path) -> Path:
    """A random Llama of that shape."""
    made, shape = folder / name, SHAPES[name]
    if made.exists():
        return made
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(made)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(made)
    return made


def _rows(folder: Path) -> Path:
    """Rows longer than any max_length here."""
    path, draw = folder / "rows.jsonl", random.Random(0)
    if not path.exists():
        texts = (" ".join(draw.choices(WORDS.split(), k=600)) for _ in range(64))
        path.write_text("".join(f'{{"text": "{number} {text}"}}\n' for number, text in enumerate(texts)))
    return path


if __name__ == "__main__":
    main()
