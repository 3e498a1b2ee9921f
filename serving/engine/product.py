"""The products of linear layers, by the faster of the two libraries that torch brings for a CPU.

In float32 torch multiplies by MKL, which keeps to AVX2 on CPUs that are not Intel's. oneDNN, which torch keeps for other types and for
compiled graphs, uses all that the CPU has: on a server with AVX-512 of another maker it was 1.3 to 2.4 times as fast from 16 tokens on
(docs/decisions/0023). Its results differ in the last bits, as those of another number of rows do.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

FEWEST = 8
"""Tokens from which oneDNN is faster; below, what each of its calls costs is more than what it gains."""


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """What `layer` makes of `x` [..., inputs], outside of training."""
    if type(layer) is nn.Linear and x.numel() >= FEWEST * layer.in_features and _is_for_onednn(x):
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, layer.weight, layer.bias, "none", [], "")
        return out
    made: Tensor = layer(x)
    return made


def _is_for_onednn(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.device.type == "cpu" and has_faster_onednn()


@cache
def has_faster_onednn() -> bool:
    """Whether this is a CPU of another maker than Intel, and torch has both libraries."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_both and hasattr(torch.ops.mkldnn, "_linear_pointwise") and not _is_intel()


def _is_intel() -> bool:
    """By what Linux says; where nobody says anything, it is taken for one, and nothing changes."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
