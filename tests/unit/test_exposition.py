"""What is recorded is what a scrape reads, and the text is valid Prometheus exposition."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vernier.engine.base import StageTimes
from vernier.exposition import Metrics


def scrape(registry: CollectorRegistry) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = generate_latest(registry).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def read(samples: dict[Any, float], name: str, **labels: str) -> float:
    return sum(v for (found, have), v in samples.items() if found == name and labels.items() <= set(have))


def test_a_batch_is_counted_in_ours_and_in_tritons_names() -> None:
    registry = CollectorRegistry()
    model = Metrics(registry, "1.0").model("ranker", "3")
    model.admitted(3)
    model.batch_done(
        "int8", "onnxruntime", 5, 8, 3, "full", [0.001, 0.002, 0.003], StageTimes(infer=0.004), 0.005
    )
    model.ended("answered", 2)
    model.ended("expired")
    model.responded("ok", "int8", "onnxruntime", 0.01)
    samples = scrape(registry)
    assert read(samples, "vernier_requests_admitted_total", model="ranker", version="3") == 3
    assert read(samples, "vernier_requests_ended_total", outcome="answered") == 2
    assert read(samples, "vernier_dispatch_total", reason="full") == 1
    assert read(samples, "vernier_queue_duration_seconds_count", precision="int8") == 3
    assert abs(read(samples, "vernier_queue_duration_seconds_sum") - 0.006) < 1e-12
    assert read(samples, "vernier_compute_duration_seconds_sum", stage="infer") == 0.004
    assert read(samples, "vernier_batch_fill_ratio_sum") == 5 / 8
    assert read(samples, "nv_inference_count", model="ranker") == 5
    assert read(samples, "nv_inference_exec_count") == 1
    assert read(samples, "nv_inference_request_success") == 2
    assert read(samples, "nv_inference_request_failure") == 1
    assert round(read(samples, "nv_inference_compute_infer_duration_us")) == 3 * 4000  # for each request


def test_histogram_buckets_are_cumulative_and_hold_their_bounds() -> None:
    registry = CollectorRegistry()
    model = Metrics(registry, "1.0").model("m", "1")
    for value in (1e-3, 1.1e-3, 99.0):
        model.responded("ok", "fp32", "onnxruntime", value)
    samples = scrape(registry)
    name = "vernier_request_duration_seconds_bucket"
    assert read(samples, name, le="0.00075") == 0
    assert read(samples, name, le="0.001") == 1
    assert read(samples, name, le="0.0015") == 2
    assert read(samples, name, le="+Inf") == 3


def test_only_one_precision_is_active_and_gate_budget_and_errors_are_shown() -> None:
    registry = CollectorRegistry()
    model = Metrics(registry, "1.0").model("m", "1")
    for precision, size in (("fp32", 400), ("int8", 100)):
        model.engine_loaded(precision, "onnxruntime", size, 0.5)
    model.precision_active("int8", "onnxruntime")
    model.gate_error("int8", "onnxruntime", {"rel_l2.p99@score": 0.01, "auc": 0.8})
    model.precision_budget("int8", {"rel_l2.max": 0.02})
    model.precision_error("int8", "rel_l2", 0.011)
    model.precision_sample("within")
    model.fallback("int8", "fp16", "budget")
    model.nonfinite_outputs("int8")
    samples = scrape(registry)
    assert read(samples, "vernier_precision_active") == 1
    assert read(samples, "vernier_precision_active", precision="int8") == 1
    assert read(samples, "vernier_engine_bytes", precision="fp32") == 400
    assert (
        read(samples, "vernier_precision_gate_error", metric="rel_l2", statistic="p99", output="score")
        == 0.01
    )
    assert read(samples, "vernier_precision_gate_error", metric="auc", statistic="") == 0.8
    assert read(samples, "vernier_precision_budget", metric="rel_l2", statistic="max") == 0.02
    assert read(samples, "vernier_precision_error_count", metric="rel_l2") == 1
    assert read(samples, "vernier_precision_samples_total", result="within") == 1
    assert read(samples, "vernier_precision_fallbacks_total", **{"from": "int8", "to": "fp16"}) == 1
    assert read(samples, "vernier_nonfinite_outputs_total", precision="int8") == 1


def test_refused_packages_and_requests_without_a_model_are_counted_and_forgotten_models_are_gone() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry, "1.0")
    metrics.model("m", "1").admitted()
    metrics.package_refused("bad", "2", "package")
    metrics.responded_without_model("invalid_json")
    metrics.set_ready(True)
    samples = scrape(registry)
    assert read(samples, "vernier_package_refused_total", model="bad") == 1
    assert read(samples, "vernier_requests_total", code="invalid_json", model="") == 1
    assert read(samples, "vernier_ready") == 1
    metrics.forget("m", "1")
    assert read(scrape(registry), "vernier_requests_admitted_total") == 0
