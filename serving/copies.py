"""Copies of the base, each with an adapter that shares no batch with others merged into it or beside it."""

import threading
from pathlib import Path
from typing import Any

from hone.manifest import AdapterManifest
from models.methods import METHODS
from models.tasks import TASKS, Head
from models.tasks.causal import learns_prompt
from serving.base import Engine

ONE_AT_A_TIME = threading.Lock()
"""While transformers makes a model it changes torch's default type for the whole process, and then puts back what it found."""


def load_copy(engine: Engine, manifest: AdapterManifest, folder: Path) -> Any:
    """The base from its folder once more, with what `folder` holds of the adapter.

    Raises:
        HoneError: the files are not those of this base, or what was learnt cannot be merged and is to be.
    """
    method = METHODS[manifest.method]
    head = Head(manifest.labels, manifest.problem_type)
    with ONE_AT_A_TIME:
        model, _ = TASKS[manifest.task].load_model(engine.folder, head=head, dtype=engine.dtype, pad_token_id=engine.inputs.pad_token_id)
        model = method.load(model, folder)
        # What could be mixed on another base can be merged.
        model = model if manifest.served == "alone" else method.merge(model)
    return model.to(engine.device).eval().requires_grad_(False)


def vectors_before(model: Any) -> int:
    """Learnt vectors that take up room before the words."""
    return int(model.active_peft_config.num_virtual_tokens) if learns_prompt(model) else 0
