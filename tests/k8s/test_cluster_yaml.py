"""Ray's own launcher accepts cluster/*.yaml, and what it does not look at (provider and node_config) is spelt right."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parents[2] / "cluster"
FILES = sorted(CLUSTER.glob("*.yaml"))

Config = dict[str, Any]


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def config(request: pytest.FixtureRequest) -> Config:
    return read(request.param)


@pytest.fixture
def aws() -> Config:
    return read(CLUSTER / "aws-gpu.yaml")


@pytest.fixture
def onprem() -> Config:
    return read(CLUSTER / "onprem.yaml")


def test_there_is_a_file_for_hosts_of_ones_own_and_one_for_aws() -> None:
    assert {read(path)["provider"]["type"] for path in FILES} == {"local", "aws"}


def test_ray_accepts_the_file(config: Config) -> None:
    prepared = accept(config)
    assert prepared["head_node_type"] in prepared["available_node_types"]


def test_every_node_asks_for_a_token_and_has_it(config: Config) -> None:
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/hone/.ray"] == "~/.ray"


def test_every_node_shares_one_home(config: Config) -> None:
    options = config["docker"]["run_options"]
    assert "--env HONE_HOME=/hone" in options
    assert any(option.startswith("--volume ") and option.endswith(":/hone") for option in options)


def test_nodes_run_the_image_of_the_manifests(config: Config) -> None:
    base = yaml.safe_load((CLUSTER.parent / "k8s" / "base" / "raycluster.yaml").read_text(encoding="utf-8"))
    image = base["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
    assert config["docker"]["image"].rpartition("/")[2] == image


def test_the_dashboard_stays_on_the_head(config: Config) -> None:
    assert not any("--dashboard-host" in command for command in config["head_start_ray_commands"])


def test_provider_keys_are_ones_that_ray_names(config: Config) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    assert config["provider"].keys() <= schema["properties"]["provider"]["properties"].keys()


def test_the_aws_head_has_no_cpu_for_ray_and_no_gpu(aws: Config) -> None:
    head = accept(aws)["available_node_types"][aws["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    assert head["node_config"]["InstanceType"].startswith("m")
    assert "--gpus all" not in aws["docker"]["run_options"]


def test_aws_has_gpu_workers_on_spot_first_and_on_demand_after(aws: Config) -> None:
    types = accept(aws)["available_node_types"]
    spot, on_demand = types["gpu.spot"], types["gpu.on-demand"]
    assert set(types) == {"head.cpu", "gpu.spot", "gpu.on-demand"}
    assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot["node_config"] == on_demand["node_config"]
    assert spot["priority"] > on_demand["priority"]
    for worker in (spot, on_demand):
        assert worker["resources"]["GPU"] == 1
        assert worker["docker"]["worker_run_options"] == ["--gpus all"]
        assert worker["min_workers"] == 0
        assert worker["max_workers"] > 0


def test_aws_node_config_keys_are_those_of_run_instances(aws: Config) -> None:
    known = {"InstanceType", "ImageId", "BlockDeviceMappings", "InstanceMarketOptions"}
    for node_type in aws["available_node_types"].values():
        assert node_type["node_config"].keys() <= known
        assert {"InstanceType", "ImageId"} <= node_type["node_config"].keys()


def test_the_onprem_head_offers_no_cpu_and_every_host_is_used(onprem: Config) -> None:
    start = onprem["head_start_ray_commands"][-1]
    assert "--num-cpus=0 " in start
    assert "--num-gpus=0 " in start
    (node_type,) = accept(onprem)["available_node_types"].values()
    assert node_type["min_workers"] == node_type["max_workers"] == len(onprem["provider"]["worker_ips"])


def _misspell_idle_timeout(config: Config) -> None:
    config["idle_timeout_minute"] = config.pop("idle_timeout_minutes")


def _name_a_head_that_is_not_there(config: Config) -> None:
    config["head_node_type"] = "head.gpu"


def _misspell_worker_limit(config: Config) -> None:
    config["available_node_types"]["gpu.spot"]["max_worker"] = 8


def _want_more_nodes_than_allowed(config: Config) -> None:
    config["available_node_types"]["gpu.spot"]["min_workers"] = config["max_workers"] + 1


def _leave_the_container_unnamed(config: Config) -> None:
    del config["docker"]["container_name"]


@pytest.mark.parametrize(
    ("plant", "error"),
    [
        (_misspell_idle_timeout, jsonschema.ValidationError),
        (_name_a_head_that_is_not_there, ValueError),
        (_misspell_worker_limit, jsonschema.ValidationError),
        (_want_more_nodes_than_allowed, ValueError),
        (_leave_the_container_unnamed, AssertionError),
    ],
)
def test_ray_refuses_a_planted_mistake(aws: Config, plant: Callable[[Config], None], error: type[Exception]) -> None:
    plant(aws)
    with pytest.raises(error):
        accept(aws)


def read(path: Path) -> Config:
    loaded: Config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


def accept(config: Config) -> Config:
    prepared: Config = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared
