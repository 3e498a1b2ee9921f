"""vLLM behind `Streams`: what hone's settings are called there, and what its answers say here. Written against the source of vLLM 0.29
(docs/decisions/0019-vllm.md); vLLM itself is imported only where a replica is to run on it.

vLLM makes token ids and nothing else. It is told no stop strings and decodes no text: `serving.engine.row` does that for every engine, so
an answer ends at the same place and its log probabilities have the same form. Prompts come as token ids for the same reason. Grammars go to
vLLM's llguidance as hone's own compiles them, and what comes back is held against hone's (`serving.engine.streams`).
"""

import os
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch

from hone.engines import without_vllm
from hone.recipe.serving import VllmSettings
from serving.engine.measures import Measures
from serving.engine.row import Row
from serving.engine.sampling import Chosen
from serving.engine.streams import LoraFiles, Step
from serving.errors import EngineError, LostEngineError, RequestError

MOST_LOGPROBS = 20
"""OpenAI's limit on top_logprobs."""


class VllmSource:
    """Satisfies `serving.engine.streams.TokenSource`."""

    def __init__(self, llm: Any) -> None:
        """`llm` is a running AsyncLLM; `start_vllm` makes one."""
        self.max_context = int(llm.model_config.max_model_len)
        self.dtype: torch.dtype = llm.model_config.dtype
        self._llm = llm
        self._requests = count(1)
        self._ids: dict[str, int] = {}
        """vLLM's number of each digest, never given to another: its caches are keyed by the number and by the name, which is the digest."""
        self._uses: dict[str, int] = {}
        """How often a digest is loaded: the same content may be published under two names."""

    async def answer(self, row: Row, adapter: LoraFiles | None) -> AsyncGenerator[Step, None]:
        """See `TokenSource.answer`. Closing it aborts the request in vLLM."""
        grammar = row.chooser.constraint.grammar if row.chooser.constraint else None
        async with aclosing(self._generate(row.prompt, sampling_settings(row), adapter, grammar)) as outputs:
            async for output in outputs:
                [made] = output.outputs
                if made.finish_reason in ("abort", "error"):
                    raise EngineError("vLLM gave this answer up; send the request again")
                yield Step(chosen_tokens(made.token_ids, made.logprobs, row.chooser.logprobs), output.num_cached_tokens or 0)

    async def logprobs(self, prompt: Sequence[int], tokens: Sequence[int], adapter: LoraFiles | None) -> list[float]:
        """See `TokenSource.logprobs`."""
        settings = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "detokenize": False, "logprob_token_ids": list(tokens)}
        async with aclosing(self._generate(prompt, settings, adapter)) as outputs:
            async for output in outputs:
                [found] = output.outputs[0].logprobs
                return [found[token].logprob for token in tokens]
        raise EngineError("vLLM gave no log probabilities")

    async def load(self, adapter: LoraFiles) -> None:
        """See `TokenSource.load`."""
        self._uses[adapter.digest] = self._uses.get(adapter.digest, 0) + 1
        try:
            with _told_apart():
                await self._llm.add_lora(self._lora(adapter))
        except RequestError as error:
            self._is_last(adapter)
            if isinstance(error, LostEngineError):
                raise
            raise ValueError(f"vLLM does not take it ({error.message})") from error

    async def unload(self, adapter: LoraFiles) -> None:
        """See `TokenSource.unload`."""
        if self._is_last(adapter):
            await self._llm.remove_lora(self._ids[adapter.digest])

    def stop(self) -> None:
        self._llm.shutdown()

    def _is_last(self, adapter: LoraFiles) -> bool:
        """Count one use less; whether that was the last."""
        self._uses[adapter.digest] -= 1
        if self._uses[adapter.digest]:
            return False
        del self._uses[adapter.digest]
        return True

    async def _generate(
        self, prompt: Sequence[int], settings: Mapping[str, Any], adapter: LoraFiles | None, grammar: str | None = None
    ) -> AsyncGenerator[Any, None]:
        from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

        with _told_apart():
            structured = StructuredOutputsParams(grammar=grammar) if grammar else None
            stream = self._llm.generate(
                {"prompt_token_ids": list(prompt)},
                SamplingParams(**settings, structured_outputs=structured, output_kind=RequestOutputKind.DELTA),
                f"hone-{next(self._requests)}",
                lora_request=self._lora(adapter) if adapter else None,
            )
            async with aclosing(stream):
                async for output in stream:
                    yield output

    def _lora(self, adapter: LoraFiles) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(**lora_settings(adapter, self._ids.setdefault(adapter.digest, len(self._ids) + 1)))


async def start_vllm(settings: Mapping[str, Any], measures: Measures) -> VllmSource:
    """Start vLLM with `engine_settings`. Blocks its loop for the minutes that this takes.

    Raises:
        ResourceError: it cannot be imported.
        EngineError: it cannot run this base here; the message says why.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # otherwise it tells its makers what runs here
    try:
        from vllm.config import StructuredOutputsConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise without_vllm(f"vLLM cannot be imported on this replica ({error})") from error
    try:
        grammars = StructuredOutputsConfig(backend="guidance")  # left to itself it takes one of several, each with a language of its own
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings, structured_outputs_config=grammars), stat_loggers=[_counting(measures)])
    except Exception as error:
        raise EngineError(f"vLLM did not start ({type(error).__name__}: {error})") from error
    return VllmSource(llm)


def engine_settings(base: Path, *, max_rows: int, max_context: int | None, max_adapters: int, settings: VllmSettings) -> dict[str, Any]:
    """What vLLM's AsyncEngineArgs are given."""
    return {
        "model": str(base),
        "trust_remote_code": False,
        "load_format": "safetensors",
        "generation_config": "vllm",  # the requests say everything; the base's own defaults would change what they leave out
        "max_model_len": -1 if max_context is None else max_context,  # -1: as much as fits
        "max_num_seqs": max_rows,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "enforce_eager": settings.enforce_eager,
        "tensor_parallel_size": settings.tensor_parallel_size,
        # The GPUs are the replica's own; left to itself vLLM would ask Ray for more from inside an actor.
        "distributed_executor_backend": "mp" if settings.tensor_parallel_size > 1 else "uni",
        "enable_prefix_caching": True,
        "enable_lora": True,
        "max_loras": min(settings.max_loras, max_adapters),
        "max_lora_rank": settings.max_lora_rank,
        "max_cpu_loras": max_adapters,  # all that the pool holds: vLLM never has to read one again from files that may be gone
        "max_logprobs": MOST_LOGPROBS,
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": True,
    }


def sampling_settings(row: Row) -> dict[str, Any]:
    """What vLLM's SamplingParams are given for a row."""
    chooser = row.chooser
    return {
        "n": 1,  # each choice is a row of its own
        "temperature": chooser.temperature,
        "top_p": chooser.top_p,
        "top_k": chooser.top_k,
        "min_p": chooser.min_p,
        "frequency_penalty": chooser.frequency_penalty,
        "presence_penalty": chooser.presence_penalty,
        "logit_bias": dict(chooser.logit_bias) or None,
        "logprobs": chooser.logprobs,
        # Differs from choice to choice, as `random` does. Without one, vLLM draws for the whole batch at once, which is quicker.
        "seed": chooser.random.getrandbits(32) if chooser.is_seeded else None,
        "max_tokens": row.max_tokens,
        "stop_token_ids": sorted(row.end_ids),
        "ignore_eos": True,  # a row says itself what ends it: a turn, where its base may name another token
        "detokenize": False,
    }


def lora_settings(adapter: LoraFiles, number: int) -> dict[str, Any]:
    """What vLLM's LoRARequest is given. Its prefix cache tells adapters apart by the name, so the name is the digest."""
    return {"lora_name": adapter.digest, "lora_int_id": number, "lora_path": str(adapter.folder)}


def chosen_tokens(tokens: Sequence[int], logprobs: Sequence[Mapping[int, Any]] | None, likeliest: int | None) -> list[Chosen]:
    """vLLM's tokens and log probabilities as ours.

    Args:
        tokens: Ids.
        logprobs: For each of them, id -> vLLM's Logprob: the token itself first, then the likeliest.
        likeliest: How many of those were asked for; None is no log probabilities at all.
    """
    if logprobs is None or likeliest is None:
        return [Chosen(token) for token in tokens]
    chosen = []
    for token, found in zip(tokens, logprobs, strict=True):
        ranked = sorted((each.rank, other, each.logprob) for other, each in found.items() if each.rank <= likeliest)
        chosen.append(Chosen(token, found[token].logprob, tuple((other, value) for _, other, value in ranked)))
    return chosen


@contextmanager
def _told_apart() -> Iterator[None]:
    """vLLM's errors as ours: the request's own fault, a failed request, an engine that is gone."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except EngineDeadError as error:
        raise LostEngineError("vLLM stopped working; the replica is being replaced") from error
    except VLLMClientError as error:
        raise RequestError(f"vLLM refuses this request: {error}") from error
    except EngineGenerateError as error:
        raise EngineError(f"vLLM failed on this request ({error.__cause__ or error})") from error
    except RequestError:
        raise
    except Exception as error:
        raise EngineError(f"vLLM failed ({type(error).__name__}: {error})") from error


def _counting(measures: Measures) -> Callable[[Any, int], Any]:
    """Makes what vLLM tells of each of its passes: how many rows were in it."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Counting(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

        def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:  # noqa: ARG002
            if scheduler_stats is not None and scheduler_stats.num_running_reqs:
                measures.batch_rows.observe(scheduler_stats.num_running_reqs)

        def log_engine_initialized(self) -> None: ...

    return Counting
