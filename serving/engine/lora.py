"""LoRA adapters of many rows in one forward pass.

Every linear layer of the base is wrapped once. A forward pass runs under a row plan that says which adapter each row has, and the wrapped
layers add each row's own low-rank delta to what the base computed. Base weights are never touched, so a row without an adapter is the base.

There are several plans, because each shape of work wants other products. `Segments` (prefill, classification: many tokens per row) runs
each adapter's two matrices over its own rows. Those of `serving.engine.decoding` are for one token per row.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Protocol

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from serving.engine.product import linear
from serving.errors import EngineError


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """One adapter on the model's device."""

    layers: dict[str, tuple[Tensor, Tensor]]
    """Module name -> A [rank, inputs] and B [rank, outputs]; B already holds the scaling."""
    modules: dict[str, nn.Module] = field(default_factory=dict)
    """Module name -> trained module that stands in for the base's own (classification heads)."""
    digest: str | None = None
    """Of its files: the same weights have the same. None where nothing may be kept under it."""

    @cached_property
    def rank(self) -> int:
        """Of its widest layer; 0 where it has none."""
        return max((len(a) for a, _ in self.layers.values()), default=0)


Rows = Sequence[AdapterWeights | None]
"""The adapter of each row of a batch; None is the base alone."""


class RowPlan(Protocol):
    """What a forward pass adds to each row."""

    rows: Rows

    def add(self, module: str, x: Tensor, out: Tensor) -> Tensor:
        """`out` [rows, ..., outputs] plus each row's delta for `x` [rows, ..., inputs]; may change `out` in place."""
        ...


class Segments:
    """Each run of neighbouring rows with the same adapter goes through that adapter's own matrices. Sort rows by adapter first."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.runs: list[tuple[AdapterWeights | None, slice]] = []
        start = 0
        for _, same in groupby(rows, key=id):
            run = list(same)
            self.runs.append((run[0], slice(start, start + len(run))))
            start += len(run)

    def add(self, module: str, x: Tensor, out: Tensor) -> Tensor:
        for adapter, run in self.runs:
            pair = adapter.layers.get(module) if adapter else None
            if pair:
                out[run] += (x[run] @ pair[0].T) @ pair[1]
        return out


class Mixer:
    """The wrapped layers of one model, and the plan of the forward pass that is running. Belongs to the model's thread."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap every linear layer of `model` in place."""
        self.plan: RowPlan | None = None
        self.tokens: int | None = None
        """Of each row of the forward pass that is running, where rows have the same."""
        self.shapes: dict[str, tuple[int, int]] = {}
        self.wrap(model)

    def wrap(self, model: nn.Module) -> None:
        """Wrap every linear layer of a further model that is not wrapped yet; what it shares with the first is."""
        wrapped = {module.base for module in model.modules() if isinstance(module, MixedLinear)}
        for name, module in list(model.named_modules()):
            if module in wrapped:
                continue
            if type(module) is nn.Linear:
                self.shapes[name] = module.in_features, module.out_features
            elif type(module) is Conv1D:
                self.shapes[name] = module.nx, module.nf
            else:
                continue
            model.set_submodule(name, MixedLinear(module, name, self))

    @contextmanager
    def running(self, plan: RowPlan, *, tokens: int | None = None) -> Iterator[None]:
        """Forward passes inside the block follow `plan`; each row has so many `tokens`."""
        outer = self.plan, self.tokens
        self.plan, self.tokens = plan, tokens
        try:
            yield
        finally:
            self.plan, self.tokens = outer


class MixedLinear(nn.Module):
    """A linear layer of the base plus the deltas of the running plan."""

    def __init__(self, base: nn.Module, name: str, mixer: Mixer) -> None:
        super().__init__()
        self.base = base
        self._name = name
        self._mixer = mixer

    @property
    def weight(self) -> Tensor:
        """Some architectures read the weight's dtype, and tied embeddings share it."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        out = linear(self.base, x)
        plan = self._mixer.plan
        if plan is None:
            return out
        rows, tokens = len(plan.rows), self._mixer.tokens
        if x.shape[0] == rows:
            return plan.add(self._name, x, out)
        if tokens is not None and x.shape[:-1] == (rows * tokens,):  # as mixtures of experts see them: token by token, row after row
            shape = rows, tokens, -1
            return plan.add(self._name, x.reshape(shape), out.reshape(shape)).flatten(0, 1)
        raise EngineError(f"layer {self._name} sees {x.shape[0]} rows of a batch of {rows}, so adapters cannot be mixed there")
