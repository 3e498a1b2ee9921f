"""Telling a mistake from a lost machine: the first is reported at once, the second is worth a restart.

When one worker fails, the others fail a moment later because it stopped answering. The first writes down why; whoever finds that note
ends quietly, so Ray Train does not restart a run that would fail again.
"""

import errno
import json
import traceback
from pathlib import Path

from hone.errors import HoneError, ResourceError, RunFailedError
from hone.run_folder import FAILURE_FILE
from hone.storage import write_json

PEER_LOST = ("gloo", "Connection closed by peer", "Connection reset", "NCCL", "Broken pipe", "Socket Timeout", "init_process_group")


class WorkersOutOfMemoryError(RunFailedError):
    """A forward or backward pass did not fit."""


class UnevenWorkersError(RunFailedError):
    """As many workers as cannot share sequences evenly."""


def record_failure(folder: Path, error: Exception, *, rank: int) -> bool:
    """Write down a failure that a restart cannot mend. False where the error only says that another worker is gone."""
    path = folder / FAILURE_FILE
    if path.exists():
        return True
    if not isinstance(error, HoneError) and any(sign in f"{type(error).__name__}: {error}" for sign in PEER_LOST):
        return False
    write_json(
        path,
        {
            "rank": rank,
            "is_user_error": isinstance(error, HoneError),
            "is_out_of_memory": _is_out_of_memory(error),
            "is_uneven": isinstance(error, UnevenWorkersError),
            "message": _say(error),
            "traceback": traceback.format_exc(),
        },
    )
    return True


def raise_recorded_failure(folder: Path) -> None:
    """Raise what a worker wrote down, if one did.

    Raises:
        WorkersOutOfMemoryError: smaller portions might do. UnevenWorkersError: fewer workers will do. RunFailedError: with the worker's
            own reason, and where its traceback is.
    """
    path = folder / FAILURE_FILE
    if not path.exists():
        return
    failure = json.loads(path.read_text())
    if failure["is_out_of_memory"]:
        raise WorkersOutOfMemoryError(f"worker {failure['rank']}: {failure['message']} (traceback in {path})")
    if failure["is_uneven"]:
        raise UnevenWorkersError(failure["message"])
    where = "" if failure["is_user_error"] else f" (worker {failure['rank']}; traceback in {path})"
    raise RunFailedError(f"{failure['message']}{where}")


def _say(error: Exception) -> str:
    if isinstance(error, HoneError):
        return error.message
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ResourceError(f"no disk left on {error.filename or 'the worker'}; free some room and run again").message
    if _is_out_of_memory(error):
        return "out of memory; lower train.micro_batch_size or data.max_length, or raise zero.stage"
    return f"{type(error).__name__}: {error}"


def _is_out_of_memory(error: Exception) -> bool:
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said
