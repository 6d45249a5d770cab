"""Pictures of a build as inline SVG, drawn by matplotlib: overview, latency, layers, ranges, search, samples.

Colours are variables of the page's style sheet, so that a picture follows the reader's light or dark
setting. Every mark has a `<title>`, which browsers show on hovering and read aloud.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from vernier.builder.reports.report import LayerReport, RangeReport, StepReport, VariantReport
from vernier.builder.searching.latency import relative_time
from vernier.package.manifest import PRECISIONS

MAX_LAYERS, MAX_RANGES = 60, 40
_WIDTH = 720
#: Beyond this share of the budget it no longer matters how far: marks are put at the edge.
_MAX_USED = 2.0
#: Variable of the style sheet → the colour that stands for it until the picture is done.
_INK = {
    name: f"#ab{i:02x}cd"
    for i, name in enumerate((*PRECISIONS, "ink", "soft", "line", "grid", "bad", "bad-back"))
}
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "vernier", "text.parse_math": False, "font.size": 12,
    "text.color": _INK["ink"], "axes.labelcolor": _INK["soft"], "axes.edgecolor": _INK["soft"],
    "xtick.color": _INK["soft"], "ytick.color": _INK["soft"], "grid.color": _INK["grid"],
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "lines.linewidth": 2,
    "xtick.major.size": 0, "ytick.major.size": 0, "axes.unicode_minus": False,
}  # fmt: skip
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_NAME = "title of "


def number(value: float) -> str:
    """Three significant digits, without an exponent where that is readable."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if 1e-3 <= abs(value) < 1e4:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.2g}"


def legend(precisions: Mapping[str, str]) -> Markup:
    """Coloured squares with the names of precisions; the values say what they stand for."""
    return Markup(" ").join(
        Markup('<span class="key"><i class="swatch {}"></i>{}</span>').format(f"c-{p}", text)
        for p, text in precisions.items()
    )


# --- drawing --------------------------------------------------------------------------------------
def _draw(
    label: str,
    height: float,
    paint: Callable[[Axes], None],
    margins: tuple[float, float, float, float] = (64, 24, 18, 46),
    width: float = _WIDTH,
) -> Markup:
    """The picture that `paint` makes; margins are left, right, top and bottom, in pixels as the sizes."""
    left, right, top, bottom = margins
    text = io.StringIO()
    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that matplotlib's font lacks: the browser has others
        figure = Figure((width / 72, height / 72), dpi=72, facecolor="none")
        place = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
        paint(figure.add_axes(place, facecolor="none"))
        figure.savefig(text, format="svg", metadata=_NO_METADATA)
    body = text.getvalue()
    body = body[body.index("<g") :].replace("xlink:href", "href")
    body = re.sub(rf'<g id="{_NAME}([^"]*)">', r"<g><title>\1</title>", body)
    body = re.sub(r' id="\w+_\d+"', "", body)
    body = re.sub(r"font: ([\d.]+px)[^;\"<]*", r"font-size: \1", body)
    body = re.sub(r"font-family: [^;\"<]*; ?", "", body)
    for name, colour in _INK.items():
        body = body.replace(colour, f"var(--{name})")
    return Markup(f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{body}')


def _titled(artists: Any, title: str) -> None:
    """Gives the first of what a drawing call returned its title."""
    artists[0].set_gid(_NAME + title)


def _log(axes: Axes, which: str, low: float, high: float) -> None:
    """A logarithmic axis with few ticks, labelled in plain numbers."""
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    axis = axes.xaxis if which == "x" else axes.yaxis
    steps = (1, 2, 5) if high / low < 50 else (1, 3) if high / low < 1e4 else (1,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=9))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: number(value))


def _budget(axes: Axes, used: Sequence[float]) -> None:
    """The vertical axis as part of the budget, its limit, and what is over the budget."""
    most = min(_MAX_USED, max([*used, 1.2]))
    shares = [share for share in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0) if share <= most]
    axes.set_ylim(-0.08 * most, 1.04 * most)
    axes.set_yticks(shares, [f"{'≥' if share == _MAX_USED else ''}{share:.0%}" for share in shares])
    axes.grid(axis="y")
    axes.axhspan(1, 1.04 * most, color=_INK["bad-back"], alpha=0.55, linewidth=0)
    axes.axhline(1, color=_INK["bad"], linestyle=(0, (5, 4)), linewidth=1)
    right = axes.get_yaxis_transform()
    axes.text(0.99, 1.01, "budget", transform=right, ha="right", va="bottom", color=_INK["bad"])


def _names(axes: Axes, places: Sequence[tuple[float, float, float, str]], apart: float = 15) -> None:
    """Names to the right of (x, y, pixels away), moved up where they would cover one another."""
    taken: list[tuple[float, float, float]] = []
    for x, y, away, name in sorted(places, key=lambda place: axes.transData.transform(place[:2])[1]):
        at, level = axes.transData.transform((x, y))
        at, end = at + away, at + away + 7.6 * len(name)
        for start, stop, other in sorted(taken, key=lambda box: box[2]):
            if start < end and at < stop and abs(level - other) < apart:
                level = other + apart
        taken.append((at, end, level))
        axes.annotate(name, (at, level), xycoords="figure pixels", va="center", weight="bold")


def _rows(axes: Axes, names: Sequence[str], texts: Sequence[str]) -> None:
    """A row for each name, the first at the top: names at the left, texts at the right."""
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), [n if len(n) <= 34 else "…" + n[-33:] for n in names])
    axes.spines[:].set_visible(False)
    for row, text in enumerate(texts):
        axes.text(1.02, row, text, transform=axes.get_yaxis_transform(), va="center", color=_INK["soft"])


# --- the whole build ------------------------------------------------------------------------------
def overview(variants: Sequence[VariantReport], chosen: str) -> Markup:
    """Speed against FP32 to the right, the used part of the budget upwards, size as area."""
    exact = next((v for v in variants if v.precision == "fp32"), None)
    shown = sorted((v for v in variants if v.used is not None), key=lambda v: -v.bytes)
    if exact is None or not shown:
        return Markup("")
    speeds = {v.precision: relative_time(exact.latency_ms, v.latency_ms) for v in shown}
    timed = [speed for speed in speeds.values() if math.isfinite(speed)]
    low, high = min([*timed, 0.9]) / 1.25, max([*timed, 1.1]) * 1.25
    largest = max([v.bytes for v in shown] + [1])

    def paint(axes: Axes) -> None:
        _log(axes, "x", low, high)
        axes.xaxis.set_major_formatter(lambda value, _: f"{number(value)}×")
        _budget(axes, [v.used or 0.0 for v in shown])
        axes.set(xlabel="times as fast as FP32 →", ylabel="part of the budget used up →")
        names, untimed = [], 0
        for variant in shown:
            speed, radius = speeds[variant.precision], 6 + 16 * math.sqrt(variant.bytes / largest)
            if not math.isfinite(speed):
                # No time was taken: it stands beside the picture, at the height of its error.
                speed, untimed = high * (high / low) ** (0.07 + 0.1 * (untimed % 2)), untimed + 1
            used, colour = min(variant.used or 0.0, _MAX_USED), _INK[variant.precision]
            refused = variant.status != "pass"
            edge = colour if refused else _INK["ink"] if variant.precision == chosen else "none"
            mark = axes.plot(
                speed, used, "o", markersize=2 * radius, color=colour, alpha=0.85, clip_on=False,
                fillstyle="none" if refused else "full", markeredgecolor=edge, markeredgewidth=2.5,
            )  # fmt: skip
            _titled(mark, _said(variant, speeds[variant.precision]))
            names.append((speed, used, radius + 5, variant.precision))
        _names(axes, names)
        if untimed:
            axes.text(1.1, -0.12, "not timed", transform=axes.transAxes, ha="center", color=_INK["soft"])

    untimed = len(timed) < len(shown)
    return _draw("Speed, error and size of every variant", 330, paint, (64, 160 if untimed else 48, 18, 46))


def _said(variant: VariantReport, speed: float) -> str:
    parts = [variant.precision, variant.status]
    if math.isfinite(speed):
        parts.append(f"{number(speed)} times as fast as FP32")
    used = variant.used or 0.0
    parts.append("beyond any budget" if math.isinf(used) else f"{used:.0%} of the budget used")
    return ", ".join([*parts, *([f"{variant.bytes / 1e6:.2f} MB"] if variant.bytes else [])])


def latency(variants: Sequence[VariantReport]) -> Markup:
    """Median milliseconds by bucket, both axes logarithmic, one line for each variant."""
    shown = [v for v in variants if v.latency_ms]
    if not shown:
        return Markup("")
    buckets = sorted({b for v in shown for b in v.latency_ms})
    times = [ms for v in shown for ms in v.latency_ms.values()]

    def paint(axes: Axes) -> None:
        _log(axes, "x", buckets[0] / 1.1, max(buckets[-1], buckets[0] + 1) * 1.1)
        axes.set_xticks(buckets, [str(bucket) for bucket in buckets])
        _log(axes, "y", min(times) / 1.2, max(times) * 1.2)
        axes.grid(axis="y")
        axes.set(xlabel="batch", ylabel="milliseconds for one batch")
        ends = []
        for variant in shown:
            colour, curve = _INK[variant.precision], sorted(variant.latency_ms.items())
            axes.plot(*zip(*curve, strict=True), color=colour)
            for bucket, ms in curve:
                mark = axes.plot(bucket, ms, "o", markersize=6, color=colour)
                _titled(mark, f"{variant.precision}: {number(ms)} ms for {bucket}")
            ends.append((*curve[-1], 10, variant.precision))
        _names(axes, ends)

    return _draw("Latency by batch", 300, paint, (64, 114, 18, 46))


# --- layers and ranges ----------------------------------------------------------------------------
def layers(found: Sequence[LayerReport]) -> Markup:
    """One bar for each node: how much of the budget it uses up alone, in the colour of its precision.

    Where nothing was measured the bars are shares of the multiply-accumulates. Of many nodes the most
    sensitive are shown, in graph order.
    """
    if not found:
        return Markup("")
    measured = any(layer.sensitivity is not None for layer in found)
    values = [(layer.sensitivity or 0.0) if measured else layer.macs for layer in found]
    shown = sorted(sorted(range(len(found)), key=lambda i: -values[i])[:MAX_LAYERS])
    high = max([*(values[i] for i in shown if math.isfinite(values[i])), 1e-9])
    has_limit = measured and high >= 1

    def paint(axes: Axes) -> None:
        texts = []
        for row, (layer, value) in enumerate((found[i], values[i]) for i in shown):
            said = f"{value:.1%}" if math.isfinite(value) else "not finite"
            bar = axes.barh(row, min(value, high), 0.7, color=_INK[layer.precision])
            about = f"{layer.name} ({layer.op_type}) in {layer.precision}"
            _titled(bar, f"{about}: {said}, {layer.macs:.1%} of the operations")
            texts.append(f"{said} · {layer.precision}")
        _rows(axes, [found[i].name for i in shown], texts)
        axes.set_xlim(0, high)
        axes.set_xticks([1.0] if has_limit else [], ["the whole budget"] if has_limit else [])
        if has_limit:
            axes.axvline(1, color=_INK["bad"], linestyle=(0, (5, 4)), linewidth=1)

    label = "Sensitivity and precision of every layer" if measured else "Layers by operations"
    return _draw(
        label, len(shown) * 19 + (36 if has_limit else 14), paint, (250, 150, 6, 26 if has_limit else 6)
    )


def ranges(found: Sequence[RangeReport]) -> Markup:
    """Where INT8 clips each activation (filled) and the largest magnitude seen (tick), logarithmic."""
    shown = [r for r in found if r.peak > 0 and r.clip > 0][:MAX_RANGES]
    if not shown:
        return Markup("")
    low = min(min(r.peak, r.clip) for r in shown) / 2

    def paint(axes: Axes) -> None:
        _log(axes, "x", low, max(max(r.peak, r.clip) for r in shown) * 1.05)
        axes.grid(axis="x")
        for row, entry in enumerate(shown):
            bar = axes.barh(row, entry.clip - low, 0.5, left=low, color=_INK["int8"])
            clips = f"{entry.tensor}: clips at {number(entry.clip)} ({entry.method})"
            _titled(bar, f"{clips}, largest seen {number(entry.peak)}")
            axes.plot(entry.peak, row, "|", markersize=15, markeredgewidth=2, color=_INK["ink"])
        texts = [f"{number(entry.clip)} · {entry.method}" for entry in shown]
        _rows(axes, [entry.tensor for entry in shown], texts)

    return _draw("Calibrated ranges", len(shown) * 19 + 34, paint, (250, 150, 6, 26))


# --- search and samples ---------------------------------------------------------------------------
def search(steps: Sequence[StepReport]) -> Markup:
    """Each evaluation in turn: how many nodes were given back, and the part of the budget used up."""
    if not steps:
        return Markup("")

    def paint(axes: Axes) -> None:
        _budget(axes, [step.used for step in steps])
        axes.set_xlim(-0.5, max(len(steps), 7) - 0.5)
        notes = [f"{'verify' if s.samples == 'verify' else ''}\n{s.given_back}" for s in steps]
        axes.set_xticks(range(len(steps)), notes)
        axes.set_xlabel("nodes given back")
        for at, step in enumerate(steps):
            used = "not finite" if math.isinf(step.used) else f"{step.used:.0%} of the budget"
            axes.vlines(at, 0, min(step.used, _MAX_USED), color=_INK["line"])
            colour = _INK["int8" if step.samples == "select" else "fp16"]
            mark = axes.plot(at, min(step.used, _MAX_USED), "o", markersize=12, color=colour, clip_on=False)
            _titled(mark, f"{step.samples}: {step.given_back} nodes given back, {used}")

    return _draw("Evaluations of the search", 230, paint, (64, 24, 18, 62))


def sample(values: Sequence[tuple[int | tuple[int, ...], float, float]], precision: str) -> Markup:
    """Values of one output, by their index or indices: FP32 as a ring, the variant as a dot, on one scale."""
    if not values:
        return Markup("")
    places = [", ".join(map(str, p)) if isinstance(p, tuple) else str(p) for p, _, _ in values]
    left = max(46.0, 14 + 6.5 * max(map(len, places)))

    def paint(axes: Axes) -> None:
        rows = range(len(values))
        exact, other = [v for _, v, _ in values], [v for _, _, v in values]
        for row, ends in enumerate(zip(exact, other, strict=True)):
            axes.plot(ends, (row, row), color=_INK["bad"])
        axes.plot(exact, rows, "o", markersize=10, fillstyle="none", color=_INK["fp32"])
        axes.plot(other, rows, "o", markersize=7, color=_INK[precision])
        axes.grid(axis="y")
        axes.set_xticks([])
        _rows(axes, places, [f"{number(a)} → {number(b)}" for _, a, b in values])

    return _draw("FP32 and variant", len(values) * 18 + 6, paint, (left, 134, 3, 3), 380)
