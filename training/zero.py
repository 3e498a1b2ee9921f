"""From the recipe to DeepSpeed's configuration, and the switches that keep DeepSpeed from compiling anything."""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hone.recipe import Recipe
from training.loss_scale import fp16_config

LARGEST_BUCKET = 500_000_000
"""Elements, DeepSpeed's own default."""
SMALL = 100_000
"""Elements of a parameter that stage 3 leaves whole, DeepSpeed's own default."""
UPDATED_AT_ONCE = 1_000_000_000
"""Elements of a sub-group at stage 3, DeepSpeed's own default."""
SWAPPED_AT_ONCE = 50_000_000
"""The same where their state is on NVMe: 200 MB in memory for each of weights, gradients and two moments."""


WEIGHT_BUFFERS = 5
"""Shards of weights on NVMe that are in memory at once: more than any module has weights of its own. DeepSpeed's own default."""


@dataclass(frozen=True)
class Swap:
    """Where a rank keeps files on NVMe, and how large they get."""

    folder: Path
    largest_shard: int
    """Elements: where weights are there, a buffer has room for any rank's part of any parameter. Else 0."""


def deepspeed_config(recipe: Recipe, *, dtype: torch.dtype, use_gpu: bool = False, swap: Swap | None = None) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize` (https://www.deepspeed.ai/docs/config-json/).

    Batch sizes in it are for its log only: the loop says itself where a step ends, since packed steps differ in their forward passes.

    Args:
        recipe: What to run.
        dtype: Of weights and gradients.
        use_gpu: Whether memory is to be pinned for one.
        swap: Of this rank, where the recipe keeps something on NVMe.
    """
    return {
        "train_micro_batch_size_per_gpu": recipe.train.portion,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.optim.max_grad_norm,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "fp16": fp16_config() if dtype is torch.float16 else {"enabled": False},
        "zero_optimization": _zero(recipe, pin_memory=use_gpu, swap=swap),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own AdamW for offloaded state has to be compiled
        "steps_per_print": 1_000_000_000,
    }


def _zero(recipe: Recipe, *, pin_memory: bool, swap: Swap | None) -> dict[str, Any]:
    zero, in_memory = recipe.zero, {"device": "cpu", "pin_memory": pin_memory}
    on_nvme = in_memory | {"device": "nvme", "nvme_path": str(swap.folder)} if swap else in_memory
    # None of the trained weights is to stay in memory, as DeepSpeed would keep the first 1e9.
    weights_on_nvme = on_nvme | {"buffer_count": WEIGHT_BUFFERS, "buffer_size": swap.largest_shard, "max_in_cpu": 0} if swap else in_memory
    return {
        "stage": zero.stage,
        **({"offload_optimizer": on_nvme if zero.offload_optimizer == "nvme" else in_memory} if zero.offload_optimizer else {}),
        **({"offload_param": weights_on_nvme if zero.offload_param == "nvme" else in_memory} if zero.offload_param else {}),
        **(_of_stage_3(recipe) if zero.stage == 3 else {}),
    }


def _of_stage_3(recipe: Recipe) -> dict[str, int]:
    settings = {
        "stage3_param_persistence_threshold": kept_whole(recipe),
        "stage3_max_live_parameters": recipe.zero.stage3_max_live_parameters,
        "stage3_max_reuse_distance": recipe.zero.stage3_max_reuse_distance,
        "sub_group_size": sub_group_size(recipe),
    }
    if recipe.zero.offload_param == "nvme":
        # A weight has its buffer for as long as it is gathered, and those that are read ahead of a pass that ends before them keep theirs.
        settings |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    return settings


def sub_group_size(recipe: Recipe) -> int:
    """Elements whose optimiser state is updated at once at stage 3."""
    return recipe.zero.sub_group_size or (SWAPPED_AT_ONCE if recipe.zero.nvme_path else UPDATED_AT_ONCE)


def kept_whole(recipe: Recipe) -> int:
    """The largest parameter that stage 3 leaves whole on every rank, in elements: none where a moving average is made of the shards."""
    return 0 if recipe.train.ema_decay else SMALL


def fit_buckets(config: dict[str, Any], trained_parameters: int) -> None:
    """Buffers through which gradients go, no larger than all of them: DeepSpeed's defaults are for models of many billions."""
    bucket = bucket_elements(trained_parameters)
    config["zero_optimization"] |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}


def elements(parameters: Iterable[torch.nn.Parameter]) -> int:
    """How many numbers there are in them. Stage 3 keeps the shape elsewhere."""
    return sum(math.prod(getattr(parameter, "ds_shape", parameter.shape)) for parameter in parameters)


def bucket_elements(trained_parameters: int) -> int:
    """Elements whose gradients are sent at once: an adapter does not need DeepSpeed's 500 million."""
    return min(LARGEST_BUCKET, trained_parameters + trained_parameters % 2)  # DeepSpeed wants them even


def prepare_deepspeed(*, use_gpu: bool) -> Any:
    """Import DeepSpeed so that it never builds an op just in time, and let it join the process group.

    Without a GPU it would compile a shared-memory collective on first use, which needs a compiler and takes half a minute; gloo's own
    does as well. DeepSpeed reads DS_ACCELERATOR when it is imported.
    """
    if not use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo", auto_mpi_discovery=False)
    return deepspeed


@contextmanager
def sharded_loading(config: dict[str, Any] | None) -> Iterator[None]:
    """A block in which `from_pretrained` gives each rank its shard, by a configuration of stage 3; without one nothing is changed.

    transformers finds the setting by this object's life.
    """
    if config is None:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    held = HfDeepSpeedConfig(config)
    yield
    del held


def step_optimizer(engine: Any) -> float | None:
    """Let the optimiser take its step; the 2-norm of the mean gradient, before it was clipped. None where gradients in fp16 have overflown:
    then the weights were not moved, and the loss scale has been halved.

    Without ZeRO, in fp32, DeepSpeed 0.19 clips by that norm and does not keep it.
    """
    if not hasattr(engine.optimizer, "_global_grad_norm"):
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
        engine.step()
        return float(norm)
    engine.step()
    return None if getattr(engine.optimizer, "overflow", False) else float(engine.get_global_grad_norm())


def release_gathered(engine: Any) -> None:
    """After passes whose backward pass never comes, let go of the weights that stage 3 has fetched for it.

    Some are still on their way, and DeepSpeed refuses to gather those for an export; and none of them hear of shards that change in place.
    """
    if engine.zero_optimization_stage() == 3:
        engine.empty_partition_cache()


def shard(parameter: Any) -> tuple[int, int]:
    """Under ZeRO-3, where this rank's shard begins in the parameter, and how many of its elements are no padding."""
    import torch.distributed as dist

    start = min(dist.get_rank() * parameter.ds_tensor.ds_numel, parameter.ds_numel)
    return start, min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start)
