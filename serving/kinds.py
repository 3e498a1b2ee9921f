"""What kind of base a folder holds, and which tasks a base of that kind is served for."""

from pathlib import Path
from typing import Any, Literal

from hone.base_model import BaseModel
from hone.errors import BaseModelError
from hone.manifest import AdapterManifest
from hone.tasks import CAUSAL, TaskName
from hone.tasks import TASKS as FACTS
from models.tasks import TASKS

Kind = Literal["decoder", "encoder-decoder", "encoder", "vision", "audio"]
Medium = Literal["text", "image", "audio"]

TASKS_OF: dict[Kind, tuple[TaskName, ...]] = {
    "decoder": ("chat", "completion", "preference", "text-classification", "token-classification"),
    "encoder-decoder": ("seq2seq", "text-classification", "token-classification"),
    "encoder": ("text-classification", "token-classification"),
    "vision": ("image-classification",),
    "audio": ("audio-classification",),
}
"""Tasks of adapters; the first is what a base does by itself, where it does not say otherwise."""


def kind_of(base: BaseModel) -> Kind:
    """By what the architecture calls itself, else by the classes that transformers has of it.

    Raises:
        BaseModelError: transformers has no class of it for any of our tasks.
    """
    if base.is_decoder:
        return "decoder"
    if _has_class(base, "image-classification"):
        return "vision"
    if _has_class(base, "audio-classification"):
        return "audio"
    if _has_class(base, "seq2seq") and not _is_named(base, "Classification"):
        return "encoder-decoder"
    if _has_class(base, "text-classification") or _has_class(base, "token-classification"):
        return "encoder"
    named = ", ".join(base.config.get("architectures") or [str(base.config.get("model_type"))])
    raise BaseModelError(f"{base.id.name}: transformers has no class of {named} for any of the tasks {', '.join(TASKS)}")


def own_task(base: BaseModel, kind: Kind, published: AdapterManifest | None) -> TaskName:
    """What the base does by itself: what it was trained for where it was published, else what its architecture is named for."""
    if published:
        return published.task
    if kind == "encoder" and _is_named(base, "ForTokenClassification"):
        return "token-classification"
    return TASKS_OF[kind][0]


def generates(task: TaskName) -> bool:
    """Whether answers are texts."""
    return is_causal(task) or task == "seq2seq"


def is_causal(task: TaskName) -> bool:
    """Whether a causal language model does it."""
    return FACTS[task].base == CAUSAL


def medium_of(task: TaskName) -> Medium:
    """What a request gives to be answered."""
    shape = FACTS[task].shape
    return "image" if shape == "image" else "audio" if shape == "audio" else "text"


def routes_of(task: TaskName) -> set[str]:
    """Where a model of this task answers. One that chats also goes on with a text."""
    own = FACTS[task].route
    return {own, FACTS["completion"].route} if own == FACTS["chat"].route else {own}


def load_processor(task: TaskName, folder: Path) -> Any:
    """What turns requests into numbers. A tokenizer is used by several threads, so it must not hold truncation or padding that the
    first call switches off."""
    processor = TASKS[task].load_processor(folder)
    if medium_of(task) == "text":
        processor("warm-up: drops the truncation and padding that were saved with it")
    return processor


def _has_class(base: BaseModel, task: TaskName) -> bool:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base.folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise BaseModelError(
            f"{base.id.name}: its config.json is none that transformers reads ({str(error).splitlines()[0][:200]})"
        ) from None
    return type(config) in TASKS[task].model_class()._model_mapping


def _is_named(base: BaseModel, ending: str) -> bool:
    return any(str(name).endswith(ending) for name in base.config.get("architectures") or [])
