"""The largest part of a weight: exact where it is small, and nearly so where it is large."""

import pytest
import torch

from models.methods import lora


@pytest.mark.parametrize("largest_decomposed", [1024, 16])
def test_two_factors_are_the_best_approximation_of_their_rank(monkeypatch: pytest.MonkeyPatch, largest_decomposed: int) -> None:
    monkeypatch.setattr(lora, "LARGEST_DECOMPOSED", largest_decomposed)
    torch.manual_seed(0)
    spectrum = 0.9 ** torch.arange(96.0)
    u, v = (torch.linalg.qr(torch.randn(size, 96))[0] for size in (128, 96))
    weight = u * spectrum @ v.T
    a, b = lora._largest_part(weight, 8, 2.0)
    left = torch.linalg.norm(weight - 2.0 * b @ a)
    assert float(left) == pytest.approx(float(spectrum[8:].square().sum().sqrt()), rel=1e-3)


def test_layers_whose_weight_stands_the_other_way_round_begin_likewise() -> None:
    """GPT-2's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from hone.recipe import LoraMethod
    from models.methods import Applying
    from models.tasks import TASKS

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=64,
        n_positions=32,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    base = GPT2LMHeadModel(config).eval()
    ids = torch.arange(8)[None]
    before = base(input_ids=ids).logits.detach()
    model = lora.Lora().apply(base, LoraMethod(r=4, init_lora_weights="pissa"), Applying(TASKS["chat"])).eval()
    torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-5, rtol=1e-5)
    starts = {name: p for name, p in model.named_parameters() if ".lora_B.default." in name}
    assert len(starts) == 8
    assert all(float(p.detach().abs().max()) > 0 for p in starts.values())  # plain LoRA begins at zero
