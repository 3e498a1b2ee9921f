"""Whether an engine that was asked for can run where it is asked for."""

import importlib.util

from hone.errors import ResourceError
from hone.recipe.serving import EngineName


def check_engine(engine: EngineName) -> None:
    """Refuse an engine whose package is not installed here. Imports nothing.

    Raises:
        ResourceError: it is not, and what brings it.
    """
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise without_vllm("the package vllm is not installed here")


def without_vllm(reason: str) -> ResourceError:
    """What to say where vLLM cannot be imported."""
    return ResourceError(
        f"engine vllm: {reason}; pip install 'hone[vllm]' brings it (several gigabytes, for NVIDIA GPUs), or take --engine slots, "
        "which needs nothing more"
    )
