"""LoRA adapters of many rows in one forward pass.

Every linear layer of the base is wrapped once. A forward pass runs under a row plan that says which adapter each row has, and the wrapped
layers add each row's own low-rank delta to what the base computed. Base weights are never touched, so a row without an adapter is the base.

Two plans, because two shapes of work want different GEMMs. `Segments` (prefill, classification: many tokens per row) runs each adapter's
two matrices over its own rows. `Stack` (decode: one token per row) concatenates the adapters' matrices into one pair of GEMMs over all
rows, and zeros between the two what belongs to another row's adapter.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from serving.errors import EngineError

STACK_AT_MOST = 24
"""Adapters in one stack. Past this the masked products cost more than running each adapter on its own rows (docs/decisions/0005)."""


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """One adapter on the model's device."""

    layers: dict[str, tuple[Tensor, Tensor]]
    """Module name -> A [rank, inputs] and B [rank, outputs]; B already holds the scaling."""
    modules: dict[str, nn.Module] = field(default_factory=dict)
    """Module name -> trained module that stands in for the base's own (classification heads)."""
    digest: str | None = None
    """Of its files: the same weights have the same. None where nothing may be kept under it."""


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


class Stack:
    """The matrices of several adapters, concatenated along the rank, per module."""

    def __init__(self, adapters: Sequence[AdapterWeights]) -> None:
        self.adapters = list(adapters)
        self.layers: dict[str, tuple[Tensor, Tensor, tuple[tuple[int, int], ...]]] = {}
        for module in {name for adapter in adapters for name in adapter.layers}:
            pairs = [(n, adapter.layers[module]) for n, adapter in enumerate(adapters) if module in adapter.layers]
            a, b = torch.cat([a for _, (a, _) in pairs]), torch.cat([b for _, (_, b) in pairs])
            self.layers[module] = a, b, tuple((n, len(a)) for n, (a, _) in pairs)

    def holds(self, adapters: Sequence[AdapterWeights]) -> bool:
        """Whether it can serve these adapters without being mostly about others."""
        held = {id(adapter) for adapter in self.adapters}
        return all(id(adapter) in held for adapter in adapters) and len(held) <= 2 * len(adapters)


class StackedRows:
    """Rows over a stack: one pair of GEMMs, and between them zeros where a rank belongs to another row's adapter."""

    def __init__(self, rows: Rows, stack: Stack, device: torch.device) -> None:
        self.rows = rows
        self.stack = stack
        index = {id(adapter): n for n, adapter in enumerate(stack.adapters)}
        owners = torch.tensor([index[id(row)] if row else -1 for row in rows], device=device)
        self._foreign: dict[tuple[tuple[int, int], ...], Tensor | None] = {}
        for _, _, layout in stack.layers.values():
            if layout not in self._foreign:
                ranks = torch.tensor([n for n, rank in layout for _ in range(rank)], device=device)
                foreign = (ranks != owners[:, None])[:, None, :]
                self._foreign[layout] = foreign if bool(foreign.any()) else None

    def add(self, module: str, x: Tensor, out: Tensor) -> Tensor:
        if module not in self.stack.layers:
            return out
        a, b, layout = self.stack.layers[module]
        foreign = self._foreign[layout]
        low = x @ a.T
        if foreign is not None:
            # Filled rather than multiplied: an overflow in one row's product must not reach another row as inf * 0.
            low = low.masked_fill(foreign if low.dim() == 3 else foreign[:, 0], 0)
        return out.add_(low @ b)


class Mixer:
    """The wrapped layers of one model, and the plan of the forward pass that is running. Belongs to the model's thread."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap every linear layer of `model` in place."""
        self.plan: RowPlan | None = None
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
    def running(self, plan: RowPlan) -> Iterator[None]:
        """Forward passes inside the block follow `plan`."""
        outer, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = outer


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
        out: Tensor = self.base(x)
        plan = self._mixer.plan
        if plan is None:
            return out
        if len(x) != len(plan.rows):
            raise EngineError(f"layer {self._name} sees {len(x)} rows of a batch of {len(plan.rows)}, so adapters cannot be mixed there")
        return plan.add(self._name, x, out)


class Planner:
    """Makes decode plans, keeping the last stack while the adapters in use stay the same."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stack: Stack | None = None
        self._plan: RowPlan | None = None

    def plan(self, rows: Rows) -> RowPlan:
        """A plan for these rows, the last one where nothing changed."""
        if self._plan is not None and [id(row) for row in rows] == [id(row) for row in self._plan.rows]:
            return self._plan
        active = list({id(row): row for row in rows if row}.values())
        if not active or len(active) > STACK_AT_MOST:
            self._plan = Segments(list(rows))
            return self._plan
        if self._stack is None or not self._stack.holds(active):
            self._stack = None  # frees the old copy before the new one is made
            self._stack = Stack(active)
        self._plan = StackedRows(list(rows), self._stack, self._device)
        return self._plan

    def forget(self) -> None:
        """Let go of every adapter's memory."""
        self._stack = self._plan = None
