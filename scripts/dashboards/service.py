"""Is it fast, is it answering, and where does the time go?"""

from __future__ import annotations

from scripts.dashboards.parts import Dashboard, Json, Query, graph, heatmap, number, row, table
from scripts.dashboards.queries import (
    BY,
    ERRORS,
    NAMES,
    OWED,
    PLAIN,
    RANGE,
    REPLICAS,
    RUNNING,
    buckets,
    fallback_marks,
    gauge,
    mean,
    or_zero,
    quantile,
    rate,
    shown,
    total,
    variables,
    whole,
)

REQUEST = "vernier_request_duration_seconds"
QUEUE = "vernier_queue_duration_seconds"
COMPUTE = "vernier_compute_duration_seconds"
PREDICTED = "vernier_predicted_duration_seconds"
INFER = 'stage="infer"'
#: The service in one process tells no `process`: the label is then empty.
PROCESS = "instance, process"
PROCESS_NAMES = "{{instance}} {{process}}"


def overview() -> list[Json]:
    errors = f"({or_zero(whole('vernier_requests_total', OWED))}) / {whole('vernier_requests_total')}"
    return [
        number(
            "Ready replicas",
            Query(f"sum(vernier_ready{{{REPLICAS}}})"),
            "Replicas whose readiness probe is green.",
            "none",
            RUNNING,
        ),
        number(
            "Requests",
            Query(whole("vernier_requests_total")),
            "Responses a second, errors included.",
            "reqps",
            PLAIN,
        ),
        number(
            "Errors",
            Query(errors),
            "Share of requests that the service owed an answer and failed. Objective: 0.1 %.",
            "percentunit",
            ERRORS,
        ),
        number(
            "p99",
            Query(f"max({quantile(0.99, REQUEST)})"),
            "The slowest model's 99th percentile, from arrival to response.",
            "s",
            PLAIN,
        ),
        number(
            "Waiting",
            Query(f"sum({gauge('vernier_queue_depth')})"),
            "Requests that wait for a slot.",
            "none",
            PLAIN,
        ),
        number(
            "In flight",
            Query(f"sum({gauge('vernier_inflight_requests')})"),
            "Admitted, not yet ended.",
            "none",
            PLAIN,
        ),
        heatmap(
            "Latency", Query(buckets(REQUEST), "{{le}}"), "Every answered request, arrival to response.", "s"
        ),
        graph(
            "Latency against its objective",
            [
                *(Query(quantile(q, REQUEST), f"{NAMES} p{q * 100:g}") for q in (0.5, 0.95, 0.99)),
                Query(gauge("vernier_latency_objective_seconds", how="max"), f"{NAMES} objective"),
            ],
            "The objective promises 99 % of the answers within it.",
            "s",
            12,
            height=9,
        ),
        table(
            "Models",
            [
                (Query(total("vernier_requests_total")), "Requests/s", "reqps"),
                (Query(quantile(0.99, REQUEST)), "p99", "s"),
                (Query(shown("model:vernier_errors:ratio_rate1h")), "Errors, 1 h", "percentunit"),
                (Query(shown("model:vernier_queue_compute:ratio_rate2m")), "Queue / compute", "none"),
                (Query(mean("vernier_batch_size")), "Mean batch", "none"),
                (Query(gauge("vernier_queue_depth")), "Waiting", "none"),
            ],
            "One row for each model version that is served.",
        ),
    ]


def where_the_time_goes() -> list[Json]:
    execution = f"{total(COMPUTE + '_sum')} / {total(COMPUTE + '_count', INFER)}"
    return [
        row("Where the time goes"),
        graph(
            "Queue against compute",
            [
                Query(mean(QUEUE), f"{NAMES} queue"),
                Query(mean(COMPUTE, by=f"{BY}, stage"), f"{NAMES} {{{{stage}}}}"),
            ],
            "Mean wait of a request, and mean time of an execution by stage.",
            "s",
        ),
        graph(
            "Queue to compute ratio",
            [Query(shown("model:vernier_queue_compute:ratio_rate2m"), NAMES)],
            "What the autoscalers hold at 1: a request waits as long as its batch computes.",
            "none",
        ),
        graph(
            "Predicted against measured execution",
            [Query(mean(PREDICTED), f"{NAMES} predicted"), Query(execution, f"{NAMES} measured")],
            "The batching policy decides by the prediction; a gap means late or small batches.",
            "s",
        ),
    ]


def batching() -> list[Json]:
    useful = f"{total('vernier_useful_elements_total')} / {total('vernier_padded_elements_total')}"
    return [
        row("Batching"),
        graph(
            "Batch size",
            [
                Query(mean("vernier_batch_size"), f"{NAMES} mean"),
                Query(quantile(0.9, "vernier_batch_size"), f"{NAMES} p90"),
            ],
            "Useful rows of an execution.",
            "none",
            6,
        ),
        graph(
            "Batch fill",
            [Query(mean("vernier_batch_fill_ratio"), NAMES)],
            "Useful rows over computed rows; the rest is padding to the bucket.",
            "percentunit",
            6,
        ),
        graph(
            "Why batches left",
            [Query(total("vernier_dispatch_total", by=f"{BY}, reason"), f"{NAMES} {{{{reason}}}}")],
            "full: the largest bucket. delay: the oldest waited long enough. deadline: the tightest would be missed."
            " idle: nothing to wait for.",
            "ops",
            6,
            stack=True,
        ),
        graph(
            "Padding of variable lengths",
            [Query(f"1 - {useful}", NAMES)],
            "Share of the computed input elements that no client sent.",
            "percentunit",
            6,
        ),
    ]


def by_reason(title: str, metric: str, label: str, text: str, unit: str = "reqps") -> Json:
    query = Query(total(metric, by=f"{BY}, {label}"), f"{NAMES} {{{{{label}}}}}")
    return graph(title, [query], text, unit, 6, stack=True)


def traffic_and_capacity() -> list[Json]:
    process = f'{{job=~".*vernier.*", {REPLICAS}}}'
    return [
        row("Traffic and capacity"),
        graph(
            "Responses by code",
            [Query(f"sum by (code) ({rate('vernier_requests_total')})", "{{code}}")],
            "ok, or an error's code.",
            "reqps",
            6,
            stack=True,
        ),
        by_reason(
            "How admitted requests ended",
            "vernier_requests_ended_total",
            "outcome",
            "Each ends exactly once.",
        ),
        by_reason(
            "Refused at admission",
            "vernier_rejected_total",
            "reason",
            "Nothing was queued; clients are told when to come back.",
        ),
        graph(
            "Slots",
            [Query(gauge("vernier_slots", by="state"), "{{state}}")],
            "Places to run, by state. A failed one is an alert.",
            "none",
            6,
            stack=True,
        ),
        graph(
            "Queue depth",
            [Query(gauge("vernier_queue_depth"), NAMES)],
            "Requests that wait for a slot.",
            "none",
            6,
        ),
        by_reason(
            "CUDA graphs",
            "vernier_graph_launches_total",
            "kind",
            "Executions replayed from a graph, or run plainly although a graph was wanted.",
            "ops",
        ),
        graph(
            "Memory",
            [Query(f"sum by ({PROCESS}) (process_resident_memory_bytes{process})", PROCESS_NAMES)],
            "Resident set of each process. It should be flat under steady load.",
            "bytes",
            6,
        ),
        graph(
            "Open files and connections",
            [Query(f"sum by ({PROCESS}) (process_open_fds{process})", PROCESS_NAMES)],
            "File descriptors of each process, connections included.",
            "none",
            6,
        ),
        graph(
            "Cores in use",
            [Query(f"sum by ({PROCESS}) (rate(process_cpu_seconds_total{process}[{RANGE}]))", PROCESS_NAMES)],
            "Of each process. A front takes one core at most: at 1 on all of them, more fronts help.",
            "none",
            6,
        ),
        graph(
            "Restarted processes",
            [
                Query(
                    f"sum by (instance, role) (increase(vernier_process_restarts_total{{{REPLICAS}}}[{RANGE}]))",
                    "{{instance}} {{role}}",
                )
            ],
            "Engine and front processes that died and were started again. Any is an alert when it repeats.",
            "none",
            6,
        ),
    ]


def dashboard() -> Dashboard:
    panels = [*overview(), *where_the_time_goes(), *batching(), *traffic_and_capacity()]
    return Dashboard(
        "vernier-service", "Vernier: service", __doc__ or "", variables(), panels, fallback_marks()
    )
