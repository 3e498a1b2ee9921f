"""What the loop needs from whatever launched it, and the two launchers' forms of it: Ray Train and torchrun."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol


class Worker(Protocol):
    """One process of a training run."""

    rank: int
    world_size: int
    local_rank: int

    def report(self, metrics: dict[str, float], checkpoint: Path | None = None) -> None:
        """Hand over metrics and this rank's part of a checkpoint. All ranks call it at the same steps."""

    def latest_checkpoint(self) -> AbstractContextManager[Path | None]:
        """The folder to resume from, or None on a first start."""


class RayWorker:
    """A worker that Ray Train started."""

    def __init__(self) -> None:
        import ray.train

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.local_rank: int = context.get_local_rank()

    def report(self, metrics: dict[str, float], checkpoint: Path | None = None) -> None:
        import ray.train

        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(str(checkpoint)) if checkpoint else None)

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)


class TorchrunWorker:
    """A worker that torchrun started: it keeps no checkpoints, and is there to compare with and to debug under."""

    def __init__(self) -> None:
        self.rank = int(os.environ["RANK"])
        self.world_size = int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ["LOCAL_RANK"])

    def report(self, metrics: dict[str, float], checkpoint: Path | None = None) -> None:
        """Nothing listens."""

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        yield None
