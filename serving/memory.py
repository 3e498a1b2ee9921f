"""Adapters that were read, checked and proven, in the machine's memory: those that were used last, within a bound in bytes.

Between the registry's files and the model's device. What comes back from here costs a copy to the device, and on a CPU nothing: the same
tensors are used.
"""

import copy
import threading
from collections import OrderedDict
from dataclasses import replace

import torch
from torch import nn

from serving.base import Served
from serving.engine.lora import AdapterWeights

CPU = torch.device("cpu")
SHARE = 0.1
"""Part of the free memory that adapters may take by default."""

Key = tuple[str, str]
"""`name@version` and digest: what was loaded is never mistaken for other weights."""


class AdapterMemory:
    """LoRA adapters, the least recently used leaving first. Thread safe."""

    def __init__(self, *, capacity: int) -> None:
        """`capacity` in bytes."""
        self.capacity = capacity
        self.size = 0
        """Bytes that are in it."""
        self.hits = 0
        """Adapters that were found here."""
        self._held: OrderedDict[Key, tuple[Served, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    def get(self, key: Key, device: torch.device) -> Served | None:
        """The adapter on that device, where it is still here."""
        with self._lock:
            if key not in self._held:
                return None
            self._held.move_to_end(key)
            self.hits += 1
            served, _ = self._held[key]
        return _moved(served, device)

    def put(self, key: Key, served: Served) -> None:
        """Keep an adapter in place of those that were not used for longer; one that is larger than all the room is not kept."""
        served = _moved(served, CPU)
        size = size_of(served)
        with self._lock:
            if key in self._held or size > self.capacity:
                return
            self._held[key] = served, size
            self.size += size
            while self.size > self.capacity:
                _, (_, freed) = self._held.popitem(last=False)
                self.size -= freed


def size_of(served: Served) -> int:
    """Bytes of what it adds to the base."""
    assert served.weights is not None, "a copy of the base has no size of its own"
    tensors = [tensor for pair in served.weights.layers.values() for tensor in pair]
    tensors += [tensor for module in served.weights.modules.values() for tensor in module.state_dict().values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _moved(served: Served, device: torch.device) -> Served:
    weights = served.weights
    assert weights is not None, "a copy of the base stays where it was made"
    if _device_of(weights).type == device.type:
        return served
    layers = {name: (a.to(device), b.to(device)) for name, (a, b) in weights.layers.items()}
    modules: dict[str, nn.Module] = {name: copy.deepcopy(module).to(device) for name, module in weights.modules.items()}
    return replace(served, weights=AdapterWeights(layers, modules, weights.digest))


def _device_of(weights: AdapterWeights) -> torch.device:
    first = next(iter(weights.layers.values()), None)
    return first[0].device if first else next(next(iter(weights.modules.values())).parameters()).device
