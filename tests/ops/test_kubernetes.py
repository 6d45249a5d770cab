"""Manifests: built by kustomize, valid by Kubernetes' and the operators' schemas, hardened, and of one mind."""

from __future__ import annotations

import functools
import json
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.ops.conftest import Run
from tests.ops.expressions import ROOT, adapter_rules, rule_expressions
from vernier.settings import Settings

Resource = dict[str, Any]
OVERLAYS = ["gpu", "cpu", "keda", "kserve", "model-build"]
SERVING = ["gpu", "cpu", "keda"]
#: The oldest Kubernetes that was supported when this was written, and the newest.
VERSIONS = ["1.30", "1.37"]
SCHEMAS = Path(__file__).parent / "schemas"
OPERATORS = {
    "keda.sh": "keda",
    "monitoring.coreos.com": "prometheus-operator",
    "serving.kserve.io": "kserve",
}


@pytest.fixture(scope="session")
def built(kustomize: Run) -> dict[str, list[Resource]]:
    """Overlay → its resources."""
    found = {}
    for overlay in OVERLAYS:
        done = kustomize([str(ROOT / "k8s" / "overlays" / overlay)])
        assert done.returncode == 0, done.stderr
        found[overlay] = [resource for resource in yaml.safe_load_all(done.stdout) if resource]
    return found


@functools.cache
def operator_schema(group: str, kind: str) -> Resource:
    schema: Resource = json.loads((SCHEMAS / f"{OPERATORS[group]}.json").read_text())[kind]
    return schema


def validate(resource: Resource) -> None:
    group = resource["apiVersion"].split("/")[0]
    if group not in OPERATORS:
        for version in VERSIONS:
            kubernetes_validate.validate(resource, version, strict=True)
        return
    jsonschema.Draft202012Validator(operator_schema(group, resource["kind"])).validate(resource)
    if resource["kind"] == "ClusterServingRuntime":
        spec = {key: resource["spec"][key] for key in ("containers", "volumes", "tolerations")}
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec})


def one(resources: list[Resource], kind: str) -> Resource:
    (found,) = [resource for resource in resources if resource["kind"] == kind]
    return found


def pods(resources: list[Resource]) -> Iterator[tuple[str, Resource]]:
    for resource in resources:
        if resource["kind"] in {"Deployment", "Job"}:
            yield resource["metadata"]["name"], resource["spec"]["template"]["spec"]
        elif resource["kind"] == "ClusterServingRuntime":
            yield resource["metadata"]["name"], resource["spec"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_manifest_fits_its_schema(built: dict[str, list[Resource]], overlay: str) -> None:
    assert built[overlay]
    for resource in built[overlay]:
        validate(resource)


@pytest.mark.parametrize("overlay", ["gpu", "keda", "kserve"])
def test_a_misspelt_field_does_not_fit(built: dict[str, list[Resource]], overlay: str) -> None:
    for resource in built[overlay]:
        if "spec" in resource:
            with pytest.raises(jsonschema.ValidationError):
                validate({**resource, "spec": {**resource["spec"], "replicaz": 1}})


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_container_may_write_its_root_or_gain_rights(
    built: dict[str, list[Resource]], overlay: str
) -> None:
    for name, pod in pods(built[overlay]):
        for container in pod["containers"]:
            security = container["securityContext"] | pod.get("securityContext", {})
            assert security["readOnlyRootFilesystem"] is True, name
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert security["runAsNonRoot"] is True, name
            assert security["runAsUser"] == 10001, name
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
            assert "memory" in container["resources"]["limits"], name
            writable = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
            assert {"/cache", "/tmp"} <= writable, name


@pytest.mark.parametrize("overlay", SERVING)
def test_the_drain_fits_into_the_grace_period(built: dict[str, list[Resource]], overlay: str) -> None:
    pod = one(built[overlay], "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    settings = tomllib.loads(settings_file(built[overlay]))
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = before + settings["drain_delay_s"] + settings["drain_timeout_s"]
    late = 5  # what the supervisor gives a process beyond the drain
    assert drain + late < pod["terminationGracePeriodSeconds"]
    # the endpoints must have left every node's tables before the port closes
    probe = container["readinessProbe"]
    assert before + settings["drain_delay_s"] > probe["periodSeconds"] * probe["failureThreshold"]


def settings_file(resources: list[Resource]) -> str:
    configs = [r for r in resources if r["kind"] == "ConfigMap" and "vernier.toml" in r["data"]]
    return str(configs[0]["data"]["vernier.toml"])


@pytest.mark.parametrize("overlay", [*SERVING, "kserve"])
def test_fronts_are_counted_by_the_container_and_not_by_the_node(
    built: dict[str, list[Resource]], overlay: str
) -> None:
    for _, pod in pods(built[overlay]):
        (container,) = pod["containers"]
        resources = container["resources"]
        named = {e["name"]: e["value"] for e in container["env"]}
        if "cpu" not in resources["limits"]:
            assert 1 <= int(named["VERNIER_FRONTS"]) < int(resources["requests"]["cpu"])


@pytest.mark.parametrize("overlay", SERVING)
def test_the_settings_file_is_accepted_by_the_service(built: dict[str, list[Resource]], overlay: str) -> None:
    values = tomllib.loads(settings_file(built[overlay]))
    assert set(values) <= set(Settings.model_fields)
    Settings(**values)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_vernier_variable_is_a_setting(built: dict[str, list[Resource]], overlay: str) -> None:
    known = {f"VERNIER_{name}".upper() for name in Settings.model_fields} | {"VERNIER_CONFIG"}
    for _, pod in pods(built[overlay]):
        for container in pod["containers"]:
            assert {e["name"] for e in container.get("env", []) if e["name"].startswith("VERNIER_")} <= known


@pytest.mark.parametrize("overlay", [*SERVING, "kserve"])
def test_probes_ask_routes_that_the_service_has(built: dict[str, list[Resource]], overlay: str) -> None:
    routes = (ROOT / "app" / "vernier" / "api" / "health.py").read_text()
    for _, pod in pods(built[overlay]):
        (container,) = pod["containers"]
        paths = {
            name: container[f"{name}Probe"]["httpGet"]["path"]
            for name in ("startup", "readiness", "liveness")
        }
        assert paths == {
            "startup": "/v2/health/live",
            "readiness": "/v2/health/ready",
            "liveness": "/v2/health/live",
        }
        assert all(f'"{path}"' in routes for path in paths.values())
        ports = {
            container[f"{name}Probe"]["httpGet"]["port"] for name in ("startup", "readiness", "liveness")
        }
        assert ports <= {"metrics", 8002}


@pytest.mark.parametrize("overlay", ["gpu", "keda", "kserve", "model-build"])
def test_gpu_pods_ask_for_a_gpu_and_tolerate_its_nodes(
    built: dict[str, list[Resource]], overlay: str
) -> None:
    for _, pod in pods(built[overlay]):
        (container,) = pod["containers"]
        assert int(container["resources"]["limits"]["nvidia.com/gpu"]) == 1
        assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"


def test_the_cpu_overlay_asks_for_no_gpu(built: dict[str, list[Resource]]) -> None:
    assert "nvidia.com" not in json.dumps(built["cpu"])


@pytest.mark.parametrize("overlay", SERVING)
def test_selectors_find_the_pods(built: dict[str, list[Resource]], overlay: str) -> None:
    resources = built[overlay]
    labels = one(resources, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    chosen = [
        one(resources, "Deployment")["spec"]["selector"]["matchLabels"],
        one(resources, "Service")["spec"]["selector"],
        one(resources, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one(resources, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels for selector in chosen)
    service = one(resources, "Service")
    monitor = one(resources, "ServiceMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}


@pytest.mark.parametrize("overlay", SERVING)
def test_one_autoscaler_owns_the_number_of_replicas(built: dict[str, list[Resource]], overlay: str) -> None:
    kinds = [r["kind"] for r in built[overlay]]
    assert kinds.count("HorizontalPodAutoscaler") + kinds.count("ScaledObject") == 1
    assert "replicas" not in one(built[overlay], "Deployment")["spec"]


def test_the_hpa_asks_for_the_metric_that_the_adapter_makes(built: dict[str, list[Resource]]) -> None:
    asked = {
        m["pods"]["metric"]["name"] for m in one(built["gpu"], "HorizontalPodAutoscaler")["spec"]["metrics"]
    }
    made = {rule["name"]["as"] for rule in adapter_rules()}
    assert asked <= made
    recorded = {e.where.split()[1] for e in rule_expressions() if e.kind == "record"}
    for rule in adapter_rules():
        series = re.search(r'__name__="([^"]+)"', rule["seriesQuery"])
        assert series is not None
        assert series[1] in recorded
        assert re.match(rule["name"]["matches"], series[1])


def test_clients_reach_predictions_and_monitoring_reaches_metrics(built: dict[str, list[Resource]]) -> None:
    resources = built["gpu"]
    clients, monitoring = one(resources, "NetworkPolicy")["spec"]["ingress"]
    assert [port["port"] for port in clients["ports"]] == ["http", "grpc"]
    assert [port["port"] for port in monitoring["ports"]] == ["metrics"]
    (container,) = one(resources, "Deployment")["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    settings = tomllib.loads(settings_file(resources))
    assert (ports["metrics"], ports["grpc"]) == (settings["metrics_port"], settings["grpc_port"])
    assert ports == {port["name"]: port["port"] for port in one(resources, "Service")["spec"]["ports"]}


def test_access_can_be_closed_by_a_component(kustomize: Run, tmp_path: Path) -> None:
    def from_here(path: str) -> str:
        return os.path.relpath(ROOT / "k8s" / path, tmp_path.resolve())

    overlay = {"resources": [from_here("overlays/cpu")], "components": [from_here("components/access")]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    done = kustomize([str(tmp_path)])
    assert done.returncode == 0, done.stderr
    resources = [resource for resource in yaml.safe_load_all(done.stdout) if resource]
    for resource in resources:
        validate(resource)
    pod = one(resources, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    named = {e["name"].removeprefix("VERNIER_").lower(): e["value"] for e in container["env"]}
    assert set(named) - {"config"} <= set(Settings.model_fields)
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    files = {name: value for name, value in named.items() if name.endswith("_file")}
    assert len(files) == 4
    assert all(value.startswith(mounts["access"] + "/") for value in files.values())
    assert {v["name"] for v in pod["volumes"]} == set(mounts)


def test_the_service_calls_nobody(built: dict[str, list[Resource]]) -> None:
    policy = one(built["gpu"], "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert not policy.get("egress")


def test_the_build_job_writes_where_the_service_reads(built: dict[str, list[Resource]]) -> None:
    (_, job), (_, service) = next(pods(built["model-build"])), next(pods(built["gpu"]))

    def claim(pod: Resource) -> str:
        return str({v["name"]: v for v in pod["volumes"]}["engines"]["persistentVolumeClaim"]["claimName"])

    assert claim(job) == claim(service)
    assert claim(service) in built["kserve"][1]["spec"]["predictor"]["model"]["storageUri"]


def test_the_dashboards_reach_grafanas_sidecar(built: dict[str, list[Resource]]) -> None:
    (found,) = [r for r in built["gpu"] if r["metadata"].get("labels", {}).get("grafana_dashboard")]
    assert set(found["data"]) == {"service.json", "precision.json", "gpu.json"}
