"""The picture: requests per second over cores, a line for each server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.svg import line, text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 380, 80, 190, 44, 44
COLOURS = ("#1667b7", "#888888", "#b7410e", "#2e7d32", "#6a1b9a")
#: Labels at the right keep this distance.
_APART = 16
STYLE = (
    "<style>text{font:12px sans-serif;fill:#444}.head{font-weight:600;fill:#111}.axis{stroke:#888}"
    ".grid{stroke:#ddd}.curve{fill:none;stroke-width:2}</style>"
)


def picture(title: str, curves: Mapping[str, Mapping[int, float]]) -> str:
    """An SVG.

    Args:
        title: stands above.
        curves: by the server's name in words, its requests per second by number of cores; none may be empty.
    """
    sizes = sorted({size for curve in curves.values() for size in curve})
    step = _step(max(rate for curve in curves.values() for rate in curve.values()))
    ticks = [step * count for count in range(1, 7)]
    most = next(tick for tick in ticks if tick >= max(max(curve.values()) for curve in curves.values()))
    right, low = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x_of(size: int) -> float:
        span = sizes[-1] - sizes[0] or 1
        return LEFT + 12 + (right - LEFT - 24) * (size - sizes[0]) / span

    def y_of(rate: float) -> float:
        return low - (low - TOP) * rate / most

    parts = [
        STYLE,
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        text(LEFT, TOP - 20, title, "start", "head"),
        line(LEFT, low, right, low, "axis"),
        text((LEFT + right) / 2, HEIGHT - 8, "cores", "middle"),
    ]
    for tick in ticks:
        if tick <= most:
            parts += [line(LEFT, y_of(tick), right, y_of(tick), "grid")]
            parts += [text(LEFT - 8, y_of(tick) + 4, f"{tick:,.0f}", "end")]
    for size in sizes:
        parts.append(text(x_of(size), low + 18, str(size), "middle"))
    ends = {name: y_of(curve[max(curve)]) for name, curve in curves.items()}
    labels = apart(ends)
    for (name, curve), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
        points = [(x_of(size), y_of(curve[size])) for size in sorted(curve)]
        listed = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{listed}" class="curve" stroke="{colour}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        parts.append(text(right + 10, labels[name] + 4, name))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{title}">{"".join(parts)}</svg>\n'
    )


def apart(heights: Mapping[str, float], least: float = _APART) -> dict[str, float]:
    """The heights of labels, moved up where they would lie on one another; the lowest stays."""
    found: dict[str, float] = {}
    for name in sorted(heights, key=lambda name: -heights[name]):
        found[name] = min([heights[name], *(height - least for height in found.values())])
    return found


def _step(most: float) -> float:
    """A round distance between ticks: 1, 2 or 5 times a power of ten, of which at most six reach `most`."""
    steps: Sequence[float] = [factor * 10.0**power for power in range(9) for factor in (1, 2, 5)]
    return next(step for step in steps if 6 * step >= most)
