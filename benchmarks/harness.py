"""The one harness: variants measured in turn, medians and spread, and a JSON that says on what and by which command.

Machines differ and drift, so a benchmark compares variants inside one run (A B A B ...) and quotes ratios pair by pair.
"""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("ray", "torch", "deepspeed", "transformers", "peft")

Figures = dict[str, list[float]]


def interleave(variants: Mapping[str, Callable[[], float]], *, repeats: int) -> Figures:
    """Measure each variant once a round, in the order given, so that drift of the machine touches all alike."""
    measured: Figures = {name: [] for name in variants}
    for round_number in range(1, repeats + 1):
        for name, measure in variants.items():
            value = measure()
            measured[name].append(value)
            print(f"round {round_number}/{repeats}  {name}: {value:.4g}", flush=True)  # noqa: T201 - a benchmark's progress
    return measured


def summary(values: list[float]) -> dict[str, Any]:
    """Median and spread of one figure."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": values}


def ratios(measured: Figures, *, of: str, to: str) -> dict[str, Any]:
    """Pair by pair: `of` divided by `to`."""
    return summary([a / b for a, b in zip(measured[of], measured[to], strict=True)])


def save(name: str, *, unit: str, figures: Mapping[str, Any], notes: Mapping[str, Any] | None = None) -> Path:
    """Write results/NAME.json with what was measured, where, and how."""
    result = {
        "name": name,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "unit": unit,
        "figures": dict(figures),
        "notes": dict(notes or {}),
        "environment": environment(),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def last_figures(name: str) -> dict[str, Any]:
    """The figures of the result of that name, where there is one."""
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text())["figures"]) if path.exists() else {}


def environment() -> dict[str, Any]:
    """Hardware, versions and commit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30),
        "gpu": _gpu_name(),
        "python": platform.python_version(),
        **{library: _version(library) for library in LIBRARIES},
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
    }


def _version(library: str) -> str | None:
    """None where it is not installed: not every benchmark needs every one."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _output(*command: str) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip() or None
