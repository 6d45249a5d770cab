"""Pictures of a build as inline SVG: latency, layers, calibrated ranges, searches, worst samples.

Every mark has a `<title>`, which browsers show on hovering and read aloud.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup, escape

from vernier.builder.report import LayerReport, RangeReport, StepReport, VariantReport
from vernier.builder.svg import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    budget_frame,
    line,
    log_scale,
    log_ticks,
    number,
    svg,
    text,
    used_scale,
)

MOST_LAYERS, MOST_RANGES = 60, 40


# --- latency --------------------------------------------------------------------------------------
def latency(variants: Sequence[VariantReport]) -> Markup:
    """Median milliseconds by bucket, both axes logarithmic, one line for each variant."""
    shown = [v for v in variants if v.latency_ms]
    if not shown:
        return Markup("")
    buckets = sorted({b for v in shown for b in v.latency_ms})
    times = [ms for v in shown for ms in v.latency_ms.values()]
    height = 300.0
    bottom, right = height - BOTTOM, WIDTH - RIGHT - 90
    low, high = min(times) / 1.2, max(times) * 1.2
    x_of = log_scale(buckets[0], max(buckets[-1], buckets[0] + 1), LEFT + 10, right)
    y_of = log_scale(low, high, bottom, TOP)
    parts = [
        line(LEFT, bottom, right, bottom, "axis"),
        line(LEFT, TOP, LEFT, bottom, "axis"),
        text((LEFT + right) / 2, height - 8, "batch", "middle", "label"),
        text(LEFT, TOP - 6, "milliseconds for one batch", "start", "label"),
    ]
    for tick in log_ticks(low, high):
        parts += [
            line(LEFT, y_of(tick), right, y_of(tick), "grid"),
            text(LEFT - 8, y_of(tick) + 4, number(tick), "end", "tick"),
        ]
    for bucket in buckets:
        parts.append(text(x_of(bucket), bottom + 18, str(bucket), "middle", "tick"))
    ends = []
    for variant in shown:
        points = [(x_of(b), y_of(ms)) for b, ms in sorted(variant.latency_ms.items())]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" class="curve c-{variant.precision}"/>')
        for (x, y), (bucket, ms) in zip(points, sorted(variant.latency_ms.items()), strict=True):
            title = f"{variant.precision}: {number(ms)} ms for {bucket}"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" class="dot c-{variant.precision}">'
                f"<title>{escape(title)}</title></circle>"
            )
        ends.append((points[-1][1], points[-1][0], variant.precision))
    parts += _labels_apart(ends)
    return svg(height, parts, "Latency by batch")


def _labels_apart(ends: Sequence[tuple[float, float, str]], gap: float = 15.0) -> list[str]:
    """Names at the right ends of lines, moved down where they would cover one another."""
    parts, last = [], -math.inf
    for y, x, name in sorted(ends):
        y = max(y, last + gap)
        last = y
        parts.append(text(x + 10, y + 4, name, "start", f"name t-{name}"))
    return parts


# --- layers ---------------------------------------------------------------------------------------
def layers(found: Sequence[LayerReport]) -> Markup:
    """One bar for each node: how much of the budget it uses up alone, in the colour of its precision.

    Where nothing was measured the bars are shares of the multiply-accumulates. Of many nodes the most
    sensitive are shown, in graph order.
    """
    if not found:
        return Markup("")
    measured = any(layer.sensitivity is not None for layer in found)
    value: Callable[[LayerReport], float] = (
        (lambda layer: layer.sensitivity or 0.0) if measured else (lambda layer: layer.macs)
    )
    kept = sorted(range(len(found)), key=lambda i: -value(found[i]))[:MOST_LAYERS]
    shown = [found[i] for i in sorted(kept)]
    row, left, right = 19.0, 250.0, WIDTH - 150.0
    finite = [value(layer) for layer in shown if math.isfinite(value(layer))]
    high = max([*finite, 1e-9])
    scale = (right - left) / high
    has_limit = measured and high >= 1
    height = len(shown) * row + (36 if has_limit else 14)
    parts = []
    if has_limit:
        parts.append(line(left + scale, 8, left + scale, height - 24, "limit"))
        parts.append(text(left + scale, height - 8, "the whole budget", "middle", "limit-label"))
    for index, layer in enumerate(shown):
        y = 10 + index * row
        amount = min(value(layer), high)
        width = max(1.5, amount * scale)
        said = f"{value(layer):.1%}" if math.isfinite(value(layer)) else "not finite"
        title = (
            f"{layer.name} ({layer.op_type}) in {layer.precision}: {said}, {layer.macs:.1%} of the operations"
        )
        parts.append(text(left - 8, y + 11, _shortened(layer.name), "end", "tick"))
        parts.append(
            f'<rect x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="13" rx="2" '
            f'class="bar c-{layer.precision}"><title>{escape(title)}</title></rect>'
        )
        parts.append(text(left + width + 6, y + 11, f"{said} · {layer.precision}", "start", "tick"))
    return svg(
        height, parts, "Sensitivity and precision of every layer" if measured else "Layers by operations"
    )


def _shortened(name: str, most: int = 34) -> str:
    return name if len(name) <= most else "…" + name[-(most - 1) :]


# --- calibration ----------------------------------------------------------------------------------
def ranges(found: Sequence[RangeReport]) -> Markup:
    """Where INT8 clips each activation (filled) and the largest magnitude seen (tick), logarithmic."""
    shown = [r for r in found if r.peak > 0 and r.clip > 0][:MOST_RANGES]
    if not shown:
        return Markup("")
    row, left, right = 19.0, 250.0, WIDTH - 150.0
    low = min(min(r.peak, r.clip) for r in shown) / 2
    high = max(max(r.peak, r.clip) for r in shown) * 1.05
    x_of = log_scale(low, high, left, right)
    height = len(shown) * row + 34
    parts = []
    for tick in log_ticks(low, high):
        parts += [
            line(x_of(tick), 6, x_of(tick), height - 24, "grid"),
            text(x_of(tick), height - 8, number(tick), "middle", "tick"),
        ]
    for index, entry in enumerate(shown):
        y = 10 + index * row
        title = f"{entry.tensor}: clips at {number(entry.clip)} ({entry.method}), largest seen {number(entry.peak)}"
        parts.append(text(left - 8, y + 11, _shortened(entry.tensor), "end", "tick"))
        parts.append(
            f'<rect x="{left:.1f}" y="{y + 2:.1f}" width="{max(1.5, x_of(entry.clip) - left):.1f}" height="9" rx="2" '
            f'class="bar c-int8"><title>{escape(title)}</title></rect>'
        )
        parts.append(line(x_of(entry.peak), y - 1, x_of(entry.peak), y + 14, "peak"))
        parts.append(text(right + 8, y + 11, f"{number(entry.clip)} · {entry.method}", "start", "tick"))
    return svg(height, parts, "Calibrated ranges")


# --- search ---------------------------------------------------------------------------------------
def search(steps: Sequence[StepReport]) -> Markup:
    """Each evaluation in turn: how many nodes were given back, and the part of the budget used up."""
    if not steps:
        return Markup("")
    height = 230.0
    bottom, right = height - BOTTOM, float(WIDTH - RIGHT)
    step = min(90.0, (right - LEFT - 20) / len(steps))
    y_of, shares = used_scale([entry.used for entry in steps], TOP + 14, bottom)
    parts = [
        *budget_frame(y_of, shares, right, bottom),
        line(LEFT, bottom, right, bottom, "axis"),
        text(LEFT - 8, bottom + 34, "given back", "end", "tick"),
    ]
    for index, entry in enumerate(steps):
        x = LEFT + 24 + index * step
        y = y_of(entry.used)
        used = "not finite" if math.isinf(entry.used) else f"{entry.used:.0%} of the budget"
        title = f"{entry.samples}: {entry.given_back} nodes given back, {used}"
        kind = "c-int8" if entry.samples == "select" else "c-fp16"
        parts.append(line(x, bottom, x, y, "stem"))
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" class="mark {kind}"><title>{escape(title)}</title></circle>'
        )
        parts.append(text(x, bottom + 34, str(entry.given_back), "middle", "tick"))
        parts.append(text(x, bottom + 18, "verify" if entry.samples == "verify" else "", "middle", "tick"))
    return svg(height, parts, "Evaluations of the search")


# --- samples --------------------------------------------------------------------------------------
def sample(values: Sequence[tuple[int | tuple[int, ...], float, float]], precision: str) -> Markup:
    """Values of one output: FP32 as a ring, the variant as a dot, on one scale."""
    if not values:
        return Markup("")
    numbers = [v for _, a, b in values for v in (a, b) if math.isfinite(v)]
    low, high = min([*numbers, 0.0]), max([*numbers, 0.0])
    span = (high - low) or 1.0
    places = [", ".join(map(str, p)) if isinstance(p, tuple) else str(p) for p, _, _ in values]
    row, left, right, width = 18.0, max(46.0, 14 + 6.5 * max(map(len, places))), 250.0, 380.0

    def x_of(value: float) -> float:
        return left + (right - left) * (value - low) / span

    parts = []
    for index, (place, (_, exact, other)) in enumerate(zip(places, values, strict=True)):
        y = 12 + index * row
        parts.append(text(left - 8, y + 4, place, "end", "tick"))
        parts.append(line(left, y, right, y, "grid"))
        if math.isfinite(exact) and math.isfinite(other):
            parts.append(line(x_of(exact), y, x_of(other), y, "moved"))
        if math.isfinite(exact):
            parts.append(f'<circle cx="{x_of(exact):.1f}" cy="{y:.1f}" r="5" class="exact"/>')
        if math.isfinite(other):
            parts.append(f'<circle cx="{x_of(other):.1f}" cy="{y:.1f}" r="3.4" class="dot c-{precision}"/>')
        parts.append(text(right + 12, y + 4, f"{number(exact)} → {number(other)}", "start", "tick"))
    return svg(len(values) * row + 6, parts, "FP32 and variant", width)


def legend(precisions: Mapping[str, str]) -> Markup:
    """Coloured squares with the names of precisions; the values say what they stand for."""
    return Markup(" ").join(
        Markup('<span class="key"><i class="swatch {}"></i>{}</span>').format(f"c-{p}", text)
        for p, text in precisions.items()
    )
