"""What NVML says of the devices that the service uses."""

from __future__ import annotations

from scripts.dashboards.parts import Dashboard, Query, graph
from scripts.dashboards.queries import RANGE, REPLICAS, variables

EACH = "{{instance}} GPU {{gpu}}"


def device(metric: str, name: str) -> Query:
    return Query(f"vernier_gpu_{metric}{{{REPLICAS}}}", f"{EACH} {{{{mig}}}} {name}".strip())


def dashboard() -> Dashboard:
    energy = f"sum(rate(vernier_gpu_energy_joules_total{{{REPLICAS}}}[{RANGE}]))"
    answers = f'sum(rate(vernier_requests_ended_total{{{REPLICAS}, outcome="answered"}}[{RANGE}]))'
    panels = [
        graph(
            "Utilization",
            [device("utilization_ratio", "")],
            "Share of time in which a kernel ran. It says nothing about waiting: scale by the queue, not by this.",
            "percentunit",
            12,
        ),
        graph(
            "Memory",
            [device("memory_used_bytes", "used"), device("memory_total_bytes", "total")],
            "An alert fires at 95 %.",
            "bytes",
            12,
        ),
        graph(
            "Power",
            [device("power_watts", "used"), device("power_limit_watts", "limit")],
            "At the limit the clocks fall, and latency rises.",
            "watt",
        ),
        graph("Temperature", [device("temperature_celsius", "")], "Hot devices slow down.", "celsius"),
        graph(
            "Energy of an answer",
            [Query(f"{energy} / {answers}")],
            "All devices' energy over all answers.",
            "joule",
        ),
    ]
    return Dashboard("vernier-gpu", "Vernier: GPU", __doc__ or "", variables()[:1], panels)
