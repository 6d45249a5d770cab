"""PromQL as the dashboards use it: filtered by the drop-downs, grouped by model version."""

from __future__ import annotations

from scripts.dashboards.parts import Json, variable

#: Every model series is filtered by the drop-downs.
SHOWN = 'namespace=~"$namespace", model=~"$model", version=~"$version"'
REPLICAS = 'namespace=~"$namespace"'
RANGE = "$__rate_interval"
BY = "namespace, model, version"
NAMES = "{{model}} {{version}}"
#: What the service owed and did not give; the same list stands in monitoring/prometheus/rules/recording.yml.
OWED = 'code=~"internal|queue_full|not_ready|engine_restarting|draining|overloaded|deadline_exceeded"'

Steps = tuple[tuple[float | None, str], ...]
PLAIN: Steps = ((None, "blue"),)
ERRORS: Steps = ((None, "green"), (0.001, "orange"), (0.01, "red"))
RUNNING: Steps = ((None, "red"), (1, "green"))


def rate(metric: str, labels: str = "") -> str:
    """Per second, one series for each of the metric's."""
    inner = f"{SHOWN}, {labels}" if labels else SHOWN
    return f"rate({metric}{{{inner}}}[{RANGE}])"


def total(metric: str, labels: str = "", by: str = BY) -> str:
    """Per second, summed by `by`."""
    return f"sum by ({by}) ({rate(metric, labels)})"


def whole(metric: str, labels: str = "") -> str:
    """Per second, summed over everything that is shown."""
    return f"sum({rate(metric, labels)})"


def quantile(q: float, metric: str, by: str = BY, labels: str = "") -> str:
    return f"histogram_quantile({q}, {total(metric + '_bucket', labels, f'{by}, le')})"


def mean(metric: str, labels: str = "", by: str = BY) -> str:
    return f"{total(metric + '_sum', labels, by)} / {total(metric + '_count', labels, by)}"


def gauge(metric: str, by: str = BY, how: str = "sum") -> str:
    return f"{how} by ({by}) ({metric}{{{SHOWN}}})"


def shown(recorded: str) -> str:
    """A series that monitoring/prometheus/rules/recording.yml records."""
    return f"{recorded}{{{SHOWN}}}"


def buckets(metric: str) -> str:
    """For a heatmap: what came into each bucket."""
    return f"sum by (le) (increase({metric}_bucket{{{SHOWN}}}[{RANGE}]))"


def or_zero(expression: str) -> str:
    """0 where a counter has never been touched."""
    return f"({expression}) or vector(0)"


def variables() -> list[Json]:
    return [
        variable("namespace", "Namespace", "label_values(vernier_build_info, namespace)"),
        variable("model", "Model", f"label_values(vernier_queue_depth{{{REPLICAS}}}, model)"),
        variable("version", "Version", 'label_values(vernier_queue_depth{model=~"$model"}, version)'),
    ]


def fallback_marks() -> list[Json]:
    """A red line wherever live traffic moved to another variant."""
    moved = f"vernier_precision_fallbacks_total{{{SHOWN}}}"
    return [
        {
            "name": "Fallbacks",
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "enable": True,
            "iconColor": "red",
            # a counter that is born at 1 does not change, so one that was not there a minute ago counts too
            "expr": f"changes({moved}[1m]) > 0 or ({moved} unless {moved} offset 1m)",
            "titleFormat": "{{model}}: {{from}} to {{to}}",
            "textFormat": "{{reason}}",
            "step": "60s",
        }
    ]
