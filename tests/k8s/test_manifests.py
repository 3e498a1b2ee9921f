"""What kustomize renders from k8s/ is what KubeRay's CRDs, its operator and a restricted namespace accept, and does what it is for."""

import copy
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.connect import SERVE_PROXIES
from hone.recipe import Recipe, load_recipe

REPO = Path(__file__).parents[2]
K8S = REPO / "k8s"
SHARED = REPO.parent / "shared"
FOLDERS = [K8S / "base", *sorted((K8S / "overlays").iterdir())]
GI = 2**30

Object = dict[str, Any]
Check = Callable[[Object], list[str] | None]


@pytest.fixture(scope="module")
def check_schema() -> Check:
    """The CRDs' schemas, read as the API server reads them."""
    tool, crds = SHARED / "tools" / "kuberay_validate.py", SHARED / "kuberay-crds"
    if not (tool.exists() and crds.exists()):
        pytest.skip(f"{tool} and {crds} are not on this machine")
    spec = importlib.util.spec_from_file_location("kuberay_validate", tool)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table = module.load_crds(crds)
    return lambda document: module.check(document, table)


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def rendered(request: pytest.FixtureRequest) -> list[Object]:
    return render(request.param)


@pytest.fixture(scope="module")
def base() -> list[Object]:
    return render(K8S / "base")


@pytest.fixture(scope="module")
def gpu() -> list[Object]:
    return render(K8S / "overlays" / "gpu")


# The schema, and the operator's rules beyond it


def test_the_crds_accept_every_ray_object(rendered: list[Object], check_schema: Check) -> None:
    refused = {o["kind"]: check_schema(o) for o in ray_objects(rendered)}
    assert refused == {"RayCluster": [], "RayJob": [], "RayService": []}


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayCluster", "spec.enableIntreeAutoscaling", True),
        ("RayCluster", "spec.authOptions.mode", "tokens"),
        ("RayCluster", "spec.headGroupSpec.template.spec.securityContext.runAsNonroot", True),
        ("RayCluster", "spec.workerGroupSpecs.0.maxReplicas", "4"),
        ("RayJob", "spec.entryPoint", "python -m training"),
        ("RayService", "spec.serveConfigV2", {"applications": []}),
    ],
)
def test_the_crds_refuse_a_planted_mistake(base: list[Object], check_schema: Check, kind: str, path: str, value: object) -> None:
    assert check_schema(planted(one(base, kind), path, value))


def test_the_operator_accepts_every_ray_object(rendered: list[Object]) -> None:
    assert [refusal for o in ray_objects(rendered) for refusal in operator_refusals(o)] == []


@pytest.mark.parametrize(
    ("kind", "path", "value", "complaint"),
    [
        ("RayCluster", "metadata.name", "c" * 54, "name"),
        ("RayJob", "metadata.name", "j" * 48, "name"),
        ("RayService", "metadata.name", "1-serve", "name"),
        ("RayJob", "spec.submissionMode", "HttpMode", "submissionMode"),
        ("RayJob", "spec.deletionStrategy", {"deletionRules": [{"policy": "DeleteCluster"}]}, "deletionRules"),
        ("RayJob", "spec.shutdownAfterJobFinishes", False, "ttlSecondsAfterFinished"),
        ("RayJob", "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy", "Always", "restartPolicy"),
        ("RayCluster", "spec.rayVersion", "2.51.0", "token"),
        ("RayCluster", "spec.networkPolicy", {}, "feature gate"),
        ("RayCluster", "spec.workerGroupSpecs.0.minReplicas", 5, "minReplicas"),
        ("RayService", "spec.upgradeStrategy.type", "Rolling", "upgradeStrategy"),
    ],
)
def test_the_operators_rules_catch_a_planted_mistake(base: list[Object], kind: str, path: str, value: object, complaint: str) -> None:
    (refusal,) = operator_refusals(planted(one(base, kind), path, value))
    assert complaint in refusal


# Security


def test_every_cluster_asks_for_a_token_from_a_secret(rendered: list[Object]) -> None:
    for cluster in clusters(rendered).values():
        assert cluster["authOptions"] == {"mode": "token", "secretName": "hone-ray-token"}


def test_every_pod_fits_a_restricted_namespace(rendered: list[Object]) -> None:
    assert one(rendered, "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in pods(rendered):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["runAsUser"] > 0
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert all({"persistentVolumeClaim", "emptyDir", "configMap"} & volume.keys() for volume in pod["spec"].get("volumes", []))
    for container in containers(rendered):
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_every_container_has_limits(rendered: list[Object]) -> None:
    for container in containers(rendered):
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()


def test_only_heads_hold_a_service_account_token(rendered: list[Object]) -> None:
    for cluster in clusters(rendered).values():
        assert "automountServiceAccountToken" not in cluster["headGroupSpec"]["template"]["spec"], "the autoscaler needs it"
    others = [group["template"] for c in clusters(rendered).values() for group in c["workerGroupSpecs"]]
    others.append(one(rendered, "RayJob")["spec"]["submitterPodTemplate"])
    assert [pod["spec"]["automountServiceAccountToken"] for pod in others] == [False] * 4


@pytest.mark.parametrize("port", [6379, 8000, 8265, 10001])
def test_pods_of_one_cluster_reach_each_other_and_no_other_cluster(rendered: list[Object], port: int) -> None:
    instances = sorted(clusters(rendered))
    reached = {(a, b) for a in instances for b in instances if reaches(rendered, pod_of(a), pod_of(b), port)}
    assert reached == {(name, name) for name in instances}


def test_outside_callers_reach_only_the_serve_port_and_the_operator_only_what_it_asks(rendered: list[Object]) -> None:
    client = {"pod": {}, "namespace": {"hone/api-client": "true"}}
    stranger = {"pod": {"app.kubernetes.io/instance": "hone-serve"}, "namespace": {}}
    operator = {
        "pod": {"app.kubernetes.io/component": "kuberay-operator"},
        "namespace": {"kubernetes.io/metadata.name": "kuberay-operator"},
    }
    reached = {
        (name, who, port)
        for name in clusters(rendered)
        for who, source in {"client": client, "stranger": stranger, "operator": operator}.items()
        for port in (6379, 8000, 8265, 10001)
        if reaches(rendered, source, pod_of(name), port)
    }
    assert reached == {
        ("hone-serve", "client", 8000),
        ("hone-serve", "operator", 8000),
        ("hone-serve", "operator", 8265),
        ("hone-train", "operator", 8265),
    }


def test_a_pod_that_no_policy_names_is_closed(rendered: list[Object]) -> None:
    assert not reaches(rendered, pod_of("hone"), pod_of("someone-else"), 8265)


def test_a_disruption_budget_holds_each_head_and_no_worker(rendered: list[Object]) -> None:
    budgets = [o["spec"] for o in rendered if o["kind"] == "PodDisruptionBudget"]
    for name in clusters(rendered):
        head, worker = ({"app.kubernetes.io/instance": name, "ray.io/node-type": node} for node in ("head", "worker"))
        assert [b["minAvailable"] for b in budgets if selects(b["selector"], head)] == [1]
        assert not any(selects(b["selector"], worker) for b in budgets)


# The parts and the clusters


def test_each_part_is_applied_by_its_label(rendered: list[Object]) -> None:
    parts: dict[str, set[str]] = {}
    for o in rendered:
        parts.setdefault(o["metadata"]["labels"]["app.kubernetes.io/component"], set()).add(o["kind"])
    assert parts == {
        "shared": {"Namespace", "PersistentVolumeClaim", "ConfigMap", "NetworkPolicy"},
        "cluster": {"RayCluster", "NetworkPolicy", "PodDisruptionBudget"},
        "train": {"RayJob", "NetworkPolicy", "PodDisruptionBudget"},
        "serve": {"RayService", "NetworkPolicy", "PodDisruptionBudget"},
    }


def test_the_three_clusters_differ_only_in_their_instance_label(rendered: list[Object]) -> None:
    alike = []
    for name, cluster in clusters(rendered).items():
        unlabelled = copy.deepcopy(cluster)
        for template in templates(unlabelled):
            assert template["metadata"].pop("labels") == {"app.kubernetes.io/instance": name}
        alike.append(unlabelled)
    assert alike[0] == alike[1] == alike[2]


def test_heads_offer_no_cpu_and_no_gpu_to_ray(rendered: list[Object]) -> None:
    for cluster in clusters(rendered).values():
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert "nvidia.com/gpu" not in limits(cluster["headGroupSpec"]["template"])
        assert cluster["enableInTreeAutoscaling"] is True
        assert cluster["autoscalerOptions"]["version"] == "v2"
        assert cluster["rayVersion"] == "2.60.0"


def test_shared_memory_holds_rays_objects(rendered: list[Object]) -> None:
    for template in (t for cluster in clusters(rendered).values() for t in templates(cluster)):
        shm = volume(template, "/dev/shm")["emptyDir"]
        assert shm["medium"] == "Memory"
        # Ray's default share of memory for objects (DEFAULT_OBJECT_STORE_MEMORY_PROPORTION).
        assert gibibytes(shm["sizeLimit"]) >= 0.3 * gibibytes(limits(template)["memory"])


def test_every_ray_pod_shares_one_home(rendered: list[Object]) -> None:
    claim = one(rendered, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for template in (t for cluster in clusters(rendered).values() for t in templates(cluster)):
        assert volume(template, "/hone")["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert {"name": "HONE_HOME", "value": "/hone"} in template["spec"]["containers"][0]["env"]


def test_every_ray_pod_sets_serves_proxies(rendered: list[Object]) -> None:
    for template in (t for cluster in clusters(rendered).values() for t in templates(cluster)):
        env = {variable["name"]: variable.get("value") for variable in template["spec"]["containers"][0]["env"]}
        assert env.items() >= SERVE_PROXIES.items()


def test_one_image_entry_changes_every_container(tmp_path: Path) -> None:
    shutil.copytree(K8S / "base", tmp_path / "base")
    mine = {"resources": ["../base"], "images": [{"name": "hone", "newName": "team/hone", "newTag": "1.2.3"}]}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kustomization.yaml").write_text(yaml.safe_dump(mine), encoding="utf-8")
    images = [c["image"] for c in containers(render(tmp_path / "mine")) if "image" in c]
    assert images == ["team/hone:1.2.3"] * 7


def test_the_gpu_overlay_moves_the_workers_of_all_three_clusters(base: list[Object], gpu: list[Object]) -> None:
    for cluster in clusters(base).values():
        assert "nvidia.com/gpu" not in limits(cluster["workerGroupSpecs"][0]["template"])
    for cluster in clusters(gpu).values():
        template = cluster["workerGroupSpecs"][0]["template"]
        assert limits(template)["nvidia.com/gpu"] == "1"
        assert template["spec"]["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
        assert template["spec"]["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]


# Training


def test_the_job_trains_the_recipe_of_the_config_map(rendered: list[Object], tmp_path: Path) -> None:
    job = one(rendered, "RayJob")["spec"]
    command, path = job["entrypoint"].rsplit(" ", 1)
    assert command == "python -m training"
    source = volume(job["rayClusterSpec"]["headGroupSpec"]["template"], str(Path(path).parent))
    assert source["configMap"]["name"] == one(rendered, "ConfigMap")["metadata"]["name"]
    assert mounted_recipe(rendered, tmp_path).name == "support-bot"


def test_the_recipe_fits_the_workers(rendered: list[Object], tmp_path: Path) -> None:
    recipe = mounted_recipe(rendered, tmp_path)
    assert recipe.base.startswith("/hone/")
    assert recipe.data.train.startswith("/hone/")
    group = one(rendered, "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    offered = limits(group["template"])
    assert recipe.scaling.resources_per_worker is not None
    asked = recipe.scaling.resources_per_worker
    assert asked["CPU"] <= float(offered["cpu"])
    assert asked.get("GPU", 0) <= float(offered.get("nvidia.com/gpu", 0))
    assert recipe.scaling.num_workers <= group["maxReplicas"]
    assert recipe.scaling.wait_for_nodes_s > 0, "there are no workers until the job asks for them"


def test_the_gpu_recipe_trains_on_gpus(gpu: list[Object], tmp_path: Path) -> None:
    scaling = mounted_recipe(gpu, tmp_path).scaling
    assert scaling.use_gpu is True
    assert scaling.resources_per_worker is not None
    assert scaling.resources_per_worker["GPU"] == 1


# Serving


# Ray 2.60's own schema, at import.
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field` is deprecated")
def test_the_service_serves_the_app(rendered: list[Object]) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(serve_config(rendered))
    (app,) = config.applications
    assert (app.name, app.route_prefix, app.import_path) == ("hone", "/", "serving.app:build")
    assert (config.http_options.host, config.http_options.port) == ("0.0.0.0", 8000)


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field` is deprecated")
def test_the_app_takes_the_arguments_and_a_worker_holds_its_replica(rendered: list[Object]) -> None:
    from serving.app import ServeArgs

    args = ServeArgs.model_validate(serve_config(rendered)["applications"][0]["args"])
    assert args.home == "/hone"
    assert args.base.startswith("/hone/")
    offered = limits(clusters(rendered)["hone-serve"]["workerGroupSpecs"][0]["template"])
    assert args.num_cpus <= float(offered["cpu"])
    assert (args.num_gpus or 0) == float(offered.get("nvidia.com/gpu", 0))


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field` is deprecated")
def test_a_replica_keeps_adapters_on_its_nodes_own_disk_with_room_to_copy(rendered: list[Object]) -> None:
    from serving.app import ServeArgs

    args = ServeArgs.model_validate(serve_config(rendered)["applications"][0]["args"])
    assert args.adapter_disk is not None
    (worker,) = clusters(rendered)["hone-serve"]["workerGroupSpecs"]
    disk = volume(worker["template"], args.adapter_disk)["emptyDir"]
    assert "medium" not in disk, "in memory it would count against the pod's limit"
    assert gibibytes(disk["sizeLimit"]) * GI >= args.adapter_disk_bytes + 4 * GI, "a pod that passes the volume's limit is evicted"


def test_the_gpu_overlay_serves_as_the_base_does(base: list[Object], gpu: list[Object]) -> None:
    configs = [serve_config(objects) for objects in (base, gpu)]
    for config in configs:
        for name in ("num_cpus", "num_gpus"):
            config["applications"][0]["args"].pop(name, None)
    assert configs[0] == configs[1]


def test_every_serving_pod_opens_the_port_that_the_policy_lets_in(rendered: list[Object]) -> None:
    for template in templates(clusters(rendered)["hone-serve"]):
        assert {"name": "serve", "containerPort": 8000} in template["spec"]["containers"][0]["ports"]


# Reading what was rendered


def render(folder: Path) -> list[Object]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not on this machine; it renders the manifests")
    result = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return list(yaml.safe_load_all(result.stdout))


def one(objects: list[Object], kind: str) -> Object:
    (found,) = (o for o in objects if o["kind"] == kind)
    return found


def ray_objects(objects: list[Object]) -> list[Object]:
    return [o for o in objects if o["apiVersion"] == "ray.io/v1"]


def cluster_spec(ray_object: Object) -> Object:
    spec: Object = ray_object["spec"]
    key = {"RayCluster": None, "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}[ray_object["kind"]]
    return spec if key is None else spec[key]


def clusters(objects: list[Object]) -> dict[str, Object]:
    return {o["metadata"]["name"]: cluster_spec(o) for o in ray_objects(objects)}


def templates(cluster: Object) -> list[Object]:
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


def pods(objects: list[Object]) -> list[Object]:
    of_ray = [template for cluster in clusters(objects).values() for template in templates(cluster)]
    return [*of_ray, one(objects, "RayJob")["spec"]["submitterPodTemplate"]]


def containers(objects: list[Object]) -> Iterator[Object]:
    """Also the autoscaler, which the operator adds to the head from these options."""
    for pod in pods(objects):
        yield from pod["spec"]["containers"]
        yield from pod["spec"].get("initContainers", [])
    for cluster in clusters(objects).values():
        yield cluster["autoscalerOptions"]


def limits(template: Object) -> dict[str, str]:
    found: dict[str, str] = template["spec"]["containers"][0]["resources"]["limits"]
    return found


def serve_config(objects: list[Object]) -> Object:
    config: Object = yaml.safe_load(one(objects, "RayService")["spec"]["serveConfigV2"])
    return config


def volume(template: Object, mount_path: str) -> Object:
    (mount,) = (m for m in template["spec"]["containers"][0]["volumeMounts"] if m["mountPath"] == mount_path)
    (found,) = (v for v in template["spec"]["volumes"] if v["name"] == mount["name"])
    return found


def gibibytes(quantity: str) -> float:
    number = re.fullmatch(r"(\d+)Gi", quantity)
    assert number is not None, quantity
    return float(number[1])


def mounted_recipe(objects: list[Object], folder: Path) -> Recipe:
    name = Path(one(objects, "RayJob")["spec"]["entrypoint"].split()[-1]).name
    path = folder / name
    path.write_text(one(objects, "ConfigMap")["data"][name], encoding="utf-8")
    return load_recipe(path)


def planted(ray_object: Object, path: str, value: object) -> Object:
    changed = copy.deepcopy(ray_object)
    *parents, last = path.split(".")
    node: Any = changed
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[last] = value
    return changed


def pod_of(instance: str) -> dict[str, dict[str, str]]:
    return {"pod": {"app.kubernetes.io/instance": instance}, "namespace": {"kubernetes.io/metadata.name": "hone"}}


def selects(selector: Object, labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}, "only matchLabels is understood here"
    return selector.get("matchLabels", {}).items() <= labels.items()


def reaches(objects: list[Object], source: dict[str, dict[str, str]], target: dict[str, dict[str, str]], port: int) -> bool:
    """Whether the network policies let `source` open `port` of `target`: allowed by any policy that selects it, open if none does."""
    policies = [o["spec"] for o in objects if o["kind"] == "NetworkPolicy" and selects(o["spec"]["podSelector"], target["pod"])]
    rules = [rule for policy in policies for rule in policy.get("ingress", [])]
    return not policies or any(_admits(rule, source, port) for rule in rules)


def _admits(rule: Object, source: dict[str, dict[str, str]], port: int) -> bool:
    if "ports" in rule and port not in [p["port"] for p in rule["ports"]]:
        return False
    return any(_is_peer(peer, source) for peer in rule["from"])


def _is_peer(peer: Object, source: dict[str, dict[str, str]]) -> bool:
    # Without a namespaceSelector a peer is a pod of the policy's own namespace.
    in_namespace = selects(peer.get("namespaceSelector", {"matchLabels": {"kubernetes.io/metadata.name": "hone"}}), source["namespace"])
    return in_namespace and selects(peer.get("podSelector", {}), source["pod"])


def operator_refusals(ray_object: Object) -> list[str]:
    """The rules of KubeRay 1.7's ray-operator/controllers/ray/utils/validation.go that its schema does not hold."""
    kind, name, spec = ray_object["kind"], ray_object["metadata"]["name"], ray_object["spec"]
    refusals = []
    longest = 53 if kind == "RayCluster" else 47
    if len(name) > longest or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        refusals.append(f"name {name!r} is not a DNS label of at most {longest} characters")
    if kind == "RayJob":
        refusals += _job_refusals(spec)
    upgrade = spec.get("upgradeStrategy", {}).get("type", "None")
    if kind == "RayService" and upgrade not in {"NewCluster", "NewClusterWithIncrementalUpgrade", "None"}:
        refusals.append(f"upgradeStrategy {upgrade!r}")
    return refusals + _cluster_refusals(cluster_spec(ray_object))


def _job_refusals(spec: Object) -> list[str]:
    refusals = []
    if spec["submissionMode"] not in {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"}:
        refusals.append(f"submissionMode {spec['submissionMode']!r}")
    if spec.get("shutdownAfterJobFinishes") and spec.get("deletionStrategy", {}).get("deletionRules"):
        refusals.append("shutdownAfterJobFinishes and deletionRules exclude each other")
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec.get("shutdownAfterJobFinishes"):
        refusals.append("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
    return refusals


def _cluster_refusals(cluster: Object) -> list[str]:
    refusals = []
    if {"networkPolicy", "tlsOptions"} & cluster.keys():
        refusals.append("networkPolicy and tlsOptions need an alpha feature gate")
    if tuple(int(part) for part in cluster["rayVersion"].split(".")) < (2, 52, 0):
        refusals.append("token authentication needs Ray 2.52")
    if {template["spec"].get("restartPolicy", "Never") for template in templates(cluster)} != {"Never"}:
        refusals.append("restartPolicy must be Never with autoscaler v2")
    for group in cluster["workerGroupSpecs"]:
        if not 0 <= group["minReplicas"] <= group["maxReplicas"]:
            refusals.append(f"minReplicas of {group['groupName']!r} is not between 0 and maxReplicas")
        if {"num-cpus", "num-gpus", "memory", "resources"} & group["rayStartParams"].keys() and group.get("resources"):
            refusals.append(f"{group['groupName']!r} sets resources twice")
    return refusals
