"""LoRA adapters of many rows with one token each: two ways of doing it in few products, and the choice between them.

`Stack` concatenates the matrices of the adapters in use into one pair of products over all rows, and zeros between the two what belongs
to another row's adapter: work that grows with rows times adapters. `Copies` lays each row's own matrices side by side, for a pair of
batched products: the least work, and more memory to read. docs/decisions/0011 has the measurements.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from serving.engine.lora import AdapterWeights, RowPlan, Rows, Segments

FEW = 4
"""Adapters are stacked up to this many times the rank of the widest; past it, copies were faster at every size that was measured."""


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
            low.masked_fill_(foreign if low.dim() == 3 else foreign[:, 0], 0)
        return out.add_(low @ b)


class Copies:
    """The matrices of every row's adapter: A [slots, rank, inputs] and B [slots, rank, outputs] of each module, zeros past a narrower rank
    and where the row has none. A slot is filled when a row with another adapter comes into it."""

    def __init__(self) -> None:
        self.layers: dict[str, tuple[Tensor, Tensor]] = {}
        self._held: list[AdapterWeights | None] = []

    def hold(self, rows: Rows) -> None:
        """Fill the first slots with the adapters of `rows`."""
        if len(rows) > len(self._held):
            slots = max(len(rows), 2 * len(self._held))
            self.layers = {module: (_grown(a, slots, a.shape[1]), _grown(b, slots, b.shape[1])) for module, (a, b) in self.layers.items()}
            self._held += [None] * (slots - len(self._held))
        for slot, adapter in enumerate(rows):
            if adapter is not self._held[slot]:
                self._held[slot] = None  # where memory runs out half-way, the next attempt fills it anew
                self._fill(slot, adapter)
                self._held[slot] = adapter

    def _fill(self, slot: int, adapter: AdapterWeights | None) -> None:
        own = adapter.layers if adapter else {}
        for module, (a, b) in own.items():
            kept = self.layers.get(module, (a[None, :0], b[None, :0]))
            if kept[0].shape[1] < a.shape[0]:
                self.layers[module] = _grown(kept[0], len(self._held), a.shape[0]), _grown(kept[1], len(self._held), b.shape[0])
        for module, kept in self.layers.items():
            rank = own[module][0].shape[0] if module in own else 0
            for n, whole in enumerate(kept):
                if rank:
                    whole[slot, :rank] = own[module][n]
                if rank < whole.shape[1]:
                    whole[slot, rank:] = 0


def _grown(kept: Tensor, slots: int, rank: int) -> Tensor:
    """Copies with room for more rows, or for a wider adapter."""
    grown = kept.new_zeros(slots, rank, kept.shape[2])
    grown[: kept.shape[0], : kept.shape[1]] = kept
    return grown


class CopiedRows:
    """Rows over copies."""

    def __init__(self, rows: Rows, copies: Copies) -> None:
        self.rows = rows
        count = len(rows)
        self._layers = {module: (a[:count].transpose(1, 2), b[:count]) for module, (a, b) in copies.layers.items()}

    def add(self, module: str, x: Tensor, out: Tensor) -> Tensor:
        pair = self._layers.get(module)
        if pair is None:
            return out
        if x.dim() == 3:
            return out.baddbmm_(torch.bmm(x, pair[0]), pair[1])
        return out.add_(torch.bmm(torch.bmm(x[:, None], pair[0]), pair[1])[:, 0])


class Planner:
    """Makes decode plans, keeping what the last one was made of while that serves the rows."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stack: Stack | None = None
        self._copies: Copies | None = None
        self._plan: RowPlan | None = None

    def plan(self, rows: Rows) -> RowPlan:
        """A plan for these rows, the last one where nothing changed."""
        if self._plan is None or [id(row) for row in rows] != [id(row) for row in self._plan.rows]:
            self._plan = self._new(list(rows))
        return self._plan

    def forget(self) -> None:
        """Let go of every adapter's memory."""
        self._stack = self._copies = self._plan = None

    def _new(self, rows: Rows) -> RowPlan:
        active = list({id(row): row for row in rows if row}.values())
        if not active:
            return Segments(rows)
        if is_few(active):
            self._copies = None
            if self._stack is None or not self._stack.holds(active):
                self._stack = None  # frees the old one before the new one is made
                self._stack = Stack(active)
            return StackedRows(rows, self._stack, self._device)
        self._stack = None
        self._copies = self._copies or Copies()
        self._copies.hold(rows)
        return CopiedRows(rows, self._copies)


def is_few(adapters: Sequence[AdapterWeights]) -> bool:
    """Whether stacking them is the least work."""
    ranks = [adapter.rank for adapter in adapters]
    return sum(ranks) <= FEW * max(ranks)
