"""What an evaluation found, as `evaluation.json` and `hone evaluate --json` hold it."""

import json
import math
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from hone.metrics import METRICS
from hone.tasks import TaskName
from models.tasks.task import ProblemType
from training.evaluation.places import EVALUATION_FILE, VERDICT_FILE

Number = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None, return_type=float | None),
]
"""Null in JSON where there is none, which is not a number there."""


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True)


class Estimate(_Result):
    """A value and its 95% interval over resamples of the rows."""

    value: Number
    low: Number
    high: Number


class Metric(_Result):
    """One metric of the model, and of what it is compared with."""

    name: str
    tuned: Estimate
    base: Estimate | None = None
    change: Estimate | None = None
    """From base to tuned, over the same resamples of both."""

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or nothing where the interval of the change holds 0."""
        if self.change is None or not (self.change.low > 0 or self.change.high < 0):
            return ""
        return "better" if (self.change.value > 0) == METRICS[self.name].higher_is_better else "worse"


class OfClass(_Result):
    """How well one class is told."""

    name: str
    count: int
    precision: float
    recall: float
    f1: float
    base_f1: float | None = None


class ReliabilityBin(_Result):
    """Decisions of about one confidence, and how many of them are right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


class Example(_Result):
    """One row."""

    row: int
    """Its number over all rows read, from 0."""
    text: str
    wanted: str
    answer: str
    base_answer: str = ""
    loss: Number | None = None
    base_loss: Number | None = None


class Evaluation(_Result):
    """A model on some rows."""

    name: str
    task: TaskName
    problem_type: ProblemType | None
    rows: int
    rows_there: int
    """How many there were, of which `rows` were drawn."""
    compared_with: str | None
    """What stands for the base, in words."""
    metrics: list[Metric]
    classes: list[OfClass] = []
    confusion: list[list[int]] = []
    """How often each class (rows) was called each class (columns), in the order of `classes`."""
    reliability: list[ReliabilityBin] = []
    improved: list[Example] = []
    """Rows whose loss fell most from the base's."""
    worsened: list[Example] = []
    """Rows whose loss rose most; without a base, those with the greatest loss."""
    written_rows: int = 0
    written: list[Example] = []
    """Some answers that the model wrote."""


def read_evaluation(folder: Path) -> Evaluation | None:
    """What was found of a run, if it was."""
    path = folder / EVALUATION_FILE
    return Evaluation.model_validate_json(path.read_bytes()) if path.exists() else None


def verdict_of(folder: Path) -> list[str]:
    """What was said of a run, a sentence or two a line."""
    path = folder / VERDICT_FILE
    return [remark["says"] for remark in json.loads(path.read_text())] if path.exists() else []
