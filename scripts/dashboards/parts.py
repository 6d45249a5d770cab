"""Grafana's JSON for the few kinds of panels that the dashboards use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
#: 24 columns a row, as Grafana counts.
COLUMNS = 24


@dataclass(frozen=True)
class Query:
    """One PromQL expression and how its series are called."""

    expression: str
    legend: str = ""


def target(query: Query, index: int, **extra: Any) -> Json:
    return {
        "datasource": DATASOURCE,
        "expr": query.expression,
        "legendFormat": query.legend or "__auto",
        "refId": chr(ord("A") + index),
        **extra,
    }


def panel(
    kind: str, title: str, queries: Sequence[Query], text: str, width: int, height: int, **extra: Any
) -> Json:
    return {
        "type": kind,
        "title": title,
        "description": text,
        "datasource": DATASOURCE,
        "gridPos": {"w": width, "h": height},
        "targets": [target(query, i) for i, query in enumerate(queries)],
        **extra,
    }


def defaults(unit: str, **custom: Any) -> Json:
    return {
        "defaults": {"unit": unit, "custom": custom, "color": {"mode": "palette-classic"}},
        "overrides": [],
    }


def graph(
    title: str,
    queries: Sequence[Query],
    text: str,
    unit: str,
    width: int = 8,
    stack: bool = False,
    height: int = 8,
) -> Json:
    """Lines over time, with a table of last and highest values below."""
    lines = {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 25 if stack else 5,
        "showPoints": "never",
        "stacking": {"mode": "normal" if stack else "none", "group": "A"},
    }
    field_config = defaults(unit, **lines)
    field_config["defaults"]["min"] = 0
    return panel(
        "timeseries",
        title,
        queries,
        text,
        width,
        height,
        fieldConfig=field_config,
        options={
            "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    )


def number(
    title: str, query: Query, text: str, unit: str, steps: Sequence[tuple[float | None, str]], width: int = 4
) -> Json:
    """One figure, coloured by thresholds (value, colour); the first has the value None."""
    config: Json = {
        "defaults": {
            "unit": unit,
            "color": {"mode": "thresholds"},
            "thresholds": {"mode": "absolute", "steps": [{"value": v, "color": c} for v, c in steps]},
        },
        "overrides": [],
    }
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "values": False},
        "colorMode": "background",
        "graphMode": "area",
    }
    return panel("stat", title, [query], text, width, 4, fieldConfig=config, options=options)


def heatmap(title: str, query: Query, text: str, unit: str, width: int = 12) -> Json:
    """A histogram's buckets over time; the expression keeps `le`."""
    made = panel("heatmap", title, [], text, width, 9)
    made["targets"] = [target(query, 0, format="heatmap")]
    made["options"] = {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Turbo", "steps": 64, "scale": "exponential", "exponent": 0.5},
        "yAxis": {"unit": unit, "axisPlacement": "left"},
        "tooltip": {"mode": "single", "yHistogram": True},
        "legend": {"show": True},
    }
    made["fieldConfig"] = {"defaults": {"custom": {"scaleDistribution": {"type": "linear"}}}, "overrides": []}
    return made


def timeline(title: str, query: Query, text: str, width: int = 12) -> Json:
    """Bars of a 0/1 state over time."""
    states = {"0": {"text": "no", "color": "transparent"}, "1": {"text": "yes", "color": "green"}}
    mappings = [{"type": "value", "options": states}]
    config = {
        "defaults": {"mappings": mappings, "custom": {"fillOpacity": 80, "lineWidth": 0}},
        "overrides": [],
    }
    options = {"mergeValues": True, "showValue": "never", "rowHeight": 0.8, "legend": {"showLegend": False}}
    return panel("state-timeline", title, [query], text, width, 8, fieldConfig=config, options=options)


def table(title: str, columns: Sequence[tuple[Query, str, str]], text: str) -> Json:
    """One row for each model version; a column is (query, name, unit)."""
    made = panel("table", title, [], text, COLUMNS, 8)
    made["targets"] = [
        target(query, i, format="table", instant=True) for i, (query, _, _) in enumerate(columns)
    ]
    renamed = {f"Value #{chr(ord('A') + i)}": name for i, (_, name, _) in enumerate(columns)}
    made["transformations"] = [
        {"id": "merge", "options": {}},
        {
            "id": "organize",
            "options": {"excludeByName": {"Time": True, "__name__": True}, "renameByName": renamed},
        },
    ]
    overrides = [
        {"matcher": {"id": "byName", "options": name}, "properties": [{"id": "unit", "value": unit}]}
        for _, name, unit in columns
    ]
    made["fieldConfig"] = {"defaults": {"custom": {"align": "auto"}}, "overrides": overrides}
    made["options"] = {"showHeader": True}
    return made


def row(title: str) -> Json:
    return {
        "type": "row",
        "title": title,
        "collapsed": False,
        "panels": [],
        "gridPos": {"w": COLUMNS, "h": 1},
    }


def variable(name: str, label: str, expression: str) -> Json:
    """A drop-down whose values Prometheus gives; `All` matches everything."""
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": DATASOURCE,
        "query": {"query": expression, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "sort": 1,
    }


@dataclass
class Dashboard:
    uid: str
    title: str
    text: str
    variables: list[Json]
    panels: list[Json]
    annotations: list[Json] = field(default_factory=list)

    def json(self) -> Json:
        """The file's content; panels flow left to right, as many in a row as fit."""
        x = y = tallest = 0
        placed = []
        for number_, made in enumerate(self.panels, 1):
            size = made["gridPos"]
            if x + size["w"] > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            placed.append({**made, "id": number_, "gridPos": {**size, "x": x, "y": y}})
            x, tallest = x + size["w"], max(tallest, size["h"])
        source = {
            "type": "datasource",
            "name": "datasource",
            "label": "Data source",
            "query": "prometheus",
            "current": {"text": "Prometheus", "value": "prometheus"},
        }
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.text,
            "tags": ["vernier"],
            "schemaVersion": 39,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "10s",
            "time": {"from": "now-1h", "to": "now"},
            "timezone": "browser",
            "links": [
                {
                    "type": "dashboards",
                    "title": "Vernier",
                    "tags": ["vernier"],
                    "asDropdown": False,
                    "keepTime": True,
                    "includeVars": True,
                }
            ],
            "templating": {"list": [source, *self.variables]},
            "annotations": {"list": self.annotations},
            "panels": placed,
        }
