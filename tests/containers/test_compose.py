"""`docker compose up` from a fresh clone: served examples, metrics, dashboards' queries, and what survives what."""

from __future__ import annotations

import json
import math
import os
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ops.expressions import panel_expressions, rule_expressions
from tests.support.certificates import Authority
from tests.support.containers import Stack, clone, inspect, run, until
from tests.support.packages import mlp_model
from tests.support.server import ROOT, free_port

#: From the command to the first answer of both examples, with the images there.
SERVED_S = 180
RANKER = {"dense": [[0.0] * 13], "ids": [[1580, 1032, 15, 45, 19, 5, 2, 12]]}


def models(url: str) -> set[str]:
    try:
        return {m["name"] for m in httpx.get(f"{url}/v1/models", timeout=5).json()["models"]}
    except (httpx.TransportError, ValueError):
        return set()


class Running:
    """The stack of `docker compose --profile cpu --profile demo up`, and how long it took to serve both examples."""

    def __init__(self, stack: Stack) -> None:
        started = time.monotonic()
        self.stack = stack
        stack.compose("--profile", "cpu", "--profile", "demo", "up", "--detach", "--build")
        self.url = stack.url("vernier-cpu", 8000)
        until(
            lambda: models(self.url) == {"ranker", "keywords"}, SERVED_S, lambda: stack.logs("examples-cpu")
        )
        self.served_s = time.monotonic() - started
        self.prometheus = stack.url("prometheus", 9090)

    def query(self, expression: str) -> list[float]:
        answer = httpx.post(f"{self.prometheus}/api/v1/query", data={"query": expression}, timeout=20).json()
        assert answer["status"] == "success", (expression, answer.get("error"))
        data = answer["data"]
        found = [data] if data["resultType"] == "scalar" else data["result"]
        return [float(one["result"][1] if "result" in one else one["value"][1]) for one in found]


@pytest.fixture(scope="module")
def running(image: str, builder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    stack = Stack(clone(tmp_path_factory.mktemp("stack")), "vernier-test")
    try:
        yield Running(stack)
    finally:
        stack.down("--volumes")


def test_one_command_serves_both_examples(running: Running) -> None:
    assert running.served_s < SERVED_S
    answer = httpx.post(f"{running.url}/v1/predict", json={"model": "ranker", "inputs": RANKER})
    assert answer.status_code == 200, answer.text
    stack = running.stack
    until(lambda: inspect(stack.container("examples-cpu"))["State"]["Status"] == "exited")
    assert inspect(stack.container("examples-cpu"))["State"]["ExitCode"] == 0
    until(lambda: inspect(stack.container("vernier-cpu"))["State"]["Health"]["Status"] == "healthy")


@pytest.mark.parametrize(
    "name", ["vernier-cpu", "examples-cpu", "demo", "prometheus", "alertmanager", "grafana"]
)
def test_every_container_is_read_only_and_without_privileges(running: Running, name: str) -> None:
    found = inspect(running.stack.container(name))
    host = found["HostConfig"]
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert "no-new-privileges:true" in host["SecurityOpt"]
    assert found["Config"]["User"] not in ("", "root", "0")
    state = found["State"]
    assert state["Status"] == "running" or (name, state["ExitCode"]) == ("examples-cpu", 0)
    assert found["RestartCount"] == 0


def test_nothing_is_published_beyond_this_machine(running: Running) -> None:
    for name in ("vernier-cpu", "prometheus", "alertmanager", "grafana"):
        published = inspect(running.stack.container(name))["NetworkSettings"]["Ports"]
        addresses = {binding["HostIp"] for bindings in published.values() for binding in bindings or ()}
        assert addresses == {"127.0.0.1"}, name


def test_prometheus_scrapes_the_service_and_knows_every_rule(running: Running) -> None:
    until(lambda: running.query('up{job="vernier"}') == [1.0])
    until(
        lambda: sum(running.query('vernier_requests_total{code="ok"}')) > 20,
        why=lambda: running.stack.logs("demo"),
    )

    def rules() -> list[dict[str, Any]]:
        groups = httpx.get(f"{running.prometheus}/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    until(lambda: all(rule["health"] == "ok" for rule in rules()), 60, lambda: json.dumps(rules()))
    assert len(rules()) == len(list(rule_expressions()))
    alertmanagers = httpx.get(f"{running.prometheus}/api/v1/alertmanagers").json()["data"][
        "activeAlertmanagers"
    ]
    assert len(alertmanagers) == 1
    assert httpx.get(running.stack.url("alertmanager", 9093) + "/-/ready").status_code == 200


def test_the_home_page_of_grafana_shows_the_traffic(running: Running) -> None:
    """Grafana has no stand-in that draws: what its home page asks Prometheus, and the files that it is given."""
    home = [e for e in panel_expressions() if e.where.startswith("service.json")]

    def empty() -> list[str]:
        values = {e.where: running.query(e.text) for e in home}
        return [where for where, found in values.items() if not any(not math.isnan(v) for v in found)]

    # what needs an error, a restart or a GPU has nothing to show
    until(lambda: len(empty()) < len(home) / 3, 90, lambda: json.dumps(empty()))
    grafana = running.stack.url("grafana", 3000)
    assert httpx.get(f"{grafana}/service.json").json()["title"]


def test_the_service_cannot_write_packages_and_a_built_one_is_served_at_once(running: Running) -> None:
    stack = running.stack
    service = stack.container("vernier-cpu")
    assert run("docker", "exec", service, "sh", "-c", ": > /engines/x", check=False).returncode != 0
    folder = stack.folder / "models"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(mlp_model().SerializeToString())
    words = ["run", "--rm", "builder-cpu", "/models/model.onnx", "--name", "built", "--precision", "fp32"]
    built = stack.compose(*words, "--out", "/engines")
    assert until(lambda: "built" in models(running.url), 20, lambda: built + stack.logs("vernier-cpu")) < 5
    answer = httpx.post(f"{running.url}/v1/predict", json={"model": "built", "inputs": {"x": [[1, 2, 3, 4]]}})
    assert answer.status_code == 200, answer.text


def test_packages_survive_the_containers_and_the_examples_are_not_built_again(running: Running) -> None:
    stack = running.stack
    before = models(running.url)
    service = stack.container("vernier-cpu")
    stack.compose("--profile", "cpu", "stop", "vernier-cpu")
    assert inspect(service)["State"]["ExitCode"] == 0  # drained
    stack.down()
    stack.compose("--profile", "cpu", "up", "--detach", "vernier-cpu", "examples-cpu")
    url = stack.url("vernier-cpu", 8000)
    until(lambda: models(url) == before, 60, lambda: stack.logs("vernier-cpu"))
    until(lambda: "has packages" in stack.logs("examples-cpu"))


def test_an_empty_host_without_examples_never_turns_ready_by_itself(
    image: str, builder: str, tmp_path: Path
) -> None:
    stack = Stack(clone(tmp_path), "vernier-empty", VERNIER_EXAMPLES="0")
    try:
        stack.compose("--profile", "cpu", "up", "--detach", "vernier-cpu", "examples-cpu")
        until(lambda: "VERNIER_EXAMPLES is not 1" in stack.logs("examples-cpu"))
        until(lambda: "no engine package" in stack.logs("vernier-cpu"))
        time.sleep(5)
        assert not models(stack.url("vernier-cpu", 8000))
        assert inspect(stack.container("examples-cpu"))["State"]["ExitCode"] == 0
    finally:
        stack.down("--volumes")


def test_with_secrets_predictions_need_a_key_and_loading_the_token(
    image: str, builder: str, tmp_path: Path
) -> None:
    folder = clone(tmp_path / "clone")
    port = free_port()
    stack = Stack(folder, "vernier-secured", "docker-compose.secured.yml", PUBLISH=f"127.0.0.1:{port}")
    up = ["--profile", "cpu", "up", "--detach", "vernier-cpu", "examples-cpu"]
    try:
        refused = stack.compose(*up, check=False)
        assert f"does not exist: {folder / 'secrets'}/" in refused.splitlines()[-1]
        made = run("scripts/make_secrets.sh", "front-end", cwd=folder).stdout
        key = made.split("kept nowhere: ")[1].split()[0]
        authority = Authority(tmp_path, "authority")
        pair = authority.issue("service")
        for name, path in (("tls_certificate", pair.certificate), ("tls_key", pair.key)):
            (folder / "secrets" / name).write_bytes(path.read_bytes())
            (folder / "secrets" / name).chmod(0o444)
        stack.compose(*up)
        trust = ssl.create_default_context(cafile=str(authority.certificate))
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trust, timeout=30) as client:

            def status(**headers: str) -> int:
                try:
                    body = {"model": "ranker", "inputs": RANKER}
                    return client.post("/v1/predict", json=body, headers=headers).status_code
                except httpx.TransportError:
                    return 0

            until(lambda: status(authorization=f"Bearer {key}") == 200, 90, lambda: stack.logs("vernier-cpu"))
            assert status() == 401
            token = (folder / "secrets" / "admin_token").read_text()
            route = "/v2/repository/models/ranker/load"
            assert client.post(route, headers={"authorization": f"Bearer {key}"}).status_code in (401, 403)
            assert client.post(route, headers={"authorization": f"Bearer {token}"}).status_code == 200
        assert token not in json.dumps(inspect(stack.container("vernier-cpu")))
    finally:
        stack.down("--volumes")


def test_a_port_that_is_taken_is_named(image: str, tmp_path: Path) -> None:
    stack = Stack(clone(tmp_path), "vernier-port", PUBLISH="127.0.0.1:1")
    other = Stack(tmp_path, "vernier-port-2", PUBLISH="127.0.0.1:1")
    try:
        stack.compose("--profile", "cpu", "up", "--detach", "vernier-cpu")
        refused = other.compose("--profile", "cpu", "up", "--detach", "vernier-cpu", check=False)
        assert "127.0.0.1:1" in refused.splitlines()[-1]
    finally:
        stack.down("--volumes")
        other.down("--volumes")


def test_a_gpu_that_is_missing_is_named(image: str, tmp_path: Path) -> None:
    stack = Stack(clone(tmp_path), "vernier-gpu")
    try:
        run("docker", "tag", image, "vernier:dev-gpu")
        refused = stack.compose(
            "--profile", "gpu", "up", "--detach", "--no-build", "vernier-gpu", check=False
        )
        assert "nvidia" in refused.splitlines()[-1]
    finally:
        stack.down("--volumes")
        run("docker", "rmi", "vernier:dev-gpu")


def test_a_machine_that_cannot_run_an_engine_is_told_from_a_test_that_fails(tmp_path: Path) -> None:
    """What CI goes by: 69 and a reason, and else the exit code of the command."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "dockerd").write_text(
        "#!/bin/sh\necho 'failed to start daemon: no control groups' >&2; exit 1\n"
    )
    (programs / "dockerd").chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    script = str(ROOT / "scripts" / "docker_stand_ins.sh")
    done = run(script, "true", check=False, PATH=path, VERNIER_DOCKER_DIR=str(tmp_path / "engine"))
    assert done.returncode == 69
    reason = "containers were not tested: dockerd does not start: failed to start daemon: no control groups"
    assert done.stdout.splitlines()[-1] == reason
