"""Every metric and label that rules, dashboards and autoscalers name is one that the service exposes."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from tests.ops.expressions import every_expression, rule_expressions, selectors
from vernier.engine.nvml import GpuCollector, GpuReading
from vernier.exposition import Metrics

#: Labels that Prometheus adds to every series it scrapes, in Compose and in Kubernetes.
SCRAPED = {"job", "instance", "namespace", "pod", "service", "container", "endpoint"}


class Readings:
    """In place of NVML: one GPU that tells everything."""

    def read(self) -> list[GpuReading]:
        return [GpuReading(0, "GPU-0", "H200", "", 0.5, 10, 20, 100.0, 700.0, 5.0, 40.0)]


class Stages:
    input = infer = output = 0.001


def exposed() -> dict[str, set[str]]:
    """Series name → label names, of a service in which everything has happened once."""
    registry = CollectorRegistry()
    model = Metrics(registry, "0").model("m", "1")
    model.admitted()
    model.ended("answered")
    model.rejected("queue_full")
    model.responded("ok", "int8", "tensorrt", 0.001)
    model.batch_done("int8", "tensorrt", 3, 4, 2, "full", [0.001], Stages(), 0.001)
    model.padding(3, 4)
    model.set_latency_objective(0.01)
    model.watch_launches(lambda: (1, 2))
    model.engine_loaded("int8", "tensorrt", 1, 1.0)
    model.precision_active("int8", "tensorrt")
    model.gate_error("int8", "tensorrt", {"max_abs": 0.1})
    model.precision_budget("int8", {"max_abs": 0.1})
    model.precision_error("int8", "max_abs", 0.1)
    model.precision_sample("within")
    model.fallback("int8", "fp16", "budget")
    model.nonfinite_outputs("int8")
    registry.register(GpuCollector(Readings()))  # type: ignore[arg-type]
    found: dict[str, set[str]] = {}
    for family in registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    metrics = Metrics(CollectorRegistry(), "0")
    metrics.package_refused("m", "1", "package")
    for family in metrics.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    found["up"] = set()
    for name in ("process_resident_memory_bytes", "process_open_fds", "process_cpu_seconds_total"):
        found[name] = {"process"}
    found["vernier_process_restarts_total"] = {"role"}
    return found


def test_every_metric_that_is_asked_for_exists() -> None:
    recorded = {e.where.split()[1] for e in rule_expressions() if e.kind == "record"}
    known = exposed()
    unknown = {
        (name, expression.where)
        for expression in every_expression()
        for name, _ in selectors(expression.text)
        if name not in known and name not in recorded
    }
    assert not unknown


def test_every_label_that_is_matched_exists() -> None:
    known = exposed()
    wrong = {
        (name, label, expression.where)
        for expression in every_expression()
        for name, labels in selectors(expression.text)
        for label in labels
        if name in known and label not in known[name] | SCRAPED
    }
    assert not wrong


def test_the_selector_reader_finds_names_and_labels() -> None:
    found = list(
        selectors('sum by (model) (rate(vernier_x_total{code=~"a|b", model="m"}[5m])) > on (model) vernier_y')
    )
    assert found == [("vernier_x_total", {"code": "a|b", "model": "m"}), ("vernier_y", {})]
