"""Rows laid end to end: each sees itself alone, whatever the architecture, and losses are those of each row by itself."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from hone.recipe import TrainSettings
from models.linear_cross_entropy import CHUNK_BYTES, linear_cross_entropy
from models.tasks import TASKS, Inputs
from models.tasks.causal import split_head
from training.batches import deal_packed
from training.forward import choose_packing

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 5},
    "gemma": {},
    "gemma3_text": {"sliding_window": 5, "sliding_window_pattern": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "olmo2": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt_neox": {},
}
NOT_PACKED: dict[str, dict[str, Any]] = {"gemma2": {}, "gpt_oss": {"num_local_experts": 2}, "mamba": {}}
ONE_LINEAR_HEAD = set(ARCHITECTURES) - {"granite", "cohere"}


def tiny(name: str, **settings: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SMALL | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def ragged_rows(seed: int = 0) -> list[dict[str, Any]]:
    """Rows of 1 to 23 tokens, some of them targets; one row has none."""
    generator = np.random.default_rng(seed)
    rows = []
    for length in (7, 23, 2, 12, 1, 9):
        ids = generator.integers(3, 97, length).astype(np.int32)
        wanted = generator.random(length) < 0.6
        wanted[0] = False
        rows.append({"input_ids": ids, "labels": np.where(wanted, ids, -100).astype(np.int32)})
    return rows


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_rows_have_the_loss_and_the_outputs_of_each_alone(name: str) -> None:
    model, task, rows = tiny(name, **ARCHITECTURES[name]), TASKS["chat"], ragged_rows()
    alone = [task.collate([row], inputs=Inputs(0), packed=False) for row in rows]
    with torch.no_grad():
        expected = [plain_loss(model, row) for row in rows]
        expected_outputs = torch.cat([task.outputs(model, batch) for batch in alone])
    assert choose_packing(model, task, TrainSettings())
    assert (split_head(model) is not None) == (name in ONE_LINEAR_HEAD)
    with torch.no_grad():
        outputs = task.outputs(model, task.collate(rows, inputs=Inputs(0), packed=True))
        together, _ = task.loss(model, task.collate(rows, inputs=Inputs(0), packed=True))
        without = [task.collate(rows[:n] + rows[n + 1 :], inputs=Inputs(0), packed=True) for n in range(len(rows))]
        others = [float(task.loss(model, batch)[0]) for batch in without]
    torch.testing.assert_close(outputs, expected_outputs, atol=1e-5, rtol=1e-5)
    assert float(together) == pytest.approx(sum(expected), rel=1e-5)
    for n, other in enumerate(others):  # row by row: what is missing without it is its own loss
        assert float(together) - other == pytest.approx(expected[n], abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "granite"])
def test_gradients_are_those_of_padded_rows(name: str) -> None:
    task, rows = TASKS["chat"], ragged_rows()
    gradients = []
    for packed in (False, True):
        model = tiny(name, **ARCHITECTURES[name])
        if packed:
            assert choose_packing(model, task, TrainSettings())
        loss, _ = task.loss(model, task.collate(rows, inputs=Inputs(0), packed=packed))
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, atol=1e-4, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", NOT_PACKED)
def test_what_mixes_tokens_in_another_way_is_padded(name: str) -> None:
    model = tiny(name, **NOT_PACKED[name])
    before = model.config._attn_implementation
    assert not choose_packing(model, TASKS["chat"], TrainSettings())
    assert model.config._attn_implementation == before


def test_packing_can_be_turned_off() -> None:
    assert not choose_packing(tiny("llama"), TASKS["chat"], TrainSettings(packing=False))


@pytest.mark.parametrize("trained", ["all", "hidden"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_cross_entropy_is_cross_entropy_chunk_by_chunk(trained: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * 50 * 16)
    torch.manual_seed(0)
    parts = [torch.randn(70, 12), torch.randn(50, 12), torch.randn(50) if bias else None]
    targets = torch.randint(0, 50, (70,))
    results = []
    for is_ours in (False, True):
        hidden, weight, offset = (None if p is None else p.clone().requires_grad_(trained == "all" or n == 0) for n, p in enumerate(parts))
        assert hidden is not None
        assert weight is not None
        if is_ours:
            loss, right = linear_cross_entropy(hidden, weight, offset, targets)
        else:
            logits = torch.nn.functional.linear(hidden, weight, offset)
            loss, right = cross_entropy(logits, targets, reduction="sum"), (logits.argmax(-1) == targets).sum()
        (loss * 0.5).backward()  # type: ignore[no-untyped-call]
        results.append((loss, right, *(None if p is None else p.grad for p in (hidden, weight, offset))))
    for ours, plain in zip(*results, strict=True):
        if plain is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, plain)


def test_no_target_at_all_is_no_loss_and_no_gradient() -> None:
    hidden = torch.randn(0, 4, requires_grad=True)
    loss, right = linear_cross_entropy(hidden, torch.randn(9, 4), None, torch.zeros(0, dtype=torch.long))
    loss.backward()  # type: ignore[no-untyped-call]
    assert (float(loss.detach()), int(right)) == (0, 0)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("capacity", [60, 200, 5000])
def test_portions_hold_every_row_once_within_capacity(world_size: int, capacity: int) -> None:
    lengths = np.random.default_rng(1).integers(1, 60, 500)
    rows = np.random.default_rng(2).permutation(500)[:90]
    dealt = [deal_packed(rows, lengths, rank=rank, world_size=world_size, capacity=capacity) for rank in range(world_size)]
    assert sorted(np.concatenate([part for portions in dealt for part in portions])) == sorted(rows)
    assert len({len(portions) for portions in dealt}) == 1
    tokens = [int(lengths[part].sum()) for portions in dealt for part in portions]
    assert max(tokens) <= capacity
    needed = -(-int(lengths[rows].sum()) // (capacity * world_size)) * world_size
    assert len(tokens) <= needed + 2 * world_size, "hardly more portions than the tokens need"


def test_portions_of_all_workers_are_alike() -> None:
    lengths = np.random.default_rng(1).integers(1, 60, 500)
    dealt = [deal_packed(np.arange(64), lengths, rank=rank, world_size=4, capacity=600) for rank in range(4)]
    tokens = [int(lengths[part].sum()) for portions in dealt for part in portions]
    assert max(tokens) <= 1.05 * min(tokens)


def test_a_row_longer_than_the_capacity_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        deal_packed(np.arange(3), np.array([1, 9, 2]), rank=0, world_size=1, capacity=8)


def plain_loss(model: Any, row: dict[str, Any]) -> float:
    """One row by itself, the textbook's way."""
    ids, labels = (torch.as_tensor(row[name]).long()[None] for name in ("input_ids", "labels"))
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    return float(cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum", ignore_index=-100))
