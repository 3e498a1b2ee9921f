"""Clusters as people write them, and tables that people edit."""

from pathlib import Path

import pytest
import yaml

from hone.errors import ResourceError
from hone.methods import METHODS
from training.plan.hardware import HERE, find_kind, load_hardware, load_prices, parse_cluster

HARDWARE = load_hardware()


@pytest.mark.parametrize(
    ("spec", "nodes", "per_node", "kind", "gib"),
    [
        ("8xH100", 1, 8, "H100", 80),
        ("2x8xA100-80GB", 2, 8, "A100-80GB", 80),
        ("4xCPU:16GiB", 1, 4, "CPU", 16),
        ("1xl4", 1, 1, "L4", 24),
        ("2xA100-40G", 1, 2, "A100-40GB", 40),
    ],
)
def test_a_cluster_is_read_as_it_is_written(spec: str, nodes: int, per_node: int, kind: str, gib: int) -> None:
    cluster = parse_cluster(spec, HARDWARE)
    assert (cluster.nodes, cluster.per_node, cluster.kind, cluster.memory) == (nodes, per_node, kind, gib * 2**30)


@pytest.mark.parametrize("spec", ["H100", "8x", "0xH100", "8xB999", "x8xH100", "8xH100:much"])
def test_a_cluster_that_makes_no_sense_is_refused_in_one_line(spec: str) -> None:
    with pytest.raises(ResourceError, match="--cluster") as caught:
        parse_cluster(spec, HARDWARE)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("A100-80G", "A100-80GB"),
        ("a calculator", None),
    ],
)
def test_kinds_are_known_by_the_names_that_drivers_and_ray_give_them(name: str, kind: str | None) -> None:
    assert find_kind(name, HARDWARE) == kind


def test_the_tables_have_every_method_and_a_price_for_every_kind() -> None:
    assert set(HARDWARE.utilisation) == set(METHODS)
    assert set(load_prices().per_hour) == set(HARDWARE.kinds)


def test_a_workers_share_of_a_node_is_what_the_node_has() -> None:
    cluster = parse_cluster("4xCPU:16GiB", HARDWARE)
    assert cluster.memory_of_each(2) == cluster.memory
    assert cluster.model_copy(update={"shares_memory": True}).memory_of_each(4) == cluster.memory // 4


def test_a_table_of_the_users_own_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text("currency: EUR\nper_hour: {H100: cheap}\n")
    with pytest.raises(ResourceError, match=r"prices\.yaml: per_hour\.H100"):
        load_prices(path)
    with pytest.raises(ResourceError, match="cannot be read"):
        load_prices(tmp_path / "nothing.yaml")
    tree = yaml.safe_load((HERE / "prices.yaml").read_text())
    path.write_text(yaml.safe_dump({**tree, "currency": "EUR"}))
    assert load_prices(path).currency == "EUR"
