"""Every architecture that is mixed: random adapters, joins, pieces and kept beginnings, token for token what `generate` says."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from serving.engine.capability import probe
from serving.engine.decoder import Decoder
from serving.engine.decoding import is_few
from serving.engine.generation import Generation
from serving.engine.lora import AdapterWeights, Mixer
from serving.engine.row import Row
from serving.engine.sampling import make_chooser
from serving.engine.text import TextStream
from serving.loading import split_weights
from tests.serving_fixtures import greedy_alone
from tests.unit.serving.test_capability import GPT2, GROUPED, SMALL, make

RANKS = (5, 4, 6, 3, 7, 8)
BY_TURNS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9, "head_dim": 8}
"""Layers that see less than most prompts."""
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
LINEAR = r".*(q|k|v|out|o|gate|up|down)_proj|.*fc[12]"
PER_LAYER = {"vocab_size_per_layer_input": 90, "hidden_size_per_layer_input": 8, "global_head_dim": 16}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**GROUPED),
        MistralConfig(**GROUPED, sliding_window=None),
        MistralConfig(**GROUPED, sliding_window=9),
        Gemma2Config(**GROUPED, **BY_TURNS),
        Gemma3TextConfig(**GROUPED, **BY_TURNS),
        Gemma4TextConfig(**GROUPED, **BY_TURNS, **PER_LAYER),
        GptOssConfig(**GROUPED, **BY_TURNS, num_local_experts=4, num_experts_per_tok=2),
        Qwen2MoeConfig(**GROUPED, **EXPERTS),
        Qwen2Config(**GROUPED),
        Qwen3Config(**GROUPED, head_dim=16),
        GPT2Config(**GPT2),
        OPTConfig(**SMALL, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.3),
    ],
    ids=lambda config: config.model_type + ("-sliding" if getattr(config, "sliding_window", None) else ""),
)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.filterwarnings("ignore:The following .* keys did not match")  # PEFT's own, for experts
@torch.inference_mode()
def test_greedy_tokens_are_those_of_generate(config: Any, seed: int, llama: Path) -> None:
    random = Random(seed)
    plain, decoder, adapters = with_adapters(config)
    assert is_few(adapters[:3])
    assert not is_few(adapters), "both ways of decoding are to be tried"
    assert any("shared_expert" in module for module in adapters[0].layers) == isinstance(config, Qwen2MoeConfig)
    generation = Generation(
        decoder, max_rows=7, max_context=64, prefill_tokens=random.choice([3, 10, 40]), prefix_tokens=random.choice([64, 2000])
    )
    tokenizer = AutoTokenizer.from_pretrained(llama)
    beginning = [random.randrange(90) for _ in range(20)]
    owners = random.sample([*range(len(RANKS)), None] * 2, k=14)
    rows = []
    for owner in owners:
        ids = random.choice([[], beginning]) + [random.randrange(90) for _ in range(random.randrange(1, 24))]
        chooser = make_chooser(seed=None, choice=0, temperature=0.0)
        adapter = None if owner is None else adapters[owner]
        rows.append(Row(ids, adapter, chooser, TextStream(tokenizer), frozenset(), random.randrange(1, 18), lambda _: None))
    waiting = list(rows)
    while waiting or generation.running or generation.waiting:
        joining, waiting = waiting[: (k := random.randrange(4))], waiting[k:]
        generation.add(joining)
        generation.step()
    for owner, row in zip(owners, rows, strict=True):
        assert row.made == alone(plain, owner, row), owner


def with_adapters(config: Any) -> tuple[Any, Decoder, list[AdapterWeights]]:
    """The model under PEFT and under the engine, and adapters of every rank in both."""
    model, plain = make(config), make(config)
    decoder = Decoder(model, Mixer(model))
    probe(decoder)
    assert decoder.window == (getattr(config, "sliding_window", None) or None)
    is_gpt2 = config.model_type == "gpt2"
    targets = ["c_attn", "c_proj", "c_fc"] if is_gpt2 else LINEAR
    adapted, weights = plain, []
    for rank in RANKS:
        lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=8, target_modules=targets, fan_in_fan_out=is_gpt2)
        if rank == RANKS[0]:
            adapted = get_peft_model(plain, lora, str(rank))
        else:
            adapted.add_adapter(str(rank), lora)
        own = {name: p for name, p in adapted.named_parameters() if f".{rank}.weight" in name}
        for parameter in own.values():
            parameter.normal_(std=0.3)
        state = {name.replace(f".{rank}.weight", ".weight"): p for name, p in own.items()}
        layers, _ = split_weights(state, {"lora_alpha": 8}, decoder.mixer.shapes, device=decoder.device, dtype=torch.float32)
        weights.append(AdapterWeights(layers, digest=str(rank)))
    return adapted.eval(), decoder, weights


def alone(plain: Any, owner: int | None, row: Row) -> list[int]:
    if owner is None:
        with plain.disable_adapter():
            return greedy_alone(plain, list(row.prompt), tokens=row.max_tokens, end_ids=())
    plain.set_adapter(str(RANKS[owner]))
    return greedy_alone(plain, list(row.prompt), tokens=row.max_tokens, end_ids=())
