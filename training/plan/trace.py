"""One forward and backward pass of the real model on torch's meta device: every allocation and every multiplication, and no arithmetic.

What a pass needs is read off the pass itself instead of a formula for each architecture, task and method: the tensors that autograd
keeps and the moment at which it lets each of them go, what gradient checkpointing computes again, the logits at the targets alone and a
few at a time, the path that an adapter's gradients take through frozen layers. Of a slice of rows that several workers share it is that one
worker's pass, with the exchange round attention (`training/sequence.py`) in it. Operators are counted as torch's own counter does
(`torch.utils.flop_counter`): two for a multiplication with its addition, for matrix products and attention alone.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from models import attention, linear_cross_entropy
from training.sequence import copies

META = torch.device("meta")
COUNTED = "hone_counted"
"""The attention that stands in for the kernels."""


@dataclass(frozen=True)
class Event:
    """Memory taken, or given back."""

    key: int
    size: int
    """Bytes; 0 for what is given back."""


@dataclass(frozen=True)
class Need:
    """Bytes of a pass where it needs the most."""

    live: int
    """In use at that moment."""
    taken: int
    """Taken until then, given back or not."""


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass."""

    events: tuple[Event, ...]
    flops: int
    exchanged: int = 0
    """Bytes sent to those that have the other slices."""

    @property
    def need(self) -> "Need":
        """At its highest, beside what was there before."""
        held: dict[int, int] = {}
        live = taken = 0
        highest = Need(0, 0)
        for event in self.events:
            live += event.size - held.pop(event.key, 0)
            taken += event.size
            if event.size:
                held[event.key] = event.size
            if live > highest.live:
                highest = Need(live, taken)
        return highest


@dataclass(frozen=True)
class Traced:
    """What learning from one portion takes."""

    first: Pass
    """The first portion of a step, which makes the gradients."""
    further: Pass
    """Another portion, which adds to those that are there."""


def trace(module: Any, batch: dict[str, torch.Tensor], *, beside: dict[str, torch.Tensor] | None = None, on_gpu: bool) -> Traced:
    """Passes of a module whose parameters are on the meta device.

    Args:
        module: A `TaskModule`, whose loss is taken.
        batch: One portion, as it would go in, or a slice of it.
        beside: Rows for the penalty on moving away from the base.
        on_gpu: Whether it is to run on a GPU, where kernels differ.
    """
    module.train()
    with _standing_in(module.model, on_gpu=on_gpu):
        passes = [_pass(module, _on_meta(batch), _on_meta(beside) if beside else None) for _ in range(2)]
    for parameter in module.parameters():
        parameter.grad = None
    return Traced(*passes)


def _pass(module: Any, batch: dict[str, torch.Tensor], beside: dict[str, torch.Tensor] | None) -> Pass:
    counting = _Counting()
    for tensor in (*module.parameters(), *module.buffers(), *(p.grad for p in module.parameters() if p.grad is not None)):
        counting.know(tensor)
    with counting:
        loss, measured, divergence = module(batch, beside=beside)
        (loss + divergence).backward()
        del loss, measured, divergence
    return Pass(tuple(counting.events), counting.flops, counting.exchanged)


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes when the memory of each tensor is taken and given back."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.flops = self.exchanged = 0
        self._known: dict[int, int] = {}
        self._made = 0

    def know(self, tensor: torch.Tensor) -> None:
        """Memory that was there before."""
        self._known[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        counted = flop_registry.get(func._overloadpacket)
        if counted is not None:
            self.flops += int(counted(*args, **(kwargs or {}), out_val=out))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._known or not storage.nbytes():
            return
        self._made += 1
        self._known[address] = self._made
        self.events.append(Event(self._made, storage.nbytes()))
        weakref.finalize(storage, self._given_back, address, self._made)

    def _given_back(self, address: int, key: int) -> None:
        if self._known.get(address) == key:
            del self._known[address]
        self.events.append(Event(key, 0))


@contextmanager
def _standing_in(model: Any, *, on_gpu: bool) -> Iterator[None]:
    """A block in which attention and loss take the memory that they take on the device that is meant.

    On the meta device torch would write attention out with a score for every pair of tokens, which no kernel here ever holds.
    """
    from transformers import AttentionInterface

    config = model.config
    before, chunk = config._attn_implementation, linear_cross_entropy.CHUNK_BYTES
    AttentionInterface.register(COUNTED, _on_gpu if on_gpu else _on_cpu)
    linear_cross_entropy.CHUNK_BYTES = {**chunk, "meta": chunk["cuda" if on_gpu else "cpu"]}
    if before in (attention.NAME, "sdpa"):
        model.set_attn_implementation(COUNTED)
    try:
        yield
    finally:
        linear_cross_entropy.CHUNK_BYTES = chunk
        if before in (attention.NAME, "sdpa"):
            model.set_attn_implementation(before)


def _on_gpu(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any) -> Any:  # noqa: ARG001
    """As `varlen_attn`: keys and values for each head; rows in one call."""
    query, key, value, slices = _whole(query, key, value, options)
    groups = query.shape[1] // key.shape[1]
    made = _Attention.apply(query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), _pairs(query, key, options))  # type: ignore[no-untyped-call]
    return _sliced(made, slices).transpose(1, 2), None


def _on_cpu(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any) -> Any:  # noqa: ARG001
    """As one call for each row: what they answer is laid end to end, so it is there twice."""
    query, key, value, slices = _whole(query, key, value, options)
    made = _Attention.apply(query, key, value, _pairs(query, key, options))  # type: ignore[no-untyped-call]
    if options.get("cu_seq_lens_q") is not None:
        made = made.clone()
    return _sliced(made, slices).transpose(1, 2), None


def _whole(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]) -> Any:
    """All of the sequence of some heads for a slice of it of all heads, where that is what comes in; and how many slices there are."""
    bounds = options.get("cu_seq_lens_q")
    slices = 1 if bounds is None else int(bounds[-1]) // query.shape[2]
    if slices == 1:
        return query, key, value, 1
    times = copies(query.shape[1], key.shape[1], slices)
    parts = (query, key.repeat_interleave(times, 1), value.repeat_interleave(times, 1))
    return *(_Exchange.apply(part, slices, 1, 2) for part in parts), slices  # type: ignore[no-untyped-call]


def _sliced(made: torch.Tensor, slices: int) -> torch.Tensor:
    """The way back."""
    back: torch.Tensor = _Exchange.apply(made, slices, 2, 1) if slices > 1 else made  # type: ignore[no-untyped-call]
    return back


def _pairs(query: torch.Tensor, key: torch.Tensor, options: dict[str, Any]) -> int:
    """How often a token looks at a token. Kernels leave out what is hidden behind a token only in whole blocks, so all is counted."""
    bounds = options.get("cu_seq_lens_q")
    if bounds is None:
        return query.shape[0] * query.shape[2] * key.shape[2]
    return int(((bounds[1:] - bounds[:-1]).long() ** 2).sum())


class _Attention(torch.autograd.Function):
    """Keeps what a flash kernel keeps: queries, keys, values, the answer, and a number for each query (arXiv:2205.14135)."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pairs: int) -> torch.Tensor:
        made = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, made, sums)
        ctx.flops = 2 * pairs * query.shape[1] * (query.shape[-1] + value.shape[-1])
        _count(ctx.flops)
        return made

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        query, key, value, _made, _sums = ctx.saved_tensors
        _count(ctx.flops * 5 // 2)  # five products in place of two
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _Exchange(torch.autograd.Function):
    """As `deepspeed.sequence.layer`: laid out for the others, received, and laid out as it is used."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, slices: int, scattered: int, gathered: int) -> torch.Tensor:
        ctx.way = slices, scattered, gathered
        return _exchanged(part, slices, scattered, gathered)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        slices, scattered, gathered = ctx.way
        return _exchanged(gradient, slices, gathered, scattered), None, None, None


def _exchanged(part: torch.Tensor, slices: int, scattered: int, gathered: int) -> torch.Tensor:
    """[1, heads, tokens, width] with one of those divided, and the other multiplied, by the number of slices."""
    shape = list(part.shape)
    shape[scattered] //= slices
    shape[gathered] *= slices
    laid = part.new_empty(part.shape)
    received = torch.empty_like(laid)
    _mode().exchanged += part.numel() * part.itemsize * (slices - 1) // slices
    return received.view(shape).clone()


def _count(flops: int) -> None:
    """Tell the mode that watches."""
    _mode().flops += flops


def _mode() -> _Counting:
    mode = torch.utils._python_dispatch._get_current_dispatch_mode()
    assert isinstance(mode, _Counting)
    return mode


def _on_meta(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Where rows begin stays readable: attention asks."""
    return {name: tensor if name == "cu_seq_lens_q" else tensor.to(META) for name, tensor in batch.items()}
