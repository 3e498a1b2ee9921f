"""A second engine behind the seam: plain transformers and PEFT, one forward pass a row. What it answers is right by construction, and it
can be made to stand still or to end."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import llguidance
import llguidance.hf
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hone.base_model import find_base_model
from hone.storage import Home
from serving.engine.constraint import Constraint
from serving.engine.measures import Measures
from serving.engine.row import Row
from serving.engine.sampling import Chosen, choose
from serving.engine.streams import LoraFiles, Step, Streams
from serving.errors import LostEngineError
from serving.streamed import StreamedEngine

MAX_CONTEXT = 128


class PlainSource:
    """Satisfies `serving.engine.streams.TokenSource`."""

    def __init__(self, base: Path, max_context: int) -> None:
        self.max_context = max_context
        self.dtype = torch.float32
        self.loaded: list[str] = []
        self.unloaded: list[str] = []
        self.begun: list[Row] = []
        self.given_up = 0
        """Answers that were closed before their last token."""
        self.is_stopped = False
        self.lost = False
        self.is_deaf = False
        """To grammars."""
        self.going = asyncio.Event()
        """While it is not set, no answer gets further than its first token."""
        self.going.set()
        self._base = base
        self._models: dict[str | None, Any] = {None: self._plain()}

    async def answer(self, row: Row, adapter: LoraFiles | None) -> AsyncGenerator[Step, None]:
        self.begun.append(row)
        model, ids, made = self._models[adapter.digest if adapter else None], list(row.prompt), 0
        constraint = row.chooser.constraint
        chooser = replace(row.chooser, constraint=self._compiled(constraint.grammar) if constraint and not self.is_deaf else None)
        try:
            while made < row.max_tokens:
                await (self.going.wait() if made else asyncio.sleep(0))
                if self.lost:
                    raise LostEngineError("the engine is gone")
                with torch.inference_mode():
                    logits = model(input_ids=torch.tensor([ids])).logits[:, -1].float()
                [chosen] = choose(logits, [chooser])
                assert isinstance(chosen, Chosen)
                ids.append(chosen.token)
                made += 1
                yield Step([chosen], kept=1)
                if chosen.token in row.end_ids:
                    return
        except (GeneratorExit, asyncio.CancelledError):
            self.given_up += 1
            raise

    async def logprobs(self, prompt: Sequence[int], tokens: Sequence[int], adapter: LoraFiles | None) -> list[float]:
        with torch.inference_mode():
            logits = self._models[adapter.digest if adapter else None](input_ids=torch.tensor([list(prompt)])).logits[0, -1]
        found: list[float] = logits.log_softmax(-1)[list(tokens)].tolist()
        return found

    async def load(self, adapter: LoraFiles) -> None:
        self._models[adapter.digest] = PeftModel.from_pretrained(self._plain(), str(adapter.folder)).eval()
        self.loaded.append(adapter.name)

    async def unload(self, adapter: LoraFiles) -> None:
        self.unloaded.append(adapter.name)

    def stop(self) -> None:
        self.is_stopped = True

    def _compiled(self, grammar: str) -> Constraint:
        """By the calls that vLLM's backend of llguidance makes: a tokenizer that knows one end of text, and the text as a "grammar"."""
        tokenizer = llguidance.hf.from_tokenizer(AutoTokenizer.from_pretrained(self._base))
        return Constraint(llguidance.LLMatcher(tokenizer, llguidance.grammar_from("grammar", grammar)))

    def _plain(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self._base, dtype=torch.float32).eval()


def plain_engine(
    home: Home, base: Path, *, max_rows: int = 4, max_lora_rank: int = 8, max_context: int = MAX_CONTEXT
) -> tuple[StreamedEngine, PlainSource]:
    async def start(_: Measures) -> PlainSource:
        return PlainSource(base, max_context)

    streams = Streams(start, max_rows=max_rows)
    assert isinstance(streams.source, PlainSource)
    return StreamedEngine(find_base_model(str(base), home=home), streams, name="vllm", max_lora_rank=max_lora_rank), streams.source
