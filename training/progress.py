"""Runs as they happen: a bar with loss, tokens a second and time left in a terminal, a line now and then in a log."""

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hone.run_folder import EVENTS_FILE, METRICS_FILE, LinesFollower

POLL_S = 0.25
LOG_EVERY_S = 10.0
SPEED_OVER_STEPS = 20


class DataProgress:
    """How far the preparation of data is: call it with a name, what is done and of how much (bytes)."""

    def __init__(self, *, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("preparing {task.description}"),
            BarColumn(bar_width=20),
            DownloadColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._began = self._next_log = time.monotonic()

    def __enter__(self) -> "DataProgress":
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def __call__(self, name: str, done: int, total: int) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(Path(name).name, total=total)
            self._began, self._next_log = time.monotonic(), time.monotonic() + LOG_EVERY_S
        self._bars.update(self._tasks[name], completed=done)
        now = time.monotonic()
        if done and not self._console.is_terminal and now >= self._next_log:
            self._next_log = now + LOG_EVERY_S
            left_s = (now - self._began) * (total - done) / done
            self._console.print(f"preparing {name}: {done / total:.0%}, about {left_s:.0f} s left", highlight=False)


class RunProgress:
    """Follows the metrics files of one or more runs, from a thread of its own, while the block lasts."""

    def __init__(self, runs: Callable[[], dict[Path, str]], *, console: Console) -> None:
        """Args: runs: Asked again and again which run folders there are, and how to call each. console: Where to draw."""
        self._runs = runs
        self._console = console
        self._followers: dict[Path, _Follower] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._bars = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "RunProgress":
        self._bars.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        self._bars.stop()

    def _follow(self) -> None:
        while True:
            over = self._over.wait(POLL_S)
            for folder, label in self._runs().items():
                if folder not in self._followers:
                    self._followers[folder] = _Follower(folder, label, self._bars, self._console)
                self._followers[folder].show_new()
            if over:
                return


class _Follower:
    """One run's bar."""

    def __init__(self, folder: Path, label: str, bars: Progress, console: Console) -> None:
        self._lines, self._events = LinesFollower(folder / METRICS_FILE), LinesFollower(folder / EVENTS_FILE)
        self._label, self._bars, self._console = label, bars, console
        self._bar: TaskID = bars.add_task(label, total=None, figures="starting workers")
        self._recent: deque[dict[str, Any]] = deque(maxlen=SPEED_OVER_STEPS)
        self._total = 0
        self._next_log = 0.0

    def show_new(self) -> None:
        for event in self._events.new_lines()[0]:
            text = _said(event)
            if text:
                self._console.print(f"{self._label}: {text}", highlight=False, markup=False)
        lines, is_new = self._lines.new_lines()
        if is_new:
            self._recent.clear()
        for line in lines:
            self._show(line)

    def _show(self, line: dict[str, Any]) -> None:
        if "total_steps" in line:
            self._total = line["total_steps"]
            self._bars.reset(self._bar, total=self._total, completed=line["step"], figures="")
        elif "stopped" in line:
            self._console.print(f"{self._label} stopped at step {line['step']}: {line['stopped']}", highlight=False)
        elif "published_step" in line:
            self._console.print(f"{self._label}: the weights of step {line['published_step']} are kept", highlight=False)
        elif "step_s" not in line:
            figures = "  ".join(f"{name} {value:.4f}" for name, value in line.items() if name.startswith(("eval_", "retain_")))
            self._console.print(f"{self._label} step {line['step']}: {figures}", highlight=False)
        else:
            self._recent.append(line)
            unit = "tokens" if "tokens" in line else "rows"
            done, seconds = (sum(m[name] for m in self._recent) for name in (unit, "step_s"))
            figures = f"loss {line['loss']:.4f}  {done / seconds:,.0f} {unit}/s"
            self._bars.update(self._bar, completed=line["step"], figures=figures)
            self._log(line["step"], figures, left_s=(self._total - line["step"]) * seconds / len(self._recent))

    def _log(self, step: int, figures: str, *, left_s: float) -> None:
        if self._console.is_terminal or time.monotonic() < self._next_log:
            return
        self._next_log = time.monotonic() + LOG_EVERY_S
        self._console.print(f"{self._label} step {step}/{self._total}  {figures}  about {left_s:.0f} s left", highlight=False)


def _said(event: dict[str, Any]) -> str:
    """What of a run's events its owner wants to know at once; nothing of most."""
    match event["event"]:
        case "attempt" if event["number"] > 1:
            passed = "".join(f"; passed over: {why}" for why in event["passed_over"])
            return f"goes on after step {event['step']} with {event['world_size']} workers{passed}"
        case "planned" if event["advice"]:
            return f"by the plan this {event['advice']}"
        case "out_of_memory":
            return f"a pass did not fit into memory; goes on with train.micro_batch_size {event['micro_batch_size']}"
        case "uneven_workers":
            return f"{event['began']} workers cannot share sequences evenly; goes on with {event['most']} at most"
        case "checkpoint_failed":
            return f"the checkpoint of step {event['step']} could not be written: {event['why']}"
        case "tracking_failed":
            return f"{event['tracker']} is told no more: {event['why']}"
        case "stalled":
            return f"rank {event['rank']} ({event['worker']}) stands still: {event['why']}; every rank's stack is in {event['stacks']}"
        case "loss_spike":
            return f"step {event['step']}: loss {event['loss']} where {event['median_before']} was usual; its rows: {event['rows']}"
        case "slow_rank":
            return f"rank {event['rank']} ({event['worker']}) takes {event['forward_s']} s where the others take {event['median_s']} s"
        case "starved":
            return f"{event['share_of_time_waiting_for_rows']:.0%} of the time goes into waiting for rows"
    return ""
