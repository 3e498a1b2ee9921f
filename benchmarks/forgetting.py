"""Forgetting on real text, and what the guards do about it: a small Llama that has read Shakespeare learns word problems.

The base is pre-trained here on four fifths of ../shared/data/shakespeare; `retain` is the last fifth, of which some paragraphs measure and
others are there to be replayed. The target is ../shared/data/math_word_problems as plain text. Each variant of each seed is one run.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import last_figures, save
from benchmarks.here import run_here
from benchmarks.word_problems import conversations, find_data
from hone.recipe import parse_recipe
from hone.storage import Home

ROWS, VALIDATION_ROWS, REPLAYED = 1200, 200, 0.25
VARIANTS: dict[str, dict[str, Any]] = {
    "no guard": {"data": {"retain_fraction": 0.0}},
    "replay": {"data": {"retain_fraction": REPLAYED}},
    "KL penalty": {"data": {"retain_fraction": REPLAYED}, "guard": {"kl_penalty": 1.0}},
    "budget of 0.2": {"data": {"retain_fraction": 0.0}, "guard": {"max_retain_loss_increase": 0.2}, "train": {"eval_steps": 5}},
    "LoRA, no guard": {"data": {"retain_fraction": 0.0}, "method": {"type": "lora", "r": 16}, "optim": {"learning_rate": 2e-3}},
    "LoRA, replay": {"data": {"retain_fraction": REPLAYED}, "method": {"type": "lora", "r": 16}, "optim": {"learning_rate": 2e-3}},
}
MEASURED = ("eval_loss", "retain_loss", "retain_loss_increase", "retain_kl")
PRETRAINING_STEPS, PRETRAINING_ROWS, PRETRAINING_LENGTH = 500, 16, 128


def main() -> None:
    """Run what is asked for and write results/forgetting.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", default=[0, 1, 2], type=int)
    args = parser.parse_args()
    figures = last_figures("forgetting")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        files = _write_rows(scratch)
        base_loss = _make_base(scratch / "base", files["pretraining"])
        for seed in args.seeds:
            for variant in args.variants:
                ran = run_here(
                    parse_recipe(_recipe(variant, seed, scratch, files), where="forgetting"),
                    home=Home(scratch / "home"),
                    name=f"{seed}-{list(VARIANTS).index(variant)}",
                )
                reached = {metric: ran.metrics[metric] for metric in MEASURED} | {"step": ran.metrics["published_step"]}
                reached["eval_loss_before"] = ran.metrics["base_eval_loss"]
                print("seed", seed, variant, json.dumps(reached), flush=True)  # noqa: T201
                runs = figures.setdefault(variant, {}).setdefault("seeds", {})
                runs[str(seed)] = reached
                figures[variant]["mean"] = {key: statistics.mean(run[key] for run in runs.values()) for key in reached}
                notes = {"rows": ROWS, "retain_fraction": REPLAYED, "pretraining_loss": base_loss}
                path = save("forgetting", unit="nats a token", figures=figures, notes=notes)
    print(path)  # noqa: T201


def _recipe(variant: str, seed: int, scratch: Path, files: dict[str, Path]) -> dict[str, Any]:
    chosen = VARIANTS[variant]
    return {
        "name": "word-problems",
        "task": "completion",
        "base": str(scratch / "base"),
        "data": {
            "train": str(files["train"]),
            "validation": str(files["validation"]),
            "retain": str(files["retain"]),
            "max_length": 256,
            "stop_on": [],
            **chosen["data"],
        },
        "method": chosen.get("method", {"type": "full"}),
        "optim": chosen.get("optim", {"learning_rate": 5e-4}),
        "train": {"num_train_epochs": 2, "global_batch_size": 32, "micro_batch_size": 8, "seed": seed, **chosen.get("train", {})},
        "guard": chosen.get("guard", {}),
        "zero": {"stage": 0},
    }


def _write_rows(scratch: Path) -> dict[str, Path]:
    data = find_data()
    play = data.parents[1] / "shakespeare" / "input.txt"
    if not play.is_file():
        sys.exit("this benchmark needs ../shared/data/shakespeare")
    paragraphs = [text for text in play.read_text().split("\n\n") if len(text) > 40]
    cut = len(paragraphs) * 4 // 5
    kept = paragraphs[cut:]
    random.Random(0).shuffle(kept)
    problems = ["\n".join(message["content"] for message in messages) for messages in conversations(data)][: ROWS + VALIDATION_ROWS]
    rows = {
        "pretraining": paragraphs[:cut],
        "retain": kept,
        "train": problems[:ROWS],
        "validation": problems[ROWS:],
    }
    files = {}
    for name, texts in rows.items():
        files[name] = scratch / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return files


def _make_base(folder: Path, rows: Path) -> float:
    """A Llama of 0.9 M parameters that has read these rows; its last loss."""
    import torch
    from rich.console import Console
    from transformers import LlamaConfig, LlamaForCausalLM

    from training.sample import byte_level_tokenizer, pretrain

    texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    problems = [message["content"] for messages in conversations(find_data())[:ROWS] for message in messages]
    # Of both texts, as a real base's tokenizer has seen either.
    fast = byte_level_tokenizer(
        texts + problems, vocab_size=2048, special_tokens=["<|endoftext|>"], eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    tokens = torch.tensor([token for text in texts for token in [*fast(text)["input_ids"], fast.eos_token_id]])
    loss = pretrain(
        model,
        tokens,
        steps=PRETRAINING_STEPS,
        rows=PRETRAINING_ROWS,
        length=PRETRAINING_LENGTH,
        learning_rate=2e-3,
        console=Console(),
    )
    model.save_pretrained(folder)
    return loss


if __name__ == "__main__":
    main()
