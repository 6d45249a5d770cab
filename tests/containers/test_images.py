"""The CPU images, built and run as their documentation says: without root, on a read-only file system."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.containers import docker, inspect, run, until
from tests.support.load import ROW
from tests.support.packages import slow_model, write_package
from tests.support.server import free_port

HARDENED = [
    "--read-only",
    "--cap-drop",
    "ALL",
    "--security-opt",
    "no-new-privileges",
    "--tmpfs",
    "/tmp:mode=1777",
]


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    engines = tmp_path / "engines"
    write_package(engines)
    return engines


class Service:
    """A container of the service without an init, as Kubernetes runs it."""

    def __init__(self, image: str, engines: Path, *options: str) -> None:
        self.port, self.health_port = free_port(), free_port()
        published = ["-p", f"127.0.0.1:{self.port}:8000", "-p", f"127.0.0.1:{self.health_port}:8002"]
        words = ["run", "--detach", *HARDENED, *published, "-v", f"{engines}:/engines:ro", *options, image]
        self.name = docker(*words).splitlines()[-1]

    @property
    def log(self) -> str:
        return docker("logs", self.name)

    @property
    def health(self) -> str:
        """By the image's own HEALTHCHECK."""
        return str(inspect(self.name)["State"]["Health"]["Status"])

    def ready(self) -> None:
        def answers() -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{self.health_port}/v2/health/ready").status_code == 200
            except httpx.TransportError:
                return False

        until(answers, 60, lambda: self.log)


@pytest.fixture
def service(image: str, packages: Path) -> Iterator[Service]:
    started = Service(image, packages)
    try:
        started.ready()
        yield started
    finally:
        docker("rm", "--force", "--volumes", started.name)


def tried(container: str, *words: str) -> bool:
    return run("docker", "exec", container, *words, check=False).returncode == 0


def test_it_answers_and_is_healthy_by_its_own_check(service: Service) -> None:
    url = f"http://127.0.0.1:{service.port}/v1/predict"
    answer = httpx.post(url, json={"model": "mlp", "inputs": ROW})
    assert answer.status_code == 200, answer.text
    assert "vernier_ready 1.0" in httpx.get(f"http://127.0.0.1:{service.health_port}/metrics").text
    until(lambda: service.health == "healthy", 30, lambda: json.dumps(inspect(service.name)["State"]))


def test_it_is_an_ordinary_user_who_can_write_nothing_but_its_cache(service: Service) -> None:
    assert docker("exec", service.name, "id", "-u") == "10001"
    for path in ("/srv/vernier/app/x", "/engines/x", "/opt/vernier/x", "/etc/x"):
        assert not tried(service.name, "sh", "-c", f": > {path}"), path
    assert tried(service.name, "sh", "-c", ": > /tmp/x")
    for tool in ("gcc", "g++", "make", "pip", "pip3"):
        assert not tried(service.name, "sh", "-c", f"command -v {tool}"), tool


def test_sigterm_finishes_what_was_admitted_and_ends_with_0(image: str, tmp_path: Path) -> None:
    engines = tmp_path / "engines"
    write_package(engines, "slow", model=slow_model(layers=200))
    service = Service(image, engines, "--env", "VERNIER_SLOTS=1", "--env", "VERNIER_DRAIN_TIMEOUT_S=60")
    statuses: list[int] = []

    def ask() -> None:
        body = {"model": "slow", "inputs": {"x": ROW["x"] * 800}}
        answer = httpx.post(f"http://127.0.0.1:{service.port}/v1/predict", json=body, timeout=90)
        statuses.append(answer.status_code)

    try:
        service.ready()
        clients = [threading.Thread(target=ask) for _ in range(8)]
        for client in clients:
            client.start()
        metrics = f"http://127.0.0.1:{service.health_port}/metrics"
        until(lambda: 'requests_admitted_total{model="slow",version="1"} 8.0' in httpx.get(metrics).text, 30)
        unanswered = 8 - len(statuses)
        started = time.monotonic()
        docker("stop", "--time", "90", service.name)
        assert time.monotonic() - started < 80
        for client in clients:
            client.join(30)
        assert unanswered > 0
        assert statuses == [200] * 8
        assert inspect(service.name)["State"]["ExitCode"] == 0
    finally:
        docker("rm", "--force", "--volumes", service.name)


def test_an_impossible_setting_ends_it_with_a_sentence(image: str) -> None:
    done = run("docker", "run", "--rm", *HARDENED, "--env", "VERNIER_PORT=many", image, check=False)
    assert done.returncode == 1
    assert "VERNIER_PORT" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_service_without_packages_is_not_healthy_and_says_why(image: str, tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir()
    options = ["--health-interval", "1s", "--health-start-period", "1s", "--health-retries", "2"]
    service = Service(image, tmp_path / "engines", *options)
    try:
        until(lambda: service.health == "unhealthy", 60, lambda: service.log)
        assert "no engine package" in service.log
        write_package(tmp_path / "staged")
        (tmp_path / "staged" / "mlp").rename(tmp_path / "engines" / "mlp")
        until(lambda: service.health == "healthy", 30, lambda: service.log)
    finally:
        docker("rm", "--force", "--volumes", service.name)


def test_the_builder_explains_itself_and_has_no_compiler(builder: str) -> None:
    assert {"build", "inspect", "compare"} <= set(docker("run", "--rm", *HARDENED, builder).split())
    done = run(
        "docker", "run", "--rm", "--entrypoint", "sh", builder, "-c", "id -u; command -v gcc pip", check=False
    )
    assert done.stdout.split() == ["10001"]


def test_nothing_but_what_the_images_need_is_sent_to_the_engine(checkout: Path, image: str) -> None:
    for path in (
        "secrets/admin_token",
        "engines/ranker/1/fp32.onnx",
        ".venv/bin/python",
        "app/x/__pycache__/x.pyc",
    ):
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).touch()
    (checkout / "Everything").write_text(f"FROM {image}\nCOPY . /tmp/context/\n")
    words = ["docker", "build", "--quiet", "--file", "Everything", "--tag", "vernier-test:context", "."]
    run(*words, cwd=checkout)
    try:
        find = [
            "--entrypoint",
            "find",
            "vernier-test:context",
            "/tmp/context",
            "-type",
            "f",
            "-printf",
            "%P\\n",
        ]
        found = docker("run", "--rm", *find).split()
    finally:
        docker("rmi", "vernier-test:context")
    assert {path.split("/")[0] for path in found} == {"LICENSE", "app", "build_engine.py", "requirements"}
    assert not [path for path in found if "__pycache__" in path]
