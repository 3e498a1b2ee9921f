"""What the tasks of causal language models share: batches, packed or padded, and the loss at the targets alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import cross_entropy

from hone.base_model import BaseModel
from hone.errors import BaseModelError
from models.loss_head import LossHead
from models.tasks.language import LanguageTask
from models.tasks.task import IGNORED, PLAIN, Batch, Inputs, LossOptions, Sums, TokenRow, ids_of, pad


class CausalTask(LanguageTask):
    """A causal language model that predicts tokens."""

    name: ClassVar[str]
    peft_task_type: ClassVar[str | None] = "CAUSAL_LM"
    can_be_packed: ClassVar[bool] = True

    def check_base(self, base: BaseModel) -> None:
        if not base.is_decoder:
            kinds = ", ".join(base.config.get("architectures") or ["unknown"])
            raise BaseModelError(f"{base.id.name}: task {self.name} needs a causal language model, and this is {kinds}")

    def model_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def collate(self, rows: Sequence[TokenRow], *, inputs: Inputs, packed: bool) -> Batch:
        return collate(rows, pad_token_id=inputs.pad_token_id, packed=packed)

    def loss(self, model: Any, batch: Batch, options: LossOptions = PLAIN) -> tuple[torch.Tensor, Sums]:
        """Summed cross entropy over the targets, and how many of them were predicted right."""
        summed, right = token_loss(model, batch, label_smoothing=options.label_smoothing)
        return summed, {"token_accuracy": right}

    def log_probs(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return logits_at(model, batch, batch["predicted_at"]).float().log_softmax(-1), batch["row_of_target"]

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        return logits_at(model, batch, batch["last"])


def collate(rows: Sequence[TokenRow], *, pad_token_id: int, packed: bool) -> Batch:
    """Tensors of one forward pass.

    Returns:
        `input_ids`, and beside them `position_ids` and `cu_seq_lens_q` (packed: all rows in one of [1, tokens]) or `attention_mask`
        (padded on the right: [rows, length]); `targets` [targets] and `predicted_at` [targets], where in the flattened sequence the
        token before each target stands, and `row_of_target` [targets]; `last` [rows], where each row ends.
    """
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    if packed:
        ends = lengths.cumsum(0)
        starts = ends - lengths
        inputs = {
            "input_ids": torch.cat([ids_of(row) for row in rows])[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths.tolist()])[None],
            "cu_seq_lens_q": torch.cat([starts.new_zeros(1), ends]).int(),
        }
        labels = torch.cat([ids_of(row, "labels") for row in rows])
        row_of = torch.arange(len(rows)).repeat_interleave(lengths)
    else:
        inputs = pad(rows, pad_token_id)
        width = inputs["input_ids"].shape[1]
        starts = torch.arange(len(rows)) * width
        ends = starts + lengths
        labels = pad(rows, IGNORED, "labels")["labels"].flatten()
        row_of = torch.arange(len(rows)).repeat_interleave(width)
    at = (labels != IGNORED).nonzero()[:, 0]
    return {**inputs, "targets": labels[at], "predicted_at": at - 1, "row_of_target": row_of[at], "last": ends - 1}


def token_loss(model: Any, batch: Batch, *, label_smoothing: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross entropy over the targets, and how many of them were predicted right."""
    parts = split_head(model)
    if parts is None:
        logits = logits_at(model, batch, batch["predicted_at"]).float()
        summed = cross_entropy(logits, batch["targets"], reduction="sum", label_smoothing=label_smoothing)
        return summed, (logits.argmax(-1) == batch["targets"]).sum()
    hidden = parts.backbone(**inputs_of(batch), use_cache=False).last_hidden_state.flatten(0, 1)
    loss, right = LossHead.of(parts.head)(hidden[batch["predicted_at"]], batch["targets"], label_smoothing=label_smoothing)
    return loss, right


def logits_at(model: Any, batch: Batch, places: torch.Tensor) -> torch.Tensor:
    """Logits at some places of the flattened sequence: [places, vocabulary]."""
    if "cu_seq_lens_q" in batch:
        logits: torch.Tensor = model(**inputs_of(batch), use_cache=False, logits_to_keep=places).logits[0]
        return logits
    padded: torch.Tensor = model(**inputs_of(batch), **({} if learns_prompt(model) else {"use_cache": False})).logits
    return padded[:, -batch["input_ids"].shape[1] :].flatten(0, 1)[places]  # learnt vectors before the words have logits too


def inputs_of(batch: Batch) -> Batch:
    """What of a batch goes into the model."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q") if name in batch}


@dataclass(frozen=True)
class HeadAndBackbone:
    """The two parts of a causal language model."""

    backbone: Any
    head: Any


def split_head(model: Any) -> HeadAndBackbone | None:
    """The model without its head, and the head, where the head is nothing but one linear layer; else None.

    Some architectures cap or scale the logits after it (Gemma 2, Granite, Cohere). What prompt and prefix tuning learn goes in where the
    whole model is called.
    """
    if learns_prompt(model):
        return None
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    head, backbone = causal.get_output_embeddings(), causal.base_model
    config = causal.config.get_text_config()
    changed = any(getattr(config, name, None) not in (None, 1, 1.0) for name in LOGIT_SETTINGS)
    if backbone is causal or type(head) not in (torch.nn.Linear, LossHead) or changed:
        return None
    return HeadAndBackbone(backbone, head)


def take_loss_in_head(model: Any) -> None:
    """Put a `LossHead` in place of the head, where `split_head` finds one; everything else about the model stays as it is."""
    parts = split_head(model)
    if parts is not None:
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        causal.set_output_embeddings(LossHead.of(parts.head))


def learns_prompt(model: Any) -> bool:
    """Whether PEFT puts learnt vectors before the words (or into the cache) of each row."""
    config = getattr(model, "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))


LOGIT_SETTINGS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier", "mup_width_multiplier")
