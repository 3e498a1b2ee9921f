"""A base model from its folder to a running engine: the weights, the processor, what it can do, and the thread that owns it."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hone.base_model import BaseModel
from hone.chat import end_of_turn_ids
from hone.errors import BaseModelError
from hone.manifest import AdapterManifest
from hone.recipe.serving import EngineName
from hone.registry import Registry
from hone.tasks import TaskName
from models.tasks import TASKS, Head, Inputs, inputs_by
from models.tasks.task import ProblemType
from models.tasks.tokenizer import NO_TEMPLATE, lacks_template
from serving.engine.alone import AT_ONCE, Alone, check_steps
from serving.engine.cache import bytes_per_token
from serving.engine.capability import MOST_ROWS, CannotMixError, check_architecture, probe, room_of
from serving.engine.classifier import Asked, Classification
from serving.engine.decoder import Decoder
from serving.engine.generation import PREFILL_TOKENS, Generation
from serving.engine.heads import EncoderHeads, Heads, MeanHidden, MixedHeads, OwnHeads, TrunkHeads
from serving.engine.lora import AdapterWeights, Mixer
from serving.engine.measures import Measures
from serving.engine.row import Row, cancel
from serving.engine.streams import LoraFiles
from serving.engine.thread import ModelThread, Work
from serving.errors import EngineError
from serving.kinds import TASKS_OF, Kind, generates, is_causal, kind_of, load_processor, medium_of, own_task
from serving.tools import ToolForm, tool_form

if TYPE_CHECKING:
    from serving.contract import Loader
    from serving.disk import AdapterDisk
    from serving.memory import AdapterMemory

logger = logging.getLogger("ray.serve")

MEMORY_SHARE = 0.5
"""Part of the free memory that keys and values may grow into; the rest is for adapters, activations and everyone else."""
PREFIX_SHARE = 0.1
"""Likewise, that the keys and values of earlier prompts may."""


@dataclass(frozen=True, eq=False)
class Served:
    """The base or one adapter of it, ready to answer."""

    name: str
    """`name@version`, or the base's name."""
    digest: str
    task: TaskName
    processor: Any
    """Its tokenizer, image processor or feature extractor."""
    max_context: int
    """Tokens of one row; 0 where it reads none."""
    weights: AdapterWeights | None = None
    """What it adds to the model that all share; None is that model itself, or one of its own."""
    model: Any = None
    """What generates, where it is not the model that all share."""
    files: LoraFiles | None = None
    """Where an adapter lies, for an engine that reads it itself."""
    heads: Heads | None = None
    """What classifies; None where nothing does, or where the base has no trained head."""
    end_ids: frozenset[int] = frozenset()
    """Tokens that end an answer."""
    labels: tuple[str, ...] = ()
    """Classes in the order of the head's outputs; none where it answers a number."""
    problem_type: ProblemType | None = None

    @cached_property
    def tool_form(self) -> ToolForm:
        """How calls of tools are written, where it chats."""
        return tool_form(self.processor)


@dataclass(frozen=True, eq=False)
class Parts:
    """What a base is served by: depends on its kind."""

    max_context: int
    mixer: Mixer | None = None
    """None where every adapter gets a copy."""
    decoder: Decoder | None = None
    generation: Generation | None = None
    """Continuous batching, of decoders alone."""
    heads: Mapping[str, MixedHeads] = field(default_factory=dict)
    """By task, for those of which rows of different adapters share a batch."""
    embedding: Heads | None = None
    """What makes vectors of texts, of encoders that are mixed."""


@dataclass(frozen=True, eq=False)
class Engine:
    """The slot engine: one base model and the work that its thread does. The replica knows it as a `serving.contract.ServingEngine`."""

    base: Served
    folder: Path
    """What copies of the base are loaded from."""
    tasks: tuple[TaskName, ...]
    """What adapters of it may be for."""
    parts: Parts
    alone: Alone
    classification: Classification
    measures: Measures
    thread: ModelThread
    vocabulary: int
    """Token ids that the embedding has rows for."""
    dtype: torch.dtype
    device: torch.device

    @property
    def name(self) -> EngineName:
        return "slots"

    @property
    def generation(self) -> Generation | None:
        return self.parts.generation

    @property
    def max_context(self) -> int:
        return self.base.max_context

    @property
    def inputs(self) -> Inputs:
        return inputs_by(self.base.processor)

    @property
    def mixed_tasks(self) -> tuple[TaskName, ...]:
        """Tasks whose LoRA adapters share a batch."""
        return tuple(task for task in self.tasks if task in self.parts.heads or (is_causal(task) and self.parts.decoder))

    @property
    def max_rows(self) -> int:
        """Answers that are made at once."""
        if generates(self.base.task):
            return self.generation.max_rows if self.generation else AT_ONCE
        return self.classification.max_rows

    @property
    def running(self) -> int:
        """Answers in the making."""
        return sum(work.running for work in self._makers)

    @property
    def waiting(self) -> int:
        """Rows and inputs that wait."""
        return sum(work.waiting for work in self._makers) + self.classification.waiting

    @property
    def completed(self) -> int:
        """Answers that were made to their end, since the start."""
        return sum(work.completed for work in self._makers)

    @property
    def active_adapters(self) -> int:
        """Adapters of the answers that share a batch."""
        return self.generation.active_adapters if self.generation else 0

    @property
    def prefix_blocks(self) -> int:
        """Blocks that are kept from earlier prompts and answers."""
        return len(self.generation.prefixes) if self.generation else 0

    @property
    def embedding(self) -> Heads | None:
        return self.parts.embedding

    @property
    def keeps_copies(self) -> bool:
        return True

    @property
    def failure(self) -> EngineError | None:
        return self.thread.failure

    def add(self, served: Served, rows: Sequence[Row]) -> None:
        """Queue answers where their model makes them."""
        if served.model is not None:
            self.thread.call(lambda: self.alone.add(served.model, rows))
            return
        generation = self.generation
        assert generation is not None, "what generates on a shared model is mixed on a decoder"
        self.thread.call(lambda: generation.add(rows))

    def cancel(self, rows: Sequence[Row]) -> None:
        cancel(rows)

    def ask(self, asked: Sequence[Asked]) -> None:
        self.thread.call(lambda: self.classification.add(asked))

    def loader(self, registry: Registry, *, memory: "AdapterMemory", disk: "AdapterDisk | None") -> "Loader":
        from serving.loading import AdapterLoader  # which knows this module

        return AdapterLoader(registry, self, memory=memory, disk=disk)

    def stop(self) -> None:
        self.thread.stop()

    @property
    def _makers(self) -> list[Alone | Generation]:
        return [self.alone, self.generation] if self.generation else [self.alone]

    def mixes(self, manifest: AdapterManifest) -> bool:
        """Whether the adapter shares a batch with others, or gets a copy of the base."""
        return manifest.served == "mixed" and manifest.task in self.mixed_tasks


def load_engine(
    base: BaseModel,
    *,
    published: AdapterManifest | None = None,
    max_rows: int | None,
    max_context: int | None,
    prefill_tokens: int = PREFILL_TOKENS,
    prefix_tokens: int | None = None,
) -> Engine:
    """Load a base and start its thread.

    Args:
        base: Where it is.
        published: What it was published as, where it is a whole model of the registry.
        max_rows: Rows that run at once; None is as many as are worth it and have the whole context.
        max_context: Tokens of one row; None is as many as the base and the memory allow.
        prefill_tokens: Prompt tokens that are read in one step.
        prefix_tokens: Tokens of earlier prompts and answers that are kept; None is as many as the memory allows.

    Raises:
        BaseModelError: the base cannot be loaded, or this engine cannot serve its architecture.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    kind = kind_of(base)
    task = own_task(base, kind, published)
    model, has_head = _load_model(base, task, device, dtype)
    processor = load_processor(task, base.folder)
    measures = Measures()
    asked = max_context or base.max_context
    if kind == "decoder":
        if lacks_template(base.folder):
            logger.info("%s: %s", base.id.name, NO_TEMPLATE)
        make = partial(Generation, prefill_tokens=prefill_tokens, measures=measures)
        try:
            parts, max_rows = _decoder_parts(
                base, model, inputs_by(processor), make, max_rows=max_rows, max_context=max_context, prefix_tokens=prefix_tokens
            )
        except CannotMixError as error:
            logger.warning("%s: its answers take turns, and each adapter gets a copy of it", error.message)
            check_steps(model, device)
            parts = Parts(_context_alone(base, model, max_context))
    elif kind == "encoder-decoder":
        parts = Parts(min(base.max_context, asked))
    else:
        reads = medium_of(task) == "text"
        context = min(_positions(model, base), processor.model_max_length, asked) if reads else 0
        parts = _encoder_parts(base, kind, task, model, inputs_by(processor), context=context)
    served = Served(
        name=str(published.ref) if published else base.id.name,
        digest=base.id.fingerprint,
        task=task,
        processor=processor,
        max_context=parts.max_context,
        model=model if generates(task) and parts.generation is None else None,
        heads=(parts.heads.get(task) or OwnHeads(model, TASKS[task], inputs_by(processor))) if has_head else None,
        end_ids=end_ids(task, processor, model),
        **(_own_answers(model, published) if has_head else {}),
    )
    rows = max_rows or MOST_ROWS  # of classification too
    classification, alone = Classification(max_rows=rows, measures=measures), Alone(device, measures)
    works: list[Work] = [*([parts.generation] if parts.generation else []), classification, alone]
    vocabulary = model.get_input_embeddings().num_embeddings if medium_of(task) == "text" else 0
    thread = ModelThread(works)
    engine = Engine(served, base.folder, TASKS_OF[kind], parts, alone, classification, measures, thread, vocabulary, dtype, device)
    logger.info("serving %s on %s in %s: %d rows of up to %d tokens", served.name, device, dtype, engine.max_rows, engine.max_context)
    return engine


def end_ids(task: TaskName, processor: Any, model: Any) -> frozenset[int]:
    """What ends an answer: of a conversation the end of the turn, else the end of the text."""
    if not generates(task):
        return frozenset()
    if is_causal(task) and task != "completion":
        return frozenset(end_of_turn_ids(processor))
    own = model.generation_config.eos_token_id if task == "seq2seq" else None
    known = [processor.eos_token_id, *(own if isinstance(own, list) else [own])]
    return frozenset(token for token in known if token is not None)


def _load_model(base: BaseModel, task: TaskName, device: torch.device, dtype: torch.dtype) -> tuple[Any, bool]:
    """The model, and whether it has a trained classification head of its own."""
    kind = TASKS[task].model_class()
    try:
        model, info = kind.from_pretrained(base.folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True)
    except (ValueError, OSError) as error:
        raise BaseModelError(f"{base.id.name}: cannot be loaded as {kind.__name__} ({str(error).splitlines()[0]})") from None
    missing = sorted(info["missing_keys"])
    if generates(task) and missing:
        raise BaseModelError(f"{base.id.name}: its weights lack {missing[0]} and {len(missing) - 1} more; the folder is incomplete")
    return model.to(device).eval().requires_grad_(False), not generates(task) and not missing


def _context_alone(base: BaseModel, model: Any, max_context: int | None) -> int:
    """Tokens of one answer where answers take turns, whose keys and values are not bounded together.

    Raises:
        BaseModelError: it cannot be served at the context that was asked for.
    """
    if max_context is not None and max_context > base.max_context:
        raise BaseModelError(f"max_context {max_context} is past what {base.id.name} reaches: {base.max_context}")
    with torch.inference_mode():
        cache = model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=True).past_key_values
    room = int(free_memory(model.device) * MEMORY_SHARE) // bytes_per_token(cache) // AT_ONCE
    return max_context or max(1, min(base.max_context, room))


def _decoder_parts(
    base: BaseModel,
    model: Any,
    inputs: Inputs,
    make: Callable[..., Generation],
    *,
    max_rows: int | None,
    max_context: int | None,
    prefix_tokens: int | None,
) -> tuple[Parts, int]:
    """A causal language model generates, and its trunk reads what is to be classified; with the rows that it has at once.

    Raises:
        CannotMixError: its rows cannot share a batch.
        BaseModelError: it cannot be served at the context that was asked for.
    """
    memory = free_memory(model.device)
    check_architecture(model)
    mixer = Mixer(model)
    decoder = Decoder(model, mixer)
    token_bytes = probe(decoder)
    rows, context = room_of(
        decoder,
        token_bytes=token_bytes,
        positions=base.max_context,
        max_context=max_context,
        max_rows=max_rows,
        memory_bytes=int(memory * MEMORY_SHARE),
    )
    kept = int(memory * PREFIX_SHARE) // token_bytes if prefix_tokens is None else prefix_tokens
    generation = make(decoder, max_rows=rows, max_context=context, prefix_tokens=kept)
    return Parts(context, mixer, decoder, generation, _trunk_heads(model.base_model, mixer, inputs)), rows


def _encoder_parts(base: BaseModel, kind: Kind, task: TaskName, model: Any, inputs: Inputs, *, context: int) -> Parts:
    """An encoder classifies, for each task with a class of its own whose trunk is the one that all share."""
    score = getattr(model, "score", None)
    if isinstance(score, torch.nn.Module):  # a causal language model that was trained whole as a classifier
        mixer = Mixer(model)
        return Parts(context, mixer, heads=_trunk_heads(model.base_model, mixer, inputs, own={task: score}))
    models = {task: model} | {other: found for other in TASKS_OF[kind] if other != task and (found := _sharing(base, other, model, inputs))}
    mixer = Mixer(model)
    mixed: dict[str, MixedHeads] = {}
    for name, each in models.items():
        mixer.wrap(each)
        heads = EncoderHeads(each, mixer, TASKS[name], inputs)
        with torch.inference_mode():
            mixed |= {name: heads} if heads.can_mix() else {}
    if not mixed:
        logger.info("%s does not compute row by row, so each adapter of it gets a copy", type(model).__name__)
    embeds = kind == "encoder" and task in mixed
    embedding = MeanHidden(model.base_model, mixer, TASKS["text-classification"], inputs) if embeds else None
    return Parts(context, mixer, heads=mixed, embedding=embedding)


def _trunk_heads(trunk: Any, mixer: Mixer, inputs: Inputs, *, own: Mapping[str, Any] | None = None) -> dict[str, MixedHeads]:
    tasks = ("text-classification", "token-classification")
    return {task: TrunkHeads(trunk, mixer, TASKS[task], inputs, score=(own or {}).get(task)) for task in tasks}


def _sharing(base: BaseModel, task: TaskName, model: Any, inputs: Inputs) -> Any:
    """The base as another task has it, on the trunk of `model`; None where transformers has no class for that, or that trunk lacks a part
    (BERT's pooler)."""
    try:
        other, _ = TASKS[task].load_model(base.folder, head=Head(["0", "1"]), dtype=model.dtype, pad_token_id=inputs.pad_token_id)
    except ValueError:
        return None
    ours, theirs = (dict(each.base_model.named_parameters()) for each in (model, other))
    if model.base_model is model or not theirs.keys() <= ours.keys():
        return None
    setattr(other, other.base_model_prefix, model.base_model)
    return other.to(model.device).eval().requires_grad_(False)


def _own_answers(model: Any, published: AdapterManifest | None) -> dict[str, Any]:
    """Labels and problem type of the base's own head: the manifest's, else the configuration's."""
    if published:
        return {"labels": tuple(published.labels or ()), "problem_type": published.problem_type}
    labels = tuple(str(label) for _, label in sorted(model.config.id2label.items()))
    # As transformers takes it: one output is a number.
    problem = model.config.problem_type or ("regression" if len(labels) == 1 else None)
    return {"labels": () if problem == "regression" else labels, "problem_type": problem}


def _positions(model: Any, base: BaseModel) -> int:
    """Tokens that an encoder's position table holds; RoBERTa's begins after its padding index."""
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if isinstance(table, torch.nn.Embedding):
        return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    return base.max_context


def free_memory(device: torch.device) -> int:
    """Bytes that nobody uses."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(free)
