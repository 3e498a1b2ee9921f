"""What one rank holds of the state that trains, as flat pieces that know their place in the whole.

Each ZeRO stage cuts weights and moments differently, and so does each number of workers. A piece is a view into DeepSpeed's own memory
with its place in the parameter that it belongs to: saving copies pieces out, resuming copies into whatever pieces there are then.

Where DeepSpeed keeps them: `single_partition_of_fp32_groups` and `_hp_mapping` (stages 1 and 2), `fp32_groups_flat_partition` (its bf16
optimiser), `fp32_partitioned_groups_flat` and `grad_position` (stage 3), `fp32_groups` (16 bits without ZeRO).
"""

from collections.abc import Iterator, Mapping
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
    """[elements], where they are kept."""
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
        self._is_cut = hasattr(optimizer, "update_lp_params") or hasattr(optimizer, "fp32_partitioned_groups_flat")

    def pieces(self) -> Iterator[Piece]:
        """What this rank holds; of the moments, those that there are already."""
        for name, parameter in self._parameters.items():
            held = self._held(parameter)
            if held and held.numel:
                state = self._inner.state.get(held.flat, {})
                for kind, flat in {"weight": held.flat, **{kind: state[kind] for kind in MOMENTS if kind in state}}.items():
                    view = flat.detach().view(-1).narrow(0, held.offset, held.numel)
                    yield Piece(kind, name, held.start, view, not self._is_cut)
        if self._average:
            for name, (start, mean) in zip(self._parameters, self._average.parts(), strict=True):
                yield Piece("average", name, start, mean, not self._average.is_sharded)
        for name, buffer in self._buffers().items():
            yield Piece("buffer", name, 0, buffer.detach().view(-1), True)
        if self.loss_scale.is_used:
            yield Piece("loss_scale", "", 0, self.loss_scale.values(), True)

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
    def begin_moments(self, steps: Mapping[str, int]) -> None:
        """Make room for the moments of the parameters in `steps`, and none for the others."""
        self._inner.state.clear()
        for name, parameter in self._parameters.items():
            held = self._held(parameter)
            if held and name in steps and held.flat not in self._inner.state:
                empty = {kind: torch.zeros_like(held.flat) for kind in MOMENTS}
                self._inner.state[held.flat] = {"step": torch.tensor(float(steps[name])), **empty}

    @torch.no_grad()
    def take_up(self) -> None:
        """Let the model have the weights that were put into the pieces. Every rank takes part."""
        optimizer = self._optimizer
        if self.loss_scale.is_used:
            self.loss_scale.take_up()
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            for number in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
            optimizer.checkpoint_event_epilogue()
        elif hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()
        elif hasattr(optimizer, "fp32_groups"):
            for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for weight, master in zip(weights, masters, strict=True):
                    weight.data.copy_(master.data)

    def _buffers(self) -> dict[str, torch.Tensor]:
        """Those that are saved with a model, such as the running means of batch norm."""
        parameters = {name for name, _ in self._module.named_parameters(remove_duplicate=False)}
        kept = self._module.state_dict(keep_vars=True)
        return {name: value for name, value in kept.items() if name not in parameters and isinstance(value, torch.Tensor) and value.numel()}

    def _held(self, parameter: torch.nn.Parameter) -> _Held | None:
        optimizer = self._optimizer
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
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
