"""A published adapter from its files to memory: digests, then matrices and head for the model that all share, or a copy of the base of its
own; and the proof that it answers here as it did where it was trained."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hone.base_model import PROCESSOR_FILE
from hone.errors import CorruptAdapterError, HoneError
from hone.manifest import AdapterManifest
from hone.registry import Registry, check_files
from hone.storage import digest_of
from models.tasks import TASKS
from serving.base import Engine, Served, end_ids
from serving.copies import load_copy, vectors_before
from serving.disk import AdapterDisk
from serving.engine.heads import OwnHeads
from serving.engine.lora import AdapterWeights
from serving.errors import AdapterRefusedError, RequestError, UnreachableError
from serving.kinds import generates, load_processor
from serving.memory import AdapterMemory
from serving.proof import prove

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
GOLDEN_FILE = "golden.safetensors"
PREFIX = "base_model.model."
NOT_PROCESSOR = {WEIGHTS_FILE, CONFIG_FILE, GOLDEN_FILE, "recipe.json", "README.md"}

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
        self._registry = registry
        self._engine = engine
        self._memory = memory
        self._disk = disk
        self._proven: set[str] = set()
        """Digests of what has answered here as recorded: the same files do so again."""
        self._processors: WeakValueDictionary[str, Any] = WeakValueDictionary()
        """By digest of their files: versions trained on one base share one."""

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

    def _read(self, manifest: AdapterManifest) -> Served:
        try:
            folder = self._files(manifest)
            served = self._mixed(folder, manifest) if self._engine.mixes(manifest) else self._copy(folder, manifest)
            if manifest.digest not in self._proven:
                golden = load_file(folder / GOLDEN_FILE)
                self._engine.thread.call(lambda: prove(self._engine, served, golden)).result()
                self._proven.add(manifest.digest)
        except RequestError:
            raise
        except CorruptAdapterError as error:
            raise AdapterRefusedError(f"{manifest.ref} has changed since it was published: {error.message}", "model") from None
        except (HoneError, ValueError, KeyError, OSError, SafetensorError) as error:
            raise AdapterRefusedError(f"{manifest.ref} cannot be served: {error}", "model") from error
        return served

    def _files(self, manifest: AdapterManifest) -> Path:
        """Its folder, every digest checked."""
        folder = self._registry.path(manifest.ref)
        try:
            if self._disk is not None:
                return self._disk.folder(manifest, folder)
            check_files(folder, manifest)
        except (CorruptAdapterError, OSError) as error:
            if isinstance(error, CorruptAdapterError) and self._registry.is_there:
                raise
            raise UnreachableError(f"{manifest.ref} is not in memory, and the registry cannot be read now; try again", "model") from error
        return folder

    def _mixed(self, folder: Path, manifest: AdapterManifest) -> Served:
        """LoRA matrices, and the head where there is one, to go beside the model that all share."""
        engine, mixer, generated = self._engine, self._engine.parts.mixer, generates(manifest.task)
        assert mixer is not None, "adapters are mixed only on bases with wrapped layers"
        config = read_config(folder / CONFIG_FILE)
        state = load_file(folder / WEIGHTS_FILE)
        layers, saved = split_weights(state, config, mixer.shapes, device=engine.device, dtype=engine.dtype)
        if generated and saved:
            raise ValueError(f"it brings whole modules ({', '.join(saved)}), and adapters for {manifest.task} are LoRA matrices alone")
        inside = [name for name in layers for module in saved if name == module or name.startswith(f"{module}.")]
        if inside:
            raise ValueError(f"its LoRA layer {inside[0]} lies inside a module that it also brings whole")
        if generated:
            return self._served(folder, manifest, weights=AdapterWeights(layers, digest=manifest.digest))
        heads = engine.parts.heads[manifest.task]
        modules = engine.thread.call(lambda: heads.build(saved)).result()
        return self._served(folder, manifest, weights=AdapterWeights(layers, modules, manifest.digest), heads=heads)

    def _copy(self, folder: Path, manifest: AdapterManifest) -> Served:
        """A model of its own."""
        model = load_copy(self._engine, manifest, folder)
        context = self._engine.max_context - vectors_before(model)
        if generates(manifest.task):
            return self._served(folder, manifest, model=model, max_context=context)
        heads = OwnHeads(model, TASKS[manifest.task], self._engine.inputs)
        return self._served(folder, manifest, heads=heads, max_context=context)

    def _served(self, folder: Path, manifest: AdapterManifest, **ways: Any) -> Served:
        if not generates(manifest.task) and not manifest.labels and manifest.problem_type != "regression":
            raise ValueError("its manifest names no labels")
        processor = self._processor(folder, manifest)
        made = {"max_context": self._engine.max_context, **ways}
        return Served(
            name=str(manifest.ref),
            digest=manifest.digest,
            task=manifest.task,
            processor=processor,
            end_ids=end_ids(manifest.task, processor, made.get("model")),
            labels=tuple(manifest.labels or ()),
            problem_type=manifest.problem_type,
            **made,
        )

    def _processor(self, folder: Path, manifest: AdapterManifest) -> Any:
        files = {name: entry.sha256 for name, entry in manifest.files.items() if name not in NOT_PROCESSOR}
        if not files.keys() & {"tokenizer_config.json", PROCESSOR_FILE}:
            return self._engine.base.processor
        key = digest_of(files)
        processor = self._processors.get(key)
        if processor is None:
            processor = self._processors[key] = load_processor(manifest.task, folder)
        return processor


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
