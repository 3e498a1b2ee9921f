"""The optimiser's state, and the weights, in files on each machine's own disk, where its memory is too small as well (ZeRO-Infinity,
https://arxiv.org/abs/2104.07857).

The files are of use to the process that wrote them alone: what a run goes on from are its checkpoints.
"""

import fcntl
import json
import os
import shutil
import time
from pathlib import Path

import torch.distributed as dist

from hone.base_model import BaseModel
from hone.errors import ResourceError
from hone.run_folder import tell
from training.job import Job
from training.model import build_on_meta
from training.worker import Worker
from training.zero import Swap, elements

ABANDONED_S = 1800.0
"""A lock of torch's that is so old was left by a build that was killed; torch would wait for it without end."""


def swap_of(job: Job, worker: Worker) -> Swap | None:
    """What this worker keeps on NVMe; None where all is in memory."""
    folder = _swap_folder(job, worker)
    if folder is None:
        return None
    largest = _largest(job) if job.recipe.zero.offload_param == "nvme" else 0
    return Swap(folder, largest_shard=-(-largest // worker.world_size))


def _largest(job: Job) -> int:
    """Elements of the model's largest parameter, method and all."""
    base = BaseModel(job.base_folder, job.base_id, json.loads((job.base_folder / "config.json").read_text()))
    return max(elements([parameter]) for parameter in build_on_meta(job.recipe, base, head=job.head).parameters())


def _swap_folder(job: Job, worker: Worker) -> Path | None:
    """Of its own for each run and process: several may share a disk, and a worker that was frozen and comes to itself removes its own
    files, not those of the one that has its rank now."""
    root = job.recipe.zero.nvme_path
    return root / f"hone-{job.run_id}" / f"rank-{worker.rank}-{os.getpid()}" if root else None


def prepare_swap(job: Job, worker: Worker) -> None:
    """Make room on each machine: what an attempt before left there goes, and DeepSpeed's op is built if it was not. Every rank takes part.

    Raises:
        ResourceError: the folder cannot be written, or the op cannot be built.
    """
    folder = _swap_folder(job, worker)
    if folder is None:
        return
    wrong = ""
    if worker.local_rank == 0:
        try:
            _clear(folder.parent)
            tell(
                job.folder,
                "building",
                op="async_io",
                why="for files on NVMe; takes minutes the first time on a machine",
            )
            _build()
        except (OSError, RuntimeError, ImportError) as error:
            wrong = f"zero.nvme_path: {error}"
    everyone: list[str] = [""] * worker.world_size
    dist.all_gather_object(everyone, wrong)
    found = next(filter(None, everyone), "")
    if found:
        raise ResourceError(found)
    folder.mkdir(parents=True, exist_ok=True)


def remove_swap(job: Job, worker: Worker) -> None:
    """Give the disk back."""
    folder = _swap_folder(job, worker)
    if folder is None:
        return
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.parent.rmdir()
    except OSError:  # other ranks have theirs in it still
        return


def _clear(run: Path) -> None:
    shutil.rmtree(run, ignore_errors=True)
    try:
        run.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"the folder zero.nvme_path {run.parent} cannot be written on this machine ({error.strerror})") from None


def _build() -> None:
    """Build async_io, for minutes the first time on a machine; one process at a time."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import get_default_build_root

    if not AsyncIOBuilder().is_compatible():
        raise RuntimeError(
            "DeepSpeed's op async_io cannot be built on this machine; install a C++ compiler and the headers of libaio (libaio-dev)"
        )
    root = Path(get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with (root / "hone-async_io.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # unlike torch's own, gone with the process that holds it
        for lock in root.glob("**/lock"):
            if time.time() - lock.stat().st_mtime > ABANDONED_S:
                lock.unlink(missing_ok=True)
        AsyncIOBuilder().load(verbose=False)
