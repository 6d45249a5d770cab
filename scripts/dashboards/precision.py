"""Are reduced-precision answers still inside their accuracy budget?"""

from __future__ import annotations

from scripts.dashboards.parts import Dashboard, Json, Query, graph, heatmap, number, row, timeline
from scripts.dashboards.queries import (
    BY,
    ERRORS,
    PLAIN,
    SHOWN,
    Steps,
    buckets,
    fallback_marks,
    gauge,
    mean,
    or_zero,
    quantile,
    rate,
    total,
    variables,
    whole,
)

ERROR = "vernier_precision_error"
SAMPLES = "vernier_precision_samples_total"
COMPARED = 'result=~"within|over"'
OVER = 'result="over"'
OK = 'code="ok"'
EACH = f"{BY}, precision, metric"
SERIES = "{{model}} {{version}} {{precision}} {{metric}}"
BUDGET = gauge("vernier_precision_budget", EACH, "min")
LIVE_P99 = quantile(0.99, ERROR, EACH)
#: Of a similarity the low end matters; only distances can be put in relation to their limit like this.
DISTANCE_P99 = quantile(0.99, ERROR, EACH, 'metric=~"rel_l2|max_abs|rel_spread"')
NEAR: Steps = ((None, "green"), (0.8, "orange"), (1, "red"))
ANY_IS_BAD: Steps = ((None, "green"), (1, "red"))


def overview() -> list[Json]:
    reduced = f'count(max by ({BY}) (vernier_precision_active{{{SHOWN}, precision!="fp32"}} == 1))'
    moved = f'sum(vernier_precision_fallbacks_total{{{SHOWN}, reason!="recovered"}})'
    rescued = f"sum(vernier_nonfinite_outputs_total{{{SHOWN}}})"
    return [
        number(
            "Budget used",
            Query(f"max({DISTANCE_P99} / on ({EACH}) {BUDGET})"),
            "The worst model's p99 error over its budget; near 100 % the fallback is near.",
            "percentunit",
            NEAR,
        ),
        number(
            "Compared",
            Query(f"({or_zero(whole(SAMPLES, COMPARED))}) / {whole('vernier_requests_total', OK)}"),
            "Share of the answers that were run again at FP32 and compared.",
            "percentunit",
            PLAIN,
        ),
        number(
            "Over budget",
            Query(or_zero(f"{whole(SAMPLES, OVER)} / {whole(SAMPLES, COMPARED)}")),
            "Share of the compared answers outside the budget.",
            "percentunit",
            ERRORS,
        ),
        number(
            "Fallbacks, 24 h",
            Query(or_zero(moved)),
            "Moves to a safer variant since each replica's start.",
            "none",
            ANY_IS_BAD,
        ),
        number(
            "Non-finite",
            Query(or_zero(rescued)),
            "Requests whose reduced output was NaN or infinite, since each replica's start; answered from FP32.",
            "none",
            ANY_IS_BAD,
        ),
        number(
            "Models below FP32",
            Query(or_zero(reduced)),
            "Model versions that answer at reduced precision now.",
            "none",
            PLAIN,
        ),
    ]


def error() -> list[Json]:
    return [
        graph(
            "Live error against its budget",
            [
                Query(LIVE_P99, f"{SERIES} p99"),
                Query(quantile(0.5, ERROR, EACH), f"{SERIES} p50"),
                Query(BUDGET, f"{SERIES} budget"),
            ],
            "Error of sampled live requests against FP32.",
            "none",
            12,
        ),
        timeline(
            "Active precision",
            Query(
                gauge("vernier_precision_active", f"{BY}, precision", "max"),
                "{{model}} {{version}} {{precision}}",
            ),
            "The variant that new batches take.",
        ),
        heatmap(
            "Distribution of the live error",
            Query(buckets(ERROR), "{{le}}"),
            "Look for a second hill at the top: an average would hide it.",
            "none",
        ),
        graph(
            "Gate against life",
            [
                Query(gauge("vernier_precision_gate_error", EACH, "max"), f"{SERIES} gate"),
                Query(LIVE_P99, f"{SERIES} live p99"),
            ],
            "What the build measured, and what production sees. A gap is drift.",
            "none",
            12,
            height=9,
        ),
    ]


def monitor() -> list[Json]:
    return [
        row("The monitor itself"),
        graph(
            "Samples",
            [Query(f"sum by (result) ({rate(SAMPLES)})", "{{result}}")],
            "within, over: compared. dropped: the reference was busy. failed: the reference failed.",
            "ops",
            stack=True,
        ),
        graph(
            "Fallbacks",
            [
                Query(
                    gauge("vernier_precision_fallbacks_total", f"{BY}, from, to, reason"),
                    "{{model}} {{version}} {{from}} to {{to}}: {{reason}}",
                )
            ],
            "Counted since each replica's start.",
            "none",
        ),
        graph(
            "Non-finite outputs",
            [
                Query(
                    total("vernier_nonfinite_outputs_total", by=f"{BY}, precision"),
                    "{{model}} {{version}} {{precision}}",
                )
            ],
            "Answered from FP32 instead.",
            "ops",
        ),
    ]


def gain() -> list[Json]:
    compute = mean("vernier_compute_duration_seconds", 'stage="infer"', "model, precision")
    return [
        row("What reduced precision buys"),
        graph(
            "Answers by precision",
            [
                Query(
                    f"sum by (precision) ({rate('vernier_request_duration_seconds_count')})", "{{precision}}"
                )
            ],
            "Answered requests a second.",
            "reqps",
            stack=True,
        ),
        graph(
            "Execution time by precision",
            [Query(compute, "{{model}} {{precision}}")],
            "Mean of the infer stage. Batch sizes differ, so compare at equal load.",
            "s",
        ),
        graph(
            "Engine memory",
            [Query(gauge("vernier_engine_bytes", f"{BY}, precision"), "{{model}} {{version}} {{precision}}")],
            "Size of the loaded engines.",
            "bytes",
        ),
    ]


def dashboard() -> Dashboard:
    panels = [*overview(), *error(), *monitor(), *gain()]
    return Dashboard(
        "vernier-precision", "Vernier: precision", __doc__ or "", variables(), panels, fallback_marks()
    )
