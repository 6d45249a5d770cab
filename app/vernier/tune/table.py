"""What `vernier.tune` prints: the candidates that no other beats, and the chosen settings."""

from __future__ import annotations

import os
import platform
from typing import Any

import onnxruntime
from rich.console import Group
from rich.table import Table
from rich.text import Text

from vernier.builder.inspection import milliseconds_text
from vernier.tune.candidates import Measured, pareto
from vernier.tune.search import GOAL, Tuning


def render(tuning: Tuning) -> Group:
    """The Pareto table, the settings that were in force among it, and a sentence below."""
    manifest, before = tuning.manifest, tuning.before
    table = Table(
        title=f"{manifest.name} version {manifest.version}, {tuning.precision} on {tuning.runtime}, objective "
        f"{tuning.objective_ms:g} ms",
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    load = f"at {_rate_text(tuning.common_rate)}/s"
    for column in ("sustains", f"p50 {load}", f"p99 {load}", "slots", "max batch", "delay"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("buckets", overflow="fold")
    shown = sorted(
        {id(m): m for m in (before, *pareto(tuning.measured))}.values(), key=lambda m: -m.sustained
    )
    for measured in shown:
        mark = "chosen" if measured is tuning.chosen else ""
        table.add_row(
            *_row(measured, mark or ("before" if measured is before else "")), style="bold" if mark else ""
        )
    lines = [
        Text(
            f"{len(tuning.measured)} settings tried; the table has those that no other beats in both columns."
        )
    ]
    if tuning.chosen is not None and before.sustained:
        gain = tuning.chosen.sustained / before.sustained
        lines.append(Text(f"The chosen settings sustain {gain:.2f} times what those in force did."))
    return Group(table, *lines)


def _rate_text(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _row(measured: Measured, mark: str) -> list[str]:
    candidate = measured.candidate
    sizes = [] if candidate.buckets is None else [f"batch {list(candidate.buckets)}"]
    sizes += [f"{dim} {list(b)}" for dim, b in (candidate.sequence_buckets or {}).items()]
    return [
        mark,
        f"{_rate_text(measured.sustained)}/s" if measured.sustained else "nothing",
        *("" if ms is None else f"{milliseconds_text(ms)} ms" for ms in (measured.p50_ms, measured.p99_ms)),
        str(candidate.slots),
        str(candidate.max_batch),
        f"{candidate.max_queue_delay_ms:g} ms",
        ", ".join(sizes) or "the package's",
    ]


def refusal(tuning: Tuning) -> str:
    """Why nothing was chosen."""
    return (
        f"no settings answer {GOAL:.0%} of the requests within {tuning.objective_ms:g} ms on this machine: "
        f"one alone takes {milliseconds_text(tuning.lone_ms)} ms; allow more, or serve a faster precision"
    )


def as_json(tuning: Tuning) -> dict[str, Any]:
    """For `--json`. Rates are requests per second."""
    front = pareto(tuning.measured)
    return {
        "model": tuning.manifest.name,
        "version": tuning.manifest.version,
        "precision": tuning.precision,
        "runtime": tuning.runtime,
        "objective_ms": tuning.objective_ms,
        "share_within_objective": GOAL,
        "common_rate": tuning.common_rate,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "onnxruntime": onnxruntime.__version__,
        },
        "candidates": [
            {
                "settings": m.candidate.as_json(),
                "sustained_rate": m.sustained,
                "p50_ms": m.p50_ms,
                "p99_ms": m.p99_ms,
                "padding_share": m.padding,
                "pareto": m in front,
                "in_force": m is tuning.before,
            }
            for m in tuning.measured
        ],
        "chosen": None if tuning.chosen is None else tuning.chosen.candidate.as_json(),
    }
