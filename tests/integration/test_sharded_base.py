"""A base under ZeRO-3: every rank has its shards of it, exactly, and none ever had more."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hone.ports import free_port

WORKERS = 3
LOAD = """
import json, os, sys
from pathlib import Path
import torch
from training.zero import prepare_deepspeed
deepspeed = prepare_deepspeed(use_gpu=False)
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from training.sharded_base import load_sharded

def told(file, name):
    return next(int(line.split()[1]) for line in open(f"/proc/self/{file}") if line.startswith(name))

folder, dtype, out = Path(sys.argv[1]), getattr(torch, sys.argv[2]), Path(sys.argv[3])
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "bf16": {"enabled": dtype is torch.bfloat16}}
tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
get_model_conversion_mapping(AutoModelForCausalLM.from_config(LlamaConfig(**tiny)))  # what is imported on the way does not count
Path("/proc/self/clear_refs").write_text("5")  # the highest memory counts from here
memory, read = told("status", "VmRSS"), told("io", "rchar")
model = load_sharded(folder, model_class=AutoModelForCausalLM, dtype=dtype, config=config)
said = {"is_loaded": model is not None}
if model is not None:
    said |= {"grown": 1024 * (told("status", "VmHWM") - memory), "read": told("io", "rchar") - read}
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    said |= {"whole": sum(p.numel() * p.element_size() for p in plain.parameters()), "wrong": []}
    theirs = {**plain.state_dict(), **dict(plain.named_buffers())}
    ours = {**model.state_dict(keep_vars=True), **dict(model.named_buffers())}
    for name, values in theirs.items():
        found = ours.pop(name)
        with deepspeed.zero.GatheredParameters([found] if hasattr(found, "ds_id") else []):
            if not torch.equal(found, values) or found.dtype != values.dtype:
                said["wrong"].append(name)
    said |= {"others": list(ours), "is_tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight}
    said |= {"generates": model.generation_config.max_new_tokens}
(out / f"{os.environ['RANK']}.json").write_text(json.dumps(said))
torch.distributed.destroy_process_group()
"""


def load(base: Path, out: Path, *, dtype: str = "float32") -> list[dict[str, Any]]:
    """What each of the ranks says of loading it."""
    out.mkdir()
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(WORKERS), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-W", "ignore", "-c", LOAD, str(base), dtype, str(out)]
    ranks = [subprocess.Popen(argv, env={**os.environ, **shared, "RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(WORKERS)]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0] * WORKERS
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [json.loads((out / f"{n}.json").read_text()) for n in range(WORKERS)]


def make_large(folder: Path) -> None:
    """200 MB in several files."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(max_new_tokens=7)
    model.save_pretrained(folder, max_shard_size="60MB")


def make_tied(folder: Path) -> None:
    """Tied embeddings, biases, and numbers of rows that three ranks cannot share evenly."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=103,
        hidden_size=24,
        intermediate_size=33,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def test_no_rank_ever_holds_the_base_whole(tmp_path: Path) -> None:
    make_large(tmp_path / "base")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    ranks = load(tmp_path / "base", tmp_path / "out")
    for said in ranks:
        assert said["wrong"] == said["others"] == []
        assert said["generates"] == 7
        assert said["read"] < 0.4 * said["whole"]
    # A third of it, one layer, and what the allocator wastes. Not of the others: when the model is made DeepSpeed sends each new layer
    # round, and gloo may keep several for a rank that is late.
    assert ranks[0]["grown"] < 0.6 * ranks[0]["whole"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_shards_are_those_of_the_files(tmp_path: Path, dtype: str) -> None:
    make_tied(tmp_path / "base")
    for said in load(tmp_path / "base", tmp_path / "out", dtype=dtype):
        assert said["wrong"] == said["others"] == []
        assert said["is_tied"]


def make_experts(folder: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    MixtralForCausalLM(config).save_pretrained(folder)


def make_short(folder: Path) -> None:
    """One weight is of another shape than the configuration says."""
    make_tied(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 104}))


@pytest.mark.parametrize("make", [make_experts, make_short])
def test_what_has_to_be_converted_is_left_to_transformers(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "base")
    assert not any(said["is_loaded"] for said in load(tmp_path / "base", tmp_path / "out"))
