"""The header of a safetensors file: which tensors are in it, and at which bytes.

As https://huggingface.co/docs/safetensors/index#format says it: eight bytes of the header's length, the header as JSON, the data. The
library itself reads whole tensors from local files alone, and holds Python's lock while it writes.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

TYPES = {
    "F32": torch.float32,
    "F64": torch.float64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names in a header."""
NAMES = {dtype: name for name, dtype in TYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""
    size: int
    """Bytes."""


def read_header(file: Any) -> dict[str, Entry]:
    """Tensors by name, of a file that is open at its beginning; those of types that are not in TYPES are left out."""
    (length,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(length))
    entries = {}
    for name, about in header.items():
        if name != "__metadata__" and about["dtype"] in TYPES:
            begin, end = about["data_offsets"]
            entries[name] = Entry(TYPES[about["dtype"]], tuple(about["shape"]), 8 + length + begin, end - begin)
    return entries


def header_of(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The beginning of a file in which the bytes of these tensors follow one another."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    said = json.dumps(header).encode()
    said += b" " * (-len(said) % 8)
    return struct.pack("<Q", len(said)) + said
