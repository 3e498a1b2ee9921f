"""A published adapter from its files to the model's memory: digests, configuration, matrices, head, and the proof that it answers here as
it did where it was trained."""

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

from hone.errors import CorruptAdapterError
from hone.manifest import AdapterManifest
from hone.registry import Registry
from hone.storage import digest_of
from serving.base import Engine, Served, end_ids, load_tokenizer
from serving.engine.cache import SlotCache
from serving.engine.capability import tolerance
from serving.engine.lora import AdapterWeights, Stack, StackedRows
from serving.errors import AdapterRefusedError, RequestError

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
GOLDEN_FILE = "golden.safetensors"
PREFIX = "base_model.model."
NOT_TOKENIZER = {WEIGHTS_FILE, CONFIG_FILE, GOLDEN_FILE, "recipe.json", "README.md"}

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
    """Brings adapters of one engine into its memory. Thread safe; the parts that touch the model run on the model's thread."""

    def __init__(self, registry: Registry, engine: Engine) -> None:
        self._registry = registry
        self._engine = engine
        self._tokenizers: WeakValueDictionary[str, Any] = WeakValueDictionary()
        """By digest of the tokenizer's files: versions trained on one base share one."""

    def load(self, manifest: AdapterManifest) -> Served:
        """Read, check and prove one adapter. Blocks for as long as that takes.

        Raises:
            AdapterRefusedError: its files are damaged, it needs what this engine does not do, or its outputs are not the recorded ones.
        """
        folder = self._registry.path(manifest.ref)
        try:
            self._registry.verify(manifest.ref)
            served = self._read(folder, manifest)
            golden = load_file(folder / GOLDEN_FILE)
            self._engine.thread.call(lambda: _prove(self._engine, served, golden)).result()
        except RequestError:
            raise
        except CorruptAdapterError as error:
            raise AdapterRefusedError(f"{manifest.ref} has changed since it was published: {error.message}", "model") from None
        except (ValueError, KeyError, OSError, SafetensorError) as error:
            raise AdapterRefusedError(f"{manifest.ref} cannot be served: {error}", "model") from error
        return served

    def _read(self, folder: Path, manifest: AdapterManifest) -> Served:
        engine, is_chat = self._engine, manifest.task == "chat"
        if is_chat and engine.generation is None:
            raise ValueError("it is a chat adapter, and this base does not generate")
        config = read_config(folder / CONFIG_FILE)
        state = load_file(folder / WEIGHTS_FILE)
        layers, saved = split_weights(state, config, engine.mixer.shapes, device=engine.device, dtype=engine.dtype)
        if is_chat and saved:
            raise ValueError(f"it brings whole modules ({', '.join(saved)}), and chat adapters are LoRA matrices alone")
        if not is_chat and not manifest.labels:
            raise ValueError("its manifest names no labels")
        inside = [name for name in layers for module in saved if name == module or name.startswith(f"{module}.")]
        if inside:
            raise ValueError(f"its LoRA layer {inside[0]} lies inside a module that it also brings whole")
        heads = engine.classification.heads
        modules = {} if is_chat else engine.thread.call(lambda: heads.build(saved)).result()
        tokenizer = self._tokenizer(folder, manifest)
        return Served(
            name=str(manifest.ref),
            digest=manifest.digest,
            task=manifest.task,
            weights=AdapterWeights(layers, modules),
            tokenizer=tokenizer,
            end_ids=end_ids(tokenizer) if is_chat else frozenset(),
            labels=tuple(manifest.labels or ()),
        )

    def _tokenizer(self, folder: Path, manifest: AdapterManifest) -> Any:
        files = {name: entry.sha256 for name, entry in manifest.files.items() if name not in NOT_TOKENIZER}
        if "tokenizer_config.json" not in files:
            return self._engine.base.tokenizer
        key = digest_of(files)
        tokenizer = self._tokenizers.get(key)
        if tokenizer is None:
            tokenizer = self._tokenizers[key] = load_tokenizer(folder)
        return tokenizer


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


def _prove(engine: Engine, served: Served, golden: Mapping[str, Tensor]) -> None:
    """Compare the recorded outputs with those that this engine's own batched path gives. On the model's thread.

    Raises:
        AdapterRefusedError: they differ by more than arithmetic explains.
    """
    ids, mask, wanted = golden["input_ids"], golden["attention_mask"], golden["logits"].float()
    rows = [row[:length].tolist() for row, length in zip(ids, mask.sum(-1).tolist(), strict=True)]
    got = torch.stack(_outputs(engine, served, rows)).cpu()
    if got.shape != wanted.shape or (served.labels and len(served.labels) != got.shape[1]):
        raise AdapterRefusedError(
            f"{served.name}: has {got.shape[1]} outputs, {len(served.labels)} labels and {wanted.shape[1]} recorded outputs", "model"
        )
    difference = float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())
    allowed = tolerance(engine.dtype)
    if not difference <= allowed:
        raise AdapterRefusedError(
            f"{served.name}: does not reproduce the outputs recorded when it was trained (relative difference {difference:.2g}, "
            f"allowed {allowed:.2g}); it is not served",
            "model",
        )


def _outputs(engine: Engine, served: Served, rows: list[list[int]]) -> list[Tensor]:
    """The adapter's outputs for token rows, through prefill and one decode step where it chats."""
    adapters = [served.weights] * len(rows)
    if served.task != "chat":
        return engine.classification.heads.logits(rows, adapters)
    assert engine.decoder is not None, "chat adapters are refused on encoders"
    cache = SlotCache(slots=len(rows), max_context=max(map(len, rows)))
    if min(map(len, rows)) == 1:
        return list(engine.decoder.prefill(cache, rows, adapters, first=0))
    engine.decoder.prefill(cache, [row[:-1] for row in rows], adapters, first=0)
    plan = StackedRows(adapters, Stack([served.weights] if served.weights else []), engine.device)
    return list(engine.decoder.decode(cache, [row[-1] for row in rows], [len(row) - 1 for row in rows], plan))
