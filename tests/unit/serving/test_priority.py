"""Which threads of a serving process wait for a core, and which one does not; in a process of its own, as all of it changes."""

import os
import subprocess
import sys

import pytest

LISTS_POLICIES = """
import os, threading
from serving.engine.thread import ModelThread
from serving.priority import give_way

here = threading.Event()
before = threading.Thread(target=here.wait)
before.start()
give_way()
model = ModelThread([])
after = threading.Thread(target=here.wait)
after.start()
print(os.sched_getscheduler(before.native_id), os.sched_getscheduler(after.native_id), os.sched_getscheduler(0))
started = model.call(lambda: threading.Thread(target=here.wait)).result()
print(model.call(lambda: (started.start(), os.sched_getscheduler(0), os.sched_getscheduler(started.native_id))[1:]).result())
here.set()
model.stop()
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux has such threads")
def test_all_threads_give_way_but_the_models_and_what_it_starts() -> None:
    ran = subprocess.run([sys.executable, "-c", LISTS_POLICIES], capture_output=True, text=True, check=True, timeout=120)
    batch, other = os.SCHED_BATCH, os.SCHED_OTHER
    assert ran.stdout.splitlines() == [f"{batch} {batch} {batch}", f"({other}, {other})"]
