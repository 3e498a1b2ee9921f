"""What the tasks that name classes (or a number) share: the head, the loss and what is right."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, logsigmoid

from hone.data.formats import Row
from hone.errors import DataError
from models.tasks.task import IGNORED, PLAIN, Batch, Head, LossOptions, ProblemType, Sums, TokenRow

HEADS = ("pre_classifier", "projector", "classifier", "score", "classification_head")
"""What transformers calls the parts of a classification head, whatever the architecture."""
PROBLEMS: dict[str, ProblemType] = {
    "label": "single_label_classification",
    "classes": "multi_label_classification",
    "number": "regression",
}
SPELLED = {"label": "'label' (one class)", "classes": "'labels' (any number of classes)", "number": "'number'"}
NOT_MODEL_INPUTS = ("labels",)


class ClassificationTask:
    """A row has one class, any number of classes, or a number; all rows of a data set the same."""

    name: ClassVar[str]
    peft_task_type: ClassVar[str | None] = None
    can_be_packed: ClassVar[bool] = False

    def model_class(self) -> Any:
        raise NotImplementedError

    def find_head(self, counted: Mapping[str, int], answers: set[str]) -> Head:
        if len(answers) > 1:
            raise DataError(f"some rows have {' and others '.join(SPELLED[name] for name in sorted(answers))}; all rows need the same")
        problem = PROBLEMS[next(iter(answers))]
        if problem == "regression":
            return Head(None, problem)
        if problem == "single_label_classification" and len(counted) < 2:
            raise DataError(f"the training rows name only one class, {next(iter(counted), None)!r}; a classifier needs at least two")
        if not counted:
            raise DataError("the training rows name no class at all")
        return Head(sorted(counted), problem)

    def load_model(
        self, folder: Path, *, head: Head, dtype: torch.dtype, pad_token_id: int, options: dict[str, Any] | None = None
    ) -> tuple[Any, set[str]]:
        names = dict(enumerate(head.labels or ["value"]))
        with _without_load_report():
            model, info = self.model_class().from_pretrained(
                folder,
                num_labels=len(names),
                id2label=names,
                label2id={name: n for n, name in names.items()},
                dtype=dtype,
                ignore_mismatched_sizes=True,  # a base that carries another task's head gets a new one
                use_safetensors=True,
                output_loading_info=True,
                **(options or {}),
            )
        model.config.pad_token_id = pad_token_id
        model.config.problem_type = head.problem_type
        fresh = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        return model, fresh if _answers_alike(folder, head) else fresh | self._head_parameters(model)

    def head_modules(self, model: Any, fresh: Collection[str] = ()) -> list[str]:
        heads = [name for name, _ in model.named_children() if name in HEADS]
        parents = {name.rpartition(".")[0] for name in fresh if name.split(".", 1)[0] not in heads}
        # A pooler that the folder lacks; not a whole encoder of which one vector is missing.
        others = [name for name in sorted(parents) if name and _is_fresh(model, name, fresh)]
        return [*heads, *others]

    def _head_parameters(self, model: Any) -> set[str]:
        return {name for name, _ in model.named_parameters() if name.split(".", 1)[0] in HEADS}

    def loss(self, model: Any, batch: Batch, options: LossOptions = PLAIN) -> tuple[torch.Tensor, Sums]:
        """Summed over the rows: cross entropy; the mean binary cross entropy of the classes; or the squared error."""
        logits = self.outputs(model, batch).float()
        labels = _like_answers(batch["labels"], logits, model)
        if labels.dtype == torch.int64:
            known = labels >= 0
            summed = cross_entropy(logits, labels, reduction="sum", label_smoothing=options.label_smoothing)
            return summed, {"accuracy": (logits.argmax(-1) == labels)[known].sum()}
        known = ~labels.isnan()
        wanted = labels.nan_to_num()
        if is_regression(model):
            errors = torch.where(known, logits - wanted, 0.0)
            return errors.square().sum(), {"mean_absolute_error": errors.detach().abs().sum()}
        smoothed = wanted * (1 - options.label_smoothing) + options.label_smoothing / 2
        each = binary_cross_entropy_with_logits(logits, smoothed, reduction="none")
        right = ((logits > 0) == (wanted > 0.5)) & known
        return torch.where(known, each, 0.0).mean(-1).sum(), {"accuracy": right.float().mean(-1).sum()}

    def log_probs(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if is_regression(model):
            raise DataError(f"task {self.name} with numbers has no probabilities to compare with the base's; leave guard.kl_penalty out")
        logits = self.outputs(model, batch).float()
        labels = _like_answers(batch["labels"], logits, model)
        is_single = labels.dtype == torch.int64
        known = labels >= 0 if is_single else ~labels.isnan().any(-1)
        logits, rows = logits[known], torch.arange(len(logits), device=logits.device)[known]
        if is_single:
            return logits.log_softmax(-1), rows
        both = torch.stack([logsigmoid(logits), logsigmoid(-logits)], -1)
        return both.flatten(0, 1), rows.repeat_interleave(logits.shape[1])

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        inputs = {name: value for name, value in batch.items() if name not in NOT_MODEL_INPUTS}
        logits: torch.Tensor = model(**inputs).logits
        return logits


def _answers_alike(folder: Path, head: Head) -> bool:
    """Whether the base's own head, if it has one, answers the same: as many outputs may mean other classes."""
    config = json.loads((folder / "config.json").read_text())
    names = config.get("id2label")
    known = [names[key] for key in sorted(names, key=int)] if names else None
    return known == (head.labels or ["value"]) and config.get("problem_type") in (None, head.problem_type)


@contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers tells at length which weights are new, and that is what a new head is."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _is_fresh(model: Any, module: str, fresh: Collection[str]) -> bool:
    return all(f"{module}.{name}" in fresh for name, _ in model.get_submodule(module).named_parameters())


def _like_answers(labels: torch.Tensor, logits: torch.Tensor, model: Any) -> torch.Tensor:
    """Labels of the kind that the head answers with: a batch in which nothing counts does not say which kind that is."""
    is_single = model.config.problem_type == "single_label_classification"
    return labels if is_single or labels.dtype != torch.int64 else torch.full_like(logits, torch.nan)


def is_regression(model: Any) -> bool:
    """Whether the head answers with a number."""
    return bool(model.config.problem_type == "regression")


def no_answer(row: TokenRow) -> TokenRow:
    """A row whose answer counts for nothing, whatever the problem."""
    return {**row, "labels": None}


def labels_of(rows: Sequence[TokenRow]) -> torch.Tensor:
    """[rows] int64 classes, -100 where there is none; or float32 [rows, classes] or [rows, 1], NaN where there is nothing."""
    known = [np.asarray(row["labels"]) for row in rows if row["labels"] is not None]
    if not known:
        return torch.full((len(rows),), IGNORED)
    first = known[0]
    if np.issubdtype(first.dtype, np.integer):
        return torch.tensor([IGNORED if row["labels"] is None else int(row["labels"][0]) for row in rows])
    empty = np.full(len(first), np.nan, dtype=np.float32)
    return torch.from_numpy(np.stack([empty if row["labels"] is None else np.asarray(row["labels"], dtype=np.float32) for row in rows]))


def answer_of(row: Row) -> dict[str, Any]:
    """The fields of Encoded that hold what a row is to be answered with."""
    if "number" in row:
        return {"number": float(row["number"])}
    return {"classes": tuple(row["labels"])} if "labels" in row else {"label": row["label"]}
