"""A published adapter from its files to the slot engine: matrices and head for the model that all share, or a copy of the base."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hone.manifest import AdapterManifest
from hone.registry import Registry
from models.tasks import TASKS
from serving.base import Engine, Served
from serving.copies import load_copy, vectors_before
from serving.disk import AdapterDisk
from serving.engine.heads import OwnHeads
from serving.engine.lora import AdapterWeights
from serving.kinds import generates
from serving.memory import AdapterMemory
from serving.proof import prove
from serving.published import CONFIG_FILE, WEIGHTS_FILE, PublishedFiles, read_tensors

PREFIX = "base_model.model."

UNDERSTOOD = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
"""Settings of PEFT's LoraConfig that plain LoRA matrices and the scaling below account for (or that no longer matter after training).
Any other that is set changes what the layers compute, so the adapter is refused rather than served wrong."""


class AdapterLoader:
    """Brings adapters of one engine into memory. Thread safe; the parts that touch the model run on the model's thread."""

    def __init__(self, registry: Registry, engine: Engine, *, memory: AdapterMemory | None = None, disk: AdapterDisk | None = None) -> None:
        """
        Args:
            registry: Where adapters are published.
            engine: Where they are to answer.
            memory: Keeps what was loaded once.
            disk: Keeps files, where the registry is on another machine.
        """
        self._engine = engine
        self._memory = memory
        self._published = PublishedFiles(registry, engine.base, disk=disk)

    def load(self, manifest: AdapterManifest) -> Served:
        """Bring one adapter to the model's device: out of memory, or read, checked and proven. Blocks for as long as that takes.

        Raises:
            AdapterRefusedError: its files are damaged, it needs what this engine does not do, or its outputs are not the recorded ones.
            UnreachableError: the registry cannot be read.
        """
        memory = self._memory if self._engine.mixes(manifest) else None
        key = str(manifest.ref), manifest.digest
        found = memory.get(key, self._engine.device) if memory is not None else None
        if found is None:
            found = self._read(manifest)
            if memory is not None:
                memory.put(key, found)
        return found

    def unload(self, served: Served) -> None:
        """Nothing: its matrices go when nobody refers to them."""

    def _read(self, manifest: AdapterManifest) -> Served:
        def made(folder: Path) -> Served:
            return self._mixed(folder, manifest) if self._engine.mixes(manifest) else self._copy(folder, manifest)

        def proven(served: Served, golden: Mapping[str, Tensor]) -> None:
            self._engine.thread.call(lambda: prove(self._engine, served, golden)).result()

        return self._published.read(manifest, made, proven)

    def _mixed(self, folder: Path, manifest: AdapterManifest) -> Served:
        """LoRA matrices, and the head where there is one, to go beside the model that all share."""
        engine, mixer, generated = self._engine, self._engine.parts.mixer, generates(manifest.task)
        assert mixer is not None, "adapters are mixed only on bases with wrapped layers"
        config = read_config(folder / CONFIG_FILE)
        state = read_tensors(folder, WEIGHTS_FILE, manifest)
        layers, saved = split_weights(state, config, mixer.shapes, device=engine.device, dtype=engine.dtype)
        if generated and saved:
            raise ValueError(f"it brings whole modules ({', '.join(saved)}), and adapters for {manifest.task} are LoRA matrices alone")
        inside = [name for name in layers for module in saved if name == module or name.startswith(f"{module}.")]
        if inside:
            raise ValueError(f"its LoRA layer {inside[0]} lies inside a module that it also brings whole")
        if generated:
            return self._published.served(folder, manifest, weights=AdapterWeights(layers, digest=manifest.digest))
        heads = engine.parts.heads[manifest.task]
        modules = engine.thread.call(lambda: heads.build(saved)).result()
        return self._published.served(folder, manifest, weights=AdapterWeights(layers, modules, manifest.digest), heads=heads)

    def _copy(self, folder: Path, manifest: AdapterManifest) -> Served:
        """A model of its own."""
        model = load_copy(self._engine, manifest, folder)
        context = self._engine.max_context - vectors_before(model)
        if generates(manifest.task):
            return self._published.served(folder, manifest, model=model, max_context=context)
        heads = OwnHeads(model, TASKS[manifest.task], self._engine.inputs)
        return self._published.served(folder, manifest, heads=heads, max_context=context)


def read_config(path: Path) -> dict[str, Any]:
    """PEFT's adapter_config.json.

    Raises:
        ValueError: not LoRA, or a variant of it that this engine does not compute; the message names the setting.
    """
    config: dict[str, Any] = json.loads(path.read_text())
    if config.get("peft_type") != "LORA":
        raise ValueError(f"its method is {config.get('peft_type')!r}, and this engine serves LORA")
    strange = [f"{key}={value!r}" for key, value in config.items() if value and key not in UNDERSTOOD and (key, value) != ("bias", "none")]
    if strange:
        raise ValueError(f"it was trained with {strange[0]}, which this engine does not compute")
    return config


def split_weights(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, int]],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, dict[str, Tensor]]]:
    """LoRA matrices by module, and the tensors of whole modules by module.

    Args:
        state: adapter_model.safetensors.
        config: adapter_config.json.
        shapes: Module name -> (inputs, outputs) of the base's linear layers.
        device: Where the matrices go.
        dtype: Their type.

    Raises:
        ValueError: a tensor that fits no layer of the base, half of a pair, or numbers that are not finite in `dtype`.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match:
            pairs.setdefault(match[1], {})[match[2]] = tensor
        elif ".lora_" in key or not key.startswith(PREFIX):
            raise ValueError(f"its tensor {key} is no part of a plain LoRA layer")
        else:
            module, leaf = _saved_module(key.removeprefix(PREFIX), config.get("modules_to_save") or [])
            saved.setdefault(module, {})[leaf] = tensor
    if not pairs and not saved:
        raise ValueError("it holds no weights")
    layers = {}
    for module, pair in pairs.items():
        a, b = _checked_pair(module, pair, shapes)
        layers[module] = a.to(device, dtype), (b.T.float() * _scaling(module, len(a), config)).to(device, dtype).contiguous()
        if not all(bool(matrix.isfinite().all()) for matrix in layers[module]):
            raise ValueError(f"its weights of {module} are not finite in {dtype}")
    return layers, saved


def _checked_pair(module: str, pair: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> tuple[Tensor, Tensor]:
    if module not in shapes:
        raise ValueError(f"it adapts {module}, which is not a linear layer of this base")
    if set(pair) != {"A", "B"}:
        raise ValueError(f"it holds only lora_{next(iter(pair))} of {module}")
    a, b = pair["A"], pair["B"]
    inputs, outputs = shapes[module]
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != inputs or b.shape[0] != outputs or a.shape[0] != b.shape[1]:
        raise ValueError(f"its matrices of {module} are {list(a.shape)} and {list(b.shape)}; the base's layer is {inputs} to {outputs}")
    return a, b


def _saved_module(key: str, names: Sequence[str]) -> tuple[str, str]:
    """Split a tensor's name at the module that PEFT saved whole; its `modules_to_save` lists endings of module names."""
    parts = key.split(".")
    for n in range(1, len(parts)):
        module = ".".join(parts[:n])
        if any(module.endswith(name) for name in names):
            return module, ".".join(parts[n:])
    raise ValueError(f"its tensor {key} is neither a LoRA matrix nor part of a module that its modules_to_save names")


def _scaling(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """What PEFT multiplies B(A(x)) by: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (https://arxiv.org/abs/2312.03732)."""
    patterns = config.get("alpha_pattern") or {}
    matched = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = float(patterns[matched] if matched else config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
