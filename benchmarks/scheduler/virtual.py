"""The same loads in virtual time: the service's own batcher, with the bare session's latency curve."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from benchmarks.load import poisson
from benchmarks.scheduler.simulation import Arrival, Simulation, fixed_delay
from vernier.engine.base import default_buckets
from vernier.serving.queueing.admission import Policy
from vernier.serving.queueing.batcher import Batcher
from vernier.serving.queueing.batching import decide
from vernier.serving.queueing.latency import LatencyCurve
from vernier.serving.queueing.padding import BatchLayout
from vernier.tensors import TensorSpec

POLICIES = {"vernier": decide, "fixed 2 ms": fixed_delay(0.002)}


def simulate(
    curve: Mapping[int, float],
    rate: float,
    seconds: float,
    seed: int,
    objective_s: float,
    policy: str,
    max_batch: int,
) -> dict[str, float]:
    """Milliseconds at the median and the 99th percentile of one load, and the share refused."""
    row = TensorSpec("x", "float32", ("batch",))
    layout = BatchLayout("dynamic", default_buckets(max_batch), [row], [row], "batch")
    batcher = Batcher(
        layout,
        {"fp32": True},
        "fp32",
        Policy(objective_s=objective_s),
        {"fp32": curve},
        decide=POLICIES[policy],
    )
    service = LatencyCurve(layout.buckets, True, curve)
    arrivals = [Arrival(float(at)) for at in poisson(rate, seconds, seed=seed)]
    trace = Simulation(batcher, 1, service.seconds).run(arrivals)
    latencies = trace.latencies() * 1e3
    return {
        "p50_ms": float(np.quantile(latencies, 0.5)),
        "p99_ms": float(np.quantile(latencies, 0.99)),
        "refused": len(trace.of("refused")) / len(arrivals),
    }
