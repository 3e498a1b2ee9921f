"""`torchrun -m training.torchrun RUN_FOLDER`: the same loop without Ray, to compare with and to debug under."""

import sys
from pathlib import Path

import torch.distributed as dist

from training.job import Job
from training.loop import train
from training.worker import TorchrunWorker


def main() -> None:
    """Run a prepared job on the workers that torchrun started."""
    worker = TorchrunWorker()
    train(Job.load(Path(sys.argv[1])), worker)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
