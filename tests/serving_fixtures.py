"""Random adapters for the serving tests: made and saved by PEFT, recorded by PEFT's own forward pass, published through the registry."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hone.base_model import find_base_model
from hone.manifest import AdapterManifest, FileEntry, Lineage
from hone.registry import Registry
from hone.storage import Home

GOLDEN_TEXTS = ("the cat sat on a mat", "why does it rain", "hello there")


def peft_model(base: Path, *, seed: int, labels: Sequence[str] | None = None, std: float = 0.2, **lora: Any) -> PeftModel:
    """A base with random LoRA weights, and a random head of its own where there are labels."""
    torch.manual_seed(seed)
    if labels:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels), dtype=torch.float32)
        heads = [name for name in ("classifier", "score") if hasattr(model, name)]
        config = LoraConfig(task_type="SEQ_CLS", modules_to_save=heads, exclude_modules=heads, **lora)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = LoraConfig(task_type="CAUSAL_LM", **lora)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=std)
    return adapted.eval()


def save_adapter(model: PeftModel, base: Path, folder: Path, *, is_chat: bool, shift: float = 0.0) -> None:
    """The files of an adapter as training leaves them; `shift` falsifies the recorded outputs."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    batch = tokenizer(list(GOLDEN_TEXTS), padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    if is_chat:
        logits = logits[torch.arange(len(logits)), batch["attention_mask"].sum(-1) - 1]
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    golden = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "logits": logits.contiguous() + shift}
    save_file(golden, folder / "golden.safetensors")


def publish(
    home: Home, base: Path, name: str, *, seed: int, labels: list[str] | None = None, shift: float = 0.0, edit: Any = None, **lora: Any
) -> AdapterManifest:
    """A random adapter in the registry. `edit` may change its folder before it is published."""
    identity = find_base_model(str(base), home=home).id
    with TemporaryDirectory() as folder:
        save_adapter(peft_model(base, seed=seed, labels=labels, **lora), base, Path(folder), is_chat=not labels, shift=shift)
        if edit:
            edit(Path(folder))

        def describe(version: int, files: dict[str, FileEntry]) -> AdapterManifest:
            return AdapterManifest(
                name=name,
                version=version,
                kind="adapter",
                method="lora",
                served="mixed",
                task="text-classification" if labels else "chat",
                base=identity,
                dtype="float32",
                labels=labels,
                metrics={"eval_loss": 1.0},
                lineage=Lineage(run_id=f"run-{seed}", data_digest="none", hone_version="0"),
                created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                files=files,
            )

        return Registry(home).publish(Path(folder), name, describe=describe)


def reload_peft(home: Home, base: Path, manifest: AdapterManifest, *, labels: list[str] | None = None) -> PeftModel:
    """The published adapter on a base of its own, as PEFT loads it: what serving is compared with."""
    if labels:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels), dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(Registry(home).path(manifest.ref))).eval()


def greedy_alone(model: Any, prompt: Sequence[int], *, tokens: int, end_ids: Sequence[int]) -> list[int]:
    """What transformers generates for one prompt with nothing else in the batch."""
    with torch.no_grad():
        out = model.generate(
            input_ids=torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=sorted(end_ids) or None,
            pad_token_id=0,
        )
    generated: list[int] = out[0, len(prompt) :].tolist()
    return generated


def edit_config(folder: Path, **values: Any) -> None:
    """Change settings in an adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
