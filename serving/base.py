"""A base model from its folder to a running engine: the weights, the tokenizer, what it can do, and the thread that owns it."""

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch

from hone.base_model import BaseModel
from hone.chat import end_of_turn_ids, ensure_template
from hone.errors import BaseModelError
from serving.engine.capability import context_of, probe
from serving.engine.classifier import Classification, EncoderHeads, Heads, LastTokenHeads
from serving.engine.decoder import Decoder
from serving.engine.generation import Generation
from serving.engine.lora import AdapterWeights, Mixer
from serving.engine.thread import ModelThread, Work

logger = logging.getLogger("ray.serve")

MEMORY_SHARE = 0.5
"""Part of the free memory that keys and values may grow into; the rest is for adapters, activations and everyone else."""


@dataclass(frozen=True, eq=False)
class Served:
    """The base or one adapter of it, ready to answer."""

    name: str
    """`name@version`, or the base's name."""
    digest: str
    task: str
    weights: AdapterWeights | None
    """None is the base alone."""
    tokenizer: Any
    end_ids: frozenset[int] = frozenset()
    """Tokens that end an answer (chat)."""
    labels: tuple[str, ...] = ()
    """Classes in the order of the head's outputs; empty where there is no trained head."""


@dataclass(frozen=True, eq=False)
class Engine:
    """One base model and the work that its thread does."""

    base: Served
    mixer: Mixer
    decoder: Decoder | None
    """None where the base is an encoder."""
    generation: Generation | None
    classification: Classification
    thread: ModelThread
    max_context: int
    vocabulary: int
    """Token ids that the embedding has rows for."""
    dtype: torch.dtype
    device: torch.device


def load_tokenizer(folder: Any) -> Any:
    """The tokenizer of a folder; it is used by several threads, so it must not hold truncation or padding to be switched off later."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer("warm-up: drops the truncation and padding that were saved with it")
    return tokenizer


def load_engine(base: BaseModel, *, name: str, labels: list[str] | None, max_rows: int, max_context: int | None) -> Engine:
    """Load a base and start its thread.

    Args:
        base: Where it is.
        name: What answers call it.
        labels: Class names of its own head, where a manifest gives them; else its configuration's are used.
        max_rows: Rows that run at once.
        max_context: Tokens of one row; None is as many as the base and the memory allow.

    Raises:
        BaseModelError: the base cannot be loaded, or this engine cannot serve its architecture.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    model, has_head = _load_model(base, device, dtype)
    tokenizer = load_tokenizer(base.folder)
    mixer = Mixer(model)
    decoder, generation = None, None
    if base.is_decoder:
        context = context_of(model, positions=base.max_context, asked=max_context, rows=max_rows, memory_bytes=_free_memory(device))
        decoder = Decoder(model, mixer)
        with torch.inference_mode():
            probe(decoder)
        generation = Generation(decoder, max_rows=max_rows, max_context=context)
        heads: Heads = LastTokenHeads(model.base_model, mixer)
    else:
        context = min(_positions(model, base), tokenizer.model_max_length, max_context or base.max_context)
        is_causal = isinstance(getattr(model, "score", None), torch.nn.Module)
        heads = LastTokenHeads(model.base_model, mixer, score=model.score) if is_causal else EncoderHeads(model, mixer)
    classification = Classification(heads, max_rows=max_rows)
    own = tuple(labels or (str(label) for _, label in sorted(model.config.id2label.items()))) if has_head else ()
    served = Served(
        name=name,
        digest=base.id.fingerprint,
        task="chat" if base.is_decoder else "text-classification",
        weights=None,
        tokenizer=tokenizer,
        end_ids=end_ids(tokenizer) if base.is_decoder else frozenset(),
        labels=own,
    )
    works: list[Work] = [*([generation] if generation else []), classification]
    logger.info("serving %s on %s in %s: %d rows of up to %d tokens", name, device, dtype, max_rows, context)
    vocabulary = model.get_input_embeddings().num_embeddings
    return Engine(served, mixer, decoder, generation, classification, ModelThread(works), context, vocabulary, dtype, device)


def end_ids(tokenizer: Any) -> frozenset[int]:
    """Give a chat tokenizer its template where it has none, and find what ends an answer."""
    if ensure_template(tokenizer):
        logger.info("%s has no chat template, so ChatML is used", tokenizer.name_or_path)
    return frozenset(end_of_turn_ids(tokenizer))


def _load_model(base: BaseModel, device: torch.device, dtype: torch.dtype) -> tuple[Any, bool]:
    """The model, and whether it has a trained classification head of its own."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForCausalLM if base.is_decoder else AutoModelForSequenceClassification
    try:
        model, info = kind.from_pretrained(base.folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True)
    except (ValueError, OSError) as error:
        raise BaseModelError(f"{base.id.name}: cannot be loaded as {kind.__name__} ({str(error).splitlines()[0]})") from None
    missing = sorted(info["missing_keys"])
    if base.is_decoder and missing:
        raise BaseModelError(f"{base.id.name}: its weights lack {missing[0]} and {len(missing) - 1} more; the folder is incomplete")
    return model.to(device).eval().requires_grad_(False), not base.is_decoder and not missing


def _positions(model: Any, base: BaseModel) -> int:
    """Tokens that an encoder's position table holds; RoBERTa's begins after its padding index."""
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if isinstance(table, torch.nn.Embedding):
        return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    return base.max_context


def _free_memory(device: torch.device) -> int:
    """Bytes that keys and values may grow into."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(free * MEMORY_SHARE)
