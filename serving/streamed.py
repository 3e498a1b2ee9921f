"""A base model behind an engine that gives tokens as they come: what the replica asks of it, and adapters on their way there.

The engine reads adapters from their folders itself. Before it does, their digests, settings, names and shapes are checked as for the slot
engine; and afterwards it has to give the recorded outputs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from hone.base_model import BaseModel
from hone.errors import BaseModelError
from hone.manifest import AdapterManifest
from hone.recipe.serving import EngineName
from hone.registry import Registry
from serving.base import Served, end_ids
from serving.copies import ONE_AT_A_TIME
from serving.disk import AdapterDisk
from serving.engine.capability import tolerance
from serving.engine.classifier import Asked
from serving.engine.measures import Measures
from serving.engine.row import Row
from serving.engine.streams import LoraFiles, Streams
from serving.errors import EngineError
from serving.kinds import TASKS_OF, generates, kind_of, load_processor, own_task
from serving.loading import read_config, split_weights
from serving.memory import AdapterMemory
from serving.proof import recorded_prompts, refuse_different
from serving.published import CONFIG_FILE, WEIGHTS_FILE, PublishedFiles, read_tensors

COMPARED = 64
"""Tokens whose log probabilities are compared with the recorded ones: so many of the likeliest, and as many across the vocabulary."""


class StreamedEngine:
    """Satisfies `serving.contract.ServingEngine` with a `TokenSource`."""

    keeps_copies = False
    embedding = None
    prefix_blocks = 0

    def __init__(
        self,
        base: BaseModel,
        streams: Streams,
        *,
        name: EngineName,
        max_lora_rank: int,
        published: AdapterManifest | None = None,
    ) -> None:
        """
        Args:
            base: What the source has loaded.
            streams: The source, started.
            name: What the engine is called.
            max_lora_rank: The largest rank that it takes.
            published: What the base was published as, where it is a whole model of the registry.
        """
        self.name: EngineName = name
        self.dtype = streams.source.dtype
        self.max_lora_rank = max_lora_rank
        self.streams = streams
        self.tasks = self.mixed_tasks = tuple(task for task in TASKS_OF["decoder"] if generates(task))
        task = own_task(base, "decoder", published)
        processor = load_processor(task, base.folder)
        self.base = Served(
            name=str(published.ref) if published else base.id.name,
            digest=base.id.fingerprint,
            task=task,
            processor=processor,
            max_context=streams.source.max_context,
            end_ids=end_ids(task, processor, None),
        )
        self.shapes, self.vocabulary = layers_of(base.folder)

    @property
    def max_context(self) -> int:
        return self.base.max_context

    @property
    def measures(self) -> Measures:
        return self.streams.measures

    @property
    def max_rows(self) -> int:
        return self.streams.max_rows

    @property
    def running(self) -> int:
        return self.streams.running

    @property
    def waiting(self) -> int:
        return self.streams.waiting

    @property
    def completed(self) -> int:
        return self.streams.completed

    @property
    def active_adapters(self) -> int:
        return self.streams.active_adapters

    @property
    def failure(self) -> EngineError | None:
        return self.streams.failure

    def mixes(self, manifest: AdapterManifest) -> bool:
        return manifest.served == "mixed" and manifest.task in self.mixed_tasks

    def add(self, served: Served, rows: Sequence[Row]) -> None:
        self.streams.add(rows, served.files)

    def cancel(self, rows: Sequence[Row]) -> None:
        self.streams.cancel(rows)

    def ask(self, asked: Sequence[Asked]) -> None:
        raise AssertionError(f"{len(asked)} inputs to classify, and nothing served here has heads")

    def loader(self, registry: Registry, *, memory: AdapterMemory, disk: AdapterDisk | None) -> "StreamedLoader":  # noqa: ARG002
        return StreamedLoader(registry, self, disk=disk)

    def stop(self) -> None:
        self.streams.stop()


class StreamedLoader:
    """Brings adapters to the source. Thread safe."""

    def __init__(self, registry: Registry, engine: StreamedEngine, *, disk: AdapterDisk | None = None) -> None:
        self._engine = engine
        self._published = PublishedFiles(registry, engine.base, disk=disk)

    def load(self, manifest: AdapterManifest) -> Served:
        """See `Loader.load`."""
        loaded: list[LoraFiles] = []

        def made(folder: Path) -> Served:
            files = self._checked(folder, manifest)
            self._engine.streams.load(files)
            loaded.append(files)
            return self._published.served(folder, manifest, files=files)

        try:
            return self._published.read(manifest, made, self._prove)
        except Exception:
            for files in loaded:
                self._engine.streams.unload(files)
            raise

    def unload(self, served: Served) -> None:
        """See `Loader.unload`."""
        assert served.files is not None, "what was loaded here has files"
        self._engine.streams.unload(served.files)

    def _checked(self, folder: Path, manifest: AdapterManifest) -> LoraFiles:
        """Refuse what the engine would refuse, and what it would compute otherwise than PEFT.

        Raises:
            ValueError: either.
        """
        engine = self._engine
        config = read_config(folder / CONFIG_FILE)
        patterned = next((key for key in ("rank_pattern", "alpha_pattern") if config.get(key)), None)
        if patterned:
            raise ValueError(f"it was trained with {patterned}, and engine {engine.name} takes one rank and one lora_alpha for all layers")
        state = read_tensors(folder, WEIGHTS_FILE, manifest)
        layers, saved = split_weights(state, config, engine.shapes, device=torch.device("cpu"), dtype=engine.dtype)
        if saved:
            raise ValueError(f"it brings whole modules ({', '.join(saved)}), and adapters for {manifest.task} are LoRA matrices alone")
        rank = max(len(a) for a, _ in layers.values())
        if rank > engine.max_lora_rank:
            raise ValueError(f"its rank is {rank}, and this server takes up to {engine.max_lora_rank}; raise vllm.max_lora_rank")
        return LoraFiles(str(manifest.ref), manifest.digest, folder, rank)

    def _prove(self, served: Served, golden: Mapping[str, Tensor]) -> None:
        """Compare the log probabilities of what comes after the recorded prompts."""
        engine = self._engine
        batch = {name: tensor for name, tensor in golden.items() if name != "logits"}
        for prompt, logits in zip(recorded_prompts(served.task, batch), golden["logits"].float(), strict=True):
            tokens = compared_tokens(logits)
            wanted = logits.log_softmax(-1)[tokens]
            got = torch.tensor(engine.streams.logprobs(prompt, tokens, served.files))
            refuse_different(served.name, float((got - wanted).norm() / wanted.norm()), tolerance(engine.dtype))


def compared_tokens(logits: Tensor) -> list[int]:
    """Which tokens' log probabilities are compared with recorded logits [vocabulary]."""
    likeliest = logits.topk(min(COMPARED, len(logits))).indices.tolist()
    across = torch.linspace(0, len(logits) - 1, COMPARED).long().tolist()
    return list(dict.fromkeys([*likeliest, *across]))


def check_decoder(base: BaseModel, published: AdapterManifest | None, engine: EngineName) -> None:
    """Refuse a base that does not go on with a text.

    Raises:
        BaseModelError: it does something else.
    """
    kind = kind_of(base)
    task = own_task(base, kind, published)
    if kind != "decoder" or not generates(task):
        raise BaseModelError(f"{base.id.name}: is for {task}, and engine {engine} serves causal language models alone; take --engine slots")


def layers_of(folder: Path) -> tuple[dict[str, tuple[int, int]], int]:
    """Module name -> (inputs, outputs) of a base's linear layers, and how many token ids it knows; without its weights."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with ONE_AT_A_TIME, torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            shapes[name] = module.in_features, module.out_features
        elif type(module) is Conv1D:
            shapes[name] = module.nx, module.nf
    return shapes, model.get_input_embeddings().num_embeddings
