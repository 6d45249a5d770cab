"""Writes the report of a build: `report.json` for programs and `report.html` for people, from the same facts.

The page is one file that needs no network: its pictures are inline SVG, its colours follow the reader's light
or dark setting.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vernier.builder.inspection import size_text
from vernier.builder.reports import charts
from vernier.builder.reports.report import BuildReport, LayerReport, TermReport, VariantReport, as_json

JSON_NAME, HTML_NAME = "report.json", "report.html"
_SHOWN_BUCKETS = 4


def write_report(folder: Path, report: BuildReport) -> None:
    """Writes report.json and report.html into `folder`. OSError (a full disk) is left to the caller."""
    (folder / JSON_NAME).write_text(json.dumps(as_json(report), indent=1, allow_nan=False) + "\n", "utf-8")
    (folder / HTML_NAME).write_text(render_page(report), "utf-8")


def render_page(report: BuildReport) -> str:
    """The whole page; everything that comes from outside is escaped."""
    environment = Environment(
        loader=PackageLoader("vernier.builder.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=charts.number,
        exact=lambda v: f"{v:.5g}",
        share=_share,
        size=size_text,
        thousands=lambda n: f"{n:,}",
    )
    return environment.get_template("report.html.j2").render(report=report, **_pictures(report))


def _pictures(report: BuildReport) -> dict[str, Any]:
    precisions = {v.precision: v.precision for v in report.variants if v.status not in ("skipped", "failed")}
    return {
        "overview": charts.overview(report.variants, report.chosen),
        "latency": charts.latency(report.variants),
        "layers": _layers(report),
        "ranges": charts.ranges(report.ranges),
        "shown_ranges": min(len(report.ranges), charts.MAX_RANGES),
        "searches": {
            name: (found, charts.search(found.steps))
            for name, found in report.searches.items()
            if found.steps
        },
        "samples": {
            name: [
                (sample, {o: charts.sample(values, name) for o, values in sample.values.items()})
                for sample in found
            ]
            for name, found in report.samples.items()
            if found
        },
        "legend": charts.legend(precisions),
        "types": charts.legend({"int8": "INT8", "fp16": "FP16", "fp32": "FP32"}),
        "skipped": [v for v in report.variants if v.status == "skipped"],
        "buckets": _buckets(report.variants),
        "terms": _terms(report.variants),
    }


def _layers(report: BuildReport) -> dict[str, dict[str, Any]]:
    """Title → picture; variants whose layers are the same share one."""
    same: list[tuple[list[str], Sequence[LayerReport]]] = []
    for name, found in report.layers.items():
        twin = next((names for names, other in same if list(other) == list(found)), None)
        if twin is not None:
            twin.append(name)
        elif found:
            same.append(([name], found))
    return {
        " and ".join(names): {
            "picture": charts.layers(found),
            "measured": any(layer.sensitivity is not None for layer in found),
            "shown": min(len(found), charts.MAX_LAYERS),
            "all": len(found),
        }
        for names, found in same
    }


def _buckets(variants: Sequence[VariantReport]) -> list[int]:
    """At most four, the smallest and the largest among them."""
    found = sorted({bucket for v in variants for bucket in v.latency_ms})
    if len(found) <= _SHOWN_BUCKETS:
        return found
    step = (len(found) - 1) / (_SHOWN_BUCKETS - 1)
    return [found[round(i * step)] for i in range(_SHOWN_BUCKETS)]


def _terms(variants: Sequence[VariantReport]) -> dict[str, dict[str, tuple[TermReport, TermReport | None]]]:
    """Term → precision → how it stands as a GPU computes it, and as served here."""
    found: dict[str, dict[str, tuple[TermReport, TermReport | None]]] = {}
    for variant in variants:
        served = {term.text: term for term in variant.served}
        for term in variant.terms:
            found.setdefault(term.text, {})[variant.precision] = term, served.get(term.text)
    return found


def _share(value: float | None) -> str:
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "over all bounds"
    if value >= 10:
        return f"{value:.0f}×"
    return f"{value:.1%}" if 0 < value < 0.0995 else f"{value:.0%}"
