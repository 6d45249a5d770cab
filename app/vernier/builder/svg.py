"""The parts of the report's pictures: text, lines, scales, ticks. Colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape

WIDTH = 720
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 18, 46
#: Beyond this share of the budget it no longer matters how far: marks are put at the edge.
MOST_USED, _LEAST_TOP = 2.0, 1.2


def svg(height: float, parts: Sequence[str], label: str, width: float = WIDTH) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def text(x: float, y: float, said: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(said)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def number(value: float) -> str:
    """Three significant digits, without an exponent where that is readable."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if 1e-3 <= abs(value) < 1e4:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        digits_text = f"{value:.{digits}f}"
        return digits_text.rstrip("0").rstrip(".") if "." in digits_text else digits_text
    return f"{value:.2g}"


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten, or powers alone when there would be too many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**e for e in range(first, last + 1) for s in steps]
        inside = [t for t in ticks if low * 0.999 <= t <= high * 1.001]
        if len(inside) <= 7:
            return inside
    return inside[:: math.ceil(len(inside) / 7)]


def log_scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = math.log(high / low) or 1.0
    return lambda value: start + (end - start) * math.log(max(value, low) / low) / span


def used_scale(
    values: Sequence[float], top: float, bottom: float
) -> tuple[Callable[[float], float], list[float]]:
    """Heights for parts of the budget, from none to a little over the largest (at most twice the budget), and ticks."""
    most = min(MOST_USED, max([*values, _LEAST_TOP]))
    shares = [s for s in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0) if s <= most]
    return (lambda used: bottom - (bottom - top) * min(used, most) / most), shares


def budget_frame(
    y_of: Callable[[float], float], shares: Sequence[float], right: float, bottom: float
) -> list[str]:
    """What is over the budget, its limit, and the ticks at the left."""
    parts = [
        f'<rect x="{LEFT}" y="{TOP}" width="{right - LEFT:.1f}" height="{y_of(1.0) - TOP:.1f}" class="over"/>'
    ]
    for share in shares:
        said = f"{share:.0%}" if share < MOST_USED else f"≥{share:.0%}"
        parts.append(text(LEFT - 8, y_of(share) + 4, said, "end", "tick"))
        if share not in (0.0, 1.0):
            parts.append(line(LEFT, y_of(share), right, y_of(share), "grid"))
    parts.append(line(LEFT, y_of(1.0), right, y_of(1.0), "limit"))
    parts.append(text(right - 4, y_of(1.0) - 6, "budget", "end", "limit-label"))
    return parts
