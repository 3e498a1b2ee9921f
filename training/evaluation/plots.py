"""Plots of a run and of its evaluation: PNG files for cards, and SVG for the report, in whose colours the reader's theme has a say."""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from training.evaluation.result import Evaluation
from training.verdict import smoothed, smoothing_window

Line = dict[str, Any]
THEME = {
    "ink": "#1f2328",
    "muted": "#6e7781",
    "grid": "#e4e7eb",
    "blue": "#2563eb",
    "orange": "#d9730d",
    "green": "#1a7f4b",
    "red": "#cf3341",
}
"""Colours on white, by the names of the variables that the report's style sheet gives other values in the dark."""
WIDE = (9.0, 3.6)
MOST_CLASSES = 40
"""More than these cannot be told apart in a confusion matrix."""
NUMBERED_CLASSES = 12
"""Up to these, cells have numbers in them."""


@dataclass(frozen=True)
class Plot:
    """One plot, twice."""

    name: str
    title: str
    png: bytes
    svg: str
    is_wide: bool = False
    """Whether it needs the width of a page."""

    @property
    def file(self) -> str:
        return f"plot_{self.name}.png"


def plots(lines: Sequence[Line], evaluation: Evaluation | None, *, budget: float | None) -> list[Plot]:
    """Those there is something to draw for.

    Args:
        lines: The run's metrics.
        evaluation: Of what it published.
        budget: How much the loss on the retained rows may rise.
    """
    made: list[Plot] = []
    if any("loss" in line for line in lines):
        made.append(_plot("losses", "Losses", lambda axes: _losses(axes, lines), size=WIDE))
        made.append(_plot("learning_rate", "Learning rate", lambda axes: _learning_rate(axes, lines), size=(WIDE[0], 2.2)))
    if len(_tradeoff(lines)) > 0:
        made.append(_plot("forgetting", "Gain against forgetting", lambda axes: _forgetting(axes, lines, budget)))
    if evaluation and evaluation.reliability:
        made.append(_plot("calibration", "Calibration", lambda axes: _calibration(axes, evaluation)))
    if evaluation and 1 < len(evaluation.confusion) <= MOST_CLASSES:
        size = min(3.6 + 0.3 * len(evaluation.confusion), WIDE[0])
        made.append(_plot("confusion", "Confusion matrix", lambda axes: _confusion(axes, evaluation), size=(size, size)))
    return made


def _losses(axes: Any, lines: Sequence[Line]) -> None:
    steps, losses = _series(lines, "loss")
    window = smoothing_window(len(losses))
    if window > 1:
        axes.plot(steps, losses, color=THEME["blue"], alpha=0.22, linewidth=0.8)
    axes.plot(steps, smoothed(losses, window), color=THEME["blue"], label=f"training{f' (mean of {window} steps)' if window > 1 else ''}")
    for name, label, colour in (("eval_loss", "validation", "orange"), ("retain_loss", "retained", "green")):
        at, values = _series(lines, name)
        if at:
            axes.plot(at, values, color=THEME[colour], marker="o", markersize=3.5, label=label)
    published = _published(lines)
    if published:
        axes.axvline(published, color=THEME["muted"], linestyle=(0, (4, 3)), linewidth=1, label=f"published: step {published}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, labelcolor=THEME["ink"])


def _learning_rate(axes: Any, lines: Sequence[Line]) -> None:
    axes.plot(*_series(lines, "learning_rate"), color=THEME["blue"])
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.yaxis.get_offset_text().set_color(THEME["muted"])


def _forgetting(axes: Any, lines: Sequence[Line], budget: float | None) -> None:
    """Each validation a point: what was gained on the task against what was lost on the retained rows."""
    points = _tradeoff(lines)
    gains, increases, divergences = ([point[n] for point in points] for n in (1, 2, 3))
    style = {"linewidth": 1, "markersize": 4, "zorder": 3}
    axes.plot(gains, increases, color=THEME["blue"], marker="o", label="loss above the base's", **style)
    axes.plot(gains, divergences, color=THEME["green"], marker="s", linestyle=(0, (2, 2)), label="KL divergence from the base", **style)
    axes.axhline(0, color=THEME["muted"], linewidth=0.8)
    if budget is not None:
        axes.axhline(budget, color=THEME["red"], linestyle=(0, (4, 3)), linewidth=1)
        axes.annotate("budget", (0, budget), (4, 3), xycoords=("axes fraction", "data"), textcoords="offset points", color=THEME["red"])
    published = _published(lines)
    every = max(1, math.ceil(len(points) / 8))
    for n, (step, gain, increase, _) in enumerate(points):
        if step == published:
            axes.scatter([gain], [increase], s=90, facecolors="none", edgecolors=THEME["orange"], linewidths=2, zorder=4)
        if step == published or n % every == 0 or n == len(points) - 1:
            text = f"step {step}{' (published)' if step == published else ''}"
            axes.annotate(text, (gain, increase), (7, 4), textcoords="offset points", fontsize=8, color=THEME["ink"])
    axes.margins(x=0.3, y=0.2)
    axes.legend(frameon=False, labelcolor=THEME["ink"], fontsize=8)
    axes.set_xlabel("gain: how far validation loss fell")
    axes.set_ylabel("forgetting (nats a target)")


def _confusion(axes: Any, evaluation: Evaluation) -> None:
    counts, names = evaluation.confusion, [each.name for each in evaluation.classes]
    shares = [[count / (sum(row) or 1) for count in row] for row in counts]
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            axes.fill([x - 0.48, x + 0.48, x + 0.48, x - 0.48], [y - 0.48, y - 0.48, y + 0.48, y + 0.48], color=THEME["grid"], linewidth=0)
            if share:
                corners = [x - 0.48, x + 0.48, x + 0.48, x - 0.48], [y - 0.48, y - 0.48, y + 0.48, y + 0.48]
                axes.fill(*corners, color=THEME["blue" if x == y else "red"], alpha=0.12 + 0.7 * share, linewidth=0)
            if len(names) <= NUMBERED_CLASSES and counts[y][x]:
                axes.text(x, y, f"{counts[y][x]:,}", ha="center", va="center", fontsize=8, color=THEME["ink"])
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    shown = [name if len(name) <= 18 else name[:17] + "…" for name in names]
    axes.set_xticks(range(len(names)), shown, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), shown)
    axes.set_aspect("equal")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("answered")
    axes.set_ylabel("wanted")


def _calibration(axes: Any, evaluation: Evaluation) -> None:
    most = max(each.count for each in evaluation.reliability)
    for each in evaluation.reliability:
        shade = 0.3 + 0.6 * each.count / most
        axes.bar(each.low, each.accuracy, width=each.high - each.low, align="edge", color=THEME["blue"], alpha=shade, linewidth=0)
    axes.plot([0, 1], [0, 1], color=THEME["muted"], linestyle=(0, (4, 3)), linewidth=1)
    sure, right = [each.confidence for each in evaluation.reliability], [each.accuracy for each in evaluation.reliability]
    axes.plot(sure, right, color=THEME["orange"], marker="o", markersize=3.5, linewidth=1)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")


def _plot(name: str, title: str, draw: Callable[[Any], None], *, size: tuple[float, float] = (4.8, 4.0)) -> Plot:
    import matplotlib

    style: Any = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": name, "path.simplify": True, "text.parse_math": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(color=THEME["grid"], linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        for spine in axes.spines.values():
            spine.set_color(THEME["grid"])
        axes.tick_params(colors=THEME["muted"], length=0)
        if name not in ("confusion", "calibration"):
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=name != "forgetting"))
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(THEME["muted"])
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=120, facecolor="white")
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return Plot(name, title, png.getvalue(), themed(svg.getvalue(), name, title), is_wide=size[0] >= WIDE[0])


def themed(svg: str, name: str, title: str) -> str:
    """An SVG document as an element of a page: colours become variables, and names of its parts its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    for colour, value in THEME.items():
        svg = svg.replace(value, f"var(--{colour})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def _series(lines: Sequence[Line], name: str) -> tuple[list[int], list[float]]:
    there = [line for line in lines if name in line]
    return [line["step"] for line in there], [float(line[name]) for line in there]


def _tradeoff(lines: Sequence[Line]) -> list[tuple[int, float, float, float]]:
    """Of each validation: its step, how far the loss fell since before the first step, how far the retained loss rose, and the KL."""
    before = next((line["eval_loss"] for line in lines if line["step"] == 0 and "eval_loss" in line), None)
    both = [line for line in lines if "retain_loss_increase" in line and "eval_loss" in line]
    return [] if before is None else [(n["step"], before - n["eval_loss"], n["retain_loss_increase"], n["retain_kl"]) for n in both]


def _published(lines: Sequence[Line]) -> int:
    return next((line["published_step"] for line in reversed(lines) if "published_step" in line), 0)
