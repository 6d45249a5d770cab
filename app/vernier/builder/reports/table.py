"""The closing table of a build: what was made, how fast, how far from FP32, and what was refused."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vernier.builder.command import fault_text
from vernier.builder.inspection import milliseconds_text, size_text
from vernier.builder.request import BuildOutcome, VariantOutcome
from vernier.package.manifest import EvidenceWarning

#: Metrics worth a column, the first three that a gate measured; `auc@score` counts as `auc`.
_SHOWN = ("auc", "accuracy", "f1", "log_loss", "wer", "cer", "rmse", "rel_l2", "max_abs", "top1", "cosine")
_MOST_METRICS = 3
_MOST_BUCKETS = 3
#: Where nobody looks at a screen, lines may be as long as they need to be.
_WIDTH_OF_A_FILE = 160


def console() -> Console:
    """Standard output."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE)


def render(outcome: BuildOutcome) -> Group:
    """The table and the sentences below it."""
    buckets = _buckets(outcome)
    metrics = _metrics(outcome)
    table = Table(title=f"{outcome.manifest.name} version {outcome.manifest.version}", title_justify="left")
    table.add_column("variant", no_wrap=True)
    for column in ("size", *(f"ms at {b}" for b in buckets), *(m.split("@")[0] for m in metrics)):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("nodes", overflow="fold")
    table.add_column("gate", no_wrap=True)
    chosen = outcome.manifest.decision.get(outcome.runtime)
    for variant in (v for v in outcome.variants if v.status != "skipped"):
        table.add_row(*_row(variant, buckets, metrics, chosen == variant.precision))
    lines = [
        Text(f"{v.precision}: {v.reason}") for v in outcome.variants if v.reason and v.status != "skipped"
    ]
    skipped = [v for v in outcome.variants if v.status == "skipped"]
    if skipped:
        reasons = (f"{v.precision} ({v.reason.removeprefix('not built: ')})" for v in skipped)
        lines.append(Text(f"not built: {', '.join(reasons)}"))
    for variant in outcome.variants:
        if variant.fault:
            lines.append(
                Text(f"please report the fault in {variant.precision}:\n{fault_text(variant.fault)}")
            )
    closing = Text(f"{outcome.package}", style="bold")
    closing.append(f" in {outcome.seconds:.1f} s; {outcome.runtime} serves {chosen}")
    return Group(table, *lines, *warning_box(outcome.manifest.warnings), closing)


def warning_box(warnings: Sequence[EvidenceWarning]) -> list[Panel]:
    """One box with what is doubtful about the evidence; empty when nothing is."""
    if not warnings:
        return []
    text = Text("\n").join(Text(f"{warning.code}: {warning.message}") for warning in warnings)
    return [
        Panel(text, title="What is doubtful about this evidence", title_align="left", border_style="yellow")
    ]


def _row(variant: VariantOutcome, buckets: list[int], metrics: list[str], chosen: bool) -> list[Text]:
    measured = variant.gate.metrics if variant.gate else {}
    style = {"pass": "green", "refused": "red", "failed": "red", "emulated": "yellow"}.get(
        variant.status, "dim"
    )
    cells = [
        Text(variant.precision, "bold" if chosen else ""),
        Text(size_text(variant.bytes) if variant.bytes else ""),
    ]
    for bucket in buckets:
        cells.append(
            Text(milliseconds_text(variant.latency_ms[bucket]) if bucket in variant.latency_ms else "")
        )
    for metric in metrics:
        cells.append(Text(f"{measured[metric]:.4g}" if metric in measured else ""))
    cells.append(Text(", ".join(f"{count} {kind}" for kind, count in variant.assignment.items())))
    cells.append(Text(variant.status, style))
    return cells


def _buckets(outcome: BuildOutcome) -> list[int]:
    """At most four, the smallest and the largest among them."""
    found = sorted({bucket for v in outcome.variants for bucket in v.latency_ms})
    if len(found) <= _MOST_BUCKETS:
        return found
    step = (len(found) - 1) / (_MOST_BUCKETS - 1)
    return [found[round(i * step)] for i in range(_MOST_BUCKETS)]


def _metrics(outcome: BuildOutcome) -> list[str]:
    """One key per metric; over a whole set rather than a quantile, and one that the budget names before others."""
    measured = list(dict.fromkeys(m for v in outcome.variants if v.gate for m in v.gate.metrics))
    named = {term.split(">")[0].split("<")[0] for v in outcome.variants if v.gate for term in v.gate.budget}
    chosen: dict[str, str] = {}
    for key in sorted(measured, key=lambda m: m not in named):
        chosen.setdefault(key.split("@")[0], key)
    return [chosen[metric] for metric in _SHOWN if metric in chosen][:_MOST_METRICS]
