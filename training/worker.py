"""What the loop needs from whatever launched it, and the two launchers' forms of it: Ray Train and torchrun."""

import os
from typing import Protocol


class Worker(Protocol):
    """One process of a training run."""

    rank: int
    world_size: int
    local_rank: int

    def report(self, metrics: dict[str, float]) -> None:
        """Hand over what a validation measured. All ranks call it at the same steps."""

    def noticed(self) -> bool:
        """Whether this worker's machine is about to be taken away. Asked once a step; one rank that says so is enough."""


class RayWorker:
    """A worker that Ray Train started."""

    def __init__(self) -> None:
        import ray.train

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.local_rank: int = context.get_local_rank()

    def report(self, metrics: dict[str, float]) -> None:
        import ray.train

        ray.train.report(metrics)

    def noticed(self) -> bool:
        """What Ray's public `get_preemption_info` asks first; that one then waits for all ranks, which is too much for every step."""
        from ray.train.v2._internal.execution.context import get_train_context

        return get_train_context().preemption_context.preemption_info is not None


class TorchrunWorker:
    """A worker that torchrun started, to compare with and to debug under."""

    def __init__(self) -> None:
        self.rank = int(os.environ["RANK"])
        self.world_size = int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ["LOCAL_RANK"])

    def report(self, metrics: dict[str, float]) -> None:
        """Nothing listens."""

    def noticed(self) -> bool:
        return False
