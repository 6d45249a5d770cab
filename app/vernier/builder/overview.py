"""The picture that a build is about: speed × error × size of every variant."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from vernier.builder.report import VariantReport
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


def overview(variants: Sequence[VariantReport], chosen: str) -> Markup:
    """Speed against FP32 to the right, the used part of the budget upwards, size as area."""
    exact = next((v for v in variants if v.precision == "fp32"), None)
    shown = [v for v in variants if v.used is not None]
    if exact is None or not shown:
        return Markup("")
    height = 330.0
    speeds = {v.precision: _speed(exact, v) for v in shown}
    untimed = any(speed is None for speed in speeds.values())
    bottom, right = height - BOTTOM, WIDTH - RIGHT - (130.0 if untimed else 0.0)
    measured = [s for s in speeds.values() if s is not None]
    low, high = min([*measured, 0.9]) / 1.25, max([*measured, 1.1]) * 1.25
    x_of = log_scale(low, high, LEFT, right)
    y_of, shares = used_scale([v.used or 0.0 for v in shown], TOP + 10, bottom - 24)
    parts = [
        *budget_frame(y_of, shares, right, bottom),
        line(LEFT, bottom, right, bottom, "axis"),
        line(LEFT, TOP, LEFT, bottom, "axis"),
        text((LEFT + right) / 2, height - 8, "times as fast as FP32 →", "middle", "label"),
        f'<text transform="translate(12 {(TOP + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle" class="label">'
        "part of the budget used up →</text>",
    ]
    for tick in log_ticks(low, high):
        parts += [line(x_of(tick), bottom, x_of(tick), bottom + 4, "axis")]
        parts += [text(x_of(tick), bottom + 18, f"{number(tick)}×", "middle", "tick")]
    largest = max([v.bytes for v in shown] + [1])
    discs: list[tuple[float, float, float, str]] = []
    waiting = 0
    for variant in sorted(shown, key=lambda v: -v.bytes):
        speed = speeds[variant.precision]
        radius = 6 + 16 * math.sqrt(variant.bytes / largest) if variant.bytes else 7.0
        y = y_of(variant.used or 0.0)
        if speed is None:
            # No time was taken: it stands beside the picture, at the height of its error.
            x = right + 36.0 + 54 * (waiting % 2)
            waiting += 1
        else:
            x = x_of(speed)
        kind = f"mark c-{variant.precision}" + ("" if variant.status == "pass" else " refused")
        ring = " chosen" if variant.precision == chosen else ""
        title = escape(_overview_title(variant, speed))
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" class="{kind}{ring}"><title>{title}</title></circle>'
        )
        discs.append((x, y, radius, variant.precision))
    parts += _names_apart(discs, bottom)
    if untimed:
        parts.append(text(right + 62, height - 8, "not timed", "middle", "label"))
    return svg(height, parts, "Speed, error and size of every variant")


def _names_apart(discs: Sequence[tuple[float, float, float, str]], bottom: float) -> list[str]:
    """The name beside each disc, on the first side where it covers neither another name nor a disc."""
    boxes = [(x - r, y - r, x + r, y + r) for x, y, r, _ in discs]
    parts = []
    for index, (x, y, r, name) in enumerate(discs):
        width = 7.6 * len(name)
        sides = [
            (x, y - r - 5, "middle", x - width / 2),
            (x + r + 5, y + 4, "start", x + r + 5),
            (x - r - 5, y + 4, "end", x - r - 5 - width),
            (x, y + r + 14, "middle", x - width / 2),
            (x + r, y - r - 20, "start", x + r),
            (x - r, y - r - 20, "end", x - r - width),
        ]
        others = [box for i, box in enumerate(boxes) if i != index]
        fitting = [
            side
            for side in sides
            if side[1] + 3 < bottom and not any(_overlap(_box(side, width), other) for other in others)
        ]
        tx, ty, anchor, _ = side = (fitting or sides)[0]
        boxes.append(_box(side, width))
        parts.append(text(tx, ty, name, anchor, "name"))
    return parts


def _box(side: tuple[float, float, str, float], width: float) -> tuple[float, float, float, float]:
    return side[3], side[1] - 12, side[3] + width, side[1] + 3


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


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
