"""Classification of rows of different adapters in one batch, each row by its own adapter's head, whose number of labels may differ.

A causal base is read up to each row's last token and the adapter's `score` layer is applied there: the same decoder that chats also
classifies, with no second copy in memory. An encoder runs as the `...ForSequenceClassification` that transformers has for it, with the
modules that adapters bring (`classifier` and whatever else was trained with it) swapped row by row.
"""

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from serving.engine.lora import AdapterWeights, MixedLinear, Mixer, Rows, Segments
from serving.errors import EngineError

BATCH_TOKENS = 4096
"""Tokens, padding included, of one forward pass; a longer text is read alone."""
SCORE = "score"
"""What transformers calls the head of a causal model that classifies."""

Saved = Mapping[str, Mapping[str, Tensor]]
"""Module name -> its tensors by their names inside the module."""


class Heads(Protocol):
    """A model that turns texts into logits through each row's own head."""

    device: torch.device

    def build(self, saved: Saved) -> dict[str, nn.Module]:
        """The modules that an adapter brings, from their saved tensors.

        Raises:
            ValueError: the tensors are not those of the base's modules of that name, or the head is missing.
        """
        ...

    def logits(self, texts: Sequence[Sequence[int]], rows: Rows) -> list[Tensor]:
        """Per row, float32 [labels of its head], and -inf past those where another row's head has more. Give rows sorted by adapter."""
        ...


class LastTokenHeads:
    """A causal trunk (`LlamaModel`) whose linear layers are wrapped by `mixer`, and a `score` layer per adapter."""

    def __init__(self, trunk: Any, mixer: Mixer, *, score: nn.Module | None = None) -> None:
        """`score` is the head of a base that was trained as a classifier."""
        self.device: torch.device = trunk.device
        self._trunk = trunk
        self._mixer = mixer
        self._score = score
        self._pad = _pad_id(trunk)

    def build(self, saved: Saved) -> dict[str, nn.Module]:
        tensors = saved.get(SCORE, {})
        weight = tensors.get("weight")
        hidden = self._trunk.config.get_text_config().hidden_size
        if set(saved) != {SCORE} or set(tensors) - {"weight", "bias"} or weight is None or weight.shape[1:] != (hidden,):
            brought = ", ".join(saved) or "nothing"
            raise ValueError(f"a classification adapter of this base brings {SCORE}.weight [labels, {hidden}]; it brings {brought}")
        head = nn.Linear(hidden, len(weight), bias="bias" in tensors)
        head.load_state_dict(dict(tensors))
        return {SCORE: head.to(self.device, self._trunk.dtype).requires_grad_(False)}

    def logits(self, texts: Sequence[Sequence[int]], rows: Rows) -> list[Tensor]:
        ids, mask = _padded(texts, self._pad, self.device)
        with self._mixer.running(Segments(list(rows))):
            hidden = self._trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(texts), device=self.device), mask.sum(-1) - 1]
        return [self._head(adapter)(row).float() for adapter, row in zip(rows, last, strict=True)]

    def _head(self, adapter: AdapterWeights | None) -> nn.Module:
        head = adapter.modules.get(SCORE) if adapter else self._score
        assert head is not None, "rows without a head are refused before they are queued"
        return head


class EncoderHeads:
    """An `AutoModelForSequenceClassification` whose linear layers are wrapped by `mixer`."""

    def __init__(self, model: Any, mixer: Mixer) -> None:
        self.device: torch.device = model.device
        self._model = model
        self._mixer = mixer
        self._pad = _pad_id(model)

    def build(self, saved: Saved) -> dict[str, nn.Module]:
        return {name: self._build_one(name, tensors) for name, tensors in saved.items()}

    def logits(self, texts: Sequence[Sequence[int]], rows: Rows) -> list[Tensor]:
        ids, mask = _padded(texts, self._pad, self.device)
        with self._mixer.running(Segments(list(rows))):
            logits: Tensor = self._model(input_ids=ids, attention_mask=mask).logits
        return list(logits.float())

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
            setattr(module.get_submodule(parent), leaf, nn.Parameter(tensor.to(self.device, self._model.dtype), requires_grad=False))
        return module


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
        widest = max(out.shape[-1] for out in outs)
        return torch.cat([nn.functional.pad(out, (0, widest - out.shape[-1]), value=-torch.inf) for out in outs])


@dataclass(eq=False)
class Text:
    """One text to classify."""

    ids: Sequence[int]
    adapter: AdapterWeights | None
    result: "Future[list[float]]"
    """Probabilities in the order of the head's labels."""


class Classification:
    """Texts that wait; those that came while the model was busy run together. All of it on the model's thread."""

    def __init__(self, heads: Heads, *, max_rows: int) -> None:
        self.heads = heads
        self.max_rows = max_rows
        self._waiting: deque[Text] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def add(self, texts: Sequence[Text]) -> None:
        self._waiting.extend(texts)

    def step(self) -> bool:
        batch: list[Text] = []
        longest = 0
        while self._waiting and len(batch) < self.max_rows:
            longest = max(longest, len(self._waiting[0].ids))
            if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
                break
            text = self._waiting.popleft()
            if text.result.set_running_or_notify_cancel():
                batch.append(text)
        if batch:
            self._run(sorted(batch, key=lambda text: id(text.adapter)))
        return bool(batch)

    def abandon(self, error: EngineError) -> None:
        for text in self._waiting:
            if text.result.set_running_or_notify_cancel():
                text.result.set_exception(error)
        self._waiting.clear()

    def _run(self, batch: list[Text]) -> None:
        try:
            answers = self.heads.logits([text.ids for text in batch], [text.adapter for text in batch])
            probabilities = [row.softmax(-1).tolist() for row in answers]
        except Exception as cause:
            error = EngineError(f"the model failed on this batch ({type(cause).__name__}: {cause})")
            for text in batch:
                text.result.set_exception(error)
            return
        for text, row in zip(batch, probabilities, strict=True):
            if all(p == p for p in row):
                text.result.set_result(row)
            else:
                text.result.set_exception(EngineError("the model's numbers overflowed on this text"))


def _pad_id(model: Any) -> int:
    """Padding is masked; its id matters only to models that derive positions from it (RoBERTa)."""
    return getattr(model.config, "pad_token_id", None) or 0


def _padded(texts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[pad] * (longest - len(text))] for text in texts], device=device)
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device=device)
    return ids, mask


def _plain_copy(module: nn.Module, mixer: Mixer) -> nn.Module:
    """A copy of a module of the base as transformers made it, without the wrapped layers in it."""
    module = copy.deepcopy(module, {id(mixer): mixer})
    if isinstance(module, MixedLinear):
        return module.base
    for name, child in list(module.named_modules()):
        if isinstance(child, MixedLinear):
            module.set_submodule(name, child.base)
    return module
