"""`environment.json` in the run folder: what a run was made with, for whoever wants to make it again."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from hone.storage import write_json

ENVIRONMENT_FILE = "environment.json"
PACKAGES = ("hone", "ray", "torch", "deepspeed", "transformers", "peft", "safetensors", "pyarrow", "numpy", "datasets", "bitsandbytes")


def write_environment(folder: Path) -> None:
    """Of the driver, which the workers share their packages with."""
    write_json(
        folder / ENVIRONMENT_FILE,
        {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "python": platform.python_version(),
            "packages": {name: found for name in PACKAGES if (found := _version(name))},
            "host": platform.node(),
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "cluster": _cluster(),
            "git": _git(),
        },
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cluster() -> dict[str, float]:
    """What the Ray that this driver is connected to has, GPUs by their kind among it; empty without one."""
    import ray

    return dict(ray.cluster_resources()) if ray.is_initialized() else {}


def _git() -> dict[str, Any] | None:
    """Commit of the folder that the run was started in, and whether there were changes beside it; None where it is no checkout."""
    try:
        commit = _said("git", "rev-parse", "HEAD")
        return {"commit": commit, "has_changes": bool(_said("git", "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _said(*argv: str) -> str:
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True, timeout=10)
    return done.stdout.strip()
