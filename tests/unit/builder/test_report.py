"""The report is one file without a network, true to its numbers, and safe whatever a model calls its nodes."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vernier.builder.reports import charts
from vernier.builder.reports.charts import number
from vernier.builder.reports.report import (
    BuildReport,
    LayerReport,
    RangeReport,
    SampleReport,
    SearchReport,
    StepReport,
    TermReport,
    VariantReport,
    as_json,
)
from vernier.builder.reports.report_page import write_report

VOID = {"meta", "br", "link", "img", "input", "hr"}
NASTY = "<script>alert(\"x\")</script> & 'quoted' font: 9px"


def term(value: float, used: float, text: str = "auc@score>=99%") -> TermReport:
    return TermReport(text, value, 0.7425, used, used <= 1, 0.75)


FP32 = VariantReport("fp32", "pass", "takes longer", 1_000_000, (term(0.75, 0.0),), (), {1: 2.0, 8: 9.0})
INT8 = VariantReport(
    "int8", "pass", "chosen: the fastest", 270_000, (term(0.749, 0.13),), (term(0.748, 0.27),),
    {1: 1.0, 8: 4.0}, {"auc@score": 0.748}, {"int8": 7, "fp16": 1}, 0.93,
)  # fmt: skip
FP16 = VariantReport("fp16", "refused", "refused: NaN", 0, (term(math.nan, math.inf),))
FP8 = VariantReport("fp8", "skipped", "not built: no kernels")


def report(name: str = "ranker", node: str = "/top/Gemm", count: int = 8) -> BuildReport:
    layers = [LayerReport(f"{node}{i}", "Gemm", "int8", 1 / count, 0.01 * i) for i in range(count)]
    return BuildReport(
        name=name,
        runtime="onnxruntime",
        chosen="int8",
        budget=("auc@score>=99%",),
        evaluated=4096,
        decision=(f"onnxruntime serves int8 {name}",),
        variants=(FP32, INT8, FP16, FP8),
        layers={"int8": layers, "int8-fp32": layers},
        samples={"int8": [SampleReport(3, 0.2, {node: [(0, 0.5, 0.7), (1, 0.1, math.nan)]}, "1")]},
        searches={
            "int8": SearchReport(
                (StepReport(0, math.inf, "select"), StepReport(1, 0.7, "verify")), (node,), 2
            )
        },
        ranges=(RangeReport(node, 6.0, 4.5, "mse"), RangeReport("dead", 0.0, 0.1, "minmax")),
        notes=(f"note of {name}",),
        facts={"model": name},
    )


def written(folder: Path, build: BuildReport) -> str:
    write_report(folder, build)
    return (folder / "report.html").read_text("utf-8")


class Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_file_that_asks_nobody_for_anything(tmp_path: Path) -> None:
    page = written(tmp_path, report())
    # References inside the page begin with "#".
    assert not re.search(r"""(https?:)?//|\b(src|href)="[^#]|url\([^#]|@import|<script|<iframe""", page)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_the_page_is_well_formed_and_shows_every_picture(tmp_path: Path) -> None:
    parser = Balanced()
    parser.feed(written(tmp_path, report()))
    assert parser.open == []
    # Overview, latency, layers (the same for both), search, one sample, ranges.
    assert parser.seen.count("svg") == 6


def test_nothing_from_outside_becomes_markup(tmp_path: Path) -> None:
    page = written(tmp_path, report(NASTY, NASTY))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.seen.count("text") == written(tmp_path, report()).count("<text")


def test_both_colour_schemes_are_there(tmp_path: Path) -> None:
    page = written(tmp_path, report())
    light, dark = page.split("prefers-color-scheme: dark", 1)
    for colour in ("--page", "--ink", "--int8", "--fp16", "--bad"):
        assert f"{colour}:" in light
        assert f"{colour}:" in dark


def test_the_json_holds_the_same_facts_and_no_numbers_that_json_lacks(tmp_path: Path) -> None:
    write_report(tmp_path, report())
    found = json.loads((tmp_path / "report.json").read_text("utf-8"), parse_constant=pytest.fail)
    assert found["chosen"] == "int8"
    assert [v["used"] for v in found["variants"]] == [0.0, 0.27, None, None]
    assert found["variants"][1]["latency_ms"] == {"1": 1.0, "8": 4.0}
    assert found["searches"]["int8"]["steps"][0]["used"] is None
    assert len(found["layers"]["int8"]) == 8
    assert as_json(report()) == found


def test_the_page_says_what_is_served_and_why_nothing_else_is(tmp_path: Path) -> None:
    page = written(tmp_path, report())
    for sentence in (
        "onnxruntime serves int8",
        "refused: NaN",
        "not built: no kernels",
        "chosen: the fastest",
    ):
        assert sentence in page
    assert "over all bounds" in page
    assert "auc@score&gt;=99%" in page


def marks(picture: str) -> dict[str, list[float]]:
    """The first word of each mark's title → left, top, right and bottom of the mark, in pixels."""
    found = {}
    for element in ElementTree.fromstring(picture).iter():
        if element.tag != "g" or not len(element) or element[0].tag != "title":
            continue
        use = next(element.iter("use"), None)
        if use is None:
            points = numbers(next(element.iter("path")).attrib["d"])
        else:
            shape = next(element.iter("path"))
            place = complex(float(use.attrib["x"]), float(use.attrib["y"]))
            points = [place + point for point in numbers(shape.attrib["d"])]
        reals, heights = [p.real for p in points], [p.imag for p in points]
        word = str(element[0].text).split(",")[0].split(" ")[0]
        found[word] = [min(reals), min(heights), max(reals), max(heights)]
    return found


def numbers(path: str) -> list[complex]:
    """The points of a path."""
    values = [float(value) for value in re.findall(r"-?[\d.]+(?:e-?\d+)?", path)]
    return [complex(x, y) for x, y in zip(values[::2], values[1::2], strict=True)]


def test_in_the_overview_right_is_faster_and_low_is_more_accurate() -> None:
    found = marks(str(charts.overview((FP32, INT8, FP16), "int8")))
    assert found["int8"][0] > found["fp32"][2]
    assert found["int8"][1] < found["fp32"][1]
    assert found["fp32"][2] - found["fp32"][0] > found["int8"][2] - found["int8"][0]
    # Refused, never timed: beside the picture, at its upper edge.
    assert found["fp16"][0] > found["int8"][2]
    assert found["fp16"][3] < found["int8"][1]


def test_names_in_the_overview_do_not_cover_one_another() -> None:
    twins = tuple(replace(FP32, precision=name) for name in ("fp32", "tf32", "bf16", "fp16"))
    root = ElementTree.fromstring(str(charts.overview(twins, "fp32")))
    levels = sorted(
        float(e.attrib["y"]) for e in root.iter("text") if e.text in ("fp32", "tf32", "bf16", "fp16")
    )
    assert len(levels) == 4
    assert min(b - a for a, b in pairwise(levels)) >= 14


def test_of_many_layers_the_most_sensitive_are_drawn() -> None:
    many = [LayerReport(f"n{i}", "Conv", "fp16", 0.001, i / 1000) for i in range(200)]
    picture = str(charts.layers(many))
    assert len(marks(picture)) == charts.MAX_LAYERS
    assert "n199" in marks(picture)
    assert "n0" not in marks(picture)


def test_bars_are_as_long_as_their_numbers() -> None:
    found = [LayerReport("a", "Conv", "int8", 0.5, 0.2), LayerReport("b", "Conv", "int8", 0.5, 0.4)]
    bars = marks(str(charts.layers(found)))
    assert bars["b"][2] - bars["b"][0] == pytest.approx(2 * (bars["a"][2] - bars["a"][0]), rel=0.01)
    unmeasured = [replace(layer, sensitivity=None) for layer in found]
    assert "Layers by operations" in str(charts.layers(unmeasured))


def test_the_same_build_has_the_same_page(tmp_path: Path) -> None:
    assert written(tmp_path, report()) == written(tmp_path, report())


def test_the_command_line_starts_without_the_plotting_library() -> None:
    code = "import sys, vernier.builder.cli; sys.exit('matplotlib' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": "app"}).returncode == 0
    )


def test_a_build_of_fp32_alone_has_a_report_too(tmp_path: Path) -> None:
    alone = BuildReport("m", "onnxruntime", "fp32", ("max_abs<=1",), 1, ("fp32",), (FP32,))
    page = written(tmp_path, alone)
    assert "Calibrated ranges" not in page
    nothing = replace(alone, variants=(replace(FP32, terms=(), latency_ms={}, bytes=0),))
    assert "<svg" not in written(tmp_path, nothing)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (1.234, "1.23"), (12.34, "12.3"), (1234, "1234"), (0.00123, "0.00123"), (1e-7, "1e-07"),
     (-2.5, "-2.5"), (100, "100"), (math.inf, "inf"), (9.999, "10")],
)  # fmt: skip
def test_numbers_are_short_and_right(value: float, text: str) -> None:
    assert number(value) == text
