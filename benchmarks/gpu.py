"""On one GPU: tokens a second, model FLOPs utilisation and peak memory of LoRA and full fine-tuning in bf16, beside TRL's SFTTrainer.

Llama models of the shapes of 1B and 8B with random weights, rows of exactly 4,096 tokens (so neither side pads), the same rows a step,
learning rate, attention kernels (torch's) and gradient checkpointing. Each run is a process of its own, and the two take turns. Nothing is
loaded from anywhere, and no Ray runs: a host without a network needs torch, transformers, datasets, peft, deepspeed and trl, as wheels.
Without a GPU it says so and stops. What does not fit into memory is written down as that.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch

from benchmarks.harness import save, summary
from benchmarks.here import alone
from benchmarks.shapes import SHAPES, Method, forward_flops, lora_parameters, training_flops
from hone.recipe import Recipe, parse_recipe
from hone.storage import Home

ROW = 4096
RANK = 16
STEPS = 12
WARM_UP = 4
METHODS: tuple[Method, ...] = ("full", "lora")
WHOSE = ("hone", "trl")
MICRO_BATCH = {"1b": {"full": 4, "lora": 4}, "8b": {"full": 1, "lora": 2}, "tiny": {"full": 2, "lora": 2}}
"""Rows of a forward pass."""
RECOMPUTES = {"1b": False, "8b": True, "tiny": False}
OFFLOADS = {("8b", "full")}
"""Whose optimiser's state is in the machine's memory: 12 bytes for each of 8 billion parameters."""
LEARNING_RATE = 1e-5
LORA: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
Result = dict[str, Any]


def main() -> None:
    """Measure, or be one of the measured processes, and write results/gpu.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1b", "8b"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--row", type=int, default=ROW)
    parser.add_argument("--tflops", type=float, help="the GPU's peak in bf16, where training/plan/hardware.yaml does not know it")
    parser.add_argument("--scratch", type=Path, help="folder for the models, 2 bytes a parameter, and as much again for what is trained")
    parser.add_argument("--without-gpu", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--be", choices=WHOSE, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.be:
        print(json.dumps((_hone if args.be == "hone" else _trl)(args.folder)))  # noqa: T201
        return
    if not (args.without_gpu or torch.cuda.is_available()):
        sys.exit("benchmarks.gpu: torch sees no GPU here, and this benchmark is about one; nothing was measured")
    peak = args.tflops or _peak_tflops(on_gpu=not args.without_gpu)
    figures: dict[str, Any] = {}
    for shape in args.shapes:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            figures[shape] = _of_shape(shape, Path(scratch), args, peak=peak)
    flops = {shape: _operations(shape, args.row) for shape in args.shapes}
    notes = {"row_tokens": args.row, "rank": RANK, "steps": STEPS, "warm_up": WARM_UP, "peak_tflops": peak, "flops_a_token": flops}
    path = "nothing is written: no GPU was measured"
    if not args.without_gpu:
        path = str(save("gpu", unit="tokens a second; share of the peak; GiB", figures=figures, notes=notes))
    for shape, found in figures.items():
        for name, figure in found.items():
            print(shape, name, _said(figure))  # noqa: T201
    print(path)  # noqa: T201


def _of_shape(shape: str, scratch: Path, args: argparse.Namespace, *, peak: float) -> dict[str, Any]:
    base = scratch / "base"
    _make_base(base, shape, args.row, on_gpu=not args.without_gpu)
    rows = _write_rows(scratch / "rows.jsonl", base, count=max(MICRO_BATCH[shape].values()) * STEPS, row=args.row)
    recipes = {method: _recipe(base, rows, shape, method, args.row, on_gpu=not args.without_gpu) for method in METHODS}
    runs = {f"{whose}, {method}": partial(_run, whose, scratch, recipes[method]) for method in METHODS for whose in WHOSE}
    results: dict[str, list[Result]] = {name: [] for name in runs}
    for turn in range(1, args.repeats + 1):
        for name, run in runs.items():
            if results[name] and "failed" in results[name][-1]:
                continue  # it would not fit the second time either
            results[name].append(run())
            print(f"{shape}, round {turn}/{args.repeats}  {name}: {results[name][-1]}", flush=True)  # noqa: T201
    return _figures(results, shape, args.row, peak)


def _figures(results: dict[str, list[Result]], shape: str, row: int, peak: float) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, found in results.items():
        failed = next((each["failed"] for each in found if "failed" in each), None)
        if failed:
            figures[name] = {"failed": failed}
            continue
        method: Method = "full" if name.endswith("full") else "lora"
        rates = [each["tokens_a_second"] for each in found]
        used = training_flops(SHAPES[shape], method, row=row, rank=RANK) / (peak * 1e12)
        figures[name] = {
            "tokens_a_second": summary(rates),
            "mfu": summary([rate * used for rate in rates]),
            "peak_gib": max(each["peak_gib"] for each in found),
        }
    for title, one, other in (
        ("full, hone to trl", "hone, full", "trl, full"),
        ("lora, hone to trl", "hone, lora", "trl, lora"),
        ("hone, lora to full", "hone, lora", "hone, full"),
    ):
        pair = [figures[name].get("tokens_a_second") for name in (one, other)]
        if all(pair):
            figures[title] = summary([a / b for a, b in zip(pair[0]["values"], pair[1]["values"], strict=True)])
    return figures


def _said(figure: dict[str, Any]) -> str:
    if "failed" in figure:
        return f"failed: {figure['failed']}"
    if "mfu" not in figure:
        return f"{figure['median']:.2f} times ({figure['min']:.2f} to {figure['max']:.2f})"
    return f"{figure['tokens_a_second']['median']:,.0f} tokens/s, MFU {figure['mfu']['median']:.1%}, peak {figure['peak_gib']:.1f} GiB"


def _operations(shape: str, row: int) -> dict[str, int]:
    linear, attention = forward_flops(SHAPES[shape], row=row)
    counted = {
        "forward, linear layers": linear,
        "forward, attention": attention,
        "LoRA parameters": lora_parameters(SHAPES[shape], rank=RANK),
    }
    return counted | {method: training_flops(SHAPES[shape], method, row=row, rank=RANK) for method in METHODS}


def _peak_tflops(*, on_gpu: bool) -> float:
    from training.plan.hardware import find_kind, load_hardware

    hardware = load_hardware()
    kind = find_kind(torch.cuda.get_device_name(), hardware) if on_gpu else "CPU"
    if kind is None:
        sys.exit(
            f"benchmarks.gpu: what {torch.cuda.get_device_name()} does at most is not in training/plan/hardware.yaml; say it with --tflops"
        )
    return hardware.kinds[kind].tflops


def _make_base(folder: Path, shape: str, row: int, *, on_gpu: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from training.sample import byte_level_tokenizer

    vocabulary = SHAPES[shape].vocabulary
    tokenizer = byte_level_tokenizer(
        [f" {letter}" for letter in ascii_lowercase], vocab_size=min(vocabulary, 512), special_tokens=["<|endoftext|>"]
    )
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    with torch.device("cuda" if on_gpu else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape].config(context=row), **ids, dtype=torch.bfloat16)).to(torch.bfloat16)
    model.save_pretrained(folder)


def _write_rows(path: Path, base: Path, *, count: int, row: int) -> Path:
    """Texts of letters, each of which is a token, and as many as fill a row with the token that ends them."""
    from models.tasks import TASKS

    draws = torch.randint(len(ascii_lowercase), (count, row - 1), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [{"text": " ".join(ascii_lowercase[n] for n in line)} for line in draws]
    task = TASKS["completion"]
    encoded = task.encode(texts, task.load_processor(base), max_length=2 * row)
    assert all(not isinstance(made, Exception) and [each.length for each in made] == [row] for made in encoded), "every letter is a token"
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return path


def _recipe(base: Path, rows: Path, shape: str, method: Method, row: int, *, on_gpu: bool) -> Recipe:
    batch = MICRO_BATCH[shape][method]
    return parse_recipe(
        {
            "name": f"gpu-{shape}-{method}",
            "task": "completion",
            "base": str(base),
            "data": {"train": str(rows), "validation_fraction": 0, "max_length": row, "near_duplicate_rows": 0},
            "method": {"type": method, **(LORA if method == "lora" else {})},
            "optim": {"learning_rate": LEARNING_RATE, "warmup_ratio": 0.0, "lr_scheduler_type": "constant", "weight_decay": 0.0},
            "train": {
                "max_steps": STEPS,
                "global_batch_size": batch,
                "micro_batch_size": batch,
                "save_steps": STEPS,
                "precision": "bf16" if on_gpu else "fp32",
                "gradient_checkpointing": RECOMPUTES[shape],
            },
            "zero": {"stage": 2, "offload_optimizer": True} if (shape, method) in OFFLOADS else {"stage": 1 if method == "full" else 0},
            "scaling": {"num_workers": 1},
            "publish": {"enabled": False},
        },
        where="gpu",
    )


def _run(whose: str, scratch: Path, recipe: Recipe) -> Result:
    """One training in a process of its own, of which nothing is left on the disk."""
    # A worker of a group of one is what hone's loop is; TRL in one would wrap the model for a group, which nobody does on one GPU.
    environment = alone() if whose == "hone" else {**os.environ, "TQDM_DISABLE": "1"}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        Path(folder, "recipe.json").write_text(recipe.model_dump_json())
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--be", whose, "--folder", folder]
        done = subprocess.run(command, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        return {"failed": next((line for line in reversed(told) if "out of memory" in line), told[-1])[:300]}
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def _hone(folder: Path) -> Result:
    """The loop that Ray Train runs, without Ray."""
    from hone.run_folder import read_metrics
    from training.job import Job
    from training.launch import prepare_job
    from training.loop import train
    from training.worker import TorchrunWorker

    recipe = Recipe.model_validate_json((folder / "recipe.json").read_text())
    on_gpu = recipe.train.precision == "bf16"
    each = {"CPU": 1.0, **({"GPU": 1.0} if on_gpu else {})}
    job = prepare_job(recipe, home=Home(folder / "home"), run_id="run", plan=lambda _: (on_gpu, each))
    train(Job.load(job.folder), TorchrunWorker())
    steps = [line for line in read_metrics(job.folder) if "step_s" in line][WARM_UP:]
    assert {line["tokens"] for line in steps} == {recipe.train.global_batch_size * recipe.data.max_length}, "every row is full"
    return {
        "tokens_a_second": sum(line["tokens"] for line in steps) / sum(line["step_s"] for line in steps),
        "loss": statistics.mean(line["loss"] for line in steps),
        "peak_gib": _peak_gib(),
    }


def _trl(folder: Path) -> Result:
    """The same training as TRL's documentation has it."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    recipe = Recipe.model_validate_json((folder / "recipe.json").read_text())
    on_gpu, batch, row = recipe.train.precision == "bf16", recipe.train.micro_batch_size, recipe.data.max_length
    assert isinstance(batch, int), "the recipe says how many"
    tokenizer = AutoTokenizer.from_pretrained(recipe.base)
    texts = [json.loads(line)["text"] for line in Path(str(recipe.data.train)).read_text().splitlines()]
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    assert all(len(each) == row for each in ids), "every letter is a token"
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    trainer = SFTTrainer(
        model=recipe.base,
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            max_steps=STEPS,
            max_length=row,
            per_device_train_batch_size=batch,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            gradient_checkpointing=recipe.train.gradient_checkpointing,
            model_init_kwargs={"dtype": "bfloat16" if on_gpu else "float32", "attn_implementation": "sdpa"},
            use_cpu=not on_gpu,
            bf16=on_gpu,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA) if recipe.method.type == "lora" else None,
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    rate = batch * row * (STEPS - WARM_UP) / (times[-1] - times[WARM_UP - 1])
    return {"tokens_a_second": rate, "loss": statistics.mean(losses[WARM_UP:]), "peak_gib": _peak_gib()}


def _peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


if __name__ == "__main__":
    main()
