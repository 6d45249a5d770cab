"""A real Prometheus that scrapes a service under test."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.ops.expressions import ROOT, RULES
from tests.support.server import free_port

#: What a Kubernetes scrape adds; KServe's and KEDA's queries ask for these names.
KUBERNETES = {"namespace": "vernier", "pod": "ranker-predictor-0"}

Hasten = Callable[[dict[str, Any]], dict[str, Any]]


class Prometheus:
    """Answers as of `at`, Unix time, however long the tests take: a rate over the last seconds would run dry."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.at = 0.0

    def query(self, expression: str) -> list[float]:
        """The values of an instant query; fails the test when the expression is refused."""
        asked = {"query": expression, "time": f"{self.at:.3f}"}
        answer = httpx.post(f"{self._url}/api/v1/query", data=asked, timeout=20).json()
        assert answer["status"] == "success", (expression, answer.get("error"))
        data = answer["data"]
        found = [data] if data["resultType"] == "scalar" else data["result"]
        return [float(one["result"][1] if "result" in one else one["value"][1]) for one in found]

    def is_up(self) -> bool:
        """Whether it answers yet."""
        try:
            return httpx.get(f"{self._url}/-/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def groups(self) -> list[dict[str, Any]]:
        """Every rule with its state, by group."""
        found: list[dict[str, Any]] = httpx.get(f"{self._url}/api/v1/rules", timeout=10).json()["data"][
            "groups"
        ]
        return found

    def firing(self) -> set[str]:
        """The names of the alerts that ring."""
        rules = [rule for group in self.groups() for rule in group["rules"]]
        return {rule["name"] for rule in rules if rule.get("state") == "firing"}


@contextmanager
def prometheus(folder: Path, ports: Sequence[int], hasten: Hasten | None = None) -> Iterator[Prometheus]:
    """The shipped configuration and rules, with other targets and shorter intervals.

    Args:
        ports: scraped, on this machine.
        hasten: changes a rule so that what takes minutes in production takes seconds here.
    """
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.fail("prometheus is missing: install Debian's package `prometheus`")
    (folder / "rules").mkdir(parents=True)
    for path in RULES.glob("*.yml"):
        rules = yaml.safe_load(path.read_text())
        for group in rules["groups"]:
            group["interval"] = "1s"
            if hasten is not None:
                group["rules"] = [hasten(rule) for rule in group["rules"]]
        (folder / "rules" / path.name).write_text(yaml.safe_dump(rules))
    config: dict[str, Any] = yaml.safe_load(
        (ROOT / "monitoring" / "prometheus" / "prometheus.yml").read_text()
    )
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    del config["alerting"]
    job = next(job for job in config["scrape_configs"] if job["job_name"] == "vernier")
    del job["dns_sd_configs"]
    targets = [f"127.0.0.1:{port}" for port in ports]
    job["static_configs"] = [{"targets": targets, "labels": KUBERNETES}]
    config["scrape_configs"] = [job]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    words = [
        binary,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(20)
