"""One model on some rows, from predictions to what is told of them."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hone.metrics import METRICS, chosen_metrics
from models.methods import METHODS
from training.batches import Rows
from training.evaluation.baseline import constant
from training.evaluation.bootstrap import Bootstrap, interval
from training.evaluation.examples import Describer
from training.evaluation.generate import Written, write
from training.evaluation.metrics import Measure, by_class, confusion, measures, reliability, written_measures
from training.evaluation.predict import Predicted, kind_of, predict, with_reference
from training.evaluation.result import Estimate, Evaluation, Example, Metric, OfClass, ReliabilityBin
from training.evaluation.watch import Watch, unwatched
from training.token_rows import TokenRows
from training.trained import Trained

EXAMPLES = 5
OF_THE_DISTANCE = ("reward_accuracy", "reward_margin")
"""Metrics that the base has no value of, being what it is measured from."""
OF_A_JUDGE = ("ece",)
"""Metrics of how sure a model is, which a constant answer is not."""


@dataclass(frozen=True)
class Options:
    """What to look at."""

    compare: bool = True
    """Whether the base is evaluated too."""
    metrics: Sequence[str] | None = None
    """By name or group; by default all that the task has."""
    rows: int | None = None
    """Rows to draw at random; by default all."""
    written_rows: int | None = None
    """Rows to write answers for; by default 50, and 100 of seq2seq."""
    written_tokens: int = 128
    """Tokens of an answer at most."""
    seed: int = 0


@dataclass(frozen=True)
class Found:
    """An evaluation, and what it is made of."""

    evaluation: Evaluation
    numbers: Rows
    """The number of each row over all rows that were read."""
    tuned: Predicted
    base: Predicted | None


def evaluate(
    trained: Trained, model: Any, rows: TokenRows, *, fresh: set[str], options: Options | None = None, watch: Watch = unwatched
) -> Found:
    """Evaluate a model, and what it is compared with.

    Args:
        trained: Where it comes from.
        model: As `trained.load` gives it, on whatever device.
        rows: On what.
        fresh: What else `trained.load` gives: the base's parameters that had to be started anew.
        options: What to look at.
        watch: Told how far it is.

    Raises:
        RecipeError: a metric that the task does not have.
    """
    options = options or Options()
    return _Evaluating(trained, model, rows, fresh, options, watch).run()


@dataclass(frozen=True)
class _Compared:
    """What stands for the base."""

    predicted: Predicted | None = None
    written: Sequence[Written] = ()
    says: str | None = None
    lacks: Sequence[str] = ()
    """Metrics that it has no value of."""


class _Evaluating:
    """One evaluation."""

    def __init__(self, trained: Trained, model: Any, rows: TokenRows, fresh: set[str], options: Options, watch: Watch) -> None:
        self._trained, self._model, self._rows, self._fresh, self._options, self._watch = trained, model, rows, fresh, options, watch
        recipe, head = trained.recipe, trained.head
        self._wanted = chosen_metrics(options.metrics, task=recipe.task, problem_type=head.problem_type)
        self._kind = kind_of(trained.task, head.problem_type)
        self._chosen = _drawn(len(rows), options.rows, options.seed)
        default = 100 if recipe.task == "seq2seq" else 50
        writes = any(METRICS[name].generates for name in self._wanted)
        most = (default if options.written_rows is None else options.written_rows) if writes else 0
        self._to_write = self._chosen[_drawn(len(self._chosen), most, options.seed)]

    def run(self) -> Found:
        trained = self._trained
        tuned, written = self._predict("tuned", self._model), self._write("tuned", self._model)
        compared = self._compared(tuned)
        base = compared.predicted
        if self._kind == "pairs" and base is not None:
            beta = trained.recipe.preference.beta
            tuned, base = with_reference(tuned, base, beta=beta), with_reference(base, base, beta=beta)
        describe = Describer(trained, self._rows, self._chosen, tuned, base, dict(zip(self._to_write.tolist(), written, strict=True)))
        evaluation = Evaluation(
            name=trained.name,
            task=trained.recipe.task,
            problem_type=trained.head.problem_type,
            rows=len(self._chosen),
            rows_there=len(self._rows),
            compared_with=compared.says,
            metrics=[*self._metrics(tuned, base, compared.lacks), *self._written_metrics(written, compared.written)],
            **self._of_classes(tuned, base),
            **_extremes(tuned, base, describe),
            written_rows=len(written),
            written=[describe.written(n, *pair) for n, pair in self._some_written(written, compared.written)],
        )
        return Found(evaluation, self._rows.numbers[self._chosen], tuned, base)

    def _compared(self, tuned: Predicted) -> _Compared:
        if not self._options.compare and self._kind != "pairs":
            return _Compared()
        trained, fresh, model = self._trained, self._fresh, self._model
        if not trained.keeps_base:
            device = next(model.parameters()).device
            model.cpu()  # there may be no room for two
            model, fresh = trained.load_base()
            model.to(device)
        if fresh:
            made, says = constant(tuned, trained.head.labels)
            return _Compared(made, says=says, lacks=OF_A_JUDGE)
        switched_off: AbstractContextManager[Any] = METHODS[trained.method].off(model) if trained.keeps_base else nullcontext()
        with switched_off:
            predicted, written = self._predict("base", model), self._write("base", model)
        return _Compared(predicted, written, trained.base_name, lacks=OF_THE_DISTANCE if self._kind == "pairs" else ())

    def _predict(self, what: str, model: Any) -> Predicted:
        trained = self._trained
        return predict(
            model,
            self._rows,
            self._chosen,
            task=trained.task,
            kind=self._kind,
            inputs=trained.inputs(),
            what=f"evaluating the {what} model",
            watch=self._watch,
        )

    def _write(self, what: str, model: Any) -> list[Written]:
        if not len(self._to_write):
            return []
        return write(
            model,
            self._rows,
            self._to_write,
            task=self._trained.recipe.task,
            tokenizer=self._trained.processor(),
            most_tokens=self._options.written_tokens,
            what=f"answers of the {what} model",
            watch=self._watch,
        )

    def _metrics(self, tuned: Predicted, base: Predicted | None, lacks: Sequence[str]) -> list[Metric]:
        names = [name for name in self._wanted if not METRICS[name].generates]
        of_base = {m.name: m for m in measures(base, [n for n in names if n not in lacks])} if base else {}
        return estimated(measures(tuned, names), of_base, Bootstrap(len(tuned), seed=self._options.seed))

    def _written_metrics(self, written: Sequence[Written], base: Sequence[Written]) -> list[Metric]:
        if not written:
            return []
        of_base = {m.name: m for m in written_measures(base, self._wanted)} if base else {}
        return estimated(written_measures(written, self._wanted), of_base, Bootstrap(len(written), seed=self._options.seed))

    def _of_classes(self, tuned: Predicted, base: Predicted | None) -> dict[str, Any]:
        labels = self._trained.head.labels
        if labels is None or self._kind not in ("classes", "many"):
            return {}
        base_f1 = [f1 for _, _, f1, _ in by_class(base, len(labels))] if base else [None] * len(labels)
        rows = zip(labels, by_class(tuned, len(labels)), base_f1, strict=True)
        classes = [OfClass(name=name, count=n, precision=p, recall=r, f1=f1, base_f1=was) for name, (p, r, f1, n), was in rows]
        if self._kind == "many":
            return {"classes": classes}
        bins = [ReliabilityBin.model_validate(each, from_attributes=True) for each in reliability(tuned)]
        return {"classes": classes, "confusion": confusion(tuned, len(labels)), "reliability": bins}

    def _some_written(self, written: Sequence[Written], base: Sequence[Written]) -> Iterable[tuple[int, tuple[Written, Written | None]]]:
        both = [(each, base[n] if base else None) for n, each in enumerate(written[:EXAMPLES])]
        return zip(self._to_write.tolist(), both, strict=False)


def best_device(*, use_gpu: bool = True) -> torch.device:
    """The GPU, if there is one to use."""
    return torch.device("cuda" if use_gpu and torch.cuda.is_available() else "cpu")


def _drawn(count: int, wanted: int | None, seed: int) -> Rows:
    """Places of so many rows of `count`, in order."""
    if wanted is None or wanted >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:wanted])


def estimated(tuned: Iterable[Measure], base: dict[str, Measure], bootstrap: Bootstrap) -> list[Metric]:
    """Metrics with their intervals, beside those of what the model is compared with."""
    made = []
    for measure in tuned:
        values, before = bootstrap.values(measure.columns, measure.of_sums), base.get(measure.name)
        if before is None:
            made.append(Metric(name=measure.name, tuned=_estimate(measure.value, values)))
            continue
        values_before = bootstrap.values(before.columns, before.of_sums)
        made.append(
            Metric(
                name=measure.name,
                tuned=_estimate(measure.value, values),
                base=_estimate(before.value, values_before),
                change=_estimate(measure.value - before.value, values - values_before),
            )
        )
    return made


def _estimate(value: float, values: Any) -> Estimate:
    low, high = interval(values)
    return Estimate(value=value, low=low, high=high)


def _extremes(tuned: Predicted, base: Predicted | None, describe: Describer) -> dict[str, list[Example]]:
    """The rows that improved most and worsened most; without a base, those that are hardest."""
    gains = base.loss - tuned.loss if base else -tuned.loss
    order = np.argsort(gains, kind="stable")
    worst = [int(n) for n in order[:EXAMPLES] if gains[n] < 0]
    best = [int(n) for n in order[::-1][:EXAMPLES] if base and gains[n] > 0]
    return {"improved": [describe(n) for n in best], "worsened": [describe(n) for n in worst]}
