"""Products by oneDNN are those of the layer, whatever the shape, and one row's overflow stays its own."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from serving.engine import product

TOKENS = [1, product.FEWEST, 40]


@pytest.fixture(autouse=True)
def another_maker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a CPU that is not Intel's, whatever this one is."""
    monkeypatch.setattr(product, "_is_intel", lambda: False)
    product.has_faster_onednn.cache_clear()
    yield
    product.has_faster_onednn.cache_clear()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_product_is_the_layers(tokens: int, bias: bool) -> None:
    torch.manual_seed(tokens)
    layer, x = nn.Linear(48, 20, bias=bias), torch.randn(tokens, 48)
    exact = layer.double()(x.double())
    layer.float()
    with torch.inference_mode():
        for shaped in (x, x[:, None], x[None]):
            made = product.linear(layer, shaped)
            assert made.shape == (*shaped.shape[:-1], 20)
            torch.testing.assert_close(made.double(), exact.view(made.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()), reason="torch has not both libraries")
def test_it_is_onednn_that_multiplies_from_some_tokens_on() -> None:
    layer = nn.Linear(48, 20)
    with torch.inference_mode():
        for tokens, expected in ((product.FEWEST - 1, False), (product.FEWEST, True)):
            with torch.profiler.profile() as profile:
                product.linear(layer, torch.randn(tokens, 48))
            assert any("mkldnn" in event.key for event in profile.key_averages()) is expected


@pytest.mark.parametrize("layer", [nn.Linear(48, 20).bfloat16(), Conv1D(20, 48)], ids=["bfloat16", "Conv1D"])
def test_what_is_not_for_onednn_goes_through_the_layer(layer: nn.Module) -> None:
    x = torch.randn(40, 48).to(next(layer.parameters()).dtype)
    with torch.inference_mode():
        assert torch.equal(product.linear(layer, x), layer(x))


def test_an_overflow_stays_in_its_row() -> None:
    layer, x = nn.Linear(48, 20), torch.randn(16, 48)
    with torch.inference_mode():
        before = product.linear(layer, x)
        x[3] = torch.inf
        after = product.linear(layer, x)
    others = [row for row in range(16) if row != 3]
    assert torch.equal(before[others], after[others])
    assert not after[3].isfinite().any()


def test_on_an_intel_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_is_intel", lambda: True)
    product.has_faster_onednn.cache_clear()
    assert not product.has_faster_onednn()
