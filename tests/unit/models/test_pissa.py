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
