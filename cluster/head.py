"""`python -m cluster.head FOLDER MIN_CPUS`: the head of a local Ray, as a process of its own (cluster/connect.py starts it).

Prints one line of JSON when it is up. Ends, and ends all of Ray with it, when its standard input closes; after the line `keep`, on
SIGTERM only. It is `ray start` and not `ray.init`, which gives every Ray on a machine the same port for its agent: the second one's
would not start, and take no jobs. For the same reason RAY_ADDRESS is in the environment of all workers: where there are two Rays,
Train's placement group cleaner fails to find its own, and a search waits for ever for the CPUs of trials that were stopped.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from cluster.child import end_with_parent
from cluster.connect import processes_in_session
from cluster.dashboard import Dashboard
from hone.errors import ResourceError
from hone.ports import free_port

DASHBOARD_PORT = 8265
POLL_S = 0.1
GRACE_S = 4.0
"""Ray alone ends within 2 s; with a Serve application on it, it would wait 20 s for replicas that nobody calls any more."""


def main() -> None:
    """Start, tell, wait, end."""
    folder, min_cpus = Path(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGTERM, _end)
    port, dashboard_port = free_port(), free_port(DASHBOARD_PORT)
    address, dashboard = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}"
    ray = subprocess.Popen(
        _ray_start(folder, port=port, dashboard_port=dashboard_port, min_cpus=min_cpus),
        env={**os.environ, "RAY_ADDRESS": address},
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        preexec_fn=end_with_parent(),
    )
    is_up = False
    try:
        _wait_until_up(dashboard, ray)
        is_up = True
        sys.stdout.write(json.dumps({"address": address, "dashboard": dashboard}) + "\n")
        sys.stdout.flush()
        threading.Thread(target=_end_with, args=(ray,), daemon=True).start()
        if any(line == "keep\n" for line in sys.stdin):
            ray.wait()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _stop(ray)
        if is_up:  # else whoever started this reads there why not
            shutil.rmtree(folder, ignore_errors=True)


def _ray_start(folder: Path, *, port: int, dashboard_port: int, min_cpus: int) -> list[str]:
    options = {
        "port": port,
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard_port,
        "dashboard-agent-listen-port": 0,
        "temp-dir": folder,
        "log-style": "record",
    }
    if (os.cpu_count() or 1) < min_cpus:
        options["num-cpus"] = min_cpus
    named = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats", *named]


def _wait_until_up(url: str, ray: subprocess.Popen[bytes]) -> None:
    """Until the dashboard answers, and knows of a node."""
    dashboard = Dashboard(url)
    while ray.poll() is None:
        with contextlib.suppress(ResourceError):
            if dashboard.is_on_this_machine():
                return
        time.sleep(POLL_S)
    sys.exit(1)


def _stop(ray: subprocess.Popen[bytes]) -> None:
    """End `ray start`, which ends what it started, and then whatever is left of this session."""
    ray.terminate()
    try:
        ray.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        ray.kill()
    while left := set(processes_in_session(os.getsid(0))) - {os.getpid()}:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)


def _end_with(ray: subprocess.Popen[bytes]) -> None:
    """A Ray that ends by itself takes this process along, so that whoever waits for it is told."""
    ray.wait()
    os.kill(os.getpid(), signal.SIGTERM)


def _end(_signal: int, _frame: object) -> None:
    sys.exit(0)


if __name__ == "__main__":
    main()
