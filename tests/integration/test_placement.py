"""What the launcher asks of a cluster of 64 GPUs: Ray's real scheduler, on nodes that only say that they have them.

The nodes are raylets on this machine. What is placed is real, the GPUs are not: nothing here says how fast anything is.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from hone.errors import ResourceError
from hone.recipe import Recipe, parse_recipe
from training.resources import plan_workers, scaling_config, workers_that_fit

pytestmark = pytest.mark.timeout(900)

NODES, GPUS = 8, 8
WORKER = {"CPU": 0.1}
"""So that a node starts one process beforehand and not eight."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without a GPU, and eight nodes of eight."""
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False, **small})
    try:
        for _ in range(NODES):
            made.add_node(num_cpus=1, num_gpus=GPUS, wait=False, **small)
        made.wait_for_nodes(timeout=300)
        ray.init(address=made.address, log_to_driver=False, logging_level="warning")
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def recipe(workers: int | tuple[int, int], *, each: dict[str, float] = WORKER) -> Recipe:
    scaling = {"num_workers": workers, "resources_per_worker": each}
    most = workers if isinstance(workers, int) else workers[1]
    about = {"name": "x", "task": "chat", "base": "x", "data": {"train": "x.jsonl"}, "train": {"global_batch_size": most}}
    return parse_recipe({**about, "scaling": scaling}, where="test")


def gang(workers: int) -> PlacementGroup:
    """The placement group that Ray Train makes of what the launcher asks for: so many times what a worker gets, by its strategy."""
    chosen = recipe(workers)
    use_gpu, each = plan_workers(chosen)
    config = scaling_config(chosen.scaling, each, use_gpu=use_gpu)
    assert (use_gpu, config.num_workers) == (True, workers)
    return placement_group([config._resources_per_worker_not_none] * config.num_workers, strategy=config.placement_strategy)


def nodes_of(group: PlacementGroup) -> Counter[str]:
    """Node -> workers on it."""
    return Counter(placement_group_table(group)["bundles_to_node_id"].values())


def free() -> dict[str, float]:
    return {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU") and amount > 1e-6}


def comes(true: Callable[[], bool], *, timeout_s: float = 60) -> bool:
    """Whether it is so in the end: what nodes have free is told with a delay."""
    deadline = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture
def everything(cluster: Any) -> Iterator[dict[str, float]]:
    """What is free before a test, and has to be again after it."""
    assert cluster
    before = {"CPU": 1.0 + NODES, "GPU": float(NODES * GPUS)}
    assert comes(lambda: free() == before), free()
    yield before
    assert comes(lambda: free() == before), free()


def test_sixty_four_workers_fill_every_gpu_and_leave_the_head_alone(cluster: Any, everything: dict[str, float]) -> None:
    group = gang(64)
    assert group.wait(60)
    placed = nodes_of(group)
    assert sorted(placed.values()) == [GPUS] * NODES
    assert cluster.head_node.node_id not in placed
    assert comes(lambda: "GPU" not in free())
    remove_placement_group(group)
    assert comes(lambda: free() == everything)


def test_fewer_workers_share_as_few_nodes_as_hold_them(everything: dict[str, float]) -> None:
    assert everything
    group = gang(16)
    assert group.wait(60)
    assert sorted(nodes_of(group).values()) == [GPUS, GPUS]
    remove_placement_group(group)


def test_a_gang_that_does_not_fit_waits_and_holds_nothing(everything: dict[str, float]) -> None:
    first = gang(60)
    assert first.wait(60)
    second = gang(8)
    assert not second.wait(5)
    assert placement_group_table(second)["state"] == "PENDING"
    assert free()["GPU"] == 4, "four are left, and the gang of eight has not taken them"
    third = gang(4)
    assert third.wait(60), "who fits goes ahead of who does not"
    remove_placement_group(first)
    assert second.wait(60), "there is room now"
    for group in (second, third):
        remove_placement_group(group)
    assert comes(lambda: free() == everything)


def test_a_gang_that_waits_and_is_taken_back_leaves_nothing(everything: dict[str, float]) -> None:
    first = gang(60)
    assert first.wait(60)
    second = gang(8)
    assert not second.wait(2)
    for group in (second, first):
        remove_placement_group(group)
    assert comes(lambda: free() == everything)


def test_more_gpus_than_there_are_is_said_at_once(everything: dict[str, float]) -> None:
    assert everything
    with pytest.raises(ResourceError, match=r"num_workers 65 needs 65 GPU and this cluster has 64 GPU in all"):
        plan_workers(recipe(65))


def test_a_worker_that_no_node_has_room_for_is_said_at_once(everything: dict[str, float]) -> None:
    """In all there is enough, and Ray would wait for ever."""
    assert everything
    with pytest.raises(
        ResourceError, match=r"num_workers 4: each worker needs 16 GPU, 0.1 CPU on one node, and the 9 nodes .* hold 0 such"
    ):
        plan_workers(recipe(4, each={"GPU": 16, "CPU": 0.1}))
    with pytest.raises(
        ResourceError, match=r"num_workers 12: each worker needs 5 GPU, 0.1 CPU on one node, and the 9 nodes .* hold 8 such"
    ):
        plan_workers(recipe(12, each={"GPU": 5, "CPU": 0.1}))


def test_an_elastic_run_asks_for_no_more_than_its_fewest(everything: dict[str, float]) -> None:
    assert everything
    use_gpu, each = plan_workers(recipe((32, 128)))
    assert scaling_config(recipe((32, 128)).scaling, each, use_gpu=use_gpu).num_workers == (32, 128)


def test_nodes_hold_whole_workers_by_what_is_scarcest() -> None:
    nodes = [{"CPU": 8.0, "GPU": 8.0}, {"CPU": 4.0, "GPU": 8.0}, {"CPU": 64.0}]
    assert workers_that_fit({"CPU": 1, "GPU": 1}, nodes) == 12
    assert workers_that_fit({"CPU": 0.1}, [{"CPU": 1.0}]) == 10


@pytest.mark.skipif(not os.environ.get("HONE_TEST_HEAVY"), reason="starts 64 processes: make test-heavy")
def test_sixty_four_workers_of_ray_train_start_together_and_give_everything_back(everything: dict[str, float], tmp_path: Path) -> None:
    import ray.train
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    chosen = recipe(64)
    use_gpu, each = plan_workers(chosen)
    DataParallelTrainer(
        say_who_and_where,
        train_loop_config={"folder": str(tmp_path)},
        scaling_config=scaling_config(chosen.scaling, each, use_gpu=use_gpu),
        run_config=ray.train.RunConfig(name="gang", storage_path=str(tmp_path / "ray")),
    ).fit()
    ranks, gpus, nodes = zip(*(path.read_text().split() for path in tmp_path.glob("rank-*")), strict=True)
    assert sorted(map(int, ranks)) == list(range(64))
    assert Counter(nodes).most_common() == [(node, GPUS) for node, _ in Counter(nodes).most_common()]
    assert len(set(zip(gpus, nodes, strict=True))) == 64, "no two workers have the same GPU"
    by_rank = [node for _, node in sorted(zip(map(int, ranks), nodes, strict=True))]
    assert all(len(set(by_rank[n : n + GPUS])) == 1 for n in range(0, 64, GPUS)), "neighbouring ranks are on one node"
    assert comes(lambda: free() == everything)


def say_who_and_where(config: dict[str, str]) -> None:
    """On each worker."""
    import ray.train.collective

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    assert world_size == 64
    [gpu] = ray.get_gpu_ids()
    (Path(config["folder"]) / f"rank-{rank}").write_text(f"{rank} {gpu} {ray.get_runtime_context().get_node_id()}")
    ray.train.collective.barrier()
