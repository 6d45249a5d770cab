"""A real Prometheus scrapes the real service, and every expression that the project ships finds data there.

Dashboards, alerts and autoscalers fail silently: a renamed label is an empty panel. So traffic makes everything
happen that they ask about (batches, a fallback, non-finite outputs, a full queue, a refused package), and then
each expression is evaluated. Alerts are evaluated with their comparisons turned into 0 or 1.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, start_http_server

from tests.ops.expressions import Expression, every_expression, selectors
from tests.support.packages import mlp_model, slow_model, write_package
from tests.support.prometheus import Prometheus, prometheus
from tests.support.server import Server, free_port, serve
from vernier.engine.nvml import GpuCollector, GpuReading

INSIDE = np.full((1, 4), 0.5, np.float32).tolist()
OUTSIDE = np.full((1, 4), 5.0, np.float32).tolist()
_COMPARISON = re.compile(r"(?<![=!<>~])(>=|<=|==|!=|>|<)(?!=|~)")


class Readings:
    """In place of NVML, on a machine without a GPU: one that tells everything, energy rising."""

    def read(self) -> list[GpuReading]:
        return [GpuReading(0, "GPU-0", "any", "", 0.5, 10, 20, 100.0, 700.0, time.monotonic() * 100, 40.0)]


def ask(server: Server, model: str, x: list[list[float]]) -> int:
    return server.predict({"x": x}, model=model).status_code


def make_everything_happen(server: Server, until: float) -> None:
    """Traffic until the monotonic time: within and out of budget, non-finite, more than the queue takes."""
    with ThreadPoolExecutor(12) as pool:
        while time.monotonic() < until:
            wanted = [("ranker", INSIDE), ("ranker", OUTSIDE), ("overflow", OUTSIDE), ("sound", INSIDE)] * 3
            wanted += [("slow", INSIDE * 16)] * 12
            statuses = set(pool.map(lambda call: ask(server, *call), wanted))
            assert statuses <= {200, 429}


def pass_the_gate(package: Path) -> None:
    """Writes into the manifest what the builder's gate would have."""
    path = package / "manifest.json"
    manifest = json.loads(path.read_text())
    metrics = {"rel_l2.max": 0.001, "auc": 0.8}
    gate = {"passed": True, "budget": ["rel_l2.max<=0.01"], "metrics": metrics, "samples": 4}
    manifest["variants"]["int8"]["gates"] = {"onnxruntime": gate}
    path.write_text(json.dumps(manifest))


def evaluable(expression: Expression) -> str:
    """An alert's expression as one that returns data while all is well; others as they are."""
    if expression.kind != "alert":
        return expression.text
    pieces = re.split(r"(\{[^}]*\})", expression.text)
    turned = "".join(
        piece if piece.startswith("{") else _COMPARISON.sub(r"\1 bool", piece) for piece in pieces
    )
    # 15 minutes ago nothing ran; both sides of `unless` have to be there all the same
    turned = re.sub(r"\boffset \w+", "", turned).replace("unless", "and")
    return turned.replace("absent(", "count(")


def test_alerts_are_turned_into_expressions_that_return_data() -> None:
    text = '(a{x!="1"} > 0 unless a offset 15m) and on (x) b == 1'
    expected = '(a{x!="1"} > bool 0 and a ) and on (x) b == bool 1'
    assert evaluable(Expression("", text, "alert")) == expected
    assert evaluable(Expression("", "a > 0", "panel")) == "a > 0"


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    engines = folder / "engines"
    engines.mkdir()
    write_package(engines, "ranker", variants={"int8": mlp_model(bend="clip")})
    write_package(engines, "overflow", variants={"fp16": mlp_model(bend="overflow")})
    pass_the_gate(write_package(engines, "sound", variants={"int8": mlp_model()}))
    write_package(engines, "slow", model=slow_model())
    damaged = write_package(engines, "damaged")
    (damaged / "fp32.onnx").write_bytes(b"not what the manifest says")
    settings = {
        "monitor_share": "1",
        "latency_objective_ms": "20",
        "models__ranker__precision": "int8",
        "models__overflow__precision": "fp16",
        "models__sound__precision": "int8",
        "models__slow__queue_limit": "1",
    }
    registry = CollectorRegistry()
    registry.register(GpuCollector(Readings()))  # type: ignore[arg-type]
    gpu_port = free_port()
    exporter, thread = start_http_server(gpu_port, "127.0.0.1", registry)
    try:
        with (
            serve(engines, folder / "log", **settings) as server,
            prometheus(folder, (server.port, gpu_port)) as found,
        ):
            make_everything_happen(server, time.monotonic() + 14)
            time.sleep(2.5)  # one more scrape, and the rules that read recorded series
            found.at = time.time()
            yield found
    finally:
        exporter.shutdown()
        exporter.server_close()
        thread.join()
        assert not [t for t in threading.enumerate() if t is thread and t.is_alive()]


@pytest.mark.parametrize("expression", every_expression(), ids=lambda e: e.where)
def test_every_expression_finds_data(scraped: Prometheus, expression: Expression) -> None:
    values = scraped.query(evaluable(expression))
    assert values, expression.text
    assert any(not math.isnan(value) for value in values), f"only NaN: {expression.text}"


def test_every_selector_of_every_expression_finds_a_series(scraped: Prometheus) -> None:
    asked = {}
    for expression in every_expression():
        text = re.sub(r"\boffset \w+", "", expression.text)
        for name, _ in selectors(text):
            for match in re.finditer(rf"(?<![\w:]){re.escape(name)}(\{{[^}}]*\}})?(?![\w:])", text):
                asked[match[0]] = expression.where
    empty = {selector: where for selector, where in asked.items() if not scraped.query(selector)}
    assert not empty


def test_the_rules_are_all_healthy(scraped: Prometheus) -> None:
    groups = scraped.groups()
    broken = [(r["name"], r["lastError"]) for group in groups for r in group["rules"] if r["health"] == "err"]
    assert not broken
    firing = {
        a["labels"]["alertname"] for group in groups for r in group["rules"] for a in r.get("alerts", [])
    }
    # what happened has been noticed
    assert {"VernierPrecisionFallback", "VernierNonfiniteOutputs", "VernierPackageRefused"} <= firing
    assert not firing & {"VernierAbsent", "VernierDown", "VernierSlotFailed", "VernierRequestsUnaccounted"}
