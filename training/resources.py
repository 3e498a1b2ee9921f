"""Whether the cluster can give what a recipe asks for, asked before anything is launched."""

import time

from hone.errors import ResourceError
from hone.recipe import Recipe


def plan_workers(recipe: Recipe) -> tuple[bool, dict[str, float]]:
    """Check the workers against the cluster; whether they get GPUs, and what each of them is given.

    Raises:
        ResourceError: the cluster is too small, and stays so for scaling.wait_for_nodes_s.
    """
    import ray

    scaling = recipe.scaling
    deadline = time.monotonic() + scaling.wait_for_nodes_s
    while True:
        have = ray.cluster_resources()
        use_gpu = bool(have.get("GPU")) if scaling.use_gpu == "auto" else scaling.use_gpu
        each = scaling.resources_per_worker or ({"GPU": 1.0, "CPU": 1.0} if use_gpu else {"CPU": 1.0})
        if use_gpu and "GPU" not in each:
            each = {**each, "GPU": 1.0}
        short = {name: amount * scaling.num_workers for name, amount in each.items() if amount * scaling.num_workers > have.get(name, 0)}
        if not short:
            return use_gpu, each
        if time.monotonic() >= deadline:
            break
        time.sleep(1)
    wants = ", ".join(f"{amount:g} {name}" for name, amount in short.items())
    has = ", ".join(f"{have.get(name, 0):g} {name}" for name in short)
    raise ResourceError(
        f"scaling.num_workers {scaling.num_workers} needs {wants} and this cluster has {has} in all; "
        "lower scaling.num_workers, or set scaling.wait_for_nodes_s where an autoscaler can add nodes"
    )
