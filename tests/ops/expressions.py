"""Every PromQL expression that the project ships, with where it stands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "monitoring" / "prometheus" / "rules"
DASHBOARDS = ROOT / "monitoring" / "grafana" / "dashboards"
COMPONENTS = ROOT / "k8s" / "components"
KSERVE = ROOT / "k8s" / "overlays" / "kserve" / "inferenceservice.yaml"

#: What Grafana puts in place of its variables when everything is selected.
GRAFANA = {"$namespace": ".*", "$model": ".*", "$version": ".*", "$__rate_interval": "20s"}
_SELECTOR = re.compile(
    r"([a-zA-Z_:][\w:]*)?\{([^{}]*)\}|\b((?:vernier|model|pod|model_le|process|up|nv)[_:][\w:]*|up)\b"
)
_MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"')


@dataclass(frozen=True)
class Expression:
    where: str
    text: str
    kind: str  # alert, record, panel, variable, scaler


def rule_expressions() -> Iterator[Expression]:
    for path in sorted(RULES.glob("*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for number, rule in enumerate(group["rules"]):
                kind = "alert" if "alert" in rule else "record"
                yield Expression(f"{path.name} {rule[kind]} #{number}", rule["expr"], kind)


def panel_expressions() -> Iterator[Expression]:
    """Panels and annotations; Grafana's variables are filled in."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        board = json.loads(path.read_text())
        sources = [
            (panel["title"], query["expr"]) for panel in board["panels"] for query in panel.get("targets", [])
        ]
        sources += [(mark["name"], mark["expr"]) for mark in board["annotations"]["list"]]
        for title, text in sources:
            for variable, value in GRAFANA.items():
                text = text.replace(variable, value)
            yield Expression(f"{path.name} {title}", text, "panel")


def variable_expressions() -> Iterator[Expression]:
    """What the dashboards' variables are chosen from: an empty one empties every panel."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if variable["type"] != "query":
                continue
            found = re.fullmatch(r"label_values\((\w+)(?:\{(.*)\})?, (\w+)\)", variable["query"]["query"])
            assert found is not None, variable["query"]
            name, matchers, label = found.groups()
            for placeholder, value in GRAFANA.items():
                matchers = (matchers or "").replace(placeholder, value)
            wanted = ", ".join(filter(None, [matchers, f'{label}!=""']))
            text = f"count by ({label}) ({name}{{{wanted}}})"
            yield Expression(f"{path.name} ${variable['name']}", text, "variable")


def adapter_rules() -> list[dict[str, Any]]:
    values = yaml.safe_load((COMPONENTS / "hpa" / "prometheus-adapter-values.yaml").read_text())
    return list(values["rules"]["custom"])


def scaler_expressions() -> Iterator[Expression]:
    """KEDA's and KServe's queries, and the adapter's as it asks them for a namespace's pods."""
    scaled = yaml.safe_load((COMPONENTS / "keda" / "scaledobject.yaml").read_text())
    for trigger in scaled["spec"]["triggers"]:
        yield Expression(f"keda {trigger['name']}", trigger["metadata"]["query"], "scaler")
    service = yaml.safe_load(KSERVE.read_text())
    for metric in service["spec"]["predictor"]["autoScaling"]["metrics"]:
        yield Expression("kserve", metric["external"]["metric"]["query"], "scaler")
    for rule in adapter_rules():
        series = re.search(r'__name__="([^"]+)"', rule["seriesQuery"])
        assert series is not None
        text = rule["metricsQuery"].replace("<<.Series>>", series[1])
        text = text.replace("<<.LabelMatchers>>", 'namespace="vernier"').replace("<<.GroupBy>>", "pod")
        yield Expression("prometheus-adapter", text, "scaler")


def every_expression() -> list[Expression]:
    return [*rule_expressions(), *panel_expressions(), *variable_expressions(), *scaler_expressions()]


def selectors(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(metric name, label → value) of each selector of an expression."""
    for match in _SELECTOR.finditer(re.sub(r"\b(by|on|group_left)\s*\([^)]*\)", " ", text)):
        name = match[1] or match[3]
        labels = dict(_MATCHER.findall(match[2] or ""))
        if name:
            yield name, labels
