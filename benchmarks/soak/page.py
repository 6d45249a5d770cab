"""The page and the picture of a soak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.soak.verdict import RULE, WARM_UP_BLOCKS, Verdict, trend
from benchmarks.svg import line, text
from vernier.builder.reports.charts import number

WIDTH, HEIGHT, LEFT, RIGHT = 760, 200, 70, 110
STYLE = (
    "<style>text{font:12px sans-serif;fill:#444}.head{font-weight:600;fill:#111}.axis{stroke:#888}"
    ".grid{stroke:#ddd}.fit{stroke:#111;stroke-dasharray:5 4}.dot{fill:none;stroke-width:2}"
    ".warm{fill:#f3f3f3}</style>"
)
PANELS = (
    ("resident memory, MB", (("rss_mb", "memory", "#1667b7"),)),
    ("latency, ms", (("p50_ms", "median", "#1667b7"), ("p99_ms", "99 %", "#b7410e"))),
    (
        "open descriptors and threads",
        (("descriptors", "descriptors", "#1667b7"), ("threads", "threads", "#2e7d32")),
    ),
)


def picture(rows: Sequence[Mapping[str, float]], minutes: float) -> str:
    """Three panels over time as SVG, with the fitted lines; what is shaded is the warm-up."""
    parts = [STYLE, f'<rect width="{WIDTH}" height="{HEIGHT * len(PANELS) + 30}" fill="#fff"/>']
    for at, (title, series) in enumerate(PANELS):
        parts += _panel(rows, minutes, at * HEIGHT, title, series)
    height = HEIGHT * len(PANELS) + 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="Memory, latency, descriptors and threads over the soak">{"".join(parts)}</svg>\n'
    )


def _panel(
    rows: Sequence[Mapping[str, float]],
    minutes: float,
    top: float,
    title: str,
    series: Sequence[tuple[str, str, str]],
) -> list[str]:
    values = [row[name] for name, _, _ in series for row in rows]
    most = 1.15 * max(values)
    high, low, right = top + 34, top + HEIGHT - 22, WIDTH - RIGHT

    def x_of(block: float) -> float:
        return LEFT + (right - LEFT) * (block + 0.5) / len(rows)

    def y_of(value: float) -> float:
        return low - (low - high) * value / most

    parts = [
        f'<rect x="{LEFT}" y="{high}" width="{x_of(WARM_UP_BLOCKS - 0.5) - LEFT:.1f}" height="{low - high}" '
        f'class="warm"/>',
        text(LEFT, high - 12, title, "start", "head"),
        line(LEFT, low, right, low, "axis"),
    ]
    for share in (0.25, 0.5, 0.75, 1.0):
        value = share * most
        parts += [
            line(LEFT, y_of(value), right, y_of(value), "grid"),
            text(LEFT - 8, y_of(value) + 4, number(value), "end"),
        ]
    for part in (0.0, 0.5, 1.0):
        parts.append(text(LEFT + part * (right - LEFT), low + 16, f"{part * minutes:g} min", "middle"))
    for name, label, colour in series:
        points = " ".join(f"{x_of(b):.1f},{y_of(row[name]):.1f}" for b, row in enumerate(rows))
        parts.append(f'<polyline points="{points}" class="dot" stroke="{colour}"/>')
        parts.append(text(right + 8, y_of(rows[-1][name]) + 4, label))
        fit = trend([row[name] for row in rows])
        last = len(rows) - 1 - WARM_UP_BLOCKS
        parts.append(
            line(
                x_of(WARM_UP_BLOCKS),
                y_of(fit.start),
                x_of(len(rows) - 1),
                y_of(fit.start + last * fit.slope),
                "fit",
            )
        )
    return parts


def page(
    rows: Sequence[Mapping[str, float]],
    verdicts: Sequence[Verdict],
    restarts_s: Sequence[float],
    setting: Mapping[str, str],
) -> str:
    """benchmarks/SOAK.md. `setting`: what was measured where, in words."""
    failed = [v.what for v in verdicts if not v.passed]
    lines = [
        "# Soak",
        "",
        "Written by `make soak` (`python -m benchmarks.soak --minutes 20`).",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in setting.items()),
        "",
        f"**{'Everything held.' if not failed else 'Missed: ' + '; '.join(failed) + '.'}**",
        "",
        "| | held | measured |",
        "|---|---|---|",
        *(f"| {v.what} | {'yes' if v.passed else '**no**'} | {v.measured} |" for v in verdicts),
        "",
        RULE,
        "",
        "![memory, latency, descriptors and threads over the time](SOAK.svg)",
        "",
        "Latencies count from when a request was due, so a service that stalls is charged for the requests that wait. "
        "Arrivals are a Poisson process. `late`: by how much the sampler, which does nothing else, woke too late at "
        "worst; seconds mean that the machine itself stood still. `stolen`: what the hypervisor gave of all cores to "
        "others.",
        "",
        "| block | requests | p50 ms | p99 ms | p99.9 ms | memory MB | descriptors | threads | reloads "
        "| late s | stolen s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {number + 1} | {row['requests']:.0f} | {row['p50_ms']:.2f} | {row['p99_ms']:.2f} | "
            f"{row['p999_ms']:.2f} | {row['rss_mb']:.1f} | {row['descriptors']:g} | {row['threads']:g} | "
            f"{row['reloads']:.0f} | {row['late_s']:.2f} | {row['stolen_s']:.2f} |"
            for number, row in enumerate(rows)
        ),
        "",
    ]
    if restarts_s:
        slowest = max(restarts_s)
        lines += [
            "## Killed under load",
            "",
            f"From the start of a new process to green readiness after SIGKILL, with the same packages: "
            f"{', '.join(f'{s:.2f}' for s in restarts_s)} s. The goal of 5 s is "
            f"{'met' if slowest < 5 else '**missed**'} (slowest: {slowest:.2f} s).",
            "",
        ]
    return "\n".join(lines)
