"""Models that classify: rows of different adapters in one batch, each row by its own adapter's head, whose number of labels may differ;
and models that stand alone.

A causal base is read by its trunk and the adapter's `score` layer is applied there: the same decoder that chats also classifies, with no
second copy in memory. An encoder (of text, pictures or sounds) runs as the class that transformers has of it for the task, with the
modules that adapters bring (`classifier` and whatever else was trained with it) swapped row by row.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.tasks import Batch, Inputs, Task
from models.tasks.task import TokenRow
from serving.engine.lora import AdapterWeights, MixedLinear, Mixer, Rows, Segments
from serving.errors import EngineError

PROBED_ROWS = 3
"""Not 2, which is how many tokens the rows of a probe have: a layer that sees tokens first must not pass for one that sees rows first."""

Saved = Mapping[str, Mapping[str, Tensor]]
"""Module name -> its tensors by their names inside the module."""


class Heads:
    """A model that turns the rows of one task into logits."""

    pads: ClassVar[bool] = True
    """Whether texts of different lengths may share a forward pass."""

    def __init__(self, model: Any, task: Task, inputs: Inputs) -> None:
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.task = task
        self._inputs = inputs

    def collate(self, rows: Sequence[TokenRow]) -> Batch:
        """Tensors of rows, as training makes them."""
        return self.task.collate(rows, inputs=self._inputs, packed=False)

    def logits(self, batch: Batch, adapters: Rows) -> Tensor:
        """float32 [rows, labels], or [rows, tokens, labels] where tokens have classes; -inf past a row's own labels where the head of
        another row has more. Give rows sorted by adapter."""
        raise NotImplementedError

    def _placed(self, batch: Batch) -> Batch:
        """What of a batch goes into the model, where the model is and of its type."""
        kinds = {name: self.dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in batch.items()}
        return {name: tensor.to(self.device, kinds[name]) for name, tensor in batch.items() if name != "labels"}


class MixedHeads(Heads):
    """One whose linear layers are wrapped, so that every row may have an adapter of its own."""

    def build(self, saved: Saved) -> dict[str, nn.Module]:
        """The modules that an adapter brings, from their saved tensors.

        Raises:
            ValueError: the tensors are not those of the base's modules of that name, or the head is missing.
        """
        raise NotImplementedError

    def can_mix(self) -> bool:
        """Whether every layer sees a batch row by row."""
        nothing = self.task.nothing(self._inputs)
        try:
            self.logits(self.collate([nothing] * PROBED_ROWS), [None] * PROBED_ROWS)
        except EngineError:
            return False
        return True


class TrunkHeads(MixedHeads):
    """A causal trunk (`LlamaModel`) whose linear layers are wrapped by `mixer`, and a `score` layer per adapter."""

    def __init__(self, trunk: Any, mixer: Mixer, task: Task, inputs: Inputs, *, score: nn.Module | None = None) -> None:
        """`score` is the head of a base that was trained as a classifier."""
        super().__init__(trunk, task, inputs)
        self._trunk = trunk
        self._mixer = mixer
        self._score = score

    def build(self, saved: Saved) -> dict[str, nn.Module]:
        brought = next(iter(saved.values()), {})
        weight = brought.get("weight")
        hidden = self._trunk.config.get_text_config().hidden_size
        if len(saved) != 1 or set(brought) - {"weight", "bias"} or weight is None or weight.shape[1:] != (hidden,):
            names = ", ".join(saved) or "nothing"
            raise ValueError(f"a classification adapter of this base brings one layer of [labels, {hidden}]; it brings {names}")
        head = nn.Linear(hidden, len(weight), bias="bias" in brought)
        head.load_state_dict(dict(brought))
        return {"score": head.to(self.device, self.dtype).requires_grad_(False)}

    def logits(self, batch: Batch, adapters: Rows) -> Tensor:
        inputs = self._placed(batch)
        with self._mixer.running(Segments(list(adapters)), tokens=inputs["input_ids"].shape[1]):
            hidden = self._trunk(**inputs, use_cache=False).last_hidden_state
        if self.task.name == "text-classification":  # a class of the whole text, where it ends
            hidden = hidden[torch.arange(len(hidden), device=self.device), inputs["attention_mask"].sum(-1) - 1]
        return joined([self._head(adapter)(row)[None].float() for adapter, row in zip(adapters, hidden, strict=True)])

    def _head(self, adapter: AdapterWeights | None) -> nn.Module:
        head = adapter.modules.get("score") if adapter else self._score
        assert head is not None, "rows without a head are refused before they are queued"
        return head


class EncoderHeads(MixedHeads):
    """A `...For...Classification` of transformers whose linear layers are wrapped by `mixer`."""

    def __init__(self, model: Any, mixer: Mixer, task: Task, inputs: Inputs) -> None:
        super().__init__(model, task, inputs)
        self._model = model
        self._mixer = mixer

    def build(self, saved: Saved) -> dict[str, nn.Module]:
        return {name: self._build_one(name, tensors) for name, tensors in saved.items()}

    def logits(self, batch: Batch, adapters: Rows) -> Tensor:
        with self._mixer.running(Segments(list(adapters))):
            logits: Tensor = self._model(**self._placed(batch)).logits
        return logits.float()

    def _build_one(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A copy of the base's module with the adapter's tensors, the last layer as wide as they are."""
        try:
            current = self._model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"it brings a module {name!r}, which this base does not have") from None
        if not isinstance(current, RowModule):
            current = RowModule(current, name, self._mixer)
            self._model.set_submodule(name, current)
        module = _plain_copy(current.base, self._mixer)
        expected = set(module.state_dict())
        if expected != set(tensors):
            raise ValueError(f"its module {name!r} holds {', '.join(sorted(tensors))}; this base's holds {', '.join(sorted(expected))}")
        for key, tensor in tensors.items():
            parent, _, leaf = key.rpartition(".")
            setattr(module.get_submodule(parent), leaf, nn.Parameter(tensor.to(self.device, self.dtype), requires_grad=False))
        return module


class MeanHidden(Heads):
    """Not a class but a vector of each text: the mean of the trunk's last hidden states over its tokens, of length 1 as OpenAI's are."""

    def __init__(self, trunk: Any, mixer: Mixer, task: Task, inputs: Inputs) -> None:
        super().__init__(trunk, task, inputs)
        self._trunk = trunk
        self._mixer = mixer

    def logits(self, batch: Batch, adapters: Rows) -> Tensor:
        """float32 [rows, hidden size]."""
        inputs = self._placed(batch)
        with self._mixer.running(Segments(list(adapters))):
            hidden: Tensor = self._trunk(**inputs).last_hidden_state.float()
        is_text = inputs["attention_mask"][..., None].bool()
        return nn.functional.normalize(hidden.where(is_text, 0).sum(1), dim=-1)  # the sum has the mean's direction


class OwnHeads(Heads):
    """A model by itself: a copy of the base with an adapter that cannot be mixed, or a base that nothing can be mixed on."""

    pads: ClassVar[bool] = False
    """With learnt vectors before the words, models that read where a row ends off its padding token (Llama) cannot find it."""

    def __init__(self, model: Any, task: Task, inputs: Inputs) -> None:
        super().__init__(model, task, inputs)
        self._model = model

    def logits(self, batch: Batch, adapters: Rows) -> Tensor:  # noqa: ARG002 - every row has the model's own weights
        inputs = self._placed(batch)
        logits: Tensor = self._model(**inputs).logits.float()
        # Learnt vectors before the words have logits too, where tokens have classes.
        return logits[:, -inputs["input_ids"].shape[1] :] if logits.dim() == 3 else logits


class RowModule(nn.Module):
    """Stands where adapters bring a module of their own, and runs each row through its adapter's."""

    def __init__(self, base: nn.Module, name: str, mixer: Mixer) -> None:
        super().__init__()
        self.base = base
        self._name = name
        self._mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        """[rows, ...] to [rows, ..., widest of the rows' outputs], the narrower ones padded with -inf."""
        plan = self._mixer.plan
        assert isinstance(plan, Segments), "encoders run under segments"
        outs = []
        for adapter, run in plan.runs:
            own = adapter.modules.get(self._name) if adapter else None
            with self._mixer.running(Segments(plan.rows[run])):  # the base's module may hold wrapped layers, which now see these rows only
                outs.append((own or self.base)(x[run]))
        return joined(outs)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Runs of rows, each [rows, ..., outputs], as one tensor as wide as the widest, the narrower ones padded with -inf."""
    widest = max(part.shape[-1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, widest - part.shape[-1]), value=-torch.inf) for part in parts])


def _plain_copy(module: nn.Module, mixer: Mixer) -> nn.Module:
    """A copy of a module of the base as transformers made it, without the wrapped layers in it."""
    module = copy.deepcopy(module, {id(mixer): mixer})
    if isinstance(module, MixedLinear):
        return module.base
    for name, child in list(module.named_modules()):
        if isinstance(child, MixedLinear):
            module.set_submodule(name, child.base)
    return module
