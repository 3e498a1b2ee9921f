"""The metrics of a task, each with an interval. Values are those of scikit-learn, sacreBLEU and rouge-score.

An interval takes a thousand resamples, so beside its value a metric is a formula over sums over rows (training/evaluation/bootstrap.py);
tests hold that both agree.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hone.metrics import METRICS
from training.evaluation.generate import Written
from training.evaluation.predict import Predicted

Floats = npt.NDArray[np.float64]
BINS = 10
"""Of confidence, all of one width, as in https://arxiv.org/abs/1706.04599."""


@dataclass(frozen=True)
class Measure:
    """A metric of some rows."""

    name: str
    value: float
    columns: Floats
    """[rows, sums], what each row adds."""
    of_sums: Callable[[Floats], Floats]
    """[..., sums] to the metric, [...]."""


def measures(predicted: Predicted, wanted: Sequence[str]) -> Iterator[Measure]:
    """Those of the wanted metrics that need no writing, in that order."""
    for name in wanted:
        if not METRICS[name].generates:
            yield MEASURES[name](predicted)


def written_measures(written: Sequence[Written], wanted: Sequence[str]) -> Iterator[Measure]:
    """Those of the wanted metrics that are about what was written, in that order."""
    for name in wanted:
        if METRICS[name].generates:
            yield _of_written(name, written)


def confusion(predicted: Predicted, n_classes: int) -> list[list[int]]:
    """How often each class (rows) was called each class (columns)."""
    from sklearn.metrics import confusion_matrix

    made: list[list[int]] = confusion_matrix(predicted.targets, predicted.answers, labels=range(n_classes)).tolist()
    return made


def by_class(predicted: Predicted, n_classes: int) -> list[tuple[float, float, float, int]]:
    """Precision, recall, F1 and number of decisions of each class."""
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(predicted.targets, predicted.answers, labels=range(n_classes), zero_division=0.0)
    return [(float(p), float(r), float(f), int(n)) for p, r, f, n in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Bin:
    """Decisions of about one confidence."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def reliability(predicted: Predicted) -> list[Bin]:
    """How often the model is right where it is so sure; empty bins left out."""
    sums = _calibration_columns(predicted).reshape(len(predicted), 3, BINS).sum(0)
    return [
        Bin(n / BINS, (n + 1) / BINS, int(count), sure / count, right / count)
        for n, (count, sure, right) in enumerate(sums.T.tolist())
        if count
    ]


def _loss(predicted: Predicted) -> Measure:
    columns = np.stack([predicted.loss * predicted.n_targets, predicted.n_targets], -1)
    return _ratio("loss", columns)


def _perplexity(predicted: Predicted) -> Measure:
    of_loss = _loss(predicted)
    with np.errstate(over="ignore"):
        return Measure("perplexity", float(np.exp(of_loss.value)), of_loss.columns, lambda sums: np.exp(of_loss.of_sums(sums)))


def _token_accuracy(predicted: Predicted) -> Measure:
    return _ratio("token_accuracy", np.stack([predicted.right, predicted.n_targets], -1))


def _accuracy(predicted: Predicted) -> Measure:
    from sklearn.metrics import accuracy_score

    columns = np.stack([predicted.right, predicted.n_targets], -1)
    return _ratio("accuracy", columns, value=float(accuracy_score(predicted.targets, predicted.answers)))


def _f1_macro(predicted: Predicted) -> Measure:
    from sklearn.metrics import f1_score

    both, called, wanted = _counts_by_class(predicted)
    there = np.flatnonzero((called + wanted).sum(0))
    options = {} if predicted.kind == "many" else {"labels": there}
    value = f1_score(predicted.targets, predicted.answers, average="macro", zero_division=0.0, **options)
    kept = slice(None) if predicted.kind == "many" else there
    columns = np.concatenate([both[:, kept], called[:, kept] + wanted[:, kept]], -1)

    def of_sums(sums: Floats) -> Floats:
        right, all_ = np.split(sums, 2, -1)
        made: Floats = np.divide(2 * right, all_, out=np.zeros_like(right), where=all_ > 0).mean(-1)
        return made

    return Measure("f1_macro", float(value), columns, of_sums)


def _f1_micro(predicted: Predicted) -> Measure:
    from sklearn.metrics import f1_score

    value = f1_score(predicted.targets, predicted.answers, average="micro", zero_division=0.0)
    both, called, wanted = (each.sum(-1) for each in _counts_by_class(predicted))
    return _ratio("f1_micro", np.stack([2 * both, called + wanted], -1), value=float(value))


def _ece(predicted: Predicted) -> Measure:
    columns = _calibration_columns(predicted)

    def of_sums(sums: Floats) -> Floats:
        counts, sure, right = np.split(sums, 3, -1)
        made: Floats = np.abs(sure - right).sum(-1) / counts.sum(-1)
        return made

    return Measure("ece", float(of_sums(columns.sum(0))), columns, of_sums)


def _mean_absolute_error(predicted: Predicted) -> Measure:
    from sklearn.metrics import mean_absolute_error

    value = mean_absolute_error(predicted.targets, predicted.answers)
    return _mean("mean_absolute_error", np.abs(predicted.targets - predicted.answers), value=float(value))


def _root_mean_squared_error(predicted: Predicted) -> Measure:
    from sklearn.metrics import root_mean_squared_error

    squared = _mean("", (predicted.targets - predicted.answers) ** 2)
    value = float(root_mean_squared_error(predicted.targets, predicted.answers))
    return Measure("root_mean_squared_error", value, squared.columns, lambda sums: np.sqrt(squared.of_sums(sums)))


def _r2(predicted: Predicted) -> Measure:
    from sklearn.metrics import r2_score

    wanted, errors = predicted.targets, predicted.targets - predicted.answers
    value = float(r2_score(wanted, predicted.answers)) if len(wanted) > 1 else float("nan")
    from_mean = wanted - wanted.mean()  # the same variance, and no difference of two large numbers
    columns = np.stack([errors**2, from_mean, from_mean**2, np.ones_like(wanted)], -1)

    def of_sums(sums: Floats) -> Floats:
        made: Floats = 1 - sums[..., 0] / (sums[..., 2] - sums[..., 1] ** 2 / sums[..., 3])
        return made

    return Measure("r2", value, columns, of_sums)


def _reward_accuracy(predicted: Predicted) -> Measure:
    return _mean("reward_accuracy", predicted.right)


def _reward_margin(predicted: Predicted) -> Measure:
    return _mean("reward_margin", predicted.answers)


def _chosen_likelier(predicted: Predicted) -> Measure:
    return _mean("chosen_likelier", predicted.likelihoods[:, 0] > predicted.likelihoods[:, 1])


MEASURES: dict[str, Callable[[Predicted], Measure]] = {
    "loss": _loss,
    "perplexity": _perplexity,
    "token_accuracy": _token_accuracy,
    "accuracy": _accuracy,
    "f1_macro": _f1_macro,
    "f1_micro": _f1_micro,
    "ece": _ece,
    "mean_absolute_error": _mean_absolute_error,
    "root_mean_squared_error": _root_mean_squared_error,
    "r2": _r2,
    "reward_accuracy": _reward_accuracy,
    "reward_margin": _reward_margin,
    "chosen_likelier": _chosen_likelier,
}


def _of_written(name: str, written: Sequence[Written]) -> Measure:
    if name == "exact_match":
        return _mean(name, np.array([each.answer == each.wanted for each in written]))
    if name.startswith("rouge"):
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([name])
        return _mean(name, np.array([scorer.score(each.wanted, each.answer)[name].fmeasure for each in written]))
    return _of_corpus(name, written)


def _of_corpus(name: str, written: Sequence[Written]) -> Measure:
    """BLEU or chrF of all rows together. What each row adds is what sacreBLEU's own resampling sums, which it does not make public."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    scorer: Any = BLEU() if name == "bleu" else CHRF()
    answers, wanted = [each.answer for each in written], [[each.wanted for each in written]]
    columns = np.array(scorer._extract_corpus_statistics(answers, wanted), dtype=np.float64)

    def of_sums(sums: Floats) -> Floats:
        flat = sums.reshape(-1, sums.shape[-1])
        scores = np.array([scorer._compute_score_from_stats(each.astype(np.int64).tolist()).score for each in flat])
        return scores.reshape(sums.shape[:-1])

    return Measure(name, float(scorer.corpus_score(answers, wanted).score), columns, of_sums)


def _mean(name: str, values: npt.NDArray[Any], *, value: float | None = None) -> Measure:
    return _ratio(name, np.stack([values, np.ones(len(values))], -1), value=value)


def _ratio(name: str, columns: npt.NDArray[Any], *, value: float | None = None) -> Measure:
    """Of two sums."""
    columns = columns.astype(np.float64)

    def of_sums(sums: Floats) -> Floats:
        made: Floats = sums[..., 0] / sums[..., 1]
        return made

    with np.errstate(invalid="ignore"):
        return Measure(name, float(of_sums(columns.sum(0))) if value is None else value, columns, of_sums)


def _counts_by_class(predicted: Predicted) -> tuple[Floats, Floats, Floats]:
    """Of each row and class: decisions for it that are right, decisions for it, and decisions that should have been for it."""
    if predicted.kind == "many":
        wanted, called = predicted.targets.astype(np.float64), predicted.answers.astype(np.float64)
        return wanted * called, called, wanted
    n_classes = predicted.probabilities.shape[1]
    is_right = predicted.targets == predicted.answers
    return (
        _tally(predicted, predicted.targets, n_classes, is_right),
        _tally(predicted, predicted.answers, n_classes),
        _tally(predicted, predicted.targets, n_classes),
    )


def _calibration_columns(predicted: Predicted) -> Floats:
    """Of each row and bin: decisions, their confidences, and how many are right: [rows, 3 * bins]."""
    sure = predicted.probabilities.max(-1).astype(np.float64)
    bins = np.minimum((sure * BINS).astype(np.int64), BINS - 1)
    is_right = predicted.targets == predicted.answers
    return np.concatenate([_tally(predicted, bins, BINS, weights) for weights in (np.ones_like(sure), sure, is_right)], -1)


def _tally(predicted: Predicted, values: npt.NDArray[Any], size: int, weights: npt.NDArray[Any] | None = None) -> Floats:
    """Sums of weights (or counts) of each value, by row: [rows, size]."""
    sums = np.bincount(
        predicted.row_of * size + values, weights=None if weights is None else weights.astype(np.float64), minlength=len(predicted) * size
    )
    return sums.reshape(len(predicted), size).astype(np.float64)
