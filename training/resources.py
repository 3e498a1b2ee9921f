"""Whether the cluster can give what a recipe asks for, asked before anything is launched."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from hone.errors import ResourceError
from hone.recipe import Recipe

Resources = dict[str, float]


def plan_workers(recipe: Recipe) -> tuple[bool, Resources]:
    """Check the workers against the cluster; whether they get GPUs, and what each of them is given.

    Raises:
        ResourceError: the cluster is too small, and stays so for scaling.wait_for_nodes_s.
    """
    use_gpu, each, short, have = _compare(recipe)
    if short and recipe.scaling.wait_for_nodes_s:
        with _autoscaler_asked(each, recipe.scaling.most):
            deadline = time.monotonic() + recipe.scaling.wait_for_nodes_s
            while short and time.monotonic() < deadline:
                time.sleep(1)
                use_gpu, each, short, have = _compare(recipe)
    if not short:
        return use_gpu, each
    wants = ", ".join(f"{amount:g} {name}" for name, amount in short.items())
    has = ", ".join(f"{have.get(name, 0):g} {name}" for name in short)
    raise ResourceError(
        f"scaling.num_workers {recipe.scaling.fewest} needs {wants} and this cluster has {has} in all; "
        "lower scaling.num_workers, or set scaling.wait_for_nodes_s where an autoscaler can add nodes"
    )


def without_cluster(_recipe: Recipe) -> tuple[bool, Resources]:
    """What workers get that are started without Ray: a CPU each."""
    return False, {"CPU": 1.0}


def _compare(recipe: Recipe) -> tuple[bool, Resources, Resources, Resources]:
    """(whether workers get GPUs, what each gets, what all need of which the cluster has too little, what the cluster has)."""
    import ray

    scaling, have = recipe.scaling, ray.cluster_resources()
    use_gpu = bool(have.get("GPU")) if scaling.use_gpu == "auto" else scaling.use_gpu
    each = {**({"GPU": 1.0} if use_gpu else {}), **(scaling.resources_per_worker or {"CPU": 1.0})}
    needed = {name: amount * scaling.fewest for name, amount in each.items()}
    return use_gpu, each, {name: amount for name, amount in needed.items() if amount > have.get(name, 0)}, have


@contextmanager
def _autoscaler_asked(each: Resources, num_workers: int) -> Iterator[None]:
    """An autoscaler adds nodes only for work that waits, and nothing waits before launch: ask, and take the request back at the end."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[each] * num_workers)
    try:
        yield
    finally:
        request_resources(bundles=[])
