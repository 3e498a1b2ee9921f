"""Who goes first where there are too few cores: the thread that computes answers, before those that carry them.

A thread that wakes takes a core from one that computes. A server's threads wake for every message, so the model's stood in line for a fifth
of its time while half a core was idle (docs/decisions/0025). Linux lets threads of `SCHED_BATCH` wait for a core that is free, or for the
end of the slice of whoever has one; they get as much of a core as before. Where cores are free, nothing changes.
"""

import contextlib
import os
from pathlib import Path

TASKS = Path("/proc/self/task")
"""Linux lists a process' threads there."""
HAS_BATCH = hasattr(os, "SCHED_BATCH")


def give_way() -> None:
    """Let all threads of this process, and those that they start, wait for a core rather than take one."""
    if not HAS_BATCH or not TASKS.exists():
        return
    for thread in TASKS.iterdir():
        with contextlib.suppress(OSError):  # it has ended, or whoever runs this process forbids it
            if os.sched_getscheduler(int(thread.name)) == os.SCHED_OTHER:
                os.sched_setscheduler(int(thread.name), os.SCHED_BATCH, os.sched_param(0))


def go_first() -> None:
    """Take this thread, and those that it starts, out of that again."""
    with contextlib.suppress(OSError):
        if HAS_BATCH and os.sched_getscheduler(0) == os.SCHED_BATCH:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
