"""What one rank holds of the state that trains, as flat pieces that know their place in the whole.

Each ZeRO stage cuts weights and moments differently, and so does each number of workers. A piece is a view into DeepSpeed's own memory
with its place in the parameter that it belongs to: saving copies pieces out, resuming copies into whatever pieces there are then.

Where DeepSpeed keeps them: `single_partition_of_fp32_groups` and `_hp_mapping` (stages 1 and 2), `fp32_groups_flat_partition` (its bf16
optimiser), `fp32_partitioned_groups_flat` and `grad_position` (stage 3), `fp32_groups` (16 bits without ZeRO). Stage 3 parts its
parameters into sub-groups, and those that it keeps on NVMe are in memory one at a time, for as long as their pieces are at hand.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from training.ema import MovingAverage
from training.loss_scale import LossScale
from training.zero import shard

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW, as torch names them."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A run of one tensor's elements."""

    kind: str
    """weight, exp_avg, exp_avg_sq, average, buffer or loss_scale."""
    name: str
    """Of the parameter or buffer."""
    start: int
    """Its first element, in the tensor laid flat."""
    values: torch.Tensor
    """[elements], where they are kept; of state on NVMe, until the next piece is asked for."""
    is_shared: bool
    """Whether every rank holds the same."""


@dataclass(frozen=True, eq=False)
class _Held:
    """Where a rank keeps its part of one parameter in fp32."""

    flat: torch.Tensor
    """The optimiser's own tensor, by which it knows its moments."""
    offset: int
    """In `flat`."""
    start: int
    """In the parameter."""
    numel: int


class TrainedState:
    """The weights that train, their moments, their moving average, the model's buffers, and the loss scale of fp16."""

    def __init__(self, optimizer: Any, parameters: Mapping[str, torch.nn.Parameter], module: Any, average: MovingAverage | None) -> None:
        """
        Args:
            optimizer: What `deepspeed.initialize` returned.
            parameters: Those that train, by name, in the optimiser's order.
            module: The model.
            average: Of the same parameters.
        """
        self._optimizer, self._parameters, self._module, self._average = optimizer, parameters, module, average
        self._inner = getattr(optimizer, "optimizer", optimizer)
        self.loss_scale = LossScale(optimizer)
        self._is_stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        self._is_cut = hasattr(optimizer, "update_lp_params") or self._is_stage_3

    @property
    def is_on_nvme(self) -> bool:
        """Whether any of it is out of memory between steps."""
        return any(self._is_out(number) for number in self._sub_groups())

    def pieces(self) -> Iterator[Piece]:
        """What this rank holds; of the moments, those that there are already."""
        for number, names in self._sub_groups().items():
            with self._in_memory(number):
                for name in names:
                    yield from self._pieces_of(name)
        yield from self._others()

    def outline(self) -> Iterator[Piece]:
        """The same pieces, in the same order; nothing is read, and the values of those that are on NVMe are on the meta device."""
        for number, names in self._sub_groups().items():
            for name in names:
                yield from self._pieces_of(name, is_here=not self._is_out(number))
        yield from self._others()

    def steps(self) -> dict[str, int]:
        """How often AdamW has moved each parameter that this rank holds a part of; it divides its moments by what follows from that."""
        made = {}
        for name, parameter in self._parameters.items():
            held = self._held(parameter)
            state = self._inner.state.get(held.flat, {}) if held else {}
            if "step" in state:
                made[name] = int(state["step"])
        return made

    @torch.no_grad()
    def load(self, steps: Mapping[str, int], fill: Callable[[Piece], None]) -> None:
        """Fill every piece, and let the model have the weights. Every rank takes part.

        Args:
            steps: How often AdamW has moved each parameter; those that are not in it have no moments yet.
            fill: Puts values into a piece.
        """
        optimizer = self._optimizer
        # What stage 3 keeps whole is left in shards, as before a first pass: in that, DeepSpeed learns which modules look at the weights of
        # others (PEFT's at lora_A's) by these being shards. Learnt in a later pass, it is at odds with the order of the first: an error.
        if self._is_stage_3 and optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        self._inner.state.clear()
        for number, names in self._sub_groups().items():
            with self._in_memory(number, changes=True):
                for name in names:
                    self._begin_moments(name, steps)
                    for piece in self._pieces_of(name):
                        fill(piece)
                if self._is_stage_3:
                    optimizer._reassign_or_swap_out_partitioned_parameters(number)
        for piece in self._others():
            fill(piece)
        if self.loss_scale.is_used:
            self.loss_scale.take_up()
        self._take_up()

    def forget_moments(self) -> None:
        """Begin as if AdamW had not taken a step."""
        self._inner.state.clear()

    def _begin_moments(self, name: str, steps: Mapping[str, int]) -> None:
        held = self._held(self._parameters[name])
        if held and name in steps and held.flat not in self._inner.state:
            empty = {kind: torch.zeros_like(held.flat) for kind in MOMENTS}
            self._inner.state[held.flat] = {"step": torch.tensor(float(steps[name])), **empty}

    def _take_up(self) -> None:
        optimizer = self._optimizer
        if hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()
        elif hasattr(optimizer, "fp32_groups"):
            for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for weight, master in zip(weights, masters, strict=True):
                    weight.data.copy_(master.data)

    def _sub_groups(self) -> dict[int, list[str]]:
        """Parameters by the number of what is in memory at once; all of them but at stage 3."""
        if not self._is_stage_3:
            return {0: list(self._parameters)}
        groups: dict[int, list[str]] = {}
        for name, parameter in self._parameters.items():
            groups.setdefault(self._optimizer.grad_position[self._optimizer.get_param_id(parameter)][0], []).append(name)
        return dict(sorted(groups.items()))

    def _is_out(self, number: int) -> bool:
        return getattr(self._optimizer, "swap_optimizer", False) and bool(self._optimizer._swappable_optimizer_subgroup(number))

    @contextmanager
    def _in_memory(self, number: int, *, changes: bool = False) -> Iterator[None]:
        """A block in which a sub-group's state is in memory; what is changed in it is written back."""
        if not self._is_out(number):
            yield
            return
        self._optimizer._optimizer_states_and_gradient_swap_in(number)
        try:
            yield
        finally:
            leave = self._optimizer._optimizer_states_and_gradient_swap_out if changes else self._optimizer._release_swap_buffers
            leave(number)

    def _pieces_of(self, name: str, *, is_here: bool = True) -> Iterator[Piece]:
        held = self._held(self._parameters[name])
        if held and held.numel:
            state = self._inner.state.get(held.flat, {})
            for kind, flat in {"weight": held.flat, **{kind: state[kind] for kind in MOMENTS if kind in state}}.items():
                view = (
                    flat.detach().view(-1).narrow(0, held.offset, held.numel)
                    if is_here
                    else torch.empty(held.numel, dtype=flat.dtype, device="meta")
                )
                yield Piece(kind, name, held.start, view, not self._is_cut)

    def _others(self) -> Iterator[Piece]:
        if self._average:
            for name, (start, mean) in zip(self._parameters, self._average.parts(), strict=True):
                yield Piece("average", name, start, mean, not self._average.is_sharded)
        for name, buffer in self._buffers().items():
            yield Piece("buffer", name, 0, buffer.detach().view(-1), True)
        if self.loss_scale.is_used:
            yield Piece("loss_scale", "", 0, self.loss_scale.values(), True)

    def _buffers(self) -> dict[str, torch.Tensor]:
        """Those that are saved with a model, such as the running means of batch norm."""
        parameters = {name for name, _ in self._module.named_parameters(remove_duplicate=False)}
        kept = self._module.state_dict(keep_vars=True)
        return {name: value for name, value in kept.items() if name not in parameters and isinstance(value, torch.Tensor) and value.numel()}

    def _held(self, parameter: torch.nn.Parameter) -> _Held | None:
        optimizer = self._optimizer
        if self._is_stage_3:
            group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start, whole = shard(parameter)
            return _Held(optimizer.fp32_partitioned_groups_flat[group], offset, start, min(whole, numel))
        if hasattr(optimizer, "update_lp_params"):
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                return None
            flats = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
            place, inside = mapping.hp_fragment_address, mapping.lp_fragment_address
            return _Held(flats[mapping.param_group_index], place.start, inside.start, place.numel)
        if hasattr(optimizer, "fp32_groups"):
            master = next(
                master
                for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
                for weight, master in zip(weights, masters, strict=True)
                if weight is parameter
            )
            return _Held(master, 0, 0, master.numel())
        return _Held(parameter, 0, 0, parameter.numel())
