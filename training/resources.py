"""Whether the cluster can give what a recipe asks for, asked before anything is launched."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hone.errors import ResourceError
from hone.recipe import Recipe
from hone.recipe.train import ScalingSettings

Resources = dict[str, float]


def plan_workers(recipe: Recipe) -> tuple[bool, Resources]:
    """Check the workers against the cluster; whether they get GPUs, and what each of them is given.

    Raises:
        ResourceError: the cluster is too small, and stays so for scaling.wait_for_nodes_s; or fp16 is asked for, and there are no GPUs.
    """
    use_gpu, each, short, have = _compare(recipe)
    if short and recipe.scaling.wait_for_nodes_s:
        with _autoscaler_asked(each, recipe.scaling.most):
            deadline = time.monotonic() + recipe.scaling.wait_for_nodes_s
            while short and time.monotonic() < deadline:
                time.sleep(1)
                use_gpu, each, short, have = _compare(recipe)
    if not short:
        _refuse_split_workers(recipe.scaling, each)
        _refuse_slow_half(recipe, use_gpu=use_gpu)
        return use_gpu, each
    wants = ", ".join(f"{amount:g} {name}" for name, amount in short.items())
    has = ", ".join(f"{have.get(name, 0):g} {name}" for name in short)
    raise ResourceError(
        f"scaling.num_workers {recipe.scaling.fewest} needs {wants} and this cluster has {has} in all; "
        "lower scaling.num_workers, or set scaling.wait_for_nodes_s where an autoscaler can add nodes"
    )


def scaling_config(scaling: ScalingSettings, each: Resources, *, use_gpu: bool) -> Any:
    """Ray Train's form of it: one gang, reserved whole or not at all, on as few nodes as hold it (PACK).

    Not STRICT_PACK, which is one node; not SPREAD, by which neighbouring ranks would talk over the network. The driver is no part of the
    gang: it needs nothing of the node that it is on, such as a head without GPUs.
    """
    import ray.train

    return ray.train.ScalingConfig(
        num_workers=scaling.most if scaling.most == scaling.fewest else (scaling.fewest, scaling.most),
        elastic_resize_monitor_interval_s=scaling.resize_every_s,
        use_gpu=use_gpu,
        resources_per_worker=each,
        placement_strategy="PACK",
    )


def workers_that_fit(each: Resources, nodes: Iterable[Mapping[str, float]]) -> int:
    """How many workers empty nodes hold; none is split over two of them."""
    return sum(min(int(node.get(name, 0) / amount + 1e-9) for name, amount in each.items() if amount) for node in nodes)


def without_cluster(_recipe: Recipe) -> tuple[bool, Resources]:
    """What workers get that are started without Ray: a CPU each."""
    return False, {"CPU": 1.0}


def _refuse_slow_half(recipe: Recipe, *, use_gpu: bool) -> None:
    """DeepSpeed takes fp16 on very few CPUs, and on the others it would be slow."""
    if recipe.train.precision == "fp16" and not use_gpu:
        raise ResourceError("train.precision fp16 is for GPUs, and these workers get none; use bf16 or fp32")


def _compare(recipe: Recipe) -> tuple[bool, Resources, Resources, Resources]:
    """(whether workers get GPUs, what each gets, what all need of which the cluster has too little, what the cluster has)."""
    import ray

    scaling, have = recipe.scaling, ray.cluster_resources()
    use_gpu = bool(have.get("GPU")) if scaling.use_gpu == "auto" else scaling.use_gpu
    each = {**({"GPU": 1.0} if use_gpu else {}), **(scaling.resources_per_worker or {"CPU": 1.0})}
    needed = {name: amount * scaling.fewest for name, amount in each.items()}
    return use_gpu, each, {name: amount for name, amount in needed.items() if amount > have.get(name, 0)}, have


def _refuse_split_workers(scaling: ScalingSettings, each: Resources) -> None:
    """The sum over all nodes may be enough where no node has what one worker needs. Ray would wait for such a node without an end."""
    import ray

    if not any(each.values()):
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fit = workers_that_fit(each, nodes)
    if fit < scaling.fewest:
        wants = ", ".join(f"{amount:g} {name}" for name, amount in each.items() if amount)
        raise ResourceError(
            f"scaling.num_workers {scaling.fewest}: each worker needs {wants} on one node, and the {len(nodes)} nodes of this cluster hold "
            f"{fit} such workers; lower scaling.num_workers or scaling.resources_per_worker"
        )


@contextmanager
def _autoscaler_asked(each: Resources, num_workers: int) -> Iterator[None]:
    """An autoscaler adds nodes only for work that waits, and nothing waits before launch: ask, and take the request back at the end."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[each] * num_workers)
    try:
        yield
    finally:
        request_resources(bundles=[])
