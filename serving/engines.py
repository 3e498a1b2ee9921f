"""Which engine a replica gets, by its name."""

from functools import partial

from hone.base_model import BaseModel
from hone.engines import check_engine
from hone.manifest import AdapterManifest
from hone.recipe.serving import EngineName, VllmSettings
from serving.base import load_engine
from serving.contract import ServingEngine
from serving.engine.capability import MOST_ROWS
from serving.engine.generation import PREFILL_TOKENS
from serving.engine.streams import Streams
from serving.engine.vllm import engine_settings, start_vllm
from serving.streamed import StreamedEngine, check_decoder

ROWS: dict[EngineName, int] = {"slots": MOST_ROWS, "vllm": 256}
"""Answers that one replica makes at once, unless it is told otherwise; the slot engine fewer where memory is short."""


def start_engine(
    name: EngineName,
    base: BaseModel,
    *,
    published: AdapterManifest | None,
    max_rows: int | None,
    max_context: int | None,
    max_adapters: int,
    prefill_tokens: int = PREFILL_TOKENS,
    prefix_tokens: int | None = None,
    vllm: VllmSettings | None = None,
) -> ServingEngine:
    """Load a base. Arguments as in `serving.app.ServeArgs`.

    Raises:
        BaseModelError: the base cannot be loaded, or this engine cannot serve its architecture.
        ResourceError: the engine's package is not installed.
        EngineError: it did not start.
    """
    if name == "slots":
        return load_engine(
            base,
            published=published,
            max_rows=max_rows,
            max_context=max_context,
            prefill_tokens=prefill_tokens,
            prefix_tokens=prefix_tokens,
        )
    check_engine(name)
    check_decoder(base, published, name)
    rows, told = max_rows or ROWS[name], vllm or VllmSettings()
    settings = engine_settings(base.folder, max_rows=rows, max_context=max_context, max_adapters=max_adapters, settings=told)
    streams = Streams(partial(start_vllm, settings), max_rows=rows)
    return StreamedEngine(base, streams, name=name, max_lora_rank=told.max_lora_rank, published=published)
