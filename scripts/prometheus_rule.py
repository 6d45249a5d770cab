"""Writes the Kubernetes form of monitoring/prometheus/rules: `python -m scripts.prometheus_rule [--check]`.

The rule files are the truth; k8s/components/prometheus-operator/prometheusrule.yaml is made from them, and the
prometheus.yml of the compose stack reads them as they are.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
RULES = ROOT / "monitoring" / "prometheus" / "rules"
OUT = ROOT / "k8s" / "components" / "prometheus-operator" / "prometheusrule.yaml"
HEAD = "# Made from monitoring/prometheus/rules by `python -m scripts.prometheus_rule`; edit those.\n"


def rendered() -> str:
    groups = [
        group for path in sorted(RULES.glob("*.yml")) for group in yaml.safe_load(path.read_text())["groups"]
    ]
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "vernier", "labels": {"app.kubernetes.io/name": "vernier"}},
        "spec": {"groups": groups},
    }
    return HEAD + yaml.safe_dump(resource, sort_keys=False, allow_unicode=True, width=120)


def main() -> None:
    if "--check" not in sys.argv:
        OUT.write_text(rendered())
    elif not OUT.exists() or OUT.read_text() != rendered():
        sys.exit(f"{OUT.name} is not what `python -m scripts.prometheus_rule` writes; run it")


if __name__ == "__main__":
    main()
