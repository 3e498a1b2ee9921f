"""Useful tokens a second in LoRA training on ragged chat rows: hone's packed loop against TRL's SFTTrainer, padded and packed.

A random Llama (6 layers, hidden 256, 8k vocabulary trained on the data) learns math_word_problems: the same rows, the same 32 rows a
step (TRL packed: as many packs as hold 32 rows on average), the same LoRA, learning rate and targets (the answers alone), on all cores.
Useful tokens are those of the rows; padding is not counted. Each run is a process tree of its own. Needs ../shared/data beside the
checkout, and the extra `bench`.
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
from typing import Any

from benchmarks.harness import interleave, ratios, save, summary
from benchmarks.word_problems import conversations, find_data, make_base
from hone.recipe import Recipe, parse_recipe
from hone.storage import Home

ROWS = 32
STEPS = 12
WARM_UP = 3
MICRO_BATCH = 8
PACK = 512
PACKS = 2
"""TRL's packs of one forward pass: 1,024 tokens, as near to 8 rows as whole packs come."""
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
LEARNING_RATE = 1e-3


def main() -> None:
    """Measure, or (`--trl FOLDER`) be one of the measured processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--packed", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trl:
        print(json.dumps(_train_with_trl(args.trl, packed=args.packed)))  # noqa: T201
        return
    data = find_data()
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_base(folder / "base", data)
        recipe = folder / "recipe.json"
        recipe.write_text(_recipe(folder, data).model_dump_json())
        variants = {
            "hone": partial(_hone, folder, losses),
            "hone_padded": partial(_hone, folder, losses, "train.packing=false"),
            "trl_padded": partial(_trl, folder, losses),
            "trl_packed": partial(_trl, folder, losses, "--packed"),
        }
        measured = interleave(variants, repeats=args.repeats)
    figures: dict[str, Any] = {name: summary(values) for name, values in measured.items()}
    figures |= {f"to_{name}": ratios(measured, of="hone", to=name) for name in list(variants)[1:]}
    final = {name: statistics.mean(values) for name, values in losses.items()}
    notes = {"loss_of_last_3_steps": final, "steps": STEPS, "warm_up": WARM_UP, "rows_a_step": ROWS}
    path = save("packing", unit="useful tokens a second", figures=figures, notes=notes)
    for name in list(variants)[1:]:
        print(f"{figures[f'to_{name}']['median']:.2f} times {name}")  # noqa: T201
    print(final, path)  # noqa: T201


def _recipe(folder: Path, data: Path) -> Recipe:
    cores = os.cpu_count() or 1
    return parse_recipe(
        {
            "name": "packing",
            "task": "chat",
            "base": str(folder / "base"),
            "data": {"train": str(data), "validation_fraction": 0, "max_length": 1024},
            "method": {"type": "lora", **LORA},
            "optim": {"learning_rate": LEARNING_RATE, "warmup_ratio": 0.0, "lr_scheduler_type": "constant", "weight_decay": 0.0},
            "train": {"max_steps": STEPS, "global_batch_size": ROWS, "micro_batch_size": MICRO_BATCH, "save_steps": STEPS},
            "zero": {"stage": 0},
            "scaling": {"num_workers": 1, "resources_per_worker": {"CPU": cores}},
            "publish": {"enabled": False},
        },
        where="packing",
    )


def _hone(folder: Path, losses: dict[str, list[float]], *overrides: str) -> float:
    from hone.run_folder import read_metrics

    home, run_id = Home(folder / "home"), f"run-{time.time_ns()}"
    command = [sys.executable, "-m", "training", str(folder / "recipe.json"), *overrides, "--home", str(home.root), "--run-id", run_id]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    steps = [m for m in read_metrics(home.runs / run_id) if "step_s" in m]
    losses.setdefault("hone_padded" if overrides else "hone", []).append(statistics.mean(m["loss"] for m in steps[-3:]))
    return float(sum(m["tokens"] for m in steps[WARM_UP:]) / sum(m["step_s"] for m in steps[WARM_UP:]))


def _trl(folder: Path, losses: dict[str, list[float]], *options: str) -> float:
    command = [sys.executable, "-m", "benchmarks.packing", "--trl", str(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    result = json.loads(done.stdout.splitlines()[-1])
    losses.setdefault("trl_packed" if options else "trl_padded", []).append(result["loss"])
    return float(result["tokens_a_second"])


def _train_with_trl(folder: Path, *, packed: bool) -> dict[str, float]:
    """The same training as TRL's documentation has it."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    recipe = Recipe.model_validate_json((folder / "recipe.json").read_text())
    messages = conversations(Path(str(recipe.data.train)))
    tokenizer = AutoTokenizer.from_pretrained(recipe.base)
    mean = statistics.mean(len(tokenizer(tokenizer.apply_chat_template(m, tokenize=False))["input_ids"]) for m in messages[:500])
    passes = round(ROWS * mean / (PACK * PACKS)) if packed else ROWS // MICRO_BATCH
    times: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    class Counting(SFTTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = Counting(
        model=recipe.base,
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            max_steps=STEPS,
            max_length=PACK if packed else 1024,
            packing=packed,
            per_device_train_batch_size=PACKS if packed else MICRO_BATCH,
            gradient_accumulation_steps=passes,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            completion_only_loss=True,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": m[:-1], "completion": m[-1:]} for m in messages]),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = times[-1] - times[WARM_UP - 1]
    return {"tokens_a_second": sum(tokens[WARM_UP * passes :]) / seconds, "loss": statistics.mean(losses[-3:])}


if __name__ == "__main__":
    main()
