"""The proof that what was loaded answers here as it did where it was trained."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from hone.tasks import TaskName
from models.tasks import TASKS, Batch
from serving.base import Engine, Served
from serving.engine.cache import SlotCache
from serving.engine.capability import tolerance
from serving.engine.decoding import Stack, StackedRows
from serving.engine.heads import Heads
from serving.engine.lora import Rows
from serving.errors import AdapterRefusedError
from serving.kinds import generates

SEQUENCES_OF = {"preference": slice(0, None, 2)}
"""Which of the recorded sequences have recorded outputs, where not all: of a pair the chosen one."""


def prove(engine: Engine, served: Served, golden: Mapping[str, Tensor]) -> None:
    """Compare the recorded outputs with those that the adapter's own way of being served gives. On the model's thread.

    Raises:
        AdapterRefusedError: they differ by more than arithmetic explains.
    """
    wanted = golden["logits"].float()
    got = _outputs(engine, served, {name: tensor for name, tensor in golden.items() if name != "logits"}).float().cpu()
    named = 0 if generates(served.task) else len(served.labels) or 1
    if got.shape != wanted.shape or (named and named != got.shape[1]):
        raise AdapterRefusedError(
            f"{served.name}: has {got.shape[1]} outputs, {len(served.labels)} labels and {wanted.shape[1]} recorded outputs", "model"
        )
    # One number alone may be next to nothing; what all rows answer is not.
    scale = wanted.norm(dim=-1) if wanted.shape[1] > 1 else wanted.abs().max()
    difference = float(((got - wanted).norm(dim=-1) / scale).max())
    refuse_different(served.name, difference, tolerance(engine.dtype))


def recorded_prompts(task: TaskName, batch: Batch) -> list[list[int]]:
    """The token ids after which the logits of a generating model were recorded."""
    recorded = SEQUENCES_OF.get(task, slice(None))
    ids, lengths = batch["input_ids"][recorded], batch["attention_mask"].sum(-1)[recorded].tolist()
    return [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]


def refuse_different(name: str, difference: float, allowed: float) -> None:
    """Refuse an adapter whose outputs differ from the recorded ones by more than arithmetic explains.

    Raises:
        AdapterRefusedError: it does.
    """
    if not difference <= allowed:
        raise AdapterRefusedError(
            f"{name}: does not reproduce the outputs recorded when it was trained (relative difference {difference:.2g}, "
            f"allowed {allowed:.2g}); it is not served",
            "model",
        )


def _outputs(engine: Engine, served: Served, batch: Batch) -> Tensor:
    """What the recorded inputs are answered: [rows, outputs]."""
    task = TASKS[served.task]
    if served.heads:
        rows = len(next(iter(batch.values())))
        return task.outputs(_as_model(served.heads, [served.weights] * rows), batch)
    if served.model is not None:
        return task.outputs(served.model, {name: tensor.to(engine.device) for name, tensor in batch.items()})
    return _generated(engine, served, batch)


def _as_model(heads: Heads, adapters: Rows) -> Any:
    """Heads that are called as a model of transformers."""

    def forward(**batch: Tensor) -> Any:
        return SimpleNamespace(logits=heads.logits(batch, adapters))

    return forward


def _generated(engine: Engine, served: Served, batch: Batch) -> Tensor:
    """Logits after each row's last token, through prefill and one decode step."""
    decoder = engine.parts.decoder
    assert decoder is not None, "adapters that generate are mixed on decoders alone"
    rows = recorded_prompts(served.task, batch)
    adapters = [served.weights] * len(rows)
    cache = SlotCache(slots=len(rows), max_context=max(map(len, rows)))
    if min(map(len, rows)) == 1:
        return decoder.prefill(cache, rows, adapters, first=0)
    decoder.prefill(cache, [row[:-1] for row in rows], adapters, first=0)
    plan = StackedRows(adapters, Stack([served.weights] if served.weights else []), engine.device)
    return decoder.decode(cache, [row[-1] for row in rows], [len(row) - 1 for row in rows], plan)
