"""Decoders whose rows cannot share a batch: their answers take turns, and each adapter is merged into a copy."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hone.base_model import find_base_model
from hone.errors import BaseModelError
from hone.storage import Home
from models.methods import METHODS
from serving.base import load_engine
from serving.calls import CompletionCall, Sampling
from serving.engine.text import TextStream
from serving.replica import Replica
from tests.serving_fixtures import greedy_alone, load_plainly, publish_trained
from tests.tiny import make_tokenizer
from tests.unit.serving.test_adapters_in_use import text

pytestmark = pytest.mark.anyio

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3, "init_std": 0.3}
TARGETS = {"falcon": ["query_key_value"], "bloom": ["query_key_value"]}
OWN: dict[str, dict[str, Any]] = {
    "falcon": {"alibi": True, "new_decoder_architecture": False, "multi_query": False, "parallel_attn": False},
    "qwen3_next": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "intermediate_size": 48,
        "mlp_only_layers": [0, 1],
    },
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"], "intermediate_size": 48},
    "granitemoehybrid": {
        "num_key_value_heads": 2,
        "layer_types": ["mamba", "attention"],
        "intermediate_size": 32,
        "shared_intermediate_size": 48,
        "num_local_experts": 0,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
    },
}
GREEDY = Sampling(max_tokens=12, temperature=0.0, top_p=1.0, seed=None, stop=())


def make(folder: Path, kind: str) -> Path:
    tokenizer = make_tokenizer(folder)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **SMALL, **OWN.get(kind, {}), **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def as_text(tokenizer: Any, tokens: list[int]) -> str:
    """As it is streamed: how many replacement characters broken bytes become depends on how they come."""
    stream = TextStream(tokenizer)
    return "".join([*map(stream.push, tokens), stream.finish()])


@pytest.mark.parametrize("kind", ["bloom", "falcon", "qwen3_next", "lfm2", "granitemoehybrid"])
async def test_each_answers_as_generate_does(kind: str, home: Home, tmp_path: Path) -> None:
    base = make(tmp_path / kind, kind)
    rows = [{"text": text} for text in ("the cat sat", "why does it rain")]
    settings = {"r": 3, "target_modules": TARGETS.get(kind, ["q_proj", "v_proj"])}
    manifests = [
        publish_trained(home, base, name, task="completion", method="lora", rows=rows, seed=seed, **settings)
        for seed, name in enumerate(("one", "two"))
    ]
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    merge = METHODS["lora"].merge
    models = {str(base): plain} | {str(manifest.ref): merge(load_plainly(home, base, manifest)) for manifest in manifests}
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt, ends = tokenizer("the cat sat")["input_ids"], [tokenizer.eos_token_id]
    expected = {name: as_text(tokenizer, greedy_alone(model, prompt, tokens=12, end_ids=ends)) for name, model in models.items()}
    assert len(set(expected.values())) == 3
    replica = Replica(base=str(base), home=str(home.root))
    try:
        names = list(models) * 3
        answers = await asyncio.gather(*(replica.answer(CompletionCall(name, ["the cat sat"], 1, GREEDY)) for name in names))
        assert [text(events) for events in answers] == [expected[name] for name in names]
        assert len((await replica.status()).copies) == 2
    finally:
        replica.stop()


async def test_what_cannot_be_asked_token_by_token_is_refused(home: Home, tmp_path: Path) -> None:
    base = make(tmp_path / "mamba", "mamba")
    with pytest.raises(BaseModelError, match="MambaForCausalLM cannot be asked token by token"):
        load_engine(find_base_model(str(base), home=home), max_rows=None, max_context=None)
