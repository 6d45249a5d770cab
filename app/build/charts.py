"""Pictures of a build as inline SVG. Colours and text sizes come from the page's style sheet.

Every mark has a `<title>`, which browsers show on hovering and read aloud.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup, escape

from app.build.report import LayerReport, RangeReport, StepReport, VariantReport

WIDTH = 720
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 18, 46
#: Beyond this share of the budget it no longer matters how far: marks are put at the edge.
_MOST_USED = 2.0
MOST_LAYERS, MOST_RANGES = 60, 40


def _svg(height: float, parts: Sequence[str], label: str, width: float = WIDTH) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def number(value: float) -> str:
    """Three significant digits, without an exponent where that is readable."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if 1e-3 <= abs(value) < 1e4:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.2g}"


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten, or powers alone when there would be too many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**e for e in range(first, last + 1) for s in steps]
        inside = [t for t in ticks if low * 0.999 <= t <= high * 1.001]
        if len(inside) <= 7:
            return inside
    return inside[:: math.ceil(len(inside) / 7)]


def _log_scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = math.log(high / low) or 1.0
    return lambda value: start + (end - start) * math.log(max(value, low) / low) / span


# --- speed × error × size -------------------------------------------------------------------------
def overview(variants: Sequence[VariantReport], chosen: str) -> Markup:
    """Speed against FP32 to the right, the used part of the budget upwards, size as area."""
    exact = next((v for v in variants if v.precision == "fp32"), None)
    shown = [v for v in variants if v.used is not None]
    if exact is None or not shown:
        return Markup("")
    height = 330.0
    bottom, right = height - _BOTTOM, WIDTH - _RIGHT - 130
    speeds = {v.precision: _speed(exact, v) for v in shown}
    measured = [s for s in speeds.values() if s is not None]
    low, high = min([*measured, 1.0]) / 1.15, max([*measured, 1.0]) * 1.15
    x_of, y_of = _log_scale(low, high, _LEFT, right), _used_scale(_TOP + 10, bottom)
    parts = [
        f'<rect x="{_LEFT}" y="{_TOP}" width="{right - _LEFT:.1f}" height="{y_of(1.0) - _TOP:.1f}" class="over"/>',
        _line(_LEFT, y_of(1.0), right, y_of(1.0), "limit"),
        _text(right - 4, y_of(1.0) - 6, "budget", "end", "limit-label"),
        _line(_LEFT, bottom, right, bottom, "axis"),
        _line(_LEFT, _TOP, _LEFT, bottom, "axis"),
        _text((_LEFT + right) / 2, height - 8, "times as fast as FP32 →", "middle", "label"),
        f'<text transform="translate(14 {(_TOP + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle" class="label">'
        "part of the budget used up →</text>",
    ]
    for tick in _log_ticks(low, high):
        parts += [_line(x_of(tick), bottom, x_of(tick), bottom + 4, "axis")]
        parts += [_text(x_of(tick), bottom + 18, f"{number(tick)}×", "middle", "tick")]
    for share in (0.0, 0.5, 1.0, 1.5, 2.0):
        text = f"{share:.0%}" if share < _MOST_USED else f"≥{share:.0%}"
        parts.append(_text(_LEFT - 8, y_of(share) + 4, text, "end", "tick"))
        parts.append(_line(_LEFT, y_of(share), right, y_of(share), "grid"))
    largest = max([v.bytes for v in shown] + [1])
    waiting = 0
    for variant in sorted(shown, key=lambda v: -v.bytes):
        used = min(variant.used or 0.0, _MOST_USED)
        speed = speeds[variant.precision]
        radius = 6 + 16 * math.sqrt(variant.bytes / largest) if variant.bytes else 7.0
        if speed is None:
            # No time was taken: it stands beside the picture, at the height of its error.
            x = right + 40.0 + 46 * (waiting % 2)
            waiting += 1
        else:
            x = x_of(speed)
        kind = f"mark {_colour(variant.precision)}" + ("" if variant.status == "pass" else " refused")
        ring = " chosen" if variant.precision == chosen else ""
        title = _overview_title(variant, speed)
        y = y_of(used)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" class="{kind}{ring}"><title>{escape(title)}</title>'
            f"</circle>"
        )
        parts.append(_text(x, y - radius - 5, variant.precision, "middle", "name"))
    if waiting:
        parts.append(_text(right + 66, height - 8, "not timed", "middle", "label"))
    return _svg(height, parts, "Speed, error and size of every variant")


def _used_scale(top: float, bottom: float) -> Callable[[float], float]:
    return lambda used: bottom - (bottom - top) * min(used, _MOST_USED) / _MOST_USED


def _speed(exact: VariantReport, variant: VariantReport) -> float | None:
    common = [b for b in exact.latency_ms if b in variant.latency_ms]
    if not common:
        return None
    return math.exp(sum(math.log(exact.latency_ms[b] / variant.latency_ms[b]) for b in common) / len(common))


def _overview_title(variant: VariantReport, speed: float | None) -> str:
    parts = [variant.precision, variant.status]
    if speed is not None:
        parts.append(f"{number(speed)} times as fast as FP32")
    if variant.used is not None:
        parts.append(
            "beyond any budget" if math.isinf(variant.used) else f"{variant.used:.0%} of the budget used"
        )
    if variant.bytes:
        parts.append(f"{variant.bytes / 1e6:.2f} MB")
    return ", ".join(parts)


def _colour(precision: str) -> str:
    return "c-" + precision


# --- latency --------------------------------------------------------------------------------------
def latency(variants: Sequence[VariantReport]) -> Markup:
    """Median milliseconds by bucket, both axes logarithmic, one line for each variant."""
    shown = [v for v in variants if v.latency_ms]
    if not shown:
        return Markup("")
    buckets = sorted({b for v in shown for b in v.latency_ms})
    times = [ms for v in shown for ms in v.latency_ms.values()]
    height = 300.0
    bottom, right = height - _BOTTOM, WIDTH - _RIGHT - 90
    low, high = min(times) / 1.2, max(times) * 1.2
    x_of = _log_scale(buckets[0], max(buckets[-1], buckets[0] + 1), _LEFT + 10, right)
    y_of = _log_scale(low, high, bottom, _TOP)
    parts = [
        _line(_LEFT, bottom, right, bottom, "axis"),
        _line(_LEFT, _TOP, _LEFT, bottom, "axis"),
        _text((_LEFT + right) / 2, height - 8, "batch", "middle", "label"),
        _text(_LEFT, _TOP - 6, "milliseconds for one batch", "start", "label"),
    ]
    for tick in _log_ticks(low, high):
        parts += [
            _line(_LEFT, y_of(tick), right, y_of(tick), "grid"),
            _text(_LEFT - 8, y_of(tick) + 4, number(tick), "end", "tick"),
        ]
    for bucket in buckets:
        parts.append(_text(x_of(bucket), bottom + 18, str(bucket), "middle", "tick"))
    ends = []
    for variant in shown:
        points = [(x_of(b), y_of(ms)) for b, ms in sorted(variant.latency_ms.items())]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" class="curve {_colour(variant.precision)}"/>')
        for (x, y), (bucket, ms) in zip(points, sorted(variant.latency_ms.items()), strict=True):
            title = f"{variant.precision}: {number(ms)} ms for {bucket}"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" class="dot {_colour(variant.precision)}">'
                f"<title>{escape(title)}</title></circle>"
            )
        ends.append((points[-1][1], points[-1][0], variant.precision))
    parts += _labels_apart(ends)
    return _svg(height, parts, "Latency by batch")


def _labels_apart(ends: Sequence[tuple[float, float, str]], gap: float = 15.0) -> list[str]:
    """Names at the right ends of lines, moved down where they would cover one another."""
    parts, last = [], -math.inf
    for y, x, name in sorted(ends):
        y = max(y, last + gap)
        last = y
        parts.append(_text(x + 10, y + 4, name, "start", f"name t-{name}"))
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
    height = len(shown) * row + 34
    parts = []
    if measured and high >= 1:
        parts.append(_line(left + scale, 8, left + scale, height - 24, "limit"))
        parts.append(_text(left + scale, height - 8, "the whole budget", "middle", "limit-label"))
    for index, layer in enumerate(shown):
        y = 10 + index * row
        amount = min(value(layer), high)
        width = max(1.5, amount * scale)
        said = f"{value(layer):.1%}" if math.isfinite(value(layer)) else "not finite"
        title = (
            f"{layer.name} ({layer.op_type}) in {layer.precision}: {said}, {layer.macs:.1%} of the operations"
        )
        parts.append(_text(left - 8, y + 11, _shortened(layer.name), "end", "tick"))
        parts.append(
            f'<rect x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="13" rx="2" '
            f'class="bar {_colour(layer.precision)}"><title>{escape(title)}</title></rect>'
        )
        parts.append(_text(left + width + 6, y + 11, f"{said} · {layer.precision}", "start", "tick"))
    return _svg(
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
    x_of = _log_scale(low, high, left, right)
    height = len(shown) * row + 34
    parts = []
    for tick in _log_ticks(low, high):
        parts += [
            _line(x_of(tick), 6, x_of(tick), height - 24, "grid"),
            _text(x_of(tick), height - 8, number(tick), "middle", "tick"),
        ]
    for index, entry in enumerate(shown):
        y = 10 + index * row
        title = f"{entry.tensor}: clips at {number(entry.clip)} ({entry.method}), largest seen {number(entry.peak)}"
        parts.append(_text(left - 8, y + 11, _shortened(entry.tensor), "end", "tick"))
        parts.append(
            f'<rect x="{left:.1f}" y="{y + 2:.1f}" width="{max(1.5, x_of(entry.clip) - left):.1f}" height="9" rx="2" '
            f'class="bar c-int8"><title>{escape(title)}</title></rect>'
        )
        parts.append(_line(x_of(entry.peak), y - 1, x_of(entry.peak), y + 14, "peak"))
        parts.append(_text(right + 8, y + 11, f"{number(entry.clip)} · {entry.method}", "start", "tick"))
    return _svg(height, parts, "Calibrated ranges")


# --- search ---------------------------------------------------------------------------------------
def search(steps: Sequence[StepReport]) -> Markup:
    """Each evaluation in turn: how many nodes were given back, and the part of the budget used up."""
    if not steps:
        return Markup("")
    height = 220.0
    bottom, right = height - _BOTTOM, WIDTH - _RIGHT
    step = min(90.0, (right - _LEFT - 20) / len(steps))
    y_of = _used_scale(_TOP + 14, bottom)
    parts = [
        f'<rect x="{_LEFT}" y="{_TOP}" width="{right - _LEFT}" height="{y_of(1.0) - _TOP:.1f}" class="over"/>',
        _line(_LEFT, y_of(1.0), right, y_of(1.0), "limit"),
        _text(right - 4, y_of(1.0) - 6, "budget", "end", "limit-label"),
        _line(_LEFT, bottom, right, bottom, "axis"),
        _text(_LEFT - 8, bottom + 34, "given back", "end", "tick"),
    ]
    for share in (0.0, 1.0, 2.0):
        text = f"{share:.0%}" if share < _MOST_USED else f"≥{share:.0%}"
        parts.append(_text(_LEFT - 8, y_of(share) + 4, text, "end", "tick"))
    for index, entry in enumerate(steps):
        x = _LEFT + 24 + index * step
        y = y_of(entry.used)
        used = "not finite" if math.isinf(entry.used) else f"{entry.used:.0%} of the budget"
        title = f"{entry.samples}: {entry.given_back} nodes given back, {used}"
        kind = "c-int8" if entry.samples == "select" else "c-fp16"
        parts.append(_line(x, bottom, x, y, "stem"))
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" class="mark {kind}"><title>{escape(title)}</title></circle>'
        )
        parts.append(_text(x, bottom + 34, str(entry.given_back), "middle", "tick"))
        parts.append(_text(x, bottom + 18, "verify" if entry.samples == "verify" else "", "middle", "tick"))
    return _svg(height, parts, "Evaluations of the search")


# --- samples --------------------------------------------------------------------------------------
def sample(values: Sequence[tuple[int, float, float]], precision: str) -> Markup:
    """Values of one output: FP32 as a ring, the variant as a dot, on one scale."""
    if not values:
        return Markup("")
    numbers = [v for _, a, b in values for v in (a, b) if math.isfinite(v)]
    low, high = min([*numbers, 0.0]), max([*numbers, 0.0])
    span = (high - low) or 1.0
    row, left, right, width = 18.0, 46.0, 250.0, 380.0

    def x_of(value: float) -> float:
        return left + (right - left) * (value - low) / span

    parts = []
    for index, (position, exact, other) in enumerate(values):
        y = 12 + index * row
        parts.append(_text(left - 8, y + 4, str(position), "end", "tick"))
        parts.append(_line(left, y, right, y, "grid"))
        if math.isfinite(exact) and math.isfinite(other):
            parts.append(_line(x_of(exact), y, x_of(other), y, "moved"))
        if math.isfinite(exact):
            parts.append(f'<circle cx="{x_of(exact):.1f}" cy="{y:.1f}" r="5" class="exact"/>')
        if math.isfinite(other):
            parts.append(
                f'<circle cx="{x_of(other):.1f}" cy="{y:.1f}" r="3.4" class="dot {_colour(precision)}"/>'
            )
        parts.append(_text(right + 12, y + 4, f"{number(exact)} → {number(other)}", "start", "tick"))
    return _svg(len(values) * row + 6, parts, "FP32 and variant", width)


def legend(precisions: Mapping[str, str]) -> Markup:
    """Coloured squares with the names of precisions; the values say what they stand for."""
    return Markup(" ").join(
        Markup('<span class="key"><i class="swatch {}"></i>{}</span>').format(_colour(p), text)
        for p, text in precisions.items()
    )
