"""What a method is: how it changes a model before training, how the base is had back, and how what it learnt is saved and loaded."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from models.tasks import Task

Gather = Callable[[Iterable[torch.nn.Parameter]], AbstractContextManager[Any]]
State = dict[str, torch.Tensor]


def all_here(_: Iterable[torch.nn.Parameter]) -> AbstractContextManager[Any]:
    """For models whose parameters are whole anyway."""
    return nullcontext()


@dataclass(frozen=True)
class Applying:
    """What a method may need to know when it is applied."""

    task: Task
    heads: Sequence[str] = ()
    """Names of the modules that start fresh: they train too, and are saved whole."""
    gather: Gather = all_here
    """A block in which ZeRO-3's parameters are whole on every rank, for reading."""
    write: Gather = all_here
    """A block in which they are whole, and at whose end what rank 0 has written is everyone's."""
    folder: Path | None = None
    """Where what must be the same after a restart is kept."""
    rank: int = 0


class Method(Protocol):
    """One way of fine-tuning. What users see of it is in hone.methods."""

    name: ClassVar[str]

    def apply(self, model: Any, settings: Any, how: Applying) -> Any:
        """The model with the method's weights in it, and nothing that requires gradients but what trains.

        Raises:
            RecipeError: target modules that match nothing; the message lists the linear layers there are.
        """

    def off(self, model: Any) -> AbstractContextManager[Any]:
        """A block in which the model answers as the base does, with the head that it began with (of `adapter`, with the head as it is)."""

    def trained(self, name: str, parameter: torch.nn.Parameter) -> bool:
        """Whether a parameter is part of what is saved."""

    def save(self, model: Any, settings: Any, state: State, folder: Path) -> None:
        """Write what was learnt: `state` holds every tensor for which `trained` is true, by its name in the model."""

    def load(self, model: Any, folder: Path) -> Any:
        """Put what `save` wrote beside a base that was just loaded (or, where a whole model was saved, give that model back)."""

    def merge(self, model: Any) -> Any:
        """The model as a plain transformers model.

        Raises:
            RecipeError: what was learnt is no change of the base's weights.
        """
