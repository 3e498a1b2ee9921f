"""Ways of fine-tuning, as a recipe names them, and which of them go with which task. What is done is in `models/methods`, a file each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from hone.tasks import TASKS, TaskName

MethodName = Literal["lora", "full", "freeze", "ia3", "adapter", "prompt", "prefix"]
Served = Literal["mixed", "merged", "alone", "whole"]
HOW_SERVED: dict[Served, str] = {
    "mixed": "in one batch with other adapters of the base",
    "merged": "merged into a copy of the base of its own",
    "alone": "beside a copy of the base of its own",
    "whole": "as a base",
}


@dataclass(frozen=True)
class MethodFacts:
    """One method."""

    says: str
    paper: str
    served: Served
    keeps_base: bool = True
    """Whether the base can be had back while training, with the adapter switched off."""
    refuses: Mapping[TaskName, str] = field(default_factory=dict)
    """Tasks that it does not go with, and why."""


NO_REFERENCE = "the loss compares with the base, which is there no longer once its own weights train; use lora, and export it merged"
NO_TEXT = "its vectors stand before those of words, and this task's model reads none"
METHODS: dict[MethodName, MethodFacts] = {
    "lora": MethodFacts("low-rank updates beside frozen weights", "https://arxiv.org/abs/2106.09685", "mixed"),
    "full": MethodFacts("every weight", "", "whole", keeps_base=False, refuses={"preference": NO_REFERENCE}),
    "freeze": MethodFacts(
        "all but the embeddings and the lowest layers",
        "https://arxiv.org/abs/1911.03090",
        "whole",
        keeps_base=False,
        refuses={"preference": NO_REFERENCE},
    ),
    "ia3": MethodFacts("a factor for each key, value and inner activation", "https://arxiv.org/abs/2205.05638", "merged"),
    "adapter": MethodFacts("small bottleneck layers behind frozen ones", "https://arxiv.org/abs/1902.00751", "alone"),
    "prompt": MethodFacts(
        "vectors before the words",
        "https://arxiv.org/abs/2104.08691",
        "alone",
        refuses={"image-classification": NO_TEXT, "audio-classification": NO_TEXT},
    ),
    "prefix": MethodFacts(
        "keys and values before those of each layer",
        "https://arxiv.org/abs/2101.00190",
        "alone",
        refuses={"image-classification": NO_TEXT, "audio-classification": NO_TEXT},
    ),
}
assert set(METHODS) == set(get_args(MethodName))


def why_not(task: TaskName, method: MethodName) -> str | None:
    """Why a method does not go with a task; None where it does."""
    return METHODS[method].refuses.get(task)


def how_served(task: TaskName, method: MethodName, *, use_dora: bool = False) -> Served:
    """How what a method makes is served."""
    served = METHODS[method].served
    return "merged" if served == "mixed" and (use_dora or TASKS[task].base == "encoder-decoder") else served
