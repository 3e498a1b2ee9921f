"""Under ZeRO-3, a base that no rank ever holds whole: it is made in shards, and each rank reads its own out of the safetensors files.

transformers' own loading lets rank 0 read every weight and send it to all others, one module after another. Here nothing is sent, and a
rank reads no byte that is not its own.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.safetensors_file import Entry, read_header
from training.zero import shard


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    path: Path
    entry: Entry

    def read(self, start: int = 0, length: int | None = None) -> torch.Tensor:
        """So many of its elements from one on, in the order of its last dimension first; all of them by default."""
        length = prod(self.entry.shape) if length is None else length
        width = self.entry.dtype.itemsize
        read = np.fromfile(self.path, dtype=np.uint8, count=length * width, offset=self.entry.offset + start * width)
        return torch.from_numpy(read).view(self.entry.dtype)


def load_sharded(folder: Path, *, model_class: Any, dtype: torch.dtype, config: dict[str, Any]) -> Any | None:
    """The base of a folder, its parameters in shards. Every rank takes part.

    Args:
        folder: Has the weights as safetensors, in one file or several.
        model_class: A transformers auto class.
        dtype: Of the weights.
        config: DeepSpeed's, of stage 3.

    Returns:
        None where the files hold the weights in another form than the model does (experts to be stacked, other names, other shapes), so
        that they have to be converted: `from_pretrained` can do that.
    """
    from transformers import AutoConfig, GenerationConfig
    from transformers.conversion_mapping import get_model_conversion_mapping

    with _made_in_shards(config):
        model = model_class.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    model.tie_weights()
    if get_model_conversion_mapping(model, add_legacy=False):
        return None
    files = _stored(folder)
    found = [(tensor, _find(names, files, model.base_model_prefix)) for tensor, names in _tensors(model)]
    if any(stored is None or stored.entry.shape != tuple(getattr(tensor, "ds_shape", tensor.shape)) for tensor, stored in found):
        return None
    with torch.no_grad():
        for tensor, stored in found:
            _fill(tensor, stored)
            tensor._is_hf_initialized = True  # as `from_pretrained` tells transformers what not to start anew
        model.initialize_weights()  # buffers that are in no file
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


@contextmanager
def _made_in_shards(config: dict[str, Any]) -> Iterator[None]:
    """A block in which every new parameter is cut at once and left as it is.

    Given the configuration, transformers would do this too, and then put each module together again to start its weights: memory that is
    freed in between is left in holes, and a rank grows by nearly the whole base.
    """
    import deepspeed
    from transformers.initialization import no_init_weights
    from transformers.integrations.deepspeed import prevent_arange_dtype_change

    with no_init_weights(), prevent_arange_dtype_change(), deepspeed.zero.Init(config_dict_or_path=config):
        yield


def _stored(folder: Path) -> dict[str, Stored]:
    """Every tensor by its name."""
    stored: dict[str, Stored] = {}
    for path in _files(folder):
        with path.open("rb") as file:
            stored |= {name: Stored(path, entry) for name, entry in read_header(file).items()}
    return stored


def _files(folder: Path) -> list[Path]:
    """Those that transformers would read: there may be others beside them, in another form."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))] if index.exists() else []


def _tensors(model: Any) -> Iterator[tuple[Any, list[str]]]:
    """Every parameter and saved buffer, and its names: tied weights have several, of which the files hold any."""
    tensors: dict[int, tuple[Any, list[str]]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors.setdefault(id(tensor), (tensor, []))[1].append(name)
    yield from tensors.values()


def _find(names: list[str], files: Mapping[str, Stored], prefix: str) -> Stored | None:
    """A tensor of the model in the files, where it has the same name, or is with or without the one under which a head holds the model."""
    spelled = [spelling for name in names for spelling in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")]
    return next((files[name] for name in spelled if name in files), None)


def _fill(tensor: Any, stored: Any) -> None:
    if not hasattr(tensor, "ds_tensor"):  # a buffer, which every rank has
        tensor.copy_(stored.read().view(tensor.shape))
        return
    start, length = shard(tensor)
    with _written_anew(tensor):
        tensor.ds_tensor[:length].copy_(stored.read(start, length))


@contextmanager
def _written_anew(parameter: Any) -> Iterator[None]:
    """A block that fills a parameter's shard; where that is on NVMe, it has a buffer in it, and goes to its file after it."""
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

    is_out = parameter.ds_tensor.status is PartitionedParamStatus.NOT_AVAILABLE
    if is_out:
        parameter.ds_tensor.data = parameter.nvme_swapper.get_buffer(parameter, parameter.ds_tensor.ds_numel)
    yield
    if is_out:
        parameter.nvme_swapper.swap_out_and_release([parameter])
