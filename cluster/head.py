"""`python -m cluster.head FOLDER MIN_CPUS`: the head of a local Ray, as a process of its own (cluster/connect.py starts it).

Prints one line of JSON when it is up. Ends, and ends all of Ray with it, when its standard input closes; after the line `keep`, on
SIGTERM only.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from cluster.connect import processes_in_session


def main() -> None:
    import ray

    folder, min_cpus = Path(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGTERM, _end)
    context = ray.init(
        address="local",
        num_cpus=min_cpus if (os.cpu_count() or 1) < min_cpus else None,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(folder),
    )
    sys.stdout.write(json.dumps({"address": context.address_info["address"], "dashboard": context.dashboard_url}) + "\n")
    sys.stdout.flush()
    is_kept = any(line == "keep\n" for line in sys.stdin)
    try:
        while is_kept:
            signal.pause()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ray.shutdown()
        for pid in set(processes_in_session(os.getsid(0))) - {os.getpid()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if is_kept:
            shutil.rmtree(folder, ignore_errors=True)


def _end(_signal: int, _frame: object) -> None:
    sys.exit(0)


if __name__ == "__main__":
    main()
