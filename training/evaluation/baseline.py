"""What stands for the base where it cannot answer at all, as its head is new: always the same answer, the best there is."""

from dataclasses import replace

import numpy as np

from training.evaluation.predict import Predicted


def constant(predicted: Predicted, labels: list[str] | None) -> tuple[Predicted, str]:
    """The best constant answer to these rows (the commonest class, or the mean), with the shares of the classes as probabilities;
    and what it is, in words."""
    if predicted.kind == "number":
        return _mean(predicted)
    if predicted.kind == "many":
        return _common_classes(predicted)
    assert labels is not None, "classes have names"
    counts = np.bincount(predicted.targets, minlength=len(labels))
    shares, commonest = counts / counts.sum(), int(counts.argmax())
    right = (predicted.targets == commonest).astype(np.int64)
    of_decision = -np.log(shares[predicted.targets])
    made = replace(
        predicted,
        loss=np.bincount(predicted.row_of, weights=of_decision, minlength=len(predicted)) / predicted.n_targets,
        right=np.bincount(predicted.row_of, weights=right, minlength=len(predicted)).astype(np.int64),
        answers=np.full_like(predicted.targets, commonest),
        probabilities=np.broadcast_to(shares.astype(np.float32), predicted.probabilities.shape),
    )
    return made, f"always {labels[commonest]!r}, the commonest class, as the base has no head for this task"


def _common_classes(predicted: Predicted) -> tuple[Predicted, str]:
    shares = predicted.targets.mean(0)
    sure = np.clip(shares, 1e-6, 1 - 1e-6)
    answers = np.broadcast_to((shares > 0.5).astype(np.int64), predicted.targets.shape)
    made = replace(
        predicted,
        loss=-np.where(predicted.targets > 0, np.log(sure), np.log(1 - sure)).mean(-1),
        right=(answers == predicted.targets).all(-1).astype(np.int64),
        answers=answers,
        probabilities=np.broadcast_to(shares.astype(np.float32), predicted.targets.shape),
    )
    return made, "always the classes that more than half of the rows have, as the base has no head for this task"


def _mean(predicted: Predicted) -> tuple[Predicted, str]:
    mean = float(predicted.targets.mean())
    made = replace(predicted, loss=(predicted.targets - mean) ** 2, answers=np.full_like(predicted.targets, mean))
    return made, f"always {mean:.4g}, the mean, as the base has no head for this task"
