"""Whether a version may take an alias: what its recipe's `publish.gate` asks, held against what was measured of it."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from hone.errors import CorruptAdapterError
from hone.manifest import EVALUATION_FILE, RECIPE_FILE, AdapterManifest
from hone.metrics import METRICS
from hone.recipe.publish import Bounds, GateSettings, PublishSettings


@dataclass(frozen=True)
class Figure:
    """A measured value, and its 95% interval where it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.4g}" + ("" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]")


@dataclass(frozen=True)
class Candidate:
    """A published version and its folder."""

    manifest: AdapterManifest
    folder: Path

    def figures(self) -> dict[str, Figure]:
        """What was measured of it, by metric: of the exported weights where they were evaluated, else during the training.

        Raises:
            CorruptAdapterError: its evaluation cannot be read.
        """
        found = {name: Figure(value) for name, value in self.manifest.metrics.items()}
        path = self.folder / EVALUATION_FILE
        if not path.exists():
            return found
        try:
            measured = {f"eval_{each['name']}": each["tuned"] for each in json.loads(path.read_bytes())["metrics"]}
            return found | {
                name: Figure(each["value"], each["low"], each["high"]) for name, each in measured.items() if each["value"] is not None
            }
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptAdapterError(f"{path}: not an evaluation that this version reads ({error!r})") from None

    def gate(self) -> GateSettings | None:
        """What its recipe asks.

        Raises:
            CorruptAdapterError: its recipe cannot be read.
        """
        path = self.folder / RECIPE_FILE
        if not path.exists():
            return None
        try:
            return PublishSettings.model_validate(json.loads(path.read_bytes()).get("publish", {})).gate
        except (ValueError, AttributeError) as error:
            raise CorruptAdapterError(f"{path}: its publish section is none that this version reads ({error})") from None


def objections(candidate: Candidate, present: Candidate | None) -> list[str]:
    """What the gate has against a version, a phrase each; nothing where it may pass.

    Args:
        candidate: The version that is to answer.
        present: The one that the alias means now, if another.
    """
    gate = candidate.gate()
    if gate is None:
        return []
    figures = candidate.figures()
    found = [_outside(name, bounds, figures.get(name)) for name, bounds in gate.metrics.items()]
    if present is not None and gate.no_worse_than_alias:
        others, where = present.figures(), _where(candidate, present)
        found += [
            _worse(name, margin, figures.get(name), others.get(name), str(present.manifest.ref), where)
            for name, margin in gate.no_worse_than_alias.items()
        ]
    if gate.max_retain_loss_increase is not None:
        found.append(_outside("retain_loss_increase", Bounds(at_most=gate.max_retain_loss_increase), figures.get("retain_loss_increase")))
    return [each for each in found if each]


def _outside(name: str, bounds: Bounds, figure: Figure | None) -> str:
    if figure is None or not math.isfinite(figure.value):
        return f"{name} was not measured"
    if bounds.at_least is not None and figure.value < bounds.at_least:
        return f"{name} {figure} is not at least {bounds.at_least:g}"
    if bounds.at_most is not None and figure.value > bounds.at_most:
        return f"{name} {figure} is not at most {bounds.at_most:g}"
    return ""


def _worse(name: str, margin: float, figure: Figure | None, other: Figure | None, ref: str, where: str) -> str:
    if figure is None or not math.isfinite(figure.value):
        return f"{name} was not measured"
    if other is None or not math.isfinite(other.value):
        return f"{name} was not measured of {ref}, which it may not be worse than"
    least = _least_worsening(figure, other, higher_is_better=METRICS[name.removeprefix("eval_")].higher_is_better)
    return f"{name} {figure} is worse than {other} of {ref} by more than {margin:g}{where}" if least > margin else ""


def _least_worsening(figure: Figure, other: Figure, *, higher_is_better: bool) -> float:
    """By how much a figure is worse: the lower end of the difference's 95% interval, or the difference where there are no intervals.

    The two were measured apart, so the ends are put together as those of independent estimates (Zou and Donner 2008, MOVER).
    """
    first, second = (other, figure) if higher_is_better else (figure, other)
    difference = first.value - second.value
    if first.low is None or second.high is None:
        return difference
    return difference - math.hypot(first.value - first.low, second.high - second.value)


def _where(candidate: Candidate, present: Candidate) -> str:
    same = candidate.manifest.lineage.data_digest == present.manifest.lineage.data_digest
    return "" if same else " (each on the validation rows of its own data)"
