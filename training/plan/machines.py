"""What there is: this machine, or the nodes of a Ray cluster, as a `Cluster`."""

from collections import Counter
from typing import Any

import psutil
import torch

from hone.errors import ResourceError
from hone.recipe import Recipe
from training.plan.hardware import Cluster, Hardware, find_kind

ACCELERATOR = "accelerator_type:"
"""Begins the name of the resource by which Ray says which kind a node has."""


def this_machine(recipe: Recipe, hardware: Hardware) -> Cluster:
    """The GPUs of this machine where it has any and the recipe lets them be used, else its cores; memory is what is free now.

    Raises:
        ResourceError: a GPU that the table does not have.
    """
    if torch.cuda.is_available() and recipe.scaling.use_gpu is not False:
        name = torch.cuda.get_device_name()
        memory = int(torch.cuda.get_device_properties(0).total_memory)
        host = psutil.virtual_memory().available
        return Cluster(nodes=1, per_node=torch.cuda.device_count(), kind=_known(name, hardware), memory=memory, host_memory=host)
    cores = psutil.cpu_count() or 1
    return Cluster(nodes=1, per_node=_workers_of(cores, recipe), kind="CPU", memory=psutil.virtual_memory().available, shares_memory=True)


def ray_cluster(recipe: Recipe, hardware: Hardware, *, use_gpu: bool | None = None) -> Cluster:
    """The cluster that this process is connected to; where its nodes differ, those of the commonest kind.

    Args:
        recipe: For what a worker gets.
        hardware: The table of kinds.
        use_gpu: Whether workers get GPUs; by default where there are any and the recipe lets them be used.

    Raises:
        ResourceError: no node that fits the recipe, or GPUs of a kind that the table does not have.
    """
    import ray

    nodes: list[dict[str, Any]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    with_gpu = [node for node in nodes if node.get("GPU")]
    wanted = recipe.scaling.use_gpu is not False if use_gpu is None else use_gpu
    if with_gpu and wanted:
        named = Counter(_accelerator(node) for node in with_gpu)
        name = named.most_common(1)[0][0]
        alike = [node for node in with_gpu if _accelerator(node) == name]
        kind = _known(name, hardware)
        per_node = int(min(node["GPU"] for node in alike))
        host = min(_memory_of(node) for node in alike)
        return Cluster(nodes=len(alike), per_node=per_node, kind=kind, memory=_memory_of_gpu(kind, hardware), host_memory=host)
    alike = [node for node in nodes if node.get("CPU")]
    if not alike:
        raise ResourceError("the cluster has no node with CPUs that a worker could run on")
    memory = min(_memory_of(node) for node in alike)
    cores = int(min(node["CPU"] for node in alike))
    return Cluster(nodes=len(alike), per_node=_workers_of(cores, recipe), kind="CPU", memory=memory, shares_memory=True)


def _memory_of(node: dict[str, Any]) -> int:
    """What Ray gives to its workers and its object store, of which training uses next to nothing."""
    return int(node.get("memory", 0) + node.get("object_store_memory", 0))


def _accelerator(node: dict[str, Any]) -> str:
    return next((name.removeprefix(ACCELERATOR) for name in node if name.startswith(ACCELERATOR)), "of an unknown kind")


def _known(name: str, hardware: Hardware) -> str:
    kind = find_kind(name, hardware)
    if kind is None or kind == "CPU":
        raise ResourceError(f"GPU {name}: not in the table of accelerators ({', '.join(hardware.kinds)}); add it to a --hardware file")
    return kind


def _memory_of_gpu(kind: str, hardware: Hardware) -> int:
    """As the driver says, where this process sees one; else as published."""
    if torch.cuda.is_available() and find_kind(torch.cuda.get_device_name(), hardware) == kind:
        return int(torch.cuda.get_device_properties(0).total_memory)
    return int(hardware.kinds[kind].memory_gib * 2**30)


def _workers_of(cores: int, recipe: Recipe) -> int:
    each = (recipe.scaling.resources_per_worker or {}).get("CPU", 1.0)
    return max(1, int(cores / each)) if each else cores
