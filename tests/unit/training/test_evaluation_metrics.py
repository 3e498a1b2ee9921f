"""Each metric's formula over sums agrees with the library that gives its value; intervals hold what they should."""

from typing import Any

import numpy as np
import pytest
import sklearn.metrics as known

from hone.metrics import METRICS, OF_PROBLEM, OF_TASK
from training.evaluation.baseline import constant
from training.evaluation.bootstrap import Bootstrap, interval
from training.evaluation.generate import Written, question_of
from training.evaluation.metrics import BINS, by_class, confusion, measures, reliability, written_measures
from training.evaluation.predict import Kind, Predicted, portions

RANDOM = np.random.default_rng(0)
ROWS = 200


def predicted(kind: Kind, **arrays: Any) -> Predicted:
    plain: dict[str, Any] = {
        "loss": RANDOM.random(ROWS),
        "n_targets": np.ones(ROWS, dtype=np.int64),
        "right": np.zeros(ROWS, dtype=np.int64),
        "row_of": np.arange(ROWS),
        "targets": np.empty(0),
        "answers": np.empty(0),
        "probabilities": np.empty((0, 0), dtype=np.float32),
        "likelihoods": np.empty((0, 2)),
    }
    return Predicted(kind, **{**plain, **arrays})


def one_class(classes: int = 4) -> Predicted:
    targets = RANDOM.integers(classes - 1, size=ROWS)  # the last class is never wanted, and sometimes called
    probabilities = RANDOM.dirichlet(np.ones(classes), size=ROWS) + np.eye(classes)[targets] * RANDOM.random((ROWS, 1))
    probabilities = (probabilities / probabilities.sum(-1, keepdims=True)).astype(np.float32)
    answers = probabilities.argmax(-1)
    return predicted("classes", targets=targets, answers=answers, probabilities=probabilities, right=(targets == answers).astype(np.int64))


def words() -> Predicted:
    counts = RANDOM.integers(1, 6, size=ROWS)
    row_of = np.repeat(np.arange(ROWS), counts)
    targets, answers = RANDOM.integers(3, size=len(row_of)), RANDOM.integers(3, size=len(row_of))
    right = np.bincount(row_of, weights=targets == answers).astype(np.int64)
    probabilities = RANDOM.dirichlet(np.ones(3), size=len(row_of)).astype(np.float32)
    return predicted("classes", n_targets=counts, right=right, row_of=row_of, targets=targets, answers=answers, probabilities=probabilities)


def many() -> Predicted:
    targets, answers = RANDOM.integers(2, size=(ROWS, 3)), RANDOM.integers(2, size=(ROWS, 3))
    return predicted("many", targets=targets, answers=answers, right=(targets == answers).all(-1).astype(np.int64))


def number() -> Predicted:
    targets = RANDOM.normal(1e4, 1, ROWS)
    return predicted("number", targets=targets, answers=targets + RANDOM.normal(0, 0.5, ROWS))


def pairs() -> Predicted:
    margins = RANDOM.normal(0.2, 1, ROWS)
    return predicted("pairs", answers=margins, right=(margins > 0).astype(np.int64), likelihoods=RANDOM.normal(0, 1, (ROWS, 2)))


def tokens() -> Predicted:
    counts = RANDOM.integers(1, 30, size=ROWS)
    return predicted("tokens", n_targets=counts, right=RANDOM.integers(0, counts + 1))


WRITTEN = [Written("", f"the cat {n} sat on the old mat", f"the cat {n % 7} sat on an old {'mat' * (n % 3)}") for n in range(30)]
CASES = [
    (one_class(), OF_PROBLEM["single_label_classification"]),
    (words(), OF_TASK["token-classification"]),
    (many(), OF_PROBLEM["multi_label_classification"]),
    (number(), OF_PROBLEM["regression"]),
    (pairs(), OF_TASK["preference"]),
    (tokens(), OF_TASK["chat"]),
]


@pytest.mark.parametrize(("model", "names"), CASES, ids=["one class", "words", "many classes", "number", "pairs", "tokens"])
def test_formulas_over_sums_give_the_values_of_the_libraries(model: Predicted, names: tuple[str, ...]) -> None:
    found = list(measures(model, names))
    assert [measure.name for measure in found] == [name for name in names if not METRICS[name].generates]
    for measure in found:
        assert float(measure.of_sums(measure.columns.sum(0))) == pytest.approx(measure.value, rel=1e-6), measure.name
        low, high = interval(Bootstrap(ROWS).values(measure.columns, measure.of_sums))
        assert low < measure.value < high, measure.name


def test_what_is_written_is_scored_as_sacrebleu_and_rouge_score_do() -> None:
    import sacrebleu

    found = {measure.name: measure for measure in written_measures(WRITTEN, (*OF_TASK["seq2seq"], "exact_match"))}
    answers, wanted = [each.answer for each in WRITTEN], [each.wanted for each in WRITTEN]
    assert found["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(answers, [wanted]).score)
    assert found["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(answers, [wanted]).score)
    assert found["exact_match"].value == 0
    for measure in found.values():
        assert float(measure.of_sums(measure.columns.sum(0))) == pytest.approx(measure.value, rel=1e-6)
    assert 0 < found["rouge2"].value < found["rouge1"].value < 1


def test_a_wrong_model_is_well_calibrated_if_it_knows_it() -> None:
    """Confidence 0.5 and right half of the time: no calibration error; confidence 1 and the same: one half."""
    targets, answers = np.zeros(ROWS, dtype=np.int64), np.arange(ROWS) % 2
    for sure, error in ((0.5, 0.0), (1.0, 0.5)):
        probabilities = np.full((ROWS, 2), 1 - sure, dtype=np.float32)
        probabilities[np.arange(ROWS), answers] = sure
        model = predicted("classes", targets=targets, answers=answers, probabilities=probabilities)
        [ece] = measures(model, ["ece"])
        assert ece.value == pytest.approx(error)
        [only] = reliability(model)
        assert (only.count, only.confidence, only.accuracy) == (ROWS, pytest.approx(sure), 0.5)
        assert BINS > 0


def test_the_confusion_matrix_and_the_classes_are_scikit_learns() -> None:
    model = one_class()
    assert confusion(model, 4) == known.confusion_matrix(model.targets, model.answers, labels=range(4)).tolist()
    assert [f1 for _, _, f1, _ in by_class(model, 4)] == pytest.approx(
        known.f1_score(model.targets, model.answers, labels=range(4), average=None, zero_division=0.0)
    )


@pytest.mark.parametrize(("model", "names"), CASES[:4], ids=["one class", "words", "many classes", "number"])
def test_a_constant_answer_has_metrics_too(model: Predicted, names: tuple[str, ...]) -> None:
    base, says = constant(model, list("abcd")[: model.probabilities.shape[-1]])
    assert says.startswith("always ")
    found = {measure.name: measure.value for measure in measures(base, names)}
    assert found["loss"] > 0
    if "r2" in found:
        assert found["r2"] == pytest.approx(0, abs=1e-6)
    if "ece" in found:
        assert found["ece"] == pytest.approx(0, abs=1e-6), "it answers with the shares themselves"


def test_intervals_are_those_of_the_normal_approximation_and_always_the_same() -> None:
    values = RANDOM.normal(3, 2, 400)
    columns = np.stack([values, np.ones_like(values)], -1)
    first, second = (interval(Bootstrap(400, seed=5).values(columns, lambda sums: sums[..., 0] / sums[..., 1])) for _ in range(2))
    half = 1.96 * values.std() / 20
    assert first == second
    assert first == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 5)


def test_a_paired_comparison_sees_what_two_intervals_do_not() -> None:
    """A small gain on each row, far smaller than the spread between rows."""
    before = RANDOM.normal(3, 2, ROWS)
    columns = [np.stack([each, np.ones(ROWS)], -1) for each in (before, before - 0.05)]
    drawn = [Bootstrap(ROWS).values(each, lambda sums: sums[..., 0] / sums[..., 1]) for each in columns]
    low, high = interval(drawn[1] - drawn[0])
    assert low == pytest.approx(-0.05)
    assert high == pytest.approx(-0.05)


def test_resamples_are_drawn_in_portions_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = RANDOM.random((ROWS, 1))
    whole = Bootstrap(ROWS, resamples=50).values(columns, lambda sums: sums[..., 0])
    monkeypatch.setattr("training.evaluation.bootstrap.DRAWN_AT_ONCE", 7 * ROWS)
    assert Bootstrap(ROWS, resamples=50).values(columns, lambda sums: sums[..., 0]) == pytest.approx(whole)


def test_every_row_is_in_one_portion_and_none_is_too_large() -> None:
    lengths = RANDOM.integers(1, 3000, size=100)
    made = list(portions(lengths, counts_tokens=True))
    assert sorted(np.concatenate(made).tolist()) == list(range(100))
    assert all(len(rows) == 1 or len(rows) * lengths[rows].max() <= 4096 for rows in made)


def test_a_conversation_is_asked_for_its_last_answer() -> None:
    row = {"input_ids": [1, 2, 3, 4, 5, 6, 7, 8], "labels": [-100, -100, 3, 4, -100, -100, 7, 8]}
    asked = question_of("chat", row)
    assert (asked.prompt, asked.wanted) == ([1, 2, 3, 4, 5, 6], [7, 8])
