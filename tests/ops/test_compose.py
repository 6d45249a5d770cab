"""The compose stack: valid, hardened, and naming only settings and files that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.ops.expressions import ROOT
from vernier.api.auth.keyfile import make_guard
from vernier.settings import Settings

TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SECURED_TEXT = (ROOT / "docker-compose.secured.yml").read_text()
#: `!override` is Compose's own tag: the list takes the place of the one below instead of joining it.
SECURED: dict[str, Any] = yaml.safe_load(SECURED_TEXT.replace("!override ", ""))
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
DOCKERFILE = (ROOT / "Dockerfile").read_text()
STAGES = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE))
#: What compose takes from its own environment, and hands to the script that builds the examples.
COMPOSE_ALONE = {"VERNIER_EXAMPLES"}
DEFAULTS = dict(
    line.split("=", 1) for line in (ROOT / ".env").read_text().splitlines() if line and line[0] != "#"
)


def seconds(duration: str) -> int:
    assert duration.endswith("s")
    return int(duration[:-1])


def test_the_file_fits_the_compose_specification() -> None:
    schema = json.loads(
        (files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json").read_text()
    )
    jsonschema.validators.validator_for(schema)(schema).validate(COMPOSE)


def test_the_secured_file_fits_the_compose_specification() -> None:
    schema = json.loads(
        (files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json").read_text()
    )
    jsonschema.validators.validator_for(schema)(schema).validate(SECURED)
    assert set(SECURED["services"]) == {"vernier-gpu", "vernier-cpu", "grafana"}


def test_without_keys_the_service_is_published_to_this_machine_only() -> None:
    for name in ("vernier-gpu", "vernier-cpu"):
        assert SERVICES[name]["ports"] == [
            "${PUBLISH:-127.0.0.1:8000}:8000",
            "${PUBLISH_GRPC:-127.0.0.1:8001}:8001",
        ]
        assert "VERNIER_API_KEYS_FILE" in SECURED["services"][name]["environment"]


def test_a_misspelt_key_does_not_fit_the_compose_specification() -> None:
    schema = json.loads(
        (files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json").read_text()
    )
    wrong = json.loads(json.dumps(COMPOSE))
    wrong["services"]["prometheus"]["heathcheck"] = wrong["services"]["prometheus"].pop("healthcheck")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validators.validator_for(schema)(schema).validate(wrong)


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_read_only_and_without_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert not {"privileged", "network_mode", "pid", "cap_add"} & set(service)


def test_every_vernier_variable_is_a_setting() -> None:
    known = {f"VERNIER_{name}".upper() for name in Settings.model_fields} | {"VERNIER_CONFIG"}
    services = [*SERVICES.values(), *SECURED["services"].values()]
    named = {v for service in services for v in service.get("environment", {}) if v.startswith("VERNIER_")}
    named |= set(re.findall(r"^(?:ENV|   ) *(VERNIER_\w+)=", DOCKERFILE, re.MULTILINE))
    assert {"VERNIER_HOST", "VERNIER_METRICS_PORT"} <= named
    assert named - COMPOSE_ALONE <= known


def test_no_limit_is_asked_for_that_a_host_may_not_grant() -> None:
    assert not any("nofile" in service.get("ulimits", {}) for service in SERVICES.values())


def test_the_examples_are_built_unless_a_host_says_otherwise() -> None:
    assert DEFAULTS["VERNIER_EXAMPLES"] == "1"
    assert "${VERNIER_EXAMPLES:-0}" in TEXT


def test_every_variable_has_a_default() -> None:
    bare = {match[1] for match in re.finditer(r"\$\{(\w+)(?::\?[^}]*)?\}", TEXT)}
    assert bare <= set(DEFAULTS)


def test_no_image_floats() -> None:
    for name, tag in DEFAULTS.items():
        if name.endswith("_TAG"):
            assert re.fullmatch(r"v?\d+\.\d+\.\d+(@sha256:[0-9a-f]{64})?", tag), name


def test_the_default_profile_needs_a_gpu_and_the_cpu_profile_needs_none() -> None:
    assert DEFAULTS["COMPOSE_PROFILES"] == "gpu"
    by_profile = {p: [s for s in OURS.values() if s["profiles"] == [p]] for p in ("gpu", "cpu")}
    assert [len(services) for services in by_profile.values()] == [2, 2]
    for service in by_profile["gpu"]:
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia"
        assert "gpu" in device["capabilities"]
    assert not any("deploy" in service for service in by_profile["cpu"])


def test_every_build_names_a_target_and_a_flavour_that_the_dockerfile_has() -> None:
    for service in OURS.values():
        assert service["build"]["target"] in STAGES
        assert f"system-{service['build']['args']['FLAVOUR']}" in STAGES


def test_prometheus_finds_the_service_by_its_network_alias() -> None:
    config = yaml.safe_load((ROOT / "monitoring" / "prometheus" / "prometheus.yml").read_text())
    job = next(job for job in config["scrape_configs"] if job["job_name"] == "vernier")
    (discovery,) = job["dns_sd_configs"]
    for name in ("vernier-gpu", "vernier-cpu"):
        assert SERVICES[name]["networks"]["default"]["aliases"] == discovery["names"]
    assert f"VERNIER_METRICS_PORT={discovery['port']}" in DOCKERFILE


def test_the_container_is_given_the_time_that_its_drain_takes() -> None:
    for name in ("vernier-gpu", "vernier-cpu"):
        environment = SERVICES[name]["environment"]
        drain = float(environment["VERNIER_DRAIN_DELAY_S"]) + float(environment["VERNIER_DRAIN_TIMEOUT_S"])
        assert seconds(SERVICES[name]["stop_grace_period"]) > drain


def test_secrets_come_from_files_and_the_script_makes_each_of_them() -> None:
    script = (ROOT / "scripts" / "make_secrets.sh").read_text()
    assert "secrets" not in COMPOSE  # what everybody on this machine may reach needs none
    for name, secret in SECURED["secrets"].items():
        assert secret == {"file": f"./secrets/{name}"}
        assert name in script or name.startswith("tls_")
    for service in [*SERVICES.values(), *SECURED["services"].values()]:
        for variable, value in service.get("environment", {}).items():
            secretive = re.search(r"PASSWORD|TOKEN|SECRET|KEY", variable)
            assert not secretive or str(value).startswith("/run/secrets/"), variable
    assert "/secrets/" in (ROOT / ".gitignore").read_text().split()


def test_every_file_that_is_mounted_exists() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).exists(), source
            elif not source.startswith("$"):
                assert source in COMPOSE["volumes"], source


def test_the_service_cannot_write_packages_and_the_builder_can() -> None:
    for name, service in OURS.items():
        mounts = [v for v in service["volumes"] if "ENGINES" in v]
        if name.startswith("vernier"):
            assert [mount.endswith(":/engines:ro") for mount in mounts] == [True]
        else:
            assert [mount.endswith(":/engines") for mount in mounts] == [True] or name == "demo"


def test_the_secrets_script_makes_what_the_service_accepts(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    script = Path(shutil.copy(ROOT / "scripts" / "make_secrets.sh", tmp_path / "scripts"))
    made = subprocess.run([script, "front-end", "batch"], capture_output=True, text=True, check=True).stdout
    secrets = tmp_path / "secrets"
    guard = make_guard(Settings(api_keys_file=secrets / "api_keys", admin_token_file=secrets / "admin_token"))
    guard.admit_admin((secrets / "admin_token").read_text())
    for client in ("front-end", "batch"):
        key = re.search(rf"key of {client}, kept nowhere: (\S+)", made)
        assert key is not None
        guard.admit(key[1])
        assert key[1] not in (secrets / "api_keys").read_text()
    before = (secrets / "admin_token").read_text()
    again = subprocess.run([script, "batch"], capture_output=True, text=True, check=True).stdout
    assert "already" in again
    assert (secrets / "admin_token").read_text() == before
