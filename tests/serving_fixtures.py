"""Random adapters for the serving tests: made and saved by PEFT or by a method of ours, recorded by their own forward pass, published
through the registry."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import TypeAdapter
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hone.base_model import find_base_model
from hone.errors import DataError
from hone.manifest import REPORT_FILE, AdapterManifest, FileEntry, Lineage
from hone.methods import MethodName, how_served
from hone.recipe.method import Method
from hone.registry import Registry
from hone.storage import Home
from hone.tasks import TaskName
from models.methods import METHODS, Applying
from models.tasks import TASKS, Batch, Encoded, Head, inputs_by

NO_HEAD = Head()

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
    (folder / REPORT_FILE).write_text(f"seed {torch.initial_seed()}")  # other in each version, as training leaves it


def publish(
    home: Home, base: Path, name: str, *, seed: int, labels: list[str] | None = None, shift: float = 0.0, edit: Any = None, **lora: Any
) -> AdapterManifest:
    """A random adapter in the registry. `edit` may change its folder before it is published."""
    with TemporaryDirectory() as folder:
        save_adapter(peft_model(base, seed=seed, labels=labels, **lora), base, Path(folder), is_chat=not labels, shift=shift)
        if edit:
            edit(Path(folder))
        task: TaskName = "text-classification" if labels else "chat"
        return _publish(home, base, Path(folder), name, task=task, labels=labels, lineage=_lineage(seed))


def publish_many(home: Home, base: Path, names: Sequence[str], **lora: Any) -> list[AdapterManifest]:
    """Chat adapters that differ in their random weights: one model that is drawn anew for each, so a thousand take a minute."""
    model = peft_model(base, seed=0, **lora)
    tokenizer = AutoTokenizer.from_pretrained(base)
    batch = tokenizer(list(GOLDEN_TEXTS), padding=True, padding_side="right", return_tensors="pt")
    made = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_adapter(model, base, folder, is_chat=True)
        for seed, adapter in enumerate(names):
            torch.manual_seed(seed)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if "lora_" in key:
                        parameter.normal_(std=0.2)
                logits = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
            model.save_pretrained(folder, save_embedding_layers=False)
            golden = {key: batch[key] for key in ("input_ids", "attention_mask")}
            last = logits[torch.arange(len(logits)), batch["attention_mask"].sum(-1) - 1].contiguous()
            save_file({**golden, "logits": last}, folder / "golden.safetensors")
            (folder / REPORT_FILE).write_text(f"seed {seed}")
            made.append(_publish(home, base, folder, adapter, task="chat", labels=None, lineage=_lineage(seed)))
    return made


def publish_trained(
    home: Home,
    base: Path,
    name: str,
    *,
    task: TaskName,
    method: MethodName,
    rows: Sequence[Any],
    head: Head = NO_HEAD,
    seed: int = 0,
    shift: float = 0.0,
    **settings: Any,
) -> AdapterManifest:
    """What a training of `method` would leave behind, with random weights, in the registry.

    Args:
        rows: Rows of the task's shape, of which the golden outputs are made.
        head: What a new head answers.
        shift: Falsifies the recorded outputs.
        settings: Of the method, as a recipe has them.
    """
    doing, how = TASKS[task], METHODS[method]
    given: Any = TypeAdapter(Method).validate_python({"type": method, **settings})
    processor = doing.load_processor(base)
    torch.manual_seed(seed)
    model, _ = doing.load_model(base, head=head, dtype=torch.float32, pad_token_id=inputs_by(processor).pad_token_id)
    model = how.apply(model, given, Applying(doing, doing.head_modules(model))).eval()
    state = {name: parameter for name, parameter in model.named_parameters() if how.trained(name, parameter)}
    with torch.no_grad():
        for parameter in state.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        batch = batch_of(task, rows, processor)
        logits = doing.outputs(model, batch)
    buffers = {
        name: value for name, value in model.state_dict().items() if name not in dict(model.named_parameters(remove_duplicate=False))
    }
    served = how_served(task, method, use_dora=settings.get("use_dora", False))
    with TemporaryDirectory() as folder:
        how.save(model, given, {name: p.detach() for name, p in state.items()} | buffers, Path(folder))
        processor.save_pretrained(folder)
        save_file(
            {**{name: t.contiguous() for name, t in batch.items()}, "logits": logits.contiguous() + shift},
            Path(folder) / "golden.safetensors",
        )
        return _publish(
            home,
            base,
            Path(folder),
            name,
            kind="full" if served == "whole" else "adapter",
            method=method,
            served=served,
            task=task,
            labels=head.labels,
            problem_type=head.problem_type,
            lineage=_lineage(seed),
        )


def batch_of(task: TaskName, rows: Sequence[Any], processor: Any) -> Batch:
    """Rows as the model reads them, padded; classes count for nothing."""
    doing = TASKS[task]
    encoded = [made for row in doing.encode(rows, processor, max_length=1000) for made in _fine(row)]
    counted = {"text-classification", "image-classification", "audio-classification"}
    dealt = [{**vars(row), "labels": None} if task in counted else vars(row) for row in encoded]
    return doing.collate(dealt, inputs=inputs_by(processor), packed=False)


def load_plainly(home: Home, base: Path, manifest: AdapterManifest) -> Any:
    """A published adapter on a base of its own, as its method loads it (or a whole model): what serving is compared with."""
    doing, folder = TASKS[manifest.task], Registry(home).path(manifest.ref)
    source = folder if manifest.kind == "full" else base
    pad = inputs_by(doing.load_processor(base)).pad_token_id
    model, _ = doing.load_model(source, head=Head(manifest.labels, manifest.problem_type), dtype=torch.float32, pad_token_id=pad)
    return METHODS[manifest.method].load(model, folder).eval()


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


def _publish(home: Home, base: Path, folder: Path, name: str, **said: Any) -> AdapterManifest:
    identity = find_base_model(str(base), home=home).id
    manifest = {"kind": "adapter", "method": "lora", "served": "mixed", "dtype": "float32", "metrics": {"eval_loss": 1.0}, **said}
    created = datetime.now(UTC).isoformat(timespec="seconds")

    def describe(version: int, files: dict[str, FileEntry]) -> AdapterManifest:
        return AdapterManifest(name=name, version=version, base=identity, created_at=created, files=files, **manifest)

    return Registry(home).publish(folder, name, describe=describe)


def _lineage(seed: int) -> Lineage:
    return Lineage(run_id=f"run-{seed}", data_digest="none", hone_version="0")


def _fine(encoded: list[Encoded] | DataError) -> list[Encoded]:
    assert not isinstance(encoded, DataError), encoded
    return encoded


def edit_config(folder: Path, **values: Any) -> None:
    """Change settings in an adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
