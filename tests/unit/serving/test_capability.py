"""Architectures: served right, or refused with the reason."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BloomConfig,
    FalconConfig,
    Gemma4TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from hone.errors import BaseModelError
from serving.engine.cache import SlotCache
from serving.engine.capability import FEWEST_ROWS, MOST_ROWS, CannotMixError, check_architecture, probe, room_of
from serving.engine.decoder import Decoder
from serving.engine.decoding import CopiedRows, Copies, Planner, Stack, StackedRows
from serving.engine.lora import AdapterWeights, Mixer, Segments
from serving.loading import split_weights

SMALL: dict[str, Any] = {"vocab_size": 90, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
GROUPED: dict[str, Any] = {
    **SMALL,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
GPT2: dict[str, Any] = {"vocab_size": 90, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}


def make(config: Any) -> Any:
    torch.manual_seed(0)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def room(model: Any, *, asked: int | None = None, rows: int | None = 4, memory: int = 2**30) -> tuple[int, int]:
    decoder = Decoder(model, Mixer(model))
    token_bytes = probe(decoder)
    return room_of(decoder, token_bytes=token_bytes, positions=64, max_context=asked, max_rows=rows, memory_bytes=memory)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**GROUPED),
        Qwen2Config(**GROUPED),
        Qwen3Config(**GROUPED, head_dim=16),
        GPT2Config(**GPT2),
    ],
    ids=lambda c: c.model_type,
)
@torch.inference_mode()
def test_mixed_rows_equal_peft_on_each_architecture(config: Any) -> None:
    model, plain = make(config), make(config)
    decoder = Decoder(model, Mixer(model))
    probe(decoder)
    targets = ["c_attn", "c_proj"] if config.model_type == "gpt2" else ["q_proj", "down_proj"]
    adapted = get_peft_model(
        plain, LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=targets, fan_in_fan_out=config.model_type == "gpt2")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.3)
    state = {k.replace(".default", ""): v for k, v in adapted.state_dict().items() if "lora_" in k}
    layers, _ = split_weights(state, {"lora_alpha": 8}, decoder.mixer.shapes, device=decoder.device, dtype=torch.float32)
    weights = AdapterWeights(layers)
    rows = [[5, 6, 7, 8, 9], [11, 12], [5, 6, 7, 8, 9]]
    adapters = [None, weights, weights]
    cache = SlotCache(slots=3, max_context=64)
    copies = Copies()
    copies.hold(adapters)
    plans = [StackedRows(adapters, Stack([weights]), decoder.device), CopiedRows(adapters, copies)]
    both = []
    for plan in plans:
        decoder.prefill(cache, [row[:-1] for row in rows], adapters, first=0)
        both.append(decoder.decode(cache, [row[-1] for row in rows], [len(row) - 1 for row in rows], plan))
    with adapted.disable_adapter():
        wanted = [adapted(torch.tensor([rows[0]])).logits[0, -1]]
    wanted += [adapted(torch.tensor([row])).logits[0, -1] for row in rows[1:]]
    for got in both:
        torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-4, atol=1e-4)


def test_a_window_that_the_engine_slides_bounds_nothing() -> None:
    assert room(make(MistralConfig(**GROUPED, sliding_window=16))) == (4, 64)


def test_a_window_that_the_engine_slides_otherwise_bounds_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "_masks", all_that_is_past)
    model = make(MistralConfig(**GROUPED, sliding_window=16))
    assert room(model) == (4, 16)
    assert model.config.sliding_window == 16
    with pytest.raises(BaseModelError, match=r"max_context 32 is past .* 16, for its sliding window"):
        room(make(MistralConfig(**GROUPED, sliding_window=16)), asked=32)


def all_that_is_past(decoder: Decoder, places: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return decoder._mask(places <= positions)


def test_a_rope_that_depends_on_the_longest_row_bounds_the_context() -> None:
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 24,
        "rope_theta": 1e4,
    }
    model = make(LlamaConfig(**GROUPED, rope_parameters=rope))
    assert room(model) == (4, 24)


def test_memory_bounds_the_context_where_none_is_asked_for() -> None:
    model = make(LlamaConfig(**GROUPED))
    per_token = 2 * 2 * 2 * 8 * 4
    assert room(model, memory=4 * per_token * 20) == (4, 20)


def test_what_a_token_takes_is_measured_layer_by_layer() -> None:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9, "head_dim": 8, "global_head_dim": 16}
    decoder = make(Gemma4TextConfig(**GROUPED, **layers, vocab_size_per_layer_input=90, hidden_size_per_layer_input=8))
    assert probe(Decoder(decoder, Mixer(decoder))) == 2 * 2 * (8 + 16) * 4


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (1000 * 64, (MOST_ROWS, 64)),
        (20 * 64, (20, 64)),
        (20 * 64 - 1, (19, 64)),
        (FEWEST_ROWS * 10, (FEWEST_ROWS, 10)),
        (1, (FEWEST_ROWS, 1)),
    ],
)
def test_rows_are_as_many_as_have_the_whole_context(tokens: int, expected: tuple[int, int]) -> None:
    model = make(LlamaConfig(**GROUPED))
    assert room(model, rows=None, memory=2 * 2 * 2 * 8 * 4 * tokens) == expected


def test_a_shorter_context_leaves_memory_for_more_rows() -> None:
    model = make(LlamaConfig(**GROUPED))
    assert room(model, asked=32, rows=None, memory=2 * 2 * 2 * 8 * 4 * 20 * 64) == (MOST_ROWS, 32)


def test_models_that_take_no_positions_are_not_mixed() -> None:
    with pytest.raises(CannotMixError, match="BloomForCausalLM takes no position_ids"):
        check_architecture(make(BloomConfig(vocab_size=90, hidden_size=32, n_layer=1, n_head=4)))


def test_models_whose_rows_depend_on_their_padding_are_not_mixed_by_measurement() -> None:
    model = make(FalconConfig(**SMALL, alibi=True, new_decoder_architecture=False, initializer_range=0.3))
    with pytest.raises(CannotMixError):
        probe(Decoder(model, Mixer(model)))


def test_encoder_decoders_are_refused() -> None:
    config = T5Config(vocab_size=90, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    with pytest.raises(BaseModelError, match="encoder-decoder"):
        check_architecture(AutoModelForSeq2SeqLM.from_config(config))


@torch.inference_mode()
def test_every_plan_adds_the_same_deltas_as_rows_come_and_go() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Sequential(torch.nn.Linear(6, 5))
    mixer = Mixer(linear)
    adapters = [AdapterWeights({"0": (torch.randn(rank, 6), torch.randn(rank, 5))}) for rank in (1, 3, 4)]
    empty = AdapterWeights({})
    batches: list[list[AdapterWeights | None]] = [
        [adapters[0], None],
        [adapters[0], None, adapters[2], adapters[1], adapters[2], empty],
        [adapters[1], empty, adapters[0]],
        [None, adapters[2], adapters[0], adapters[0]],
    ]
    copies = Copies()
    for rows in batches:
        x = torch.randn(len(rows), 1, 6)
        copies.hold(rows)
        held = [*adapters, empty]
        plans = [Segments(rows), StackedRows(rows, Stack(held), x.device), CopiedRows(rows, copies)]
        for plan in plans:
            with mixer.running(plan):
                got = linear(x)
                flat = linear(x[:, 0])
            torch.testing.assert_close(flat, got[:, 0])
            for n, row in enumerate(rows):
                delta = x[n] @ row.layers["0"][0].T @ row.layers["0"][1] if row and row.layers else 0
                torch.testing.assert_close(got[n], linear(x)[n] + delta)


@torch.inference_mode()
def test_few_adapters_are_stacked_and_many_are_copied() -> None:
    adapters = [AdapterWeights({"0": (torch.randn(4, 6), torch.randn(4, 5))}) for _ in range(9)]
    planner = Planner(torch.device("cpu"))
    kinds = [type(planner.plan(adapters[:n])) for n in (0, 1, 4, 5, 9, 4)]
    assert kinds == [Segments, StackedRows, StackedRows, CopiedRows, CopiedRows, StackedRows]
    rows = [*adapters[:5], None]
    assert planner.plan(rows) is planner.plan(list(rows))
