"""What `/metrics` answers: the recorded numbers as Prometheus metric families, Triton's names beside ours."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping

from prometheus_client import GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR, CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    UntypedMetricFamily,
)
from prometheus_client.registry import Collector

from vernier.metrics import BucketHistogram, ModelMetrics


def register_process(registry: CollectorRegistry) -> None:
    """Adds what Prometheus' clients tell of every process: memory, processor time, open files."""
    for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
        registry.register(collector)


def _metric_labels(name: str) -> dict[str, str]:
    """`rel_l2.p99@score` becomes three labels, so that it joins with `vernier_precision_error{metric="rel_l2"}`."""
    measured, _, output = name.partition("@")
    metric, _, statistic = measured.partition(".")
    return {"metric": metric, "statistic": statistic, "output": output}


class _ModelFamilies:
    """One scrape: families filled from every ModelMetrics."""

    def __init__(self, counts_requests: bool) -> None:
        self.families: dict[str, Metric] = {}
        self._counts_requests = counts_requests

    def counter(self, name: str, text: str, labels: Mapping[str, str], value: float) -> None:
        family = self.families.get(name)
        if family is None:
            family = self.families[name] = CounterMetricFamily(name, text, labels=list(labels))
        assert isinstance(family, CounterMetricFamily)
        family.add_metric(list(labels.values()), value)

    def gauge(self, name: str, text: str, labels: Mapping[str, str], value: float) -> None:
        family = self.families.get(name)
        if family is None:
            family = self.families[name] = GaugeMetricFamily(name, text, labels=list(labels))
        assert isinstance(family, GaugeMetricFamily)
        family.add_metric(list(labels.values()), value)

    def untyped(self, name: str, text: str, labels: Mapping[str, str], value: float) -> None:
        family = self.families.get(name)
        if family is None:
            family = self.families[name] = UntypedMetricFamily(name, text, labels=list(labels))
        assert isinstance(family, UntypedMetricFamily)
        family.add_metric(list(labels.values()), value)

    def histogram(self, name: str, text: str, labels: Mapping[str, str], data: BucketHistogram) -> None:
        family = self.families.get(name)
        if family is None:
            family = self.families[name] = HistogramMetricFamily(name, text, labels=list(labels))
        assert isinstance(family, HistogramMetricFamily)
        family.add_metric(list(labels.values()), data.buckets(), data.total)

    def add(self, m: ModelMetrics) -> None:
        base = {"model": m.model, "version": m.version}
        self._requests(m, base)
        self._batches(m, base)
        self._precision(m, base)
        self._triton(m, base)

    def _requests(self, m: ModelMetrics, base: Mapping[str, str]) -> None:
        if self._counts_requests:
            self._books(m, base)
        for code, n in m._codes.items():
            self.counter(
                "vernier_requests", "Responses by code; ok or an error's.", {**base, "code": code}, n
            )
        for reason, n in m._rejected.items():
            self.counter("vernier_rejected", "Requests refused at admission.", {**base, "reason": reason}, n)
        self.gauge("vernier_queue_depth", "Requests that wait for a slot.", base, m._queue_depth)
        for state, n in m._slots.items():
            self.gauge("vernier_slots", "Slots by state.", {**base, "state": state}, n)
        if m._objective_s is not None:
            self.gauge(
                "vernier_latency_objective_seconds", "The model's latency objective.", base, m._objective_s
            )

    def _books(self, m: ModelMetrics, base: Mapping[str, str]) -> None:
        self.counter("vernier_requests_admitted", "Requests taken into the queue.", base, m._admitted)
        for outcome, n in m._ended.items():
            self.counter(
                "vernier_requests_ended",
                "Admitted requests by how they ended.",
                {**base, "outcome": outcome},
                n,
            )
        self.gauge("vernier_inflight_requests", "Admitted requests that have not ended.", base, m._inflight)

    def _batches(self, m: ModelMetrics, base: Mapping[str, str]) -> None:
        for (precision, runtime), s in m._serving.items():
            full = {**base, "precision": precision, "runtime": runtime}
            self.histogram(
                "vernier_request_duration_seconds",
                "From the request's arrival to its response.",
                full,
                s.request,
            )
            self.histogram("vernier_queue_duration_seconds", "From admission to dispatch.", full, s.queue)
            for stage, data in s.stages.items():
                self.histogram(
                    "vernier_compute_duration_seconds",
                    "One execution, by stage.",
                    {**full, "stage": stage},
                    data,
                )
            self.histogram(
                "vernier_predicted_duration_seconds",
                "What the policy expected an execution to take.",
                full,
                s.predicted,
            )
            self.histogram("vernier_batch_size", "Useful rows of an execution.", full, s.rows)
            self.histogram("vernier_batch_fill_ratio", "Useful rows over computed rows.", full, s.fill)
            for bucket, (executions, *seconds) in sorted(s.buckets.items()):
                sized = {**full, "bucket": str(bucket)}
                self.counter(
                    "vernier_bucket_executions",
                    "Executions by rows computed, padding included.",
                    sized,
                    executions,
                )
                for stage, spent in zip(s.stages, seconds, strict=True):
                    self.counter(
                        "vernier_bucket_compute_seconds",
                        "Seconds of executions by rows computed, and by stage.",
                        {**sized, "stage": stage},
                        spent,
                    )
        if m._last_execution_s is not None:
            self.gauge(
                "vernier_last_execution_timestamp_seconds",
                "When the last execution ended, in Unix time.",
                base,
                time.time() - (time.monotonic() - m._last_execution_s),
            )
        for reason, n in m._dispatched.items():
            self.counter(
                "vernier_dispatch", "Batches by why they were dispatched.", {**base, "reason": reason}, n
            )
        for kind, n in m.launches().items():
            self.counter(
                "vernier_graph_launches", "Executions by CUDA graph or plain.", {**base, "kind": kind}, n
            )
        self.counter("vernier_useful_elements", "Input elements that clients sent.", base, m._useful)
        self.counter("vernier_padded_elements", "Input elements computed, padding included.", base, m._padded)

    def _precision(self, m: ModelMetrics, base: Mapping[str, str]) -> None:
        active_precision, active_runtime = m._active
        for precision in m._known:
            self.gauge(
                "vernier_precision_active",
                "1 for the precision that new batches take.",
                {**base, "precision": precision, "runtime": active_runtime},
                float(precision == active_precision),
            )
        for (precision, runtime), (size, seconds) in m._engines.items():
            full = {**base, "precision": precision, "runtime": runtime}
            self.gauge("vernier_engine_bytes", "Size of a loaded engine.", full, size)
            self.gauge("vernier_engine_load_seconds", "How long loading the engine took.", full, seconds)
        for (precision, runtime, metric), value in m._gate.items():
            self.gauge(
                "vernier_precision_gate_error",
                "What the accuracy gate measured.",
                {**base, "precision": precision, "runtime": runtime, **_metric_labels(metric)},
                value,
            )
        for (precision, metric), value in m._budgets.items():
            self.gauge(
                "vernier_precision_budget",
                "The bound that live errors are held against.",
                {**base, "precision": precision, **_metric_labels(metric)},
                value,
            )
        for (precision, metric), data in m._errors.items():
            self.histogram(
                "vernier_precision_error",
                "Error of live requests against FP32.",
                {**base, "precision": precision, "metric": metric},
                data,
            )
        for result, n in m._samples.items():
            self.counter(
                "vernier_precision_samples",
                "Live requests compared with FP32.",
                {**base, "result": result},
                n,
            )
        for (from_, to, reason), n in m._fallbacks.items():
            self.counter(
                "vernier_precision_fallbacks",
                "Moves of live traffic to another variant.",
                {**base, "from": from_, "to": to, "reason": reason},
                n,
            )
        for precision, n in m._nonfinite.items():
            self.counter(
                "vernier_nonfinite_outputs",
                "Requests whose reduced-precision output was not finite.",
                {**base, "precision": precision},
                n,
            )

    def _triton(self, m: ModelMetrics, base: Mapping[str, str]) -> None:
        """Triton's names, microseconds and cumulative, so that existing dashboards work.

        Untyped, since the exposition would append `_total` to a counter's name and Triton's have none.
        """
        ended = m._ended if self._counts_requests else dict.fromkeys(m._ended, 0)
        answered = ended["answered"]
        all_serving = list(m._serving.values())
        rows = sum(s.rows.total for s in all_serving)
        micro = 1e6
        values = {
            "nv_inference_request_success": answered,
            "nv_inference_request_failure": sum(n for outcome, n in ended.items() if outcome != "answered"),
            "nv_inference_count": rows,
            "nv_inference_exec_count": sum(s.executions for s in all_serving),
            "nv_inference_request_duration_us": sum(s.request.total for s in all_serving) * micro,
            "nv_inference_queue_duration_us": sum(s.queue.total for s in all_serving) * micro,
        }
        for stage in ("input", "infer", "output"):
            values[f"nv_inference_compute_{stage}_duration_us"] = (
                sum(s.requests_stages[stage] for s in all_serving) * micro
            )
        for name, value in values.items():
            self.untyped(name, "As Triton Inference Server defines it.", base, value)
        self.gauge(
            "nv_inference_pending_request_count",
            "As Triton Inference Server defines it.",
            base,
            m._queue_depth,
        )


class Metrics(Collector):
    """All models of the process, and the process's own state. Registers itself on `registry`.

    `model`, `forget`, `set_ready` and `package_refused` may be called from any thread.

    Args:
        counts_requests: False in an engine process, whose fronts count the requests that it admits and ends.
    """

    def __init__(
        self, registry: CollectorRegistry, app_version: str, *, counts_requests: bool = True
    ) -> None:
        self._models: dict[tuple[str, str], ModelMetrics] = {}
        self._lock = threading.Lock()
        self._refused: dict[tuple[str, str, str], int] = {}
        self._ready = 0
        self._app_version = app_version
        self._unrouted: dict[str, int] = {}
        self._counts_requests = counts_requests
        registry.register(self)

    def model(self, name: str, version: str) -> ModelMetrics:
        """The metrics of one model version, made on first use and kept through reloads."""
        with self._lock:
            return self._models.setdefault((name, version), ModelMetrics(name, version))

    def forget(self, name: str, version: str) -> None:
        """Drops the series of an unloaded version."""
        with self._lock:
            self._models.pop((name, version), None)

    def set_ready(self, ready: bool) -> None:
        self._ready = int(ready)

    def package_refused(self, model: str, version: str, reason: str) -> None:
        key = (model, version, reason)
        with self._lock:
            self._refused[key] = self._refused.get(key, 0) + 1

    def responded_without_model(self, code: str, n: int = 1) -> None:
        """Responses for which no model was found: bad JSON, an unknown name …"""
        self._unrouted[code] = self._unrouted.get(code, 0) + n

    def describe(self) -> Iterator[Metric]:
        """Nothing up front: the families depend on the models that are loaded."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        families = _ModelFamilies(self._counts_requests)
        with self._lock:
            models = list(self._models.values())
            refused = dict(self._refused)
        for m in models:
            families.add(m)
        for code, n in dict(self._unrouted).items():
            families.counter(
                "vernier_requests",
                "Responses by code; ok or an error's.",
                {"model": "", "version": "", "code": code},
                n,
            )
        for (model, version, reason), n in refused.items():
            families.counter(
                "vernier_package_refused",
                "Packages that were not loaded.",
                {"model": model, "version": version, "reason": reason},
                n,
            )
        families.gauge("vernier_ready", "1 when the readiness probe is green.", {}, self._ready)
        families.gauge("vernier_build_info", "Always 1.", {"app_version": self._app_version}, 1)
        yield from families.families.values()
