"""One HTML page that tells it all and needs nothing else: no script, no font and no picture from anywhere."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hone.metrics import METRICS
from hone.recipe import Recipe
from training.evaluation.figures import changed, estimated, figure, signed, spelled
from training.evaluation.plots import Plot
from training.evaluation.result import Evaluation
from training.verdict import Remark

TEMPLATE = Path(__file__).with_name("report.html")


def report(
    *,
    title: str,
    subtitle: str,
    recipe: Recipe,
    facts: Sequence[tuple[str, str]],
    evaluation: Evaluation | None = None,
    remarks: Sequence[Remark] = (),
    plots: Sequence[Plot] = (),
) -> str:
    """The page. Whatever comes from data stands in it as text."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": figure, "signed": signed, "estimate": estimated, "change": changed, "spelled": spelled}
    return environment.get_template(TEMPLATE.name).render(
        title=title,
        subtitle=subtitle,
        recipe=yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True),
        facts=[(name, value) for name, value in facts if value],
        evaluation=evaluation,
        remarks=remarks,
        plots=plots,
        meanings=METRICS,
    )
