"""`hone doctor`: what this machine, or a cluster, can run, and what to do about what it cannot."""

import dataclasses
import importlib.metadata
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from cluster.connect import DEFAULT_TOKEN_FILE, auth_token
from cluster.dashboard import Dashboard
from cluster.deploy import check_bind
from cluster.terminal import size, table
from hone.errors import HoneError
from hone.storage import Home
from hone.store import Store

PYTHONS = ((3, 11), (3, 13))
PACKAGES = ("hone", "ray", "torch", "deepspeed", "transformers", "peft", "safetensors")
LEAST_MEMORY = 4 * 2**30
"""A local Ray takes 1.1 GB and each worker at least 0.5 GB."""
LEAST_SHM = 256 * 2**20
LEAST_DISK = 2 * 2**30
PORT = 8000
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    level: Level
    found: str
    advice: str = ""
    """What to do; empty where all is well."""


def examine(home: Home, *, address: str | None = None) -> list[Finding]:
    """Look at everything, and at the cluster whose dashboard is at `address`, if one is given. Nothing is started, and of the home
    only the store's file is made."""
    checks: list[Callable[[], Finding]] = [
        _python,
        *(lambda name=name: _package(name) for name in PACKAGES),
        _accelerators,
        _processors,
        _memory,
        _shared_memory,
        lambda: _home(home),
        lambda: _disk(home),
        lambda: _store(home),
        _port,
        _host_name,
        _token,
    ]
    findings = [check() for check in checks]
    return findings + (list(_cluster(address)) if address else [])


def print_findings(findings: list[Finding], *, as_json: bool, console: Console) -> None:
    """A table, or JSON."""
    if as_json:
        console.print_json(json.dumps([dataclasses.asdict(finding) for finding in findings]))
        return
    rows = [(f"[{COLOURS[f.level]}]{f.level}[/]", f.name, escape(f.found), escape(f.advice)) for f in findings]
    console.print(table(("", "CHECK", "FOUND", "WHAT TO DO"), rows))
    failed = sum(f.level == "fail" for f in findings)
    console.print(f"{failed} must be mended before hone can run here" if failed else "hone can run here")


def _python() -> Finding:
    is_known = PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]
    first, last = (".".join(map(str, version)) for version in PYTHONS)
    return Finding("python", "ok" if is_known else "fail", sys.version.split()[0], "" if is_known else f"use Python {first} to {last}")


def _package(name: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "fail", "not installed", f"pip install {name}")


def _accelerators() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("gpu", "fail", f"torch cannot be imported ({error})", "install torch anew")
    if not torch.cuda.is_available():
        return Finding("gpu", "warn", "none; training runs on the CPU in fp32", "install a CUDA build of torch if there is a GPU")
    names = ", ".join(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))
    bf16 = "with bf16" if torch.cuda.is_bf16_supported() else "without bf16, so training runs in fp32"
    return Finding("gpu", "ok", f"{names} ({bf16})")


def _processors() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("cpu", "ok" if count > 1 else "warn", f"{count} cores", "" if count > 1 else "one worker and Ray share it; expect waits")


def _memory() -> Finding:
    free = _available_memory()
    if free is None:
        return Finding("memory", "warn", "cannot be told on this system", f"make sure that {size(LEAST_MEMORY)} are free")
    is_enough = free >= LEAST_MEMORY
    advice = "" if is_enough else f"free some: a local Ray and two small workers take {size(LEAST_MEMORY)}"
    return Finding("memory", "ok" if is_enough else "warn", f"{size(free)} free", advice)


def _available_memory() -> int | None:
    """Bytes that can still be had, by the machine or by the container's own limit (cgroup v2), whichever is less."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        return min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return free


def _shared_memory() -> Finding:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return Finding("/dev/shm", "ok", "none on this system; Ray keeps its objects on disk")
    free = shutil.disk_usage(shm).free
    is_enough = free >= LEAST_SHM
    return Finding(
        "/dev/shm",
        "ok" if is_enough else "warn",
        f"{size(free)} free",
        "" if is_enough else "give the container more (docker run --shm-size=2g)",
    )


def _home(home: Home) -> Finding:
    try:
        home.ready(needed_bytes=0)
    except HoneError as error:
        return Finding("home", "fail", error.message, "choose another with --home or HONE_HOME")
    return Finding("home", "ok", f"{home.root} can be written")


def _disk(home: Home) -> Finding:
    folder = next(path for path in (home.root, *home.root.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    level: Level = "ok" if free >= LEAST_DISK else "warn"
    return Finding("disk", level, f"{size(free)} free at {folder}", "" if level == "ok" else "free some, or choose another --home")


def _store(home: Home) -> Finding:
    try:
        store = Store(home.store_url)
        count = len(store.jobs())
        store.close()
    except (HoneError, OSError) as error:
        return Finding("store", "fail", str(error), "check HONE_STORE, or the home's permissions")
    return Finding("store", "ok", f"opens, {count} jobs")


def _port() -> Finding:
    try:
        check_bind("127.0.0.1", PORT)
    except HoneError:
        return Finding(f"port {PORT}", "warn", "in use", "give hone serve another --port")
    return Finding(f"port {PORT}", "ok", "free")


def _host_name() -> Finding:
    """Gloo takes the address that the host's own name resolves to, and tells the other nodes to connect there."""
    if chosen := os.environ.get("GLOO_SOCKET_IFNAME"):
        return Finding("host name", "ok", f"GLOO_SOCKET_IFNAME is {chosen}")
    name = socket.gethostname()
    try:
        resolved = socket.gethostbyname(name)
    except OSError:
        resolved = "nothing"
    if resolved != "nothing" and not resolved.startswith("127."):
        return Finding("host name", "ok", f"{name} is {resolved}")
    advice = "fine on one machine; for CPU workers on several, set GLOO_SOCKET_IFNAME to the network interface between them"
    return Finding("host name", "warn", f"{name} resolves to {resolved}", advice)


def _token() -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode not in (None, "token"):
        return Finding(
            "ray token", "warn", f"RAY_AUTH_MODE is {mode}", "unset it: without a token, whoever reaches Ray's ports runs code here"
        )
    try:
        if auth_token():
            return Finding("ray token", "ok", "set, and shown to every cluster")
    except HoneError as error:
        return Finding("ray token", "fail", error.message, "correct RAY_AUTH_TOKEN_PATH")
    saved = f"; {DEFAULT_TOKEN_FILE} is used with RAY_AUTH_MODE=token" if DEFAULT_TOKEN_FILE.expanduser().is_file() else ""
    return Finding("ray token", "ok", f"a local Ray makes its own; none is shown to clusters{saved}")


def _cluster(address: str) -> Iterator[Finding]:
    """What the cluster's own dashboard says."""
    try:
        dashboard = Dashboard(address)
        version = dashboard.get("/api/version")["ray_version"]
        nodes = [node for node in dashboard.get("/nodes?view=summary")["data"]["summary"] if node["raylet"].get("state") == "ALIVE"]
    except HoneError as error:
        yield Finding("cluster", "fail", error.message, "check the address, the network policy and the token")
        return
    here = importlib.metadata.version("ray")
    is_same = version == here
    advice = "" if is_same else f"install ray=={version} here, so that client and cluster agree"
    yield Finding("cluster", "ok" if is_same else "warn", f"Ray {version}, {len(nodes)} nodes", advice)
    total: dict[str, float] = {}
    for node in nodes:
        for name, amount in _resources(node).items():
            total[name] = total.get(name, 0) + amount
    shown = ", ".join(f"{total[name]:g} {name}" for name in ("CPU", "GPU") if name in total)
    yield Finding(
        "cluster room", "ok" if shown else "warn", shown or "no CPU and no GPU now", "" if shown else "add workers, or let it grow"
    )


def _resources(node: dict[str, Any]) -> dict[str, float]:
    return dict((node["raylet"].get("resourcesTotal") or {}).items())
