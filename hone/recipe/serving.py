"""What answers once a result is published: `hone serve --recipe FILE` reads this section; nothing of it touches the training."""

from typing import Annotated, Literal

from pydantic import Field

from hone.recipe.settings import Settings, Source

EngineName = Literal["slots", "vllm"]


class VllmSettings(Settings):
    """What vLLM is told beside the base, the rows and the context of a replica."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs of one node that share one replica's base, each with a slice of every layer."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Part of a GPU's memory that vLLM takes at the start, for weights, adapters, keys and values."""
    max_loras: int = Field(default=8, ge=1)
    """Adapters in one batch. Each takes the memory of an adapter of max_lora_rank on the GPU from the start; rows of further ones wait."""
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 64
    """Rank of the largest adapter that is taken; vLLM has kernels for these."""
    enforce_eager: bool = False
    """Without CUDA graphs: a quicker start, and slower answers."""


class ServingSettings(Settings):
    """Which engine answers for the base and its adapters."""

    engine: EngineName = "slots"
    """`slots`: hone's own, on CPUs and GPUs. `vllm`: vLLM, on NVIDIA GPUs, with the extra hone[vllm]."""
    vllm: VllmSettings = VllmSettings()
    adapter_disk: Source | None = None
    """Folder on each replica's own disk in which adapters are kept, where the registry is on another machine; replicas share it."""
    adapter_disk_bytes: int = Field(default=50 * 10**9, ge=0)
    """How many bytes of them; what is being copied comes on top."""
