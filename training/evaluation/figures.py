"""Figures and names of metrics as the report and the card write them."""

import math

from training.evaluation.result import Estimate

SPELLED = {
    "f1_macro": "F1 (macro)",
    "f1_micro": "F1 (micro)",
    "ece": "calibration error",
    "r2": "R²",
    "chrf": "chrF",
    "bleu": "BLEU",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}


def figure(value: float) -> str:
    """A number as short as it can be read."""
    if not math.isfinite(value):
        return "–"
    places = next((places for limit, places in ((1000, 0), (100, 1), (10, 2)) if abs(value) >= limit), 3)
    return f"{value:,.{places}f}"


def signed(value: float) -> str:
    """A change."""
    return f"{'+' if value >= 0 else '−'}{figure(abs(value))}" if math.isfinite(value) else "–"


def spelled(name: str) -> str:
    """A metric as people write it."""
    return SPELLED.get(name, name.replace("_", " "))


def estimated(estimate: Estimate | None) -> str:
    """A value and its interval."""
    return "" if estimate is None else f"{figure(estimate.value)} [{figure(estimate.low)}, {figure(estimate.high)}]"


def changed(estimate: Estimate | None) -> str:
    """A change and its interval."""
    return "" if estimate is None else f"{signed(estimate.value)} [{signed(estimate.low)}, {signed(estimate.high)}]"
